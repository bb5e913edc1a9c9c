"""Trains one checkpoint by policy gradient and by rounds of dTRPO on as many answers, and writes what each buys.

Called by compare_online.sh. All rows start from the same SFT checkpoint and answer the same problems; a seed is other
answers, another order of the pairs and other noise. Policy gradient comes first. The rounds share out as many answers
as it decoded on average, so that the price in decoded tokens is the same up to the length of answers. Over the seeds:

    anchor            weight of the likelihood of the chosen answers beside the preference loss; 0.5 where none is named
    exact match       greedily decoded answers to held-out problems that are right, with a 95% interval over seeds and
                      problems, both drawn anew (`compare_estimators.interval`)
    over SFT          the same of the difference to the SFT checkpoint, problem by problem
    over gradient     the same of the difference to policy gradient, problem by problem and seed by seed
    answers, tokens   decoded in training, thousands
    pairs, steps      of training: pairs that were made, steps of the optimizer
    CPU s             processor seconds of the training process, with decoding and the evaluations on the way

Every finished part of a run is kept in its folder, and not repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is all we draw; no display needed
import matplotlib.pyplot as plt  # noqa: E402
import yaml  # noqa: E402

from compare_estimators import (  # noqa: E402
    ROOT,
    Words,
    answers,
    command,
    difference,
    folder,
    interval,
    once,
    read_lines,
    side_by_side,
    warm_up,
)

GRADIENT = "policy gradient"
# The likelihood anchor of the file, 0.5, and a stronger one.
ANCHORS = {"": [], ", anchor 2": ["--loss-weights", "1", "2"]}
COLOURS = ("#2f6db5", "#111827", "#d9822b", "#3a9a5b", "#6b7280", "#e9b97f", "#8fceaa")
COLUMNS = ("row", "exact match", "over SFT", "over gradient", "answers", "tokens", "pairs", "steps", "CPU s")


def parse(arguments: Words | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="the SFT checkpoint")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="problems to train on")
    parser.add_argument("--problems", type=Path, required=True, metavar="FILE", help="held-out problems")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--gradient", type=Path, required=True, metavar="FILE", help="settings of policy gradient")
    parser.add_argument("--dtrpo", type=Path, required=True, metavar="FILE", help="settings of dTRPO")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="(default: 1 2 3)")
    parser.add_argument("--iterations", type=int, default=40, help="of policy gradient (default: 40)")
    parser.add_argument("--rounds", type=int, default=4, help="(default: 4)")
    parser.add_argument("--epochs", type=float, default=2, help="over the pairs of a round (default: 2)")
    parser.add_argument("--group-size", type=int, default=8, help="answers to a prompt (default: 8)")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    return parser.parse_args(arguments)


def rows(rounds: int) -> dict[str, tuple[int, Words]]:
    """A row's name -> its rounds and its flags."""
    table: dict[str, tuple[int, Words]] = {}
    for anchor, flags in ANCHORS.items():
        table |= {
            f"dTRPO, 1 round{anchor}": (1, flags),
            f"dTRPO, {rounds} rounds{anchor}": (rounds, flags),
            f"dTRPO, {rounds} rounds{anchor}, reference moved": (rounds, [*flags, "--move-reference"]),
        }
    return table


# Running


def shared(options: argparse.Namespace, seed: int) -> list:
    """The flags of every run."""
    return [
        *("--load", options.checkpoint, "--data-path", options.prompts, "--seed", seed, "--rewards", "numeric"),
        *("--group-size", options.group_size, "--rollout-max-new-tokens", 24, "--rollout-batch-size", 256),
        *("--reward-workers", 1, "--eval-data-path", options.problems, "--eval-examples", 1000),
        *("--eval-max-new-tokens", 24, "--eval-batch-size", 256),
    ]


