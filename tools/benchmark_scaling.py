#!/usr/bin/env python3
"""Time of a preference step against response length and against pairs per micro-batch: linear in work, or not?

    python tools/benchmark_scaling.py --plot scaling.png --output scaling.json
    python tools/benchmark_scaling.py --lengths 64 256 1024 --pairs-per-micro-batch 1 8

Work is what the packed layout asks for: tokens through the layers, and pairs of tokens that the mask lets see each
other. Time is fitted as ``a * tokens + b * visible pairs``; a term that grows with the packed length squared would show
as a bad fit, and as a power of time over work that is not 1.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from megatron_dtrpo.arguments import tool_parser
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import initialize
from megatron_dtrpo.train import run_command

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the peers are tests' own

from tests.peers.sizes import SIZES  # noqa: E402

PROMPT = 64
BLOCK_SIZE = 32


def build_parser() -> argparse.ArgumentParser:
    parser = tool_parser("benchmark_scaling.py", __doc__)
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
    parser.add_argument("--output", metavar="FILE.json", help="Write the numbers.")
    parser.add_argument("--plot", metavar="FILE.png", help="Draw them (needs matplotlib).")
    return parser


def _benchmark(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    if min(*arguments.lengths, *arguments.pairs_per_micro_batch, arguments.response, arguments.repetitions) < 1:
        raise UserError("all numbers must be at least 1")
    from megatron_dtrpo.config import ParallelSettings

    initialize.start(ParallelSettings(), seed=0)
    try:
        by_length, by_packing = _measure(arguments)
    finally:
        initialize.stop()
    fit = _fit(by_length)
    print("| response tokens | packed tokens | visible pairs | seconds | fitted |\n|---|---|---|---|---|")
    for row, fitted in zip(by_length, fit["fitted"], strict=True):
        print(f"| {row['response']} | {row['tokens']} | {row['visible']} | {row['seconds']:.4f} | {fitted:.4f} |")
    print(f"seconds = {fit['per_token']:.3e} x tokens + {fit['per_visible_pair']:.3e} x visible pairs; "
          f"R2 {fit['r_squared']:.4f}; time grows as work to the power {fit['power']:.2f}")  # fmt: skip
    print("| pairs per micro-batch | seconds per pair |\n|---|---|")
    for row in by_packing:
        print(f"| {row['pairs']} | {row['seconds_per_pair']:.4f} |")
    record = {"settings": vars(arguments), "by_length": by_length, "fit": fit, "by_packing": by_packing}
    if arguments.output:
        from megatron_dtrpo.training.checkpoint import write_atomically

        write_atomically(Path(arguments.output), json.dumps(record, indent=2) + "\n")
    if arguments.plot:
        _plot(arguments.plot, by_length, fit, by_packing)


def _measure(arguments: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    from megatron_dtrpo.diffusion.sharding import work
    from tests.peers.ours import Ours, noising, sample_of
    from tests.peers.pairs import Pair
    from tests.peers.weights import Learner

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

    def median_seconds(pairs: list[Pair], micro_batch_size: int) -> float:
        ours.micro_batch_size, seconds = micro_batch_size, []
        for repetition in range(arguments.repetitions + 1):
            started = time.perf_counter()
            ours.step(pairs)
            if repetition:  # the first warms up
                seconds.append(time.perf_counter() - started)
        return statistics.median(seconds)

    by_length = []
    for response in arguments.lengths:
        one = pair(0, response)
        packed = document(one)
        visible = int(work(packed.coordinates(), BLOCK_SIZE).sum()) * BLOCK_SIZE**2
        row = {"response": response, "tokens": len(packed), "visible": visible, "seconds": median_seconds([one], 1)}
        by_length.append(row)
    pairs = [pair(i, arguments.response) for i in range(max(arguments.pairs_per_micro_batch))]
    by_packing = [
        {"pairs": count, "seconds_per_pair": median_seconds(pairs, count) / len(pairs)}
        for count in arguments.pairs_per_micro_batch
    ]
    return by_length, by_packing


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
    power = np.polyfit(np.log(fitted), np.log(seconds), 1)[0] if len(rows) > 1 else math.nan
    return {
        "per_token": float(per_token),
        "per_visible_pair": float(per_visible),
        "r_squared": float(1 - ((seconds - fitted) ** 2).sum() / spread) if spread else math.nan,
        "power": float(power),
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
