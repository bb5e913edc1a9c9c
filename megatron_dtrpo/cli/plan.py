"""Prints the layouts of a number of GPUs that a run fits on, and roughly how fast they are: best first.

Every setting of the trainer is a flag too; sizes of parallelism and recomputation are searched. Needs no GPU, no data
and no checkpoint. The formulae, and how far they are off, are in docs/memory.md.
"""

from __future__ import annotations

import math

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.cli.settings import parse_settings
from megatron_dtrpo.config.command_line import Parser
from megatron_dtrpo.config.parser import settings_parser
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.planning.layouts import layouts
from megatron_dtrpo.planning.memory import GIB
from megatron_dtrpo.planning.report import layout_table
from megatron_dtrpo.planning.step_time import batch_of_step

EXAMPLES = """
  megatron-dtrpo plan --config examples/dtrpo_7b.yaml --gpus 64 --gpu-memory 80
"""


def build_parser() -> Parser:
    parser = settings_parser("megatron-dtrpo plan", __doc__, EXAMPLES)
    parser.add_argument("--gpus", type=int, required=True, help="GPUs of the run.")
    parser.add_argument("--gpu-memory", type=float, default=80, help="GiB of one. Default: 80.")
    parser.add_argument("--top", type=int, default=10, help="Layouts to print. Default: 10.")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_command(_plan, argv)


def _plan(argv: list[str]) -> None:
    own, config, _ = parse_settings(build_parser(), argv)
    for name, value in (("gpus", own.gpus), ("gpu-memory", own.gpu_memory), ("top", own.top)):
        if not 0 < value < math.inf:
            raise UserError(f"--{name} is {value}: it must be a positive number")
    if config.model.vocab_size is None:
        raise UserError("vocab_size is missing: give --vocab-size, or a --config that has it")
    found = layouts(config, own.gpus, int(own.gpu_memory * GIB))
    print(
        f"{own.gpus} GPUs of {own.gpu_memory:g} GiB, seq_length {config.data.seq_length}, "
        f"{batch_of_step(config)} examples a step: {sum(each.fits for each in found)} of "
        f"{len(found)} layouts fit"
    )
    print("\n".join(layout_table(found[: own.top])))
