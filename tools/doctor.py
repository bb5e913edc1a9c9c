#!/usr/bin/env python3
"""Says what this machine has, what a run needs of it, and how to mend what is wrong.

    python tools/doctor.py                                           # any run
    python tools/doctor.py --config run.yaml --fp8-format hybrid     # this run: the trainer's own settings and flags
    python tools/doctor.py --config run.yaml --nproc 8               # under torchrun --nproc-per-node 8

Each line is ok, a note (this run does without), or missing, too old or wrong: then the run cannot work here, and the
exit status is 1. Needs neither torch nor megatron-core, and starts nothing.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

# From a checkout nothing need be installed yet.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_dtrpo.doctor.checks import Line, can_run, examine  # noqa: E402
from megatron_dtrpo.doctor.machine import gather, one_line  # noqa: E402
from megatron_dtrpo.doctor.requirements import Needs, read_needs  # noqa: E402
from megatron_dtrpo.errors import UserError  # noqa: E402


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nproc", type=int, metavar="N", help="Processes on this machine, as torchrun counts them.")
    arguments, settings = parser.parse_known_args(argv)
    if arguments.nproc is not None and arguments.nproc < 1:
        parser.error("--nproc must be at least 1")
    warnings.filterwarnings("ignore")
    facts = gather()
    try:
        needs = read_needs(settings, arguments.nproc, len(facts.gpus))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # a broken torch, say: the rest of the report is wanted all the more
        needs = Needs(unread=one_line(error))
    lines = examine(facts, needs)
    print("\n".join(map(_text, lines)))
    print("this run works here" if can_run(lines) else "this run does not work here: mend the lines above")
    return 0 if can_run(lines) else 1


def _text(line: Line) -> str:
    mend = f"\n{'':30}-> {line.mend}" if line.mend and line.status != "ok" else ""
    return f"{line.status:<9}{line.name:<20} {line.said}{mend}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
