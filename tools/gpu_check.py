#!/usr/bin/env python3
"""Checks everything that only a GPU can show, in one command; about ten minutes on a cold machine.

    python tools/gpu_check.py --output DIR                  # one GPU
    python tools/gpu_check.py --output DIR --size tiny      # anywhere, to see that it runs; skips what needs CUDA
    python tools/gpu_check.py --output DIR --parts flex fp8

Each part runs in a process of its own with a time limit of its own: one that fails, hangs or crashes costs the others
nothing. DIR gets gpu_check.md and gpu_check.json, rewritten after every part, and a folder with the log of each. The
exit status is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

# From a checkout nothing need be installed: this one's package comes before any other.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_checks import report  # noqa: E402
from gpu_checks.common import REPOSITORY, SIZES, Result, Size, environment  # noqa: E402

from megatron_dtrpo.errors import one_line  # noqa: E402


class Part(NamedTuple):
    """A function of a module in gpu_checks, by name: where torch is broken, the doctor still says so. It is ended after
    ``seconds``, more than twice the time that it takes where nothing is compiled or cached yet."""

    module: str
    function: str
    seconds: float

    def load(self) -> Callable[[Size, Path], Result]:
        return getattr(import_module(f"gpu_checks.{self.module}"), self.function)


PARTS = {
    "doctor": Part("commands", "doctor", 100),
    "flex": Part("attention", "compare", 120),
    "overlap": Part("commands", "overlap", 200),
    "fp32": Part("commands", "same_on_cpu", 200),
    "lora": Part("commands", "lora", 150),
    "online": Part("commands", "online", 150),
    "layers": Part("commands", "layers", 170),
    "fp8": Part("commands", "fp8", 150),
    "memory": Part("steps", "memory", 120),
    "profile": Part("steps", "profile", 120),
    "decoding": Part("decoding", "compare", 150),
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="Folder for the table and the logs.")
    parser.add_argument("--size", choices=SIZES, default="full", help="Default: %(default)s.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="Some only. Default: all.")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--decode-to", type=Path, help=argparse.SUPPRESS)  # decoding's half on the CPU
    return parser


def main(argv: list[str]) -> int:
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.decode_to is not None:
        Part("decoding", "decode_to", 0).load()(SIZES[arguments.size], arguments.decode_to)
        return 0
    if arguments.output is None:
        parser.error("--output DIR is needed")
    if arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output {arguments.output} is a file; give a folder")
    folder = arguments.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.part is not None:
        _run_here(arguments.part, SIZES[arguments.size], folder / arguments.part)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # neither process groups nor a GPU in an unknown state are to keep a part from ending
    rows = []
    for name in arguments.parts:
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows.append(_in_a_process(name, arguments.size, folder))
        text = report.write(folder, arguments.size, rows)
    print(text, end="")
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def _in_a_process(name: str, size: str, folder: Path) -> dict:
    """Runs a part by itself; its row of the table, whatever becomes of it."""
    own = folder / name
    own.mkdir(exist_ok=True)
    log, target = own / "log", own / "result.json"
    limit = PARTS[name].seconds * (1 if size == "full" else 5)  # a small check may share its processor with others
    for old in (log, target):
        old.unlink(missing_ok=True)
    words = [sys.executable, str(Path(__file__).resolve()), "--output", str(folder), "--size", size, "--part", name]
    started, timed_out = time.monotonic(), False
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=environment(), start_new_session=True
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
        except BaseException:  # the user's interrupt too: a session of its own does not get that
            _end(process)
            raise
        if timed_out:
            _end(process)
    seconds = time.monotonic() - started
    if target.exists():
        result = json.loads(target.read_text())
    else:
        why = f"no end within {limit:.0f} s" if timed_out else f"exit status {process.returncode}"
        result = dataclasses.asdict(Result("failed", f"{why}, see {name}/log"))
    return {"part": name, "seconds": round(seconds, 1), **result}


def _end(process: subprocess.Popen) -> None:
    """Ends a part and what it started, which are one session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _run_here(name: str, size: Size, folder: Path) -> None:
    """Runs a part and leaves its result, an exception's too."""
    folder.mkdir(exist_ok=True)
    try:
        result = PARTS[name].load()(size, folder)
    except BaseException as error:
        traceback.print_exc()
        result = Result("failed", f"{type(error).__name__}: {one_line(error)}, see {name}/log")
    scratch = folder / "result.json.new"
    scratch.write_text(json.dumps(dataclasses.asdict(result), default=str))
    scratch.replace(folder / "result.json")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
