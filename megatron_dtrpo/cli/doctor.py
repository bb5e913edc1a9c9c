"""Prints what this machine has, what a run needs of it, and how to fix what is wrong.

Give it the run's own settings and flags; without any it checks what every run needs. Each line is ok, a note (this run
does without), or missing, too old or wrong: then the run cannot work here, and the exit status is 1. It needs neither
torch nor megatron-core and starts nothing. In a checkout nothing need be installed: python -m megatron_dtrpo doctor
"""

from __future__ import annotations

import argparse
import warnings

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser
from megatron_dtrpo.doctor.checks import Line, can_run, examine
from megatron_dtrpo.doctor.machine import gather
from megatron_dtrpo.doctor.requirements import Requirements, read_requirements, with_processes
from megatron_dtrpo.errors import UserError, one_line

try:
    from megatron_dtrpo.cli.settings import parse_settings
    from megatron_dtrpo.config.parser import settings_parser
except ImportError as error:  # no PyYAML: the rest of the report is wanted all the more
    UNREAD: str | None = str(error)
else:
    UNREAD = None

EXAMPLES = """
  megatron-dtrpo doctor
  megatron-dtrpo doctor --config run.yaml --fp8-format hybrid
  megatron-dtrpo doctor --config run.yaml --nproc 8     # under torchrun --nproc-per-node 8
"""


def build_parser() -> Parser:
    make = settings_parser if UNREAD is None else command_parser
    parser = make("megatron-dtrpo doctor", __doc__, EXAMPLES)
    parser.add_argument("--nproc", type=_positive, metavar="N", help="Processes on this machine, as torchrun has them.")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    return run_command(_doctor, argv)


def _doctor(argv: list[str]) -> int:
    warnings.filterwarnings("ignore")
    machine = gather()
    lines = examine(machine, _requirements(argv, len(machine.gpus)))
    print("\n".join(map(_text, lines)))
    print("this run works here" if can_run(lines) else "this run does not work here: fix the lines above")
    return 0 if can_run(lines) else 1


def _requirements(argv: list[str], gpus: int) -> Requirements:
    """Raises UserError for an unknown flag or key, and for a file that cannot be read."""
    if UNREAD is not None:
        own, settings = build_parser().parse_known_args(argv)
        return with_processes(
            Requirements(configured=bool(settings), unread=UNREAD if settings else None), own.nproc, gpus
        )
    own, config, given = parse_settings(build_parser(), argv)
    try:
        return read_requirements(config, bool(given), own.nproc, gpus)
    except UserError:
        raise
    except Exception as error:
        return Requirements(unread=one_line(error))


def _text(line: Line) -> str:
    advice = f"\n{'':30}-> {line.fix}" if line.fix and line.status != "ok" else ""
    return f"{line.status:<9}{line.name:<20} {line.detail}{advice}"
