"""Answers that are formulas, judged by math-verify in a process of its own.

A model may write any formula, ``9^{9^{9^9}}`` say, and sympy would compute it. A process can be limited in computing
time and memory. math-verify's own limit is an alarm of the wall clock: it fails in threads, does not interrupt a long
multiplication, and makes a verdict depend on the load of the machine.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import resource
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.evaluation.final_answer import last_boxed

SECONDS = 5  # of computing time for one verdict
_BYTES = 4 << 30
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|begin|end)\s*\{[^{}]*\}")
_COMMAND = re.compile(r"\\[a-zA-Z]+")
_one_at_a_time = threading.Lock()


def is_formula(answer: str) -> bool:
    """Whether ``answer`` is more than digits and signs, and has no word outside of LaTeX's own."""
    rest = _COMMAND.sub("+", _TEXT.sub("", answer)).strip()
    return bool(rest) and bool(re.search(r"[a-zA-Z\\^(\[{]", answer)) and not re.search(r"[A-Za-z]{2,}", rest)


def same(answer: str, completion: str) -> bool:
    """Whether the completion's final formula equals ``answer``. Raises UserError where that cannot be decided."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(f"the answer {answer[:40]!r} is not one number: pip install math-verify to judge formulas")
    boxed = last_boxed(completion)
    text = completion if boxed is None else f"\\boxed{{{boxed}}}"
    verdict = _ask(json.dumps([answer, text]))
    if isinstance(verdict, str):
        raise UserError(f"the answer {answer[:40]!r}: {verdict}")
    return verdict


def _ask(question: str) -> bool | str:
    with _one_at_a_time:
        process = _judge(os.getpid())
        try:
            process.stdin.write(question + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)
        _judge.cache_clear()
        process.wait()
    return f"math-verify came to no verdict within {SECONDS} s and {_BYTES >> 30} GiB"


@cache
def _judge(owner: int) -> subprocess.Popen:
    """The process that judges for process ``owner``: a fork gets one of its own."""
    package = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(package), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, str(SECONDS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": path},
    )
    atexit.register(process.stdin.close)  # ends its loop
    return process


def _serve(seconds: int) -> None:
    from math_verify import LatexExtractionConfig, parse, verify

    def verdict(answer: str, text: str) -> bool | str:
        gold = parse(f"\\boxed{{{answer}}}", [LatexExtractionConfig()], parsing_timeout=None)
        if all(isinstance(reading, str) for reading in gold):
            return "it is neither one number nor a formula that math-verify reads"
        return bool(verify(gold, parse(text, parsing_timeout=None), timeout_seconds=None))

    resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        # The hard limit stays, so that the soft one can be raised again.
        soft = int(used.ru_utime + used.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))
        print(json.dumps(verdict(*json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