def train_gradient(options: argparse.Namespace, save: Path, seed: int) -> dict:
    steps = ["--train-iters", options.iterations, "--eval-interval", max(1, options.iterations // 4)]
    words = ["--config", options.gradient, *shared(options, seed), "--save", save / "run", *steps]
    seconds = command("train", words, save / "train.log")
    metrics = read_lines(save / "run" / "metrics.jsonl")
    counts = [(row["groups/trained"] + row["groups/dropped"]) * options.group_size for row in metrics]
    tokens = [count * row["response/length"] for count, row in zip(counts, metrics, strict=True)]
    matched = {row["iteration"]: row["eval/exact_match"] for row in read_lines(save / "run" / "eval.jsonl")}
    updates = yaml.safe_load((save / "run" / "run_config.yaml").read_text())["updates_per_rollout"]
    return {
        "curve": [(sum(tokens[:iteration]), match) for iteration, match in sorted(matched.items())],
        "answers": sum(counts),
        "tokens": sum(tokens),
        "pairs": None,
        "steps": sum(min(row["groups/trained"], updates) for row in metrics),
        "CPU s": seconds,
    }


def train_rounds(options: argparse.Namespace, save: Path, seed: int, rounds: int, flags: Words, prompts: int) -> dict:
    words = ["--config", options.dtrpo, *shared(options, seed), "--save", save / "run", "--rounds", rounds]
    words += ["--round-prompts", prompts, "--pairs-per-prompt", options.group_size // 2]
    words += ["--num-epochs", options.epochs, "--eval-interval", 10**6, *flags]
    seconds = command("train", words, save / "train.log")
    made = [save / "run" / f"round-{number}" for number in range(1, rounds + 1)]
    measured = [json.loads((each / "answers.json").read_text()) for each in made]
    matched = [read_lines(each / "eval.jsonl") for each in made]
    tokens = [row["tokens"] for row in measured]
    points = [(sum(tokens[: number + 1]), found[-1]["eval/exact_match"]) for number, found in enumerate(matched)]
    return {
        "curve": [(0, matched[0][0]["eval/exact_match"]), *points],
        "answers": sum(row["answers"] for row in measured),
        "tokens": sum(tokens),
        "pairs": sum(row["pairs"] for row in measured),
        "steps": sum(len(read_lines(each / "metrics.jsonl")) for each in made),
        "CPU s": seconds,
    }


def one_run(options: argparse.Namespace, row: str, seed: int, last: str, train) -> str:
    """Trains and decodes a seed of a row; ``last``: its result in its run folder."""
    save = folder(options, row.replace(",", ""), seed)
    save.mkdir(parents=True, exist_ok=True)
    found = once(save / "train.json", lambda: train(options, save, seed))
    right = once(save / "answers.json", lambda: answers(options, save / "run" / last, save))["right"]
    return f"{row}, seed {seed}: exact match {statistics.mean(right):.3f}, {found['tokens']:.0f} decoded tokens"


def collect(options: argparse.Namespace, row: str) -> dict[str, list]:
    """Everything measured of a row, a list over its seeds each."""
    found: dict[str, list] = {}
    for seed in options.seeds:
        save = folder(options, row.replace(",", ""), seed)
        measured = json.loads((save / "train.json").read_text())
        measured |= {"right": json.loads((save / "answers.json").read_text())["right"]}
        for key, value in measured.items():
            found.setdefault(key, []).append(value)
    return found


# Reporting


def table(sft: dict, results: dict[str, dict]) -> str:
    def cell(matrix: list, sign: str = "") -> str:
        return "{:{sign}.3f} ± {:.3f}".format(*interval(matrix), sign=sign)

    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines.append(f"| SFT | {cell([sft['right']])} |" + " |" * (len(COLUMNS) - 2))
    for row, found in results.items():
        cells = [cell(found["right"]), cell(difference(found["right"], [sft["right"]] * len(found["right"])), "+")]
        gradient = results[GRADIENT]["right"]
        cells.append("" if row == GRADIENT else cell(difference(found["right"], gradient), "+"))
        cells += [f"{statistics.mean(found[key]) / 1000:.1f}k" for key in ("answers", "tokens")]
        cells.append("" if None in found["pairs"] else f"{statistics.mean(found['pairs']):.0f}")
        cells += [f"{statistics.mean(found[key]):.0f}" for key in ("steps", "CPU s")]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(sft: dict, results: dict[str, dict], path: Path) -> None:
    """Exact match by decoded tokens: a line is the mean over seeds, a point a seed."""
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    mean, half = interval([sft["right"]])
    axis.axhspan(mean - half, mean + half, color="#e5e7eb", label="SFT, 95% interval")
    for colour, (row, found) in zip(COLOURS, results.items(), strict=False):
        points = [list(zip(*step, strict=True)) for step in zip(*found["curve"], strict=True)]
        across = [statistics.mean(tokens) / 1000 for tokens, _ in points]
        axis.plot(across, [statistics.mean(match) for _, match in points], "-", color=colour, label=row)
        for tokens, match in points:
            axis.plot([each / 1000 for each in tokens], match, ".", color=colour, markersize=5, alpha=0.7)
        mean, half = interval(found["right"])
        axis.errorbar(across[-1], mean, yerr=half, color=colour, capsize=3, linewidth=1)
    axis.set_xlabel("thousand decoded tokens of training", fontsize=9)
    axis.set_ylabel("exact match on held-out problems", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Words | None = None) -> int:
    options = parse(arguments)
    for name in ("checkpoint", "prompts", "problems", "output", "gradient", "dtrpo"):
        setattr(options, name, getattr(options, name).resolve())
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    options.output.mkdir(parents=True, exist_ok=True)
    warm_up()
    save = options.output / "sft"
    save.mkdir(exist_ok=True)
    sft = once(save / "answers.json", lambda: answers(options, options.checkpoint, save))
    side_by_side(
        [functools.partial(one_run, options, GRADIENT, seed, "", train_gradient) for seed in options.seeds],
        options.processes,
    )
    results = {GRADIENT: collect(options, GRADIENT)}
    decoded = statistics.mean(results[GRADIENT]["answers"])
    jobs = []
    for row, (rounds, flags) in rows(options.rounds).items():
        prompts = round(decoded / options.group_size / rounds)
        train = functools.partial(train_rounds, rounds=rounds, flags=flags, prompts=prompts)
        jobs += [functools.partial(one_run, options, row, s, f"round-{rounds}", train) for s in options.seeds]
    side_by_side(jobs, options.processes)
    results |= {row: collect(options, row) for row in rows(options.rounds)}
    text = table(sft, results)
    (options.output / "online.json").write_text(json.dumps({"sft": sft, "rows": results}) + "\n")
    (options.output / "online.md").write_text(text)
    plot(sft, results, options.output / "online.png")
    print(f"\n{text}\nwritten: {options.output}/online.md, .json and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
