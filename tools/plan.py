#!/usr/bin/env python3
"""Which layouts of so many GPUs a run fits on, and roughly how fast: best first.

    python tools/plan.py --config examples/dtrpo_7b.yaml --gpus 64 --gpu-memory 80

Takes every setting of the trainer as a flag too; sizes of parallelism and recomputation are what is searched. Needs no
GPU, no data and no checkpoint. The formulae, and how far they are off, are in docs/memory.md.
"""

from __future__ import annotations

import math
import sys

from megatron_dtrpo.config.parser import build_parser, parse_command
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.planning.layouts import layouts
from megatron_dtrpo.planning.memory import GIB
from megatron_dtrpo.planning.report import layout_table
from megatron_dtrpo.train import run_command


def _plan(argv: list[str]) -> None:
    parser = build_parser("plan.py", __doc__)
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the run.")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GiB of one. Default: 80.")
    parser.add_argument("--top", type=int, default=10, help="Layouts to print. Default: 10.")
    own, config, _ = parse_command(parser, argv)
    for name, value in (("gpus", own.gpus), ("gpu-memory", own.gpu_memory), ("top", own.top)):
        if not 0 < value < math.inf:
            raise UserError(f"--{name} is {value}: it must be a positive number")
    if config.model.vocab_size is None:
        raise UserError("vocab_size is missing: give --vocab-size, or a --config that has it")
    found = layouts(config, own.gpus, int(own.gpu_memory * GIB))
    print(
        f"{own.gpus} GPUs of {own.gpu_memory:g} GiB, seq_length {config.data.seq_length}, "
        f"global_batch_size {config.data.global_batch_size}: {sum(each.fits for each in found)} of "
        f"{len(found)} layouts fit"
    )
    print("\n".join(layout_table(found[: own.top])))


if __name__ == "__main__":
    sys.exit(run_command(_plan))
