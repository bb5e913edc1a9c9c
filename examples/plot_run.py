"""Draws what one or more training runs wrote to `metrics.jsonl`: loss, rewards and log-probabilities by iteration.

A run with `rewards/...` keys is a preference run, one with `reward/mean` an online one, any other an SFT run; each kind
gets its own panels. Several runs of a kind share a panel, one colour each. Behind every line stands the unsmoothed one,
faintly.
"""

import argparse
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all we draw; no display needed
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from megatron_dtrpo.errors import UserError  # noqa: E402

COLOURS = ("#2f6db5", "#d9822b", "#3a9a5b", "#8e5bb0", "#c2455a", "#6b7280")
INK = "#374151"


@dataclass(frozen=True)
class Run:
    """One run's metrics: a row for each iteration, in order."""

    name: str
    rows: list[dict]

    @property
    def is_preference(self) -> bool:
        return any(key.startswith("rewards/") for row in self.rows for key in row)

    @property
    def is_online(self) -> bool:
        return any("reward/mean" in row for row in self.rows)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Iterations and values; rows without the key, or with a value that is no number, are left out."""
        points = [(row["iteration"], row[key]) for row in self.rows if _is_number(row.get(key))]
        return [x for x, _ in points], [y for _, y in points]


@dataclass(frozen=True)
class Curve:
    """One metric of a panel. `style` and `label` tell it from the panel's others."""

    key: str
    style: str = "-"
    label: str = ""


@dataclass(frozen=True)
class Panel:
    title: str
    runs: list[Run]
    curves: tuple[Curve, ...]
    baseline: float | None = None
    baseline_label: str = ""


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_run(directory: Path) -> Run:
    path = directory / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; --runs takes the output directories of training runs") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    by_iteration = {}
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if not line.endswith("\n"):
                continue  # the run is still writing its last line
            raise UserError(f"{path}:{number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict) or not _is_number(row.get("iteration")):
            raise UserError(f"{path}:{number}: no number under the key 'iteration'")
        # A resumed run writes the iterations since its checkpoint again; the later row counts.
        by_iteration[row["iteration"]] = row
    if not by_iteration:
        raise UserError(f"{path}: empty; the run has not logged an iteration yet")
    return Run(directory.resolve().name, [by_iteration[i] for i in sorted(by_iteration)])


def read_runs(directories: list[Path]) -> list[Run]:
    runs = [read_run(directory) for directory in directories]
    if len({run.name for run in runs}) < len(runs):  # a/dtrpo and b/dtrpo: only the whole path tells them apart
        runs = [replace(run, name=str(directory)) for run, directory in zip(runs, directories, strict=True)]
    return runs


def _without_anchor(runs: list[Run]) -> list[Run]:
    """With a likelihood anchor `loss` is more than the preference loss, which then has a key of its own."""
    return [
        replace(run, rows=[{**row, "loss": row.get("loss/sigmoid", row["loss"])} for row in run.rows]) for run in runs
    ]


def panels(runs: list[Run]) -> list[Panel]:
    online = [run for run in runs if run.is_online]
    sft = [run for run in runs if not run.is_preference and not run.is_online]
    preference = [run for run in runs if run.is_preference]
    result = []
    if sft:
        result.append(Panel("SFT loss", sft, (Curve("loss"),)))
    if preference:
        result += [
            Panel("Preference loss", _without_anchor(preference), (Curve("loss"),), math.log(2), "ln 2"),
            Panel("Reward accuracy", preference, (Curve("rewards/accuracies"),), 0.5, "chance"),
            Panel("Reward margin", preference, (Curve("rewards/margins"),), 0.0),
            Panel(
                "Log-probability",
                preference,
                (Curve("logps/chosen", "-", "chosen"), Curve("logps/rejected", "--", "rejected")),
            ),
        ]
    if online:
        result += [
            Panel("Reward", online, (Curve("reward/mean"),)),
            Panel("Entropy, nats a token", online, (Curve("entropy"),)),
            Panel("Share of clipped ratios", online, (Curve("clip/fraction"),), 0.0),
            Panel("Tokens of an answer", online, (Curve("response/length"),)),
        ]
    if len(result) % 2:  # fills the grid
        result.append(Panel("Gradient norm", runs, (Curve("grad_norm"),)))
    return result


def smooth(values: list[float]) -> list[float]:
    """Centred running mean over a twentieth of the run. It narrows towards the start, so that the first point is
    the first value (ln 2 where policy and reference start equal), but not towards the end, where one noisy last
    value would look like a trend."""
    smoothed = []
    for i in range(len(values)):
        reach = min(len(values) // 40, i)
        window = values[i - reach : i + reach + 1]
        smoothed.append(sum(window) / len(window))
    return smoothed


def draw_panel(axes: Axes, panel: Panel, colours: dict[str, str]) -> None:
    for run in panel.runs:
        for curve in panel.curves:
            x, y = run.series(curve.key)
            label = " ".join(filter(None, (run.name if len(panel.runs) > 1 else "", curve.label)))
            # One iteration is a point, which a line would not show.
            marker = "o" if len(x) == 1 else None
            axes.plot(x, y, color=colours[run.name], alpha=0.22, linewidth=0.8)
            axes.plot(
                x, smooth(y), curve.style, color=colours[run.name], linewidth=1.8, marker=marker, label=label or None
            )
    if panel.baseline is not None:
        axes.axhline(panel.baseline, color=INK, linewidth=0.9, linestyle=":", label=panel.baseline_label or None)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize=8)
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold", color=INK)
    axes.set_xlabel("iteration", fontsize=9, color=INK)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=INK, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#9ca3af")


def draw(runs: list[Run], output: Path) -> None:
    drawn = panels(runs)
    rows = 1 if len(drawn) <= 2 else 2
    columns = len(drawn) // rows
    figure, grid = plt.subplots(rows, columns, figsize=(4.4 * columns, 3.1 * rows), layout="constrained", squeeze=False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    colours = {run.name: COLOURS[i % len(COLOURS)] for i, run in enumerate(runs)}
    for axes, panel in zip(grid.flat, drawn, strict=True):
        draw_panel(axes, panel, colours)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:  # ValueError: a file extension that matplotlib does not know
        raise UserError(f"--output {output}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, metavar="DIR", help="output directories of runs")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the figure, a .png")
    options = parser.parse_args(arguments)
    try:
        draw(read_runs(options.runs), options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
