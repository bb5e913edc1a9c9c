"""Parts that run this project's own commands: the doctor, small training runs, and the benchmark of layers."""

from __future__ import annotations

import json
import math
import random
import string
from pathlib import Path

from gpu_checks.common import CommandFailed, Result, Size, has_gpu, run_python, verdict, why_no_fp8

from megatron_dtrpo.checkpoint.folder import METRICS_FILE

LN2 = math.log(2)
OVERLAPPED = {
    "bf16": True,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
}


def doctor(size: Size, folder: Path) -> Result:
    """The machine and its packages."""
    try:
        output = run_python(["-m", "megatron_dtrpo", "doctor"], folder / "log")
    except CommandFailed as error:
        return Result("failed", f"{error} (see {folder.name}/log)")
    lines = output.splitlines()
    notes = [line[9:30].strip() for line in lines if line.startswith("note ")]
    return verdict(True, lines[-1] + (f"; without {', '.join(notes)}" if notes else ""))


def overlap(size: Size, folder: Path) -> Result:
    """The distributed optimizer with every overlap: ln 2 at the first step, saved twice, resumed."""
    settings = _settings(size, folder) | OVERLAPPED | {"save_interval": 3}
    first = _train(settings | {"train_iters": 6}, folder)
    rows = _train(settings | {"train_iters": 9}, folder)
    saved = sorted(path.name for path in (folder / "run").glob("iter_*"))
    losses = [row["loss"] for row in rows]
    good = (
        abs(losses[0] - LN2) < 1e-6
        and [row["iteration"] for row in rows] == list(range(1, 10))
        and rows[:6] == first
        and all(map(math.isfinite, losses))
    )
    return verdict(
        good,
        f"loss {losses[0]:.7f} at step 1, {losses[-1]:.4f} at step 9, resumed at 6; saved {', '.join(saved)}",
        losses=losses,
    )


def same_on_cpu(size: Size, folder: Path) -> Result:
    """The same run in fp32 on the GPU and on the CPU."""
    if not has_gpu():
        return Result("skipped", "needs CUDA: it compares a GPU with a CPU")
    settings = _settings(size, folder) | {"train_iters": 5, "transformer_impl": "local"}
    losses = {}
    for name, on_cpu in (("gpu", False), ("cpu", True)):
        rows = _train(settings | {"save": folder / f"run_{name}"}, folder, on_cpu)
        losses[name] = [row["loss"] for row in rows]
    # A loss of some nats is beta times a difference of sums of some hundred; Adam's first steps keep rounding's signs.
    worst = max(abs(a - b) / max(a, 1) for a, b in zip(losses["gpu"], losses["cpu"], strict=True))
    return verdict(worst < 1e-4, f"losses of 5 steps differ by at most {worst:.1e}, relative (allowed 1e-4)", **losses)


def fp8(size: Size, folder: Path) -> Result:
    """FP8: policy and reference round alike, so that the first step is ln 2 exactly."""
    if (reason := why_no_fp8()) is not None:
        return Result("skipped", reason)
    rows = _train(_settings(size, folder) | {"train_iters": 3, "bf16": True, "fp8_format": "hybrid"}, folder)
    losses = [row["loss"] for row in rows]
    return verdict(
        abs(losses[0] - LN2) < 1e-12, f"loss {losses[0]:.15f} at step 1, {losses[-1]:.4f} at 3", losses=losses
    )


def lora(size: Size, folder: Path) -> Result:
    """Low-rank adapters: without them the model is its reference, so that the first step is ln 2 exactly."""
    settings, base = _settings(size, folder) | OVERLAPPED, folder / "base"
    _train(settings | {"train_iters": 1, "save": base}, folder)
    settings |= {"load": base, "lora_rank": 8, "lr": 1e-3, "train_iters": 3}
    losses = [row["loss"] for row in _train(settings, folder)]
    return verdict(
        abs(losses[0] - LN2) < 1e-12
        and len(losses) == 3
        and all(map(math.isfinite, losses))
        and losses[2] != losses[0],
        f"loss {losses[0]:.15f} at step 1, {losses[1]:.4f} at 2, {losses[2]:.4f} at 3",
        losses=losses,
    )


