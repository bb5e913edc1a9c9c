"""Where a run's numbers go: metrics.jsonl, the terminal, TensorBoard and, if asked, Weights & Biases. Rank 0 only."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

from tqdm import tqdm

from megatron_dtrpo.checkpoint.folder import EVALUATIONS_FILE, METRICS_FILE
from megatron_dtrpo.config.settings import RunSettings
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.files import write_atomically


def check_logging(settings: RunSettings) -> None:
    """Raises UserError, on every process, for a sink that rank 0 could not open."""
    if settings.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError("wandb_project is set but wandb is not installed: pip install megatron-dtrpo[wandb]")


def drop_later_lines(path: Path, iteration: int) -> None:
    """Forgets the steps after ``iteration``, which a resumed run takes again, and a line cut short by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept))


class MetricLog:
    """Writes one object per step to every sink."""

    def __init__(self, settings: RunSettings, start: int, total: int, config: dict):
        self.settings, self.total = settings, total
        folder = Path(settings.save)
        for name in (METRICS_FILE, EVALUATIONS_FILE):
            drop_later_lines(folder / name, start)
        self._file = (folder / METRICS_FILE).open("a", buffering=1)
        self._tensorboard = self._open_tensorboard(folder, start) if settings.tensorboard else None
        self._wandb = self._open_wandb(config) if settings.wandb_project else None
        show_bar = settings.progress and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True) if show_bar else None

    @staticmethod
    def _open_tensorboard(folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(folder / "tensorboard", purge_step=start + 1)

    def _open_wandb(self, config: dict):
        import wandb

        return wandb.init(project=self.settings.wandb_project, name=self.settings.wandb_exp_name, config=config)

    def say(self, message: str) -> None:
        """One line for the person at the terminal, above the progress bar."""
        if self._bar is not None:
            self._bar.write(message)
        else:
            print(message, flush=True)

    def step(self, metrics: dict) -> None:
        iteration = metrics["iteration"]
        self._file.write(json.dumps(metrics) + "\n")
        self._send(metrics)
        if self._bar is not None:
            self._bar.update(1)
            self._bar.set_postfix_str(f"loss {metrics['loss']:.4f}")
        if iteration % self.settings.log_interval == 0 or iteration == self.total:
            self.say(self._line(metrics))

    def evaluation(self, metrics: dict) -> None:
        """``iteration`` and what was measured on held-out data after it."""
        with (Path(self.settings.save) / EVALUATIONS_FILE).open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        self._send(metrics)
        shown = [f"{name} {value:.4f}" for name, value in metrics.items() if name != "iteration"]
        self.say(f"evaluation after iteration {metrics['iteration']}: {', '.join(shown)}")

    def has_evaluation(self, iteration: int) -> bool:
        path = Path(self.settings.save) / EVALUATIONS_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        return any(json.loads(line)["iteration"] == iteration for line in lines)

    def _send(self, metrics: dict) -> None:
        iteration = metrics["iteration"]
        if self._tensorboard is not None:
            for name, value in metrics.items():
                if name != "iteration":
                    self._tensorboard.add_scalar(name, value, iteration)
        if self._wandb is not None:
            self._wandb.log(metrics, step=iteration)

    def _line(self, metrics: dict) -> str:
        shown = [f"iteration {metrics['iteration']}/{self.total}", f"loss {metrics['loss']:.6f}"]
        if "rewards/accuracies" in metrics:
            shown.append(f"accuracy {metrics['rewards/accuracies']:.3f}")
            shown.append(f"margin {metrics['rewards/margins']:.4f}")
        if "reward/mean" in metrics:
            shown.append(f"reward {metrics['reward/mean']:.3f}")
        shown.append(f"grad norm {metrics['grad_norm']:.4f}")
        shown.append(f"lr {metrics['lr']:.3e}")
        shown.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
        return " | ".join(shown)

    def close(self) -> None:
        self._file.close()
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def finish(self) -> None:
        """After `close`, of a run that ended in order: this one waits for the network. Weights & Biases takes a run
        whose process is gone for a crashed one."""
        if self._wandb is not None:
            self._wandb.finish()
