"""Times decoding beside the same decoder in plain transformers: same weights, same prompts, one run.

Runs alternate (ours at batch 1, the peer, ours at larger batches, and again); the medians and their spread are printed.
Weights are random, so every response has the same length and no end token. Greedy answers are compared first.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser, parse_flags
from megatron_dtrpo.errors import UserError
from tools.benchmarks.peers.sizes import SIZES

EXAMPLES = """
  python -m tools.benchmarks.decoding                              # a model of 135M parameters
  python -m tools.benchmarks.decoding --size tiny --prompts 48
"""


def build_parser() -> Parser:
    parser = command_parser("python -m tools.benchmarks.decoding", __doc__, EXAMPLES)
    parser.add_argument("--size", choices=SIZES, default="135m", help="Model. Default: %(default)s.")
    parser.add_argument("--block-size", type=int, default=32, help="Default: %(default)s.")
    parser.add_argument("--prompts", type=int, default=16, help="Prompts, 32 to 96 tokens long. Default: %(default)s.")
    parser.add_argument("--max-new-tokens", type=int, default=48, help="Default: %(default)s.")
    parser.add_argument("--threshold", type=float, default=0.9, help="Default: %(default)s.")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16], help="Of ours. Default: 1 16.")
    parser.add_argument("--repetitions", type=int, default=5, help="Default: %(default)s.")
    parser.add_argument("--output", metavar="FILE.json", help="Write the numbers.")
    return parser


def _benchmark(argv: list[str]) -> None:
    arguments = parse_flags(build_parser(), argv)
    if min(arguments.prompts, arguments.repetitions, *arguments.batch_sizes) < 1:
        raise UserError("--prompts, --repetitions and --batch-sizes must be at least 1")
    from megatron_dtrpo.config.settings import ParallelSettings
    from megatron_dtrpo.runtime import initialize

    initialize.start(ParallelSettings(), seed=0)
    try:
        _run(arguments)
    finally:
        initialize.stop()


def _run(arguments: argparse.Namespace) -> None:
    from megatron_dtrpo.config.decoding import DecodingOptions
    from megatron_dtrpo.inference.decoder import BlockDecoder, Vocabulary
    from tools.benchmarks.peers import transformers_decoder
    from tools.benchmarks.peers.weights import random_pair

    shape = SIZES[arguments.size]
    peer, model = random_pair(shape)
    vocabulary = shape["vocab_size"]
    mask_id, end_id = vocabulary - 1, vocabulary  # an end token that no logit stands for
    rng = random.Random(0)
    prompts = [[rng.randrange(mask_id) for _ in range(rng.randint(32, 96))] for _ in range(arguments.prompts)]
    small = min(8, arguments.block_size)
    rule = {"threshold": arguments.threshold, "max_new_tokens": arguments.max_new_tokens, "small_block_size": small}
    decoder = BlockDecoder(model, Vocabulary(vocabulary, mask_id, frozenset([end_id])), arguments.block_size, 32768)

    def theirs() -> list[list[int]]:
        known = {"block_size": arguments.block_size, "mask_id": mask_id, "end_id": end_id}
        return [transformers_decoder.decode(peer, prompt, **rule, **known) for prompt in prompts]

    def ours(batch_size: int):
        return lambda: [c.tokens for c in decoder.decode(prompts, DecodingOptions(**rule), batch_size=batch_size)]

    contenders = {"transformers, one at a time": theirs}
    contenders |= {f"ours, batch {size}": ours(size) for size in arguments.batch_sizes}
    answers = {name: run() for name, run in contenders.items()}  # warm-up, and the check
    same = sum(
        a == b for other in answers.values() for a, b in zip(answers["transformers, one at a time"], other, strict=True)
    )
    print(f"equal answers: {same} of {len(prompts) * len(answers)} (fp32 rounding may flip one)")
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repetitions):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    _report(arguments, seconds, arguments.prompts * arguments.max_new_tokens)


def _report(arguments: argparse.Namespace, seconds: dict[str, list[float]], tokens: int) -> None:
    median = {name: statistics.median(values) for name, values in seconds.items()}
    base = median["transformers, one at a time"]
    print(f"| {arguments.size}, block {arguments.block_size} | tokens per second | spread | ratio |\n|---|---|---|---|")
    rows = {}
    for name, values in seconds.items():
        spread = (max(values) - min(values)) / median[name]
        rows[name] = {"tokens_per_second": tokens / median[name], "spread": spread, "ratio": base / median[name]}
        print(f"| {name} | {tokens / median[name]:.1f} | {spread:.0%} | {base / median[name]:.2f} |")
    if arguments.output:
        from megatron_dtrpo.files import write_atomically

        write_atomically(Path(arguments.output), json.dumps({**vars(arguments), "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(_benchmark))
