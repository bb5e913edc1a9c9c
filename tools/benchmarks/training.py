"""Times a full preference step (reference, policy forward and backward, optimizer) beside its peers, in one run.

Contenders alternate; medians, their spread and ratios are printed. All have the same random weights (fp32; the learning
rate is 0, so that they stay the same) and run the same pairs; those that run a pair many times get the first few
pairs only, and ours is timed on these too. Before being timed, each must give the loss of ours on the same noise. At
the default size each ratio stands beside its goal; when a speed misses its own, shares of a step's time follow.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser, new_file, parse_flags
from megatron_dtrpo.errors import UserError, one_line
from megatron_dtrpo.runtime import initialize
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
    parser.add_argument("--contenders", nargs="+", metavar="NAME", help="Some only (ours always). Default: all.")
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
    if arguments.slow_pairs > arguments.pairs:
        raise UserError("--slow-pairs must be at most --pairs")
    if torch.cuda.is_available():
        raise UserError("the peers run on a CPU: set CUDA_VISIBLE_DEVICES= (a GPU: tools.benchmarks.layers)")
    from megatron_dtrpo.config.settings import ParallelSettings

    initialize.start(ParallelSettings(), seed=0)
    try:
        # Only now: what imports megatron-core needs the runtime.
        from tools.benchmarks.peers.contenders import CONTENDERS, World, check, peak_memory
        from tools.benchmarks.peers.goals import SPEED, where_time_goes

        chosen = list(arguments.contenders or CONTENDERS)
        for name in chosen:
            if name not in CONTENDERS:
                raise UserError(f"no contender {name!r}: choose from {', '.join(CONTENDERS)}")
        world = World(arguments, SIZES[arguments.size], _pairs(arguments))
        if arguments.peak_memory_of:
            print(peak_memory(world, arguments.peak_memory_of))
            return
        chosen = [name for name in CONTENDERS if name in chosen or name.startswith("ours")]
        missing = [name for name in chosen if not CONTENDERS[name].available()]
        for name in missing:
            print(f"skipped {name}: {CONTENDERS[name].requires} is not installed", file=sys.stderr)
        chosen = [name for name in chosen if name not in missing]
        # Before this process holds models of its own: a peer alone may fill the machine.
        memory = {} if arguments.no_memory else {name: _memory_in_own_process(argv, name) for name in chosen}
        steps = {name: CONTENDERS[name].build(world) for name in chosen}
        differences = {}
        for name in chosen:
            differences[name] = check(world, name, steps[name])  # warms up, too
            print(f"{name} gives our loss, to within {differences[name]:.1e}", file=sys.stderr)
        seconds, tokens = _time(steps, arguments.repetitions)
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
            for name in chosen
        }
        comparison = _compare(arguments.size, results)
        if any(name in SPEED and not verdict.met for name, verdict in comparison["goals"].items()):
            comparison["profile"] = where_time_goes(steps["ours"].run)
    finally:
        initialize.stop()
    _report(arguments, world, results, comparison)


def _pairs(arguments: argparse.Namespace):
    """``(pairs, tokenizer)``: pairs drawn at random from all."""
    from tools.benchmarks.peers import pairs

    vocabulary = SIZES[arguments.size]["vocab_size"]
    rows = pairs.preference_rows(Path(arguments.data)) if arguments.data else pairs.arithmetic_rows(1000)
    if len(rows) < arguments.pairs:
        raise UserError(f"{arguments.data or 'generated pairs'}: {len(rows)} rows, --pairs asks for {arguments.pairs}")
    if arguments.tokenizer:
        if not Path(arguments.tokenizer).is_dir():
            raise UserError(f"--tokenizer {arguments.tokenizer}: no such folder")
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
        except (OSError, ValueError) as error:
            raise UserError(f"--tokenizer {arguments.tokenizer}: {one_line(error)}") from None
    else:
        tokenizer = pairs.train_tokenizer(rows, vocabulary - 1)
    drawn = random.Random(arguments.seed).sample(range(len(rows)), arguments.pairs)
    return pairs.tokenize(rows, drawn, tokenizer, vocabulary - 1), tokenizer  # the last id is [MASK]


def _machine() -> dict[str, str]:
    """What numbers depend on besides the code."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # with +cpu or +cu130, which package metadata may lack
        **{name: metadata.version(name) for name in ("megatron-core", "transformers")},
        **({"trl": metadata.version("trl")} if find_spec("trl") else {}),
    }


def _processor() -> str:
    """Its model, which Python knows by its architecture only."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


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


def _compare(size: str, results: dict) -> dict:
    """Ours over each peer, in speed and in memory, with the verdict where there is a goal."""
    from tools.benchmarks.peers.contenders import CONTENDERS
    from tools.benchmarks.peers.goals import verdicts

    def over(ours: str, other: str, key: str = "pairs_per_second") -> float:
        return results[ours][key] / results[other][key]

    against = {name: CONTENDERS[name].against for name in results if CONTENDERS[name].against}
    ratios = {name: over(ours, name) for name, ours in against.items()}
    if "fast_dllm_layout" in results:
        ratios["fast_dllm_layout_cached"] = over("ours_cached", "fast_dllm_layout")
    memory = {n: over(o, n, "peak_memory_bytes") for n, o in against.items() if results[n]["peak_memory_bytes"]}
    return {"ratios": ratios, "memory_ratios": memory, "goals": verdicts(size, ratios, memory)}


def _report(arguments: argparse.Namespace, world, results: dict, comparison: dict) -> None:
    from tools.benchmarks.peers.contenders import CONTENDERS

    ratios, goals = comparison["ratios"], comparison["goals"]

    def with_goal(name: str, ratio: float) -> str:
        return f"{ratio:.2f}" + (f" ({goals[name]})" if name in goals else "")

    prompt, response = world.mean_lengths()
    print(
        f"{arguments.size}, fp32, {world.threads} threads, blocks of {arguments.block_size}; {arguments.pairs} pairs: "
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
    if "fast_dllm_layout_cached" in ratios:
        factor = with_goal("fast_dllm_layout_cached", ratios["fast_dllm_layout_cached"])
        print(f"ours with a cached reference, against Fast-dLLM v2's layout: {factor}")
    for name, ratio in comparison["memory_ratios"].items():
        print(f"peak memory, ours over {name}: {with_goal(f'peak_memory_{name}', ratio)}")
    if "profile" in comparison:
        print("a goal of speed was missed; shares of a step of ours, live reference:")
        for operation, share in comparison["profile"]:
            print(f"  {share:6.1%} {operation}")
    if arguments.output:
        from megatron_dtrpo.files import write_atomically

        record = {
            "settings": {k: v for k, v in vars(arguments).items() if k != "peak_memory_of"},
            "machine": _machine(),
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
