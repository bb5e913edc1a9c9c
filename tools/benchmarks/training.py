"""Times a full preference step (reference, policy forward and backward, optimizer) beside its peers, in one run.

Contenders alternate; medians, their spread and ratios are printed. All have the same random weights (fp32; the learning
rate is 0, so that they stay the same) and run the same pairs; those that run a pair many times get the first few
pairs only, and ours is timed on these too. Before being timed, each must give the loss of ours on the same noise. At
the default size each ratio stands beside its goal; when a speed misses its own, shares of a step's time follow.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser, new_file, parse_flags
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import initialize
from tools.benchmarks.peers.machine import describe_machine
from tools.benchmarks.peers.sizes import SIZES

EXAMPLES = """
  python -m tools.benchmarks.training                                                  # generated arithmetic pairs
  python -m tools.benchmarks.training --data pairs.jsonl --output benchmark.json       # your own
"""


def build_parser() -> Parser:
    parser = command_parser("python -m tools.benchmarks.training", __doc__, EXAMPLES)
    parser.add_argument("--data", metavar="FILE", help="Preference pairs, texts or messages. Default: sums.")
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="Hugging Face tokenizer. Default: a BPE trained on the data's own texts."
    )
    parser.add_argument("--size", choices=SIZES, default="135m", help="Model. Default: %(default)s.")
    parser.add_argument(
        "--layers", type=int, help="Fewer or more than the model has, for time or memory; no goals then."
    )
    parser.add_argument("--block-size", type=int, default=32, help="Default: %(default)s.")
    parser.add_argument("--steps-per-block", type=int, default=8, help="T_B. Default: %(default)s.")
    parser.add_argument("--pairs", type=int, default=6, help="Pairs per step. Default: %(default)s.")
    parser.add_argument("--slow-pairs", type=int, default=1, help="Of vrpo_8 and exact_trajectory. Default: 1.")
    parser.add_argument(
        "--micro-batch-size", type=int, default=6, help="Pairs at once, for ours and the peers. Default: %(default)s."
    )
    parser.add_argument(
        "--same-products",
        action="store_true",
        help="On a CPU: peers choose the library of a matrix product as ours does; left is the layout.",
    )
    parser.add_argument("--repetitions", type=int, default=5, help="Default: %(default)s.")
    parser.add_argument(
        "--contenders", nargs="+", metavar="NAME", help="Some, and what of ours each is compared with. Default: all."
    )
    parser.add_argument("--seed", type=int, default=0, help="Chooses the pairs. Default: %(default)s.")
    parser.add_argument("--no-memory", action="store_true", help="Do not measure peak memory (a process each).")
    parser.add_argument("--output", type=new_file, metavar="FILE.json", help="Write the numbers.")
    parser.add_argument("--peak-memory-of", help=argparse.SUPPRESS)  # one contender's own process
    return parser


def _benchmark(argv: list[str]) -> None:
    arguments = parse_flags(build_parser(), argv)
    sizes = ("pairs", "slow_pairs", "micro_batch_size", "repetitions", "block_size", "steps_per_block")
    for name in sizes:
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.layers is not None and arguments.layers < 1:
        raise UserError("--layers must be at least 1")
    if arguments.slow_pairs > arguments.pairs:
        raise UserError("--slow-pairs must be at most --pairs")
    if torch.cuda.is_available():
        raise UserError("the peers run on a CPU: set CUDA_VISIBLE_DEVICES= (a GPU: tools.benchmarks.layers)")
    from megatron_dtrpo.config.settings import ParallelSettings

    initialize.start(ParallelSettings(), seed=0)
    try:
        # Only now: what imports megatron-core needs the runtime.
        from tools.benchmarks.peers.contenders import CONTENDERS, World, peak_memory

        names = list(arguments.contenders or CONTENDERS)
        for name in names:
            if name not in CONTENDERS:
                raise UserError(f"no contender {name!r}: choose from {', '.join(CONTENDERS)}")
        shape, drawn = _shape(arguments), _pairs(arguments)
        if arguments.peak_memory_of:
            family = CONTENDERS[arguments.peak_memory_of].family
            print(peak_memory(World(arguments, shape, drawn, family), arguments.peak_memory_of))
            return
        chosen = _chosen(names)
        # Before this process holds models of its own: a peer alone may fill the machine.
        memory = {} if arguments.no_memory else {name: _memory_in_own_process(argv, name) for name in chosen}
        results: dict[str, dict] = {}
        profiles: dict[str, list] = {}
        for family in dict.fromkeys(CONTENDERS[name].family for name in chosen):  # one family's weights at a time
            some = [name for name in chosen if CONTENDERS[name].family == family]
            measured, slow = _measure(World(arguments, shape, drawn, family), some, memory)
            results |= measured
            profiles |= slow
            gc.collect()
    finally:
        initialize.stop()
    comparison = _compare(arguments, results) | ({"profile": profiles} if profiles else {})
    _report(arguments, World(arguments, shape, drawn), results, comparison)


def _shape(arguments: argparse.Namespace) -> dict:
    own = {} if arguments.layers is None else {"num_hidden_layers": arguments.layers}
    return SIZES[arguments.size] | own


def _chosen(names: list[str]) -> list[str]:
    """The contenders called ``names`` that can run here, with those of ours that they are compared with."""
    from tools.benchmarks.peers.contenders import CONTENDERS

    compared = {ours for name in names for ours in CONTENDERS[name].against.values()}
    chosen = [name for name in CONTENDERS if name in names or name in compared]
    missing = [name for name in chosen if not CONTENDERS[name].available()]
    for name in missing:
        print(f"skipped {name}: {CONTENDERS[name].requires} is not installed", file=sys.stderr)
    return [name for name in chosen if name not in missing]


def _measure(world, names: list[str], memory: dict[str, int]) -> tuple[dict[str, dict], dict[str, list]]:
    """The results of contenders of one family; and of each of ours that misses a goal of speed where its time goes."""
    from tools.benchmarks.peers.contenders import CONTENDERS, check
    from tools.benchmarks.peers.goals import where_time_goes

    steps = {name: CONTENDERS[name].build(world) for name in names}
    differences = {}
    for name in names:
        differences[name] = check(world, name, steps[name])  # warms up, too
        print(f"{name} gives our loss, to within {differences[name]:.1e}", file=sys.stderr)
    seconds, tokens = _time(steps, world.arguments.repetitions)
    results = {
        name: {
            "pairs_per_second": steps[name].pairs / statistics.median(seconds[name]),
            "spread": (max(seconds[name]) - min(seconds[name])) / statistics.median(seconds[name]),
            "seconds": seconds[name],
            "pairs": steps[name].pairs,
            "tokens_per_pair": tokens[name] / steps[name].pairs,
            "peak_memory_bytes": memory.get(name),
            "loss_difference": differences[name],
        }
        for name in names
    }
    return results, {name: where_time_goes(steps[name].run) for name in _too_slow(world.arguments, results)}


def _too_slow(arguments: argparse.Namespace, results: dict) -> list[str]:
    """Those of ours that miss a goal of speed."""
    from tools.benchmarks.peers.goals import SPEED

    goals, against = _compare(arguments, results)["goals"], _comparisons(results)
    return list(dict.fromkeys(against[name][0] for name in goals if name in SPEED and not goals[name].met))


def _comparisons(results: dict) -> dict[str, tuple[str, str]]:
    """Of each comparison the contender of ours and the peer."""
    from tools.benchmarks.peers.contenders import CONTENDERS

    return {name: (ours, peer) for peer in results for name, ours in CONTENDERS[peer].against.items()}


def _pairs(arguments: argparse.Namespace):
    """``(pairs, tokenizer)``: pairs drawn at random from all."""
    from tools.benchmarks.peers import pairs

    vocabulary = SIZES[arguments.size]["vocab_size"]
    rows = pairs.preference_rows(Path(arguments.data)) if arguments.data else pairs.arithmetic_rows(1000)
    if len(rows) < arguments.pairs:
        raise UserError(f"{arguments.data or 'generated pairs'}: {len(rows)} rows, --pairs asks for {arguments.pairs}")
    tokenizer = pairs.open_tokenizer(arguments.tokenizer, rows, vocabulary - 1)
    drawn = random.Random(arguments.seed).sample(range(len(rows)), arguments.pairs)
    return pairs.tokenize(rows, drawn, tokenizer, vocabulary - 1), tokenizer  # the last id is [MASK]


def _time(steps: dict, repetitions: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of every repetition, and tokens through the policy."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    tokens = {}
    for repetition in range(repetitions):
        for name, step in steps.items():
            started = time.perf_counter()
            step.run()
            seconds[name].append(time.perf_counter() - started)
            tokens[name] = step.tokens()
        taken = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        print(f"round {repetition + 1} of {repetitions}: {taken}", file=sys.stderr)
    return seconds, tokens


def _memory_in_own_process(argv: list[str], name: str) -> int:
    command = [sys.executable, "-m", "tools.benchmarks.training", *argv, "--peak-memory-of", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        words = done.stderr.strip().splitlines()[-1:] if done.returncode > 0 else ["killed, perhaps for want of memory"]
        raise UserError(f"{name} alone in a process failed: {''.join(words)}; try a smaller --micro-batch-size")
    peak = int(done.stdout.split()[-1])
    print(f"peak memory of {name}: {peak / 2**30:.2f} GiB", file=sys.stderr)
    return peak


def _compare(arguments: argparse.Namespace, results: dict) -> dict:
    """Ours over each peer, in speed and in memory, with the verdict where there is a goal."""
    from tools.benchmarks.peers.goals import verdicts

    def ratios(key: str) -> dict[str, float]:
        both = {name: [results[one][key] for one in pair] for name, pair in _comparisons(results).items()}
        return {name: ours / peer for name, (ours, peer) in both.items() if peer}

    speed, memory = ratios("pairs_per_second"), ratios("peak_memory_bytes")
    goals = {} if arguments.layers else verdicts(arguments.size, speed, memory)
    return {"ratios": speed, "memory_ratios": memory, "goals": goals}


def _report(arguments: argparse.Namespace, world, results: dict, comparison: dict) -> None:
    from tools.benchmarks.peers.contenders import CONTENDERS

    ratios, goals = comparison["ratios"], comparison["goals"]

    def with_goal(name: str, ratio: float) -> str:
        return f"{ratio:.2f}" + (f" ({goals[name]})" if name in goals else "")

    prompt, response = world.mean_lengths()
    print(
        f"{arguments.size}, {world.shape['num_hidden_layers']} layers, fp32, {world.threads} threads, "
        f"blocks of {arguments.block_size}; {arguments.pairs} pairs: "
        f"{prompt:.0f} prompt and 2 x {response:.0f} response tokens, micro-batches of {arguments.micro_batch_size}"
    )
    print(
        "| | pairs per second | spread | tokens per pair | peak memory | ours is faster by |\n|---|---|---|---|---|---|"
    )
    for name, row in results.items():
        gib = f"{row['peak_memory_bytes'] / 2**30:.2f} GiB" if row["peak_memory_bytes"] else ""
        factor = with_goal(name, ratios[name]) if name in ratios else ""
        print(
            f"| {CONTENDERS[name].title} | {row['pairs_per_second']:.4f} | {row['spread']:.0%} | "
            f"{row['tokens_per_pair']:.0f} | {gib} | {factor} |"
        )
    for name, (ours, peer) in _comparisons(results).items():
        if name != peer:
            titles = f"{CONTENDERS[ours].title}, against {CONTENDERS[peer].title}"
            print(f"{titles}: {with_goal(name, ratios[name])}")
    for name, ratio in comparison["memory_ratios"].items():
        print(f"peak memory, ours over {name}: {with_goal(f'peak_memory_{name}', ratio)}")
    for name, shares in comparison.get("profile", {}).items():
        print(f"a goal of speed was missed; shares of a step of {CONTENDERS[name].title}:")
        for operation, share in shares:
            print(f"  {share:6.1%} {operation}")
    if arguments.output:
        from megatron_dtrpo.files import write_atomically

        record = {
            "settings": {k: v for k, v in vars(arguments).items() if k != "peak_memory_of"},
            "machine": describe_machine(),
            "mean_prompt_tokens": prompt,
            "mean_response_tokens": response,
            "threads": world.threads,
            "contenders": results,
            **comparison,
            "goals": {name: verdict._asdict() for name, verdict in goals.items()},
        }
        write_atomically(Path(arguments.output), json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(_benchmark))
