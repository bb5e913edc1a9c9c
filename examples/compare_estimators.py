"""Trains the same checkpoint with several estimators and writes what each of them buys: a Markdown table and a plot.

Called by compare_estimators.sh. Every run sees the same pairs in the same number of steps; only the estimator and the
seed differ. Reported per estimator, over the seeds:

    exact match       greedily decoded answers to held-out problems that are right
    tokens per pass   of those answers: all tokens over all forward passes
    reward accuracy   held-out pairs whose chosen response gained more than the rejected one
    seconds per step  median, on this machine
    forward tokens    tokens of a pair in one forward pass of policy or reference
    deviation         standard deviation of a pair's estimated margin between draws of noise, mean over pairs, all under
                      one and the same policy (the first run of `dtrpo`, or of the first estimator given) and scaled to
                      the forward tokens of one `dtrpo` view
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all we draw; no display needed
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# Training settings of each contender, beyond what all share. mean_field has no noise that more views would average.
ESTIMATORS = {
    "dtrpo": ["--estimator", "dtrpo"],
    "vrpo": ["--estimator", "vrpo"],
    "elbo": ["--estimator", "elbo"],
    "mean_field": ["--estimator", "mean_field", "--num-views", "1"],
}
DEVIATION = "deviation at equal cost"
MEASURED = ("exact match", "tokens per pass", "reward accuracy", "seconds per step", "forward tokens per pair")
COLUMNS = (*MEASURED, DEVIATION)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the SFT checkpoint")
    parser.add_argument("--pairs", type=Path, required=True, metavar="FILE", help="training pairs")
    parser.add_argument("--heldout-pairs", type=Path, required=True, metavar="FILE", help="pairs for reward accuracy")
    parser.add_argument("--problems", type=Path, required=True, metavar="FILE", help="held-out prompts with answers")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="training settings shared by all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--draws", type=int, default=8, help="of noise, for the deviation (default: 8)")
    parser.add_argument("--processes", type=int, default=1, help="data-parallel processes (default: 1)")
    return parser.parse_known_args(arguments)  # what is left goes to the trainer


def run(words: list[str], log: Path, processes: int = 1) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), *words]
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ).returncode
    if status:
        sys.exit(f"error: {' '.join(words[:3])} ended with status {status}; its output is in {log}")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(options: argparse.Namespace, extra: list[str], name: str, seed: int) -> Path:
    """The run folder; a run that is finished is not repeated."""
    save = options.output / f"{name}-{seed}"
    if not (save / "done").exists():
        words = ["-m", "megatron_dtrpo.train", "--config", options.config, "--load", options.checkpoint]
        words += ["--data-path", options.pairs, "--save", save, "--seed", seed, *extra, *ESTIMATORS[name]]
        run([str(word) for word in words], options.output / f"{name}-{seed}.log", options.processes)
        (save / "done").touch()
    return save


def answers(options: argparse.Namespace, save: Path, name: str) -> tuple[float, float]:
    """Exact match, and tokens per forward pass."""
    output = options.output / f"{name}.answers.jsonl"
    words = ["tools/generate.py", "--checkpoint", save, "--prompts", options.problems, "--output", output]
    words += ["--max-new-tokens", 64, "--batch-size", 128, "--no-progress"]
    run([str(word) for word in words], output.with_suffix(".log"))
    sys.path.insert(0, str(ROOT))
    from megatron_dtrpo.evaluation.verifiers import numeric

    rows = read_lines(output)
    tokens = sum(len(row["completion_ids"]) for row in rows)
    right = sum(numeric(row, row["completion"]) for row in rows)
    return right / len(rows), tokens / sum(row["completion_passes"] for row in rows)


def margins(options: argparse.Namespace, save: Path, name: str, seed: int, estimator: str) -> list[float]:
    """Estimated margin of every held-out pair."""
    output = options.output / f"{name}.scores.jsonl"
    words = ["tools/score_preferences.py", "--checkpoint", save, "--reference", options.checkpoint]
    words += ["--data", options.heldout_pairs, "--output", output, "--seed", seed, "--no-progress"]
    words += [*ESTIMATORS[estimator], "--beta", 1]
    run([str(word) for word in words], output.with_suffix(".log"))
    return [row["rewards/margins"] for row in read_lines(output)]


def measure(options: argparse.Namespace, extra: list[str], name: str) -> dict[str, list[float]]:
    """One value per seed of every column but the deviation."""
    found: dict[str, list[float]] = {column: [] for column in MEASURED}
    for seed in options.seeds:
        save = train(options, extra, name, seed)
        rows = read_lines(save / "metrics.jsonl")
        match, tokens_per_pass = answers(options, save, f"{name}-{seed}")
        found["exact match"].append(match)
        found["tokens per pass"].append(tokens_per_pass)
        scores = margins(options, save, f"{name}-{seed}", 0, name)
        found["reward accuracy"].append(sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in scores) / len(scores))
        batch = rows[0]["consumed_samples"] / rows[0]["iteration"]
        found["seconds per step"].append(statistics.median(batch / row["pairs_per_second"] for row in rows))
        tokens = sum(row["tokens_per_second"] for row in rows) / sum(row["pairs_per_second"] for row in rows)
        found["forward tokens per pair"].append(tokens)
        print(f"{name} seed {seed}: " + ", ".join(f"{column} {values[-1]:.4g}" for column, values in found.items()))
    return found


def deviation(options: argparse.Namespace, judge: Path, name: str) -> float:
    """Of one pair's margin between draws of noise, mean over the pairs, all under the policy in ``judge``."""
    draws = [margins(options, judge, f"{name}-draw{draw}", 1000 + draw, name) for draw in range(options.draws)]
    return statistics.mean(statistics.stdev(values) for values in zip(*draws, strict=True))


