"""How fast batches are built, beside the step they are built for, and whether memory stays flat over a million pairs.

Batches are the trainer's own: noised, laid out, balanced and packed, on one core, from a tokenized store on disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser, new_file, parse_flags
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import initialize
from tools.benchmarks.peers.sizes import SIZES

BLOCK_SIZE, SEQ_LENGTH, MICRO_BATCH, GLOBAL_BATCH = 8, 4096, 32, 256
TIMED_PAIRS = 16  # of a step: a large model takes no more of them a second in larger ones
WRITTEN_AT_ONCE = 10000
EXAMPLES = """
  python -m tools.benchmarks.batches                       # 1,000,000 generated arithmetic pairs
  python -m tools.benchmarks.batches --stream 100000
"""


def build_parser() -> Parser:
    parser = command_parser("python -m tools.benchmarks.batches", __doc__, EXAMPLES)
    parser.add_argument("--stream", type=int, default=1_000_000, help="Pairs that pass by. Default: %(default)s.")
    parser.add_argument("--size", choices=SIZES, default="135m", help="Model of the step. Default: %(default)s.")
    parser.add_argument("--steps", type=int, default=5, help="Steps that are timed. Default: %(default)s.")
    parser.add_argument("--output", type=new_file, metavar="FILE.json", help="Write the numbers.")
    return parser


def _benchmark(argv: list[str]) -> None:
    arguments = parse_flags(build_parser(), argv)
    if arguments.stream < 10 * GLOBAL_BATCH or arguments.steps < 1:
        raise UserError(f"--stream must be at least {10 * GLOBAL_BATCH}, --steps at least 1")
    from megatron_dtrpo.config.settings import ParallelSettings

    step = None
    with tempfile.TemporaryDirectory() as folder:
        builder, tokenized = _open(Path(folder), arguments.stream)
        initialize.start(ParallelSettings(), seed=0)
        try:
            step = _pairs_per_second_of_steps(arguments)
        finally:
            initialize.stop()
        built, memory = _stream(builder, arguments.stream)
    growth = memory[-1] - memory[0]
    print(f"tokenized {tokenized:.0f} pairs a second; built {built:.0f} a second on one core")
    print(f"the step ({arguments.size}) takes {step:.1f} pairs a second: building is {built / step:.0f} times faster")
    first, last, more = (size / 2**20 for size in (memory[0], memory[-1], growth))
    print(f"anonymous memory after a tenth of the stream {first:.0f} MiB, after all {last:.0f} MiB: {more:+.1f} MiB")
    if arguments.output:
        from megatron_dtrpo.files import write_atomically

        record = {
            "pairs": arguments.stream,
            "built_per_second": built,
            "step_pairs_per_second": step,
            "ratio": built / step,
            "memory_bytes_by_tenth": memory,
        }
        write_atomically(Path(arguments.output), json.dumps(record, indent=2) + "\n")


def _open(folder: Path, count: int):
    """The trainer's batch builder over ``count`` generated pairs, and how many were tokenized a second."""
    from megatron_dtrpo.data.batches import BatchBuilder
    from megatron_dtrpo.data.sampler import SampleOrder, select_by_length
    from megatron_dtrpo.data.token_store import build_token_store
    from megatron_dtrpo.data.tokenizer import build_tokenizer
    from tools.benchmarks.peers.ours import noising
    from tools.benchmarks.peers.pairs import arithmetic_rows

    with (folder / "pairs.jsonl").open("w") as file:
        for first in range(0, count, WRITTEN_AT_ONCE):
            rows = arithmetic_rows(min(WRITTEN_AT_ONCE, count - first), seed=first)
            file.writelines(json.dumps(row) + "\n" for row in rows)
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    started = time.perf_counter()
    store = build_token_store(folder / "pairs.jsonl", "preference", tokenizer, folder / "cache")
    tokenized = count / (time.perf_counter() - started)
    noise = noising("dtrpo", 1, block_size=BLOCK_SIZE, mask_id=tokenizer.mask_id, steps_per_block=8)

    usable, _ = select_by_length(store, noise.packed_lengths(store), SEQ_LENGTH)
    builder = BatchBuilder(
        store,
        SampleOrder(usable, seed=0),
        noise,
        global_batch_size=GLOBAL_BATCH,
        micro_batch_size=MICRO_BATCH,
        seq_length=SEQ_LENGTH,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    return builder, tokenized


def _pairs_per_second_of_steps(arguments: argparse.Namespace) -> float:
    """Of the whole preference step on all cores, on pairs of the same kind."""
    from tools.benchmarks.peers import pairs
    from tools.benchmarks.peers.ours import Ours, noising, sample_of
    from tools.benchmarks.peers.weights import Learner

    shape = SIZES[arguments.size]
    vocabulary = shape["vocab_size"] - 1
    rows = pairs.arithmetic_rows(TIMED_PAIRS)
    drawn = pairs.tokenize(rows, range(len(rows)), pairs.train_tokenizer(rows, 300), vocabulary)
    noise = noising("dtrpo", 1, block_size=BLOCK_SIZE, mask_id=vocabulary, steps_per_block=8)
    ours = Ours(
        Learner(shape, lr=0.0),
        shape,
        lambda pair: noise.document(sample_of(pair), pair.prompt, pair.responses),
        beta=0.1,
        micro_batch_size=MICRO_BATCH,
        seq_length=SEQ_LENGTH,
    )
    seconds = []
    for _ in range(arguments.steps + 1):
        started = time.perf_counter()
        ours.step(drawn)
        seconds.append(time.perf_counter() - started)
    return len(drawn) / statistics.median(seconds[1:])


def _stream(builder, count: int) -> tuple[float, list[int]]:
    """Builds every batch of one epoch on one core: pairs a second, and anonymous memory after each tenth."""
    torch.set_num_threads(1)
    steps = count // GLOBAL_BATCH
    started, memory = time.perf_counter(), []
    for step in range(steps):
        builder.step(step * GLOBAL_BATCH)
        if (step + 1) % (steps // 10) == 0:
            memory.append(_anonymous_memory())
    return steps * GLOBAL_BATCH / (time.perf_counter() - started), memory


def _anonymous_memory() -> int:
    """Resident bytes of this process that are no file's. Linux only."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(run_command(_benchmark))