def online(size: Size, folder: Path) -> Result:
    """Policy gradient in bf16: the trainer's log-probabilities beside the decoder's, and finite steps."""
    left_out = ("global_batch_size", "num_views", "steps_per_block")
    settings = {key: value for key, value in _settings(size, folder).items() if key not in left_out}
    settings |= OVERLAPPED | {
        "objective": "policy_gradient",
        "rewards": "tools.gpu_checks.rewards:share_of_letters",
        "rollout_prompts": 4,
        "group_size": 4,
        "rollout_max_new_tokens": size.new_tokens,
        "train_iters": 3,
    }
    rows = _train(settings, folder)
    gaps, norms = ([row[name] for row in rows] for name in ("rollout/logp_gap", "grad_norm"))
    seconds = ", ".join(f"{row['seconds/rollout']:.1f} + {row['seconds/training']:.1f}" for row in rows)
    return verdict(
        len(rows) == 3 and max(gaps) < 0.05 and all(map(math.isfinite, norms)),
        f"decoder and trainer differ by at most {max(gaps):.1e} nats a token (allowed 0.05); gradient norms "
        f"{', '.join(f'{norm:.3f}' for norm in norms)}; seconds of rollout and training {seconds}",
        rows=rows,
    )


def layers(size: Size, folder: Path) -> Result:
    """tools/benchmarks/layers.py: speed, error and memory in bf16 and FP8."""
    reason = why_no_fp8()
    formats = ["bf16"] if reason is not None else ["bf16", "tensorwise"]
    words = ["--size", size.layers[0], "--layers", "2", "--tokens", str(size.tokens), "--repetitions", "5"]
    target = folder / "layers.json"
    words += ["--formats", *formats, "--output", str(target)]
    run_python(["-m", "tools.benchmarks.layers", *words], folder / "log")
    rows = json.loads(target.read_text())["rows"]
    told = [
        f"{row['format']} {row['seconds'] * 1e3:.1f} ms, MFU {row['model_flop_utilisation']:.1%}, "
        f"error {row['log_prob_error']:.1e} / {row['gradient_error']:.1e}, {row['compiled_after_warm_up']} compiled"
        for row in rows
    ]
    good = all(row["compiled_after_warm_up"] == 0 for row in rows) and rows[0]["gradient_error"] < 0.1
    return verdict(good, "; ".join(told) + (f"; no FP8: {reason}" if reason else ""), rows=rows)


def _settings(size: Size, folder: Path) -> dict:
    return size.model | {
        "tokenizer_type": "ByteLevelTokenizer",
        "data_path": _pairs(folder / "pairs.jsonl"),
        "save": folder / "run",
        "seq_length": 4096,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "num_views": 2,
        "steps_per_block": 4,
        "lr": 1e-4,
        "tensorboard": False,
    }


def _pairs(path: Path) -> Path:
    rng = random.Random(0)

    def text(longest: int) -> str:
        return "".join(rng.choices(string.ascii_lowercase + " ", k=rng.randint(longest // 4, longest))) + "."

    rows = [{"prompt": text(80), "chosen": text(160), "rejected": text(160)} for _ in range(32)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _train(settings: dict, folder: Path, on_cpu: bool = False) -> list[dict]:
    """A run of the trainer to its end; the metrics of its steps."""
    words = []
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        words += (
            ([flag] if value else [flag.replace("--", "--no-", 1)]) if isinstance(value, bool) else [flag, str(value)]
        )
    run_python(["-m", "megatron_dtrpo", "train", *words], folder / "log", on_cpu)
    return [json.loads(line) for line in (Path(settings["save"]) / METRICS_FILE).read_text().splitlines()]
