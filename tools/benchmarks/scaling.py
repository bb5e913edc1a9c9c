"""Time of a preference step against response length and against pairs per micro-batch: linear in work, or not?

Work is what the packed layout asks for: tokens through the layers, and pairs of tokens that the mask lets see each
other. Time is fitted as ``a * tokens + b * visible pairs``. The power is that of time over the multiply-adds of the two
as the model's shape has them, which knows nothing of the measured times: cost beyond the mask's work makes it exceed 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser, new_file, parse_flags
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import initialize
from tools.benchmarks.peers.sizes import SIZES

PROMPT = 64
BLOCK_SIZE = 32
EXAMPLES = """
  python -m tools.benchmarks.scaling --plot scaling.png --output scaling.json
  python -m tools.benchmarks.scaling --lengths 64 256 1024 --pairs-per-micro-batch 1 8
"""


def build_parser() -> Parser:
    parser = command_parser("python -m tools.benchmarks.scaling", __doc__, EXAMPLES)
    parser.add_argument("--size", choices=SIZES, default="tiny", help="Model. Default: %(default)s.")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048], help="Of responses, one pair a step."
    )
    parser.add_argument(
        "--pairs-per-micro-batch",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="Of the same pairs. Default: 1 2 4 8.",
    )
    parser.add_argument("--response", type=int, default=110, help="Response length for these. Default: %(default)s.")
    parser.add_argument("--repetitions", type=int, default=5, help="Default: %(default)s.")
    parser.add_argument("--output", type=new_file, metavar="FILE.json", help="Write the numbers.")
    parser.add_argument("--plot", type=new_file, metavar="FILE.png", help="Draw them (needs matplotlib).")
    return parser


def _benchmark(argv: list[str]) -> None:
    arguments = parse_flags(build_parser(), argv)
    if min(*arguments.lengths, *arguments.pairs_per_micro_batch, arguments.response, arguments.repetitions) < 1:
        raise UserError("all numbers must be at least 1")
    from megatron_dtrpo.config.settings import ParallelSettings

    initialize.start(ParallelSettings(), seed=0)
    try:
        by_length, by_packing = _measure(arguments)
    finally:
        initialize.stop()
    fit = _fit(by_length)
    print("| response tokens | packed tokens | visible pairs | seconds | fitted |\n|---|---|---|---|---|")
    for row, fitted in zip(by_length, fit["fitted"], strict=True):
        print(f"| {row['response']} | {row['tokens']} | {row['visible']} | {row['seconds']:.4f} | {fitted:.4f} |")
    print(f"seconds = {fit['per_token']:.3e} x tokens + {fit['per_visible_pair']:.3e} x visible pairs", end="")
    several = fit["power"] is not None  # one length fits anything
    print(f"; R2 {fit['r_squared']:.4f}; time grows as work to the power {fit['power']:.2f}" if several else "")
    print("| pairs per micro-batch | seconds per pair |\n|---|---|")
    for row in by_packing:
        print(f"| {row['pairs']} | {row['seconds_per_pair']:.4f} |")
    record = {"settings": vars(arguments), "by_length": by_length, "fit": fit, "by_packing": by_packing}
    if arguments.output:
        from megatron_dtrpo.files import write_atomically

        write_atomically(Path(arguments.output), json.dumps(record, indent=2) + "\n")
    if arguments.plot:
        _plot(arguments.plot, by_length, fit, by_packing)


def _measure(arguments: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    from megatron_dtrpo.diffusion.sharding import work
    from tools.benchmarks.peers.ours import Ours, noising, sample_of
    from tools.benchmarks.peers.pairs import Pair
    from tools.benchmarks.peers.weights import Learner

    shape = SIZES[arguments.size]
    mask_id = shape["vocab_size"] - 1
    noise = noising("dtrpo", 1, block_size=BLOCK_SIZE, mask_id=mask_id, steps_per_block=8)
    generator = torch.Generator().manual_seed(0)

    def document(pair: Pair):
        return noise.document(sample_of(pair), pair.prompt, pair.responses)

    def pair(index: int, response: int) -> Pair:
        lengths = (PROMPT, response, response)
        return Pair(index, *(torch.randint(mask_id, (n,), generator=generator) for n in lengths))

    ours = Ours(Learner(shape, lr=0.0), shape, document, beta=0.1, micro_batch_size=1, seq_length=2**30)

    def medians(cases: list[tuple[list[Pair], int]]) -> list[float]:
        """Seconds of a step on each case's pairs at its micro-batch size. Cases take turns; the first step of a turn
        is not timed, for it maps the memory that other cases did not need, which a run does once."""
        seconds: list[list[float]] = [[] for _ in cases]
        for _ in range(arguments.repetitions):
            for (pairs, ours.micro_batch_size), times in zip(cases, seconds, strict=True):
                ours.step(pairs)
                started = time.perf_counter()
                ours.step(pairs)
                times.append(time.perf_counter() - started)
        return [statistics.median(times) for times in seconds]

    singles = [pair(0, response) for response in arguments.lengths]
    by_length = []
    for one, response, seconds in zip(singles, arguments.lengths, medians([([p], 1) for p in singles]), strict=True):
        packed = document(one)
        visible = int(work(packed.coordinates(), BLOCK_SIZE).sum()) * BLOCK_SIZE**2
        by_length.append(
            {
                "response": response,
                "tokens": len(packed),
                "visible": visible,
                "work": multiply_adds(shape, len(packed), visible),
                "seconds": seconds,
            }
        )
    pairs = [pair(i, arguments.response) for i in range(max(arguments.pairs_per_micro_batch))]
    counts = arguments.pairs_per_micro_batch
    by_packing = [
        {"pairs": count, "seconds_per_pair": seconds / len(pairs)}
        for count, seconds in zip(counts, medians([(pairs, count) for count in counts]), strict=True)
    ]
    return by_length, by_packing


def multiply_adds(shape: dict, tokens: int, visible: int) -> int:
    """Of one pass through the layers."""
    h, f = shape["hidden_size"], shape["intermediate_size"]
    shared = h * shape["num_key_value_heads"] // shape["num_attention_heads"]
    return shape["num_hidden_layers"] * (tokens * h * (2 * h + 2 * shared + 3 * f) + visible * 2 * h)


def _fit(rows: list[dict]) -> dict:
    """Least squares of relative errors, so that short responses count as much as long ones; no negative coefficient."""
    tokens, visible, seconds = (np.array([float(row[key]) for row in rows]) for key in ("tokens", "visible", "seconds"))
    best = None
    for columns in ([tokens, visible], [tokens, 0 * visible], [0 * tokens, visible]):
        design = np.stack(columns, 1) / seconds[:, None]
        coefficients = np.linalg.lstsq(design, np.ones_like(seconds), rcond=None)[0]
        error = float(((design @ coefficients - 1) ** 2).sum())
        if (coefficients >= 0).all() and (best is None or error < best[0]):
            best = error, coefficients
    per_token, per_visible = best[1]
    fitted = per_token * tokens + per_visible * visible
    spread = ((seconds - seconds.mean()) ** 2).sum()
    work = np.array([float(row["work"]) for row in rows])
    power = np.polyfit(np.log(work), np.log(seconds), 1)[0] if len(rows) > 1 else None
    return {
        "per_token": float(per_token),
        "per_visible_pair": float(per_visible),
        "r_squared": float(1 - ((seconds - fitted) ** 2).sum() / spread) if spread else None,
        "power": power if power is None else float(power),
        "fitted": fitted.tolist(),
    }


def _plot(path: str, by_length: list[dict], fit: dict, by_packing: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    lengths = [row["response"] for row in by_length]
    left.loglog(lengths, [row["seconds"] for row in by_length], "o", label="measured")
    left.loglog(lengths, fit["fitted"], "-", label="a tokens + b visible pairs")
    left.set(xlabel="response tokens", ylabel="seconds per pair")
    left.legend()
    right.plot([row["pairs"] for row in by_packing], [row["seconds_per_pair"] for row in by_packing], "o-")
    right.set(xlabel="pairs per micro-batch", ylabel="seconds per pair", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(run_command(_benchmark))
