"""Trains one checkpoint with every estimator, without and with a likelihood anchor, and writes what each row buys.

Called by compare_estimators.sh. All rows start from the same SFT checkpoint, see the same pairs in the same number of
steps, and share learning rate and beta; estimator, anchor and seed (order of the pairs, noise) differ. `NAME + X` has
the anchor: --loss-type sigmoid sft --loss-weights 1 X. `chosen alone` is the anchor without a preference loss. Over the
seeds:

    exact match       greedily decoded answers to held-out problems that are right, with a 95% interval over seeds and
                      problems, both drawn anew (`interval`)
    over chosen       the same of the difference to `chosen alone`, problem by problem and seed by seed
    tokens per pass   of those answers: all tokens over all forward passes
    accuracy          held-out pairs whose chosen response gained more than the rejected one; a tie counts half
    chosen, rejected  mean change of the log-likelihood of the held-out pairs' responses since SFT, in nats. Accuracy
                      and change are measured for every row by exact_trajectory, which has no noise
    CPU s             processor seconds of the training process, imports apart, over its steps; decoding is not in it
    tokens a pair     of one forward pass of policy or reference
    deviation         standard deviation of a pair's estimated margin between draws of noise, mean over held-out pairs,
                      all under one policy (the first estimator's first run), scaled to the tokens of that estimator

Every finished part of a run is kept in its folder, and not repeated.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all we draw; no display needed
import matplotlib.pyplot as plt  # noqa: E402
import yaml  # noqa: E402

from megatron_dtrpo.files import write_atomically  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
# mean_field has no noise that more views would average.
ESTIMATORS = {
    "dtrpo": [],
    "trajectory": [],
    "vrpo": [],
    "elbo": [],
    "mean_field": ["--num-views", "1"],
}
ANCHORS = ("0", "0.1", "0.5")
CHOSEN = "chosen alone"
# 97.5% points of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NORMAL = 1.96

Words = list[str]
Matrix = list[list[float]]  # one list a seed, one value a problem


def parse(arguments: Words | None) -> tuple[argparse.Namespace, Words]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the SFT checkpoint")
    parser.add_argument("--pairs", type=Path, required=True, metavar="FILE", help="training pairs, recorded")
    parser.add_argument("--heldout-pairs", type=Path, required=True, metavar="FILE", help="held-out pairs, recorded")
    parser.add_argument("--problems", type=Path, required=True, metavar="FILE", help="held-out prompts with answers")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="training settings shared by all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--anchors", nargs="+", default=list(ANCHORS), help="weights (default: 0 0.1 0.5)")
    parser.add_argument("--draws", type=int, default=4, help="of noise, for the deviation (default: 4)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    return parser.parse_known_args(arguments)  # what is left goes to the trainer


def rows(estimators: Words, anchors: Words) -> dict[str, Words]:
    """A row's name -> its flags."""
    table = {CHOSEN: ["--estimator", estimators[0], "--loss-type", "sft"]}
    for estimator in estimators:
        for anchor in anchors:
            flags = ["--estimator", estimator, *ESTIMATORS[estimator]]
            if float(anchor):
                flags += ["--loss-type", "sigmoid", "sft", "--loss-weights", "1", anchor]
            table[name_of(estimator, anchor)] = flags
    return table


def name_of(estimator: str, anchor: str) -> str:
    return f"{estimator} + {anchor}" if float(anchor) else estimator


# Running


def warm_up() -> None:
    """Imports once what every command needs; those are forked from here."""
    from megatron_dtrpo.runtime import environment

    environment.set_defaults()
    from megatron_dtrpo.runtime import initialize

    initialize.enable_device()
    from megatron.core import dist_checkpointing  # noqa: F401

    import megatron_dtrpo.training.trainer  # noqa: F401


def command(program: str, words: list, log: Path) -> float:
    """Runs a verb of ``megatron-dtrpo`` in a process of its own; its processor seconds."""
    child = os.fork()
    if child == 0:
        _become(program, [str(word) for word in words], log)
    _, status, usage = os.wait4(child, 0)
    if status:
        raise SystemExit(f"error: {program} ended with status {os.waitstatus_to_exitcode(status)}; see {log}")
    return usage.ru_utime + usage.ru_stime