def table(results: dict[str, dict[str, list[float]]], baseline: tuple[float, float]) -> str:
    lines = ["| estimator | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines.append(f"| none: the SFT checkpoint | {baseline[0]:.3f} | {baseline[1]:.2f} | | | | |")
    for name, found in results.items():
        cells = [
            show(found["exact match"], 3),
            show(found["tokens per pass"], 2),
            show(found["reward accuracy"], 3),
            f"{statistics.median(found['seconds per step']):.3f}",
            f"{statistics.mean(found['forward tokens per pair']):.0f}",
            f"{found[DEVIATION][0]:.3f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def show(values: list[float], digits: int) -> str:
    """Mean and, of several seeds, their standard deviation."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def plot(results: dict[str, dict[str, list[float]]], baseline: float, path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for axis, column in zip(axes, ("exact match", "reward accuracy", DEVIATION), strict=True):
        for place, found in enumerate(results.values()):
            values = found[column]
            axis.bar(place, statistics.mean(values), color="#2f6db5", alpha=0.35)
            axis.plot([place] * len(values), values, "o", color="#2f6db5", markersize=4)
        axis.set_xticks(range(len(results)), list(results))
        axis.set_title(column, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].axhline(baseline, color="#6b7280", linewidth=1, linestyle="--", label="SFT")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    options, extra = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    baseline = answers(options, options.checkpoint, "sft")
    results = {name: measure(options, extra, name) for name in options.estimators}
    judge = options.output / f"{options.estimators[0]}-{options.seeds[0]}"
    cost = {name: statistics.mean(found["forward tokens per pair"]) for name, found in results.items()}
    for name, found in results.items():
        # Twice the tokens, averaged over, have 1 / sqrt(2) of the deviation.
        equal_cost = math.sqrt(cost[name] / cost[options.estimators[0]])
        found[DEVIATION] = [deviation(options, judge, name) * equal_cost]
    text = table(results, baseline)
    (options.output / "comparison.md").write_text(text)
    (options.output / "comparison.json").write_text(json.dumps({"sft": baseline[0], **results}, indent=2) + "\n")
    plot(results, baseline[0], options.output / "comparison.png")
    print(f"\n{text}\nwritten: {options.output}/comparison.md, .json and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