def _become(program: str, words: Words, log: Path) -> None:
    status = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        status = _call(program, words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _call(program: str, words: Words) -> int:
    return importlib.import_module(f"megatron_dtrpo.cli.{program}").main(words)


def once(path: Path, make) -> dict | list:
    """What ``make()`` returns; from the file, where an earlier start of this script wrote it."""
    if not path.exists():
        write_atomically(path, json.dumps(make()))
    return json.loads(path.read_text())


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def folder(options: argparse.Namespace, row: str, seed: int) -> Path:
    return options.output / f"{row.replace(' + ', '-').replace(' ', '-')}-seed{seed}"


def train(options: argparse.Namespace, save: Path, seed: int, words: Words) -> dict:
    words = [
        "--config",
        options.config,
        "--load",
        options.checkpoint,
        "--data-path",
        options.pairs,
        "--save",
        save / "run",
        "--seed",
        seed,
        *words,
    ]
    return {"CPU s": command("train", words, save / "train.log")}


def answers(options: argparse.Namespace, checkpoint: Path, save: Path) -> dict:
    """Which problems are answered right, and tokens per forward pass."""
    output = save / "answers.jsonl"
    words = [
        "--checkpoint",
        checkpoint,
        "--prompts",
        options.problems,
        "--output",
        output,
        "--verifier",
        "numeric",
        "--max-new-tokens",
        64,
        "--batch-size",
        128,
        "--no-progress",
    ]
    command("generate", words, save / "answers.log")
    found = read_lines(output)
    tokens, passes = sum(len(r["completion_ids"]) for r in found), sum(r["completion_passes"] for r in found)
    return {"right": [float(r["correct"] is True) for r in found], "tokens per pass": tokens / passes}


def changes(options: argparse.Namespace, checkpoint: Path, save: Path, name: str, words: Words) -> dict:
    """Since SFT, of the log-likelihood of both responses of every held-out pair."""
    output = save / f"{name}.jsonl"
    words = [
        "--checkpoint",
        checkpoint,
        "--reference",
        options.checkpoint,
        "--data",
        options.heldout_pairs,
        "--output",
        output,
        "--beta",
        1,
        "--loss-type",
        "sigmoid",
        "--loss-weights",
        1,
        *words,
    ]
    command("score", words, save / f"{name}.log")
    found = read_lines(output)
    return {side: [row[f"rewards/{side}"] for row in found] for side in ("chosen", "rejected")}


def one_run(options: argparse.Namespace, extra: Words, row: str, flags: Words, seed: int) -> str:
    """Trains, decodes and scores a seed of a row; leaves everything in its folder."""
    save = folder(options, row, seed)
    save.mkdir(parents=True, exist_ok=True)
    once(save / "train.json", lambda: train(options, save, seed, [*extra, *flags]))
    right = once(save / "answers.json", lambda: answers(options, save / "run", save))["right"]
    exact = ["--estimator", "exact_trajectory", "--num-views", 1]
    once(save / "changes.json", lambda: changes(options, save / "run", save, "changes", exact))
    return f"{row}, seed {seed}: exact match {statistics.mean(right):.3f}"


def one_draw(options: argparse.Namespace, judge: Path, estimator: str, draw: int) -> str:
    save = options.output / "draws"
    save.mkdir(exist_ok=True)
    name = f"{estimator}-{draw}"
    words = ["--estimator", estimator, *ESTIMATORS[estimator], "--seed", 1000 + draw]
    once(save / f"{name}.json", lambda: changes(options, judge, save, name, words))
    return f"{estimator}, draw {draw}"


def side_by_side(jobs: list, processes: int) -> None:
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        for future in [pool.submit(job) for job in jobs]:
            print(future.result(), flush=True)


# Statistics


def interval(matrix: Matrix) -> tuple[float, float]:
    """Mean, and half of its 95% interval for new seeds and new problems.

    The seeds' part is Student's, of the standard error between seeds' means; the problems' is the normal one of the
    standard error between problems' means, less what the seeds explain of it. One seed says nothing about seeds: then
    the interval is over problems alone."""
    seeds, problems = len(matrix), len(matrix[0])
    of_seed = [statistics.mean(values) for values in matrix]
    of_problem = [statistics.mean(values) for values in zip(*matrix, strict=True)]
    mean = statistics.mean(of_seed)
    problem_part = statistics.variance(of_problem) / problems
    if seeds == 1:
        return mean, NORMAL * math.sqrt(problem_part)
    rest = sum(
        (value - of_seed[s] - of_problem[p] + mean) ** 2 for s, row in enumerate(matrix) for p, value in enumerate(row)
    ) / ((seeds - 1) * (problems - 1))
    seed_part = statistics.variance(of_seed) / seeds
    problem_part = max(0.0, problem_part - rest / (seeds * problems))
    return mean, math.hypot(STUDENT.get(seeds - 1, 2.26) * math.sqrt(seed_part), NORMAL * math.sqrt(problem_part))


def difference(left: Matrix, right: Matrix) -> Matrix:
    return [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(left, right, strict=True)]


def accuracy(change: dict) -> float:
    """Share of pairs whose chosen gained more than the rejected; a tie counts half."""
    margins = [c - r for c, r in zip(change["chosen"], change["rejected"], strict=True)]
    return statistics.mean(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins)


def deviation(draws: Matrix, cost: float) -> float:
    """Of one pair's margin between draws, mean over pairs, at ``cost`` times the tokens of what it is compared with:
    twice the tokens, averaged over, have 1 / sqrt(2) of the deviation."""
    return statistics.mean(statistics.stdev(values) for values in zip(*draws, strict=True)) * math.sqrt(cost)


# Reporting


def tokens_per_pair(metrics: list[dict]) -> float:
    return sum(row["tokens_per_second"] for row in metrics) / sum(row["pairs_per_second"] for row in metrics)


def collect(options: argparse.Namespace, row: str) -> dict:
    """Everything measured of a row, a list over its seeds each."""
    found: dict[str, list] = {key: [] for key in ("right", "tokens per pass", "changes", "CPU s", "tokens", "metrics")}
    for seed in options.seeds:
        save = folder(options, row, seed)
        read = {part: json.loads((save / f"{part}.json").read_text()) for part in ("train", "answers", "changes")}
        metrics = read_lines(save / "run" / "metrics.jsonl")
        found["right"].append(read["answers"]["right"])
        found["tokens per pass"].append(read["answers"]["tokens per pass"])
        found["changes"].append(read["changes"])
        found["CPU s"].append(read["train"]["CPU s"] / len(metrics))
        found["tokens"].append(tokens_per_pair(metrics))
        found["metrics"].append(metrics)
    return found


def deviations(options: argparse.Namespace, results: dict[str, dict]) -> dict[str, float]:
    """Of each estimator's first row."""
    first: dict[str, float] = {}
    cost = {name: statistics.mean(results[row]["tokens"]) for name, row in _first_rows(options).items()}
    for name in options.estimators:
        read = [json.loads((options.output / "draws" / f"{name}-{d}.json").read_text()) for d in range(options.draws)]
        draws = [[c - r for c, r in zip(draw["chosen"], draw["rejected"], strict=True)] for draw in read]
        first[name] = deviation(draws, cost[name] / cost[options.estimators[0]])
    return first


def _first_rows(options: argparse.Namespace) -> dict[str, str]:
    table = rows(options.estimators, options.anchors)
    return {name: next(row for row in table if row.split(" + ")[0] == name) for name in options.estimators}


COLUMNS = (
    "row",
    "exact match",
    "over chosen",
    "tokens per pass",
    "accuracy",
    "chosen",
    "rejected",
    "CPU s",
    "tokens a pair",
    "deviation",
)


def table(sft: dict, results: dict[str, dict], spread: dict[str, float]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    mean, half = interval([sft["right"]])
    lines.append(f"| SFT | {mean:.3f} ± {half:.3f} | | {sft['tokens per pass']:.2f} | | | | | | |")
    for row, found in results.items():
        mean, half = interval(found["right"])
        cells = [f"{mean:.3f} ± {half:.3f}"]
        gain, half = interval(difference(found["right"], results[CHOSEN]["right"]))
        cells.append("" if row == CHOSEN else f"{gain:+.3f} ± {half:.3f}")
        cells.append(f"{statistics.mean(found['tokens per pass']):.2f}")
        cells.append(f"{statistics.mean(map(accuracy, found['changes'])):.3f}")
        for side in ("chosen", "rejected"):
            cells.append(f"{statistics.mean(statistics.mean(change[side]) for change in found['changes']):+.2f}")
        cells += [f"{statistics.mean(found['CPU s']):.2f}", f"{statistics.mean(found['tokens']):.0f}"]
        cells.append(f"{spread[row]:.3f}" if row in spread else "")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def contrasts(options: argparse.Namespace, results: dict[str, dict]) -> str:
    """Differences of exact match, problem by problem and seed by seed: of each anchor to no anchor (or the first), and
    of each estimator to the first one."""
    names, anchors = options.estimators, options.anchors
    pairs = [(name_of(name, anchor), name_of(name, anchors[0])) for name in names for anchor in anchors[1:]]
    pairs += [(name_of(name, anchor), name_of(names[0], anchor)) for name in names[1:] for anchor in anchors]
    lines = ["| row | less | exact match |", "|---|---|---|"]
    for left, right in pairs:
        mean, half = interval(difference(results[left]["right"], results[right]["right"]))
        lines.append(f"| {left} | {right} | {mean:+.3f} ± {half:.3f} |")
    return "\n".join(lines) + "\n"


def curve(runs: list[list[dict]], side: str, beta: float) -> list[float]:
    """Change of the log-likelihood since SFT by step, mean over runs and a window of five steps."""
    by_step = [statistics.mean(row[f"rewards/{side}"] for row in step) / beta for step in zip(*runs, strict=True)]
    return [statistics.mean(by_step[max(0, i - 2) : i + 3]) for i in range(len(by_step))]


def plot_displacement(options: argparse.Namespace, results: dict[str, dict], beta: float, path: Path) -> None:
    """A panel for each estimator and anchor: both log-likelihoods over training, by the row's own estimator."""
    names, anchors = options.estimators, options.anchors
    figure, grid = plt.subplots(
        len(anchors),
        len(names),
        figsize=(2.3 * len(names), 1.9 * len(anchors) + 0.4),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for column, name in enumerate(names):
        for line, anchor in enumerate(anchors):
            axis = grid[line][column]
            found = results[name_of(name, anchor)]
            for side, style, colour in (("chosen", "-", "#2f6db5"), ("rejected", "--", "#c2455a")):
                axis.plot(curve(found["metrics"], side, beta), style, color=colour, linewidth=1.4, label=side)
            axis.axhline(0, color="#9ca3af", linewidth=0.7)
            axis.set_title(f"{name}, anchor {anchor}", fontsize=8)
            axis.tick_params(labelsize=7)
            axis.spines[["top", "right"]].set_visible(False)
    grid[0][0].legend(frameon=False, fontsize=7)
    figure.supxlabel("step", fontsize=8)
    figure.supylabel("change of log-likelihood since SFT, nats", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_match(sft: dict, results: dict[str, dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6.5, 0.28 * len(results) + 0.9), layout="constrained")
    for place, found in enumerate(reversed(results.values())):
        mean, half = interval(found["right"])
        axis.errorbar(mean, place, xerr=half, fmt="o", color="#2f6db5", markersize=4, capsize=3)
        points = [statistics.mean(values) for values in found["right"]]
        axis.plot(points, [place] * len(points), "|", color="#d9822b", markersize=8)
    axis.axvline(statistics.mean(sft["right"]), color="#6b7280", linewidth=1, linestyle="--", label="SFT")
    axis.set_yticks(range(len(results)), list(reversed(results)), fontsize=8)
    axis.set_xlabel("exact match: 95% interval, and each seed", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(options: argparse.Namespace, sft: dict, beta: float) -> str:
    results = {row: collect(options, row) for row in rows(options.estimators, options.anchors)}
    of_estimator, first = deviations(options, results), _first_rows(options)
    text = table(sft, results, {first[name]: value for name, value in of_estimator.items()})
    text += "\n" + contrasts(options, results)
    numbers = {row: {k: v for k, v in found.items() if k != "metrics"} for row, found in results.items()}
    written = {"sft": sft, "rows": numbers, "deviation": of_estimator}
    (options.output / "comparison.json").write_text(json.dumps(written) + "\n")
    plot_match(sft, results, options.output / "comparison.png")
    plot_displacement(options, results, beta, options.output / "displacement.png")
    (options.output / "comparison.md").write_text(text)
    return text


def main(arguments: Words | None = None) -> int:
    options, extra = parse(arguments)
    for name in ("checkpoint", "pairs", "heldout_pairs", "problems", "output", "config"):
        setattr(options, name, getattr(options, name).resolve())
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    options.output.mkdir(parents=True, exist_ok=True)
    warm_up()
    sft_folder = options.output / "sft"
    sft_folder.mkdir(exist_ok=True)
    sft = once(sft_folder / "answers.json", lambda: answers(options, options.checkpoint, sft_folder))
    wanted = rows(options.estimators, options.anchors).items()
    side_by_side(
        [functools.partial(one_run, options, extra, row, flags, s) for s in options.seeds for row, flags in wanted],
        options.processes,
    )
    judge = folder(options, next(iter(_first_rows(options).values())), options.seeds[0]) / "run"
    side_by_side(
        [
            functools.partial(one_draw, options, judge, name, d)
            for name in options.estimators
            for d in range(options.draws)
        ],
        options.processes,
    )
    beta = yaml.safe_load((judge / "run_config.yaml").read_text())["beta"]
    text = report(options, sft, beta)
    print(f"\n{text}\nwritten: {options.output}/comparison.md, .json, .png and displacement.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
