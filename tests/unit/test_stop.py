"""SIGTERM and SIGUSR1 are noted, by the trainer until its very end, and left alone where nobody asked for that."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from megatron_dtrpo.errors import StopRequest
from megatron_dtrpo.runtime import stop
from tests.support.launch import REPOSITORY, _environment


def send(number: signal.Signals) -> None:
    """To this thread: another one, of a library that an earlier test started, may not block what the process gets."""
    signal.pthread_kill(threading.get_ident(), number)


def test_a_signal_is_asked_for_and_forgotten_at_the_end():
    handlers = [signal.getsignal(number) for number in stop.SIGNALS]
    with stop.listening():
        assert stop.requested() is None
        stop.raise_if_requested()
        send(signal.SIGUSR1)
        assert stop.requested() == "SIGUSR1" and stop.wait(60)
        send(signal.SIGTERM)
        with pytest.raises(StopRequest, match="^SIGUSR1$"):
            stop.raise_if_requested()
    assert stop.requested() is None
    assert [signal.getsignal(number) for number in stop.SIGNALS] == handlers
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()).intersection(stop.SIGNALS)


def test_a_signal_that_came_past_the_mask_counts():
    """As multiprocessing unblocks SIGTERM around its first spawn."""
    with stop.listening():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        send(signal.SIGTERM)
        assert stop.requested() == "SIGTERM"
    assert stop.requested() is None


IN_A_CHILD = "import subprocess, sys; from megatron_dtrpo.runtime import stop; stop.block(); " + (
    "child = subprocess.Popen([sys.executable, '-c', 'import os, signal; os.kill(os.getpid(), signal.SIGUSR1)']); "
    "sys.exit(child.wait())"
)
AT_EXIT = """
import atexit, os, signal
from megatron_dtrpo import train
train._train = lambda argv: None
for number in (signal.SIGTERM, signal.SIGUSR1):
    atexit.register(os.kill, os.getpid(), number)
train.program([])
"""


@pytest.mark.parametrize("code", [IN_A_CHILD, AT_EXIT], ids=["in a child process", "at exit"])
def test_programs(code):
    assert subprocess.run([sys.executable, "-c", code], env=_environment(), cwd=REPOSITORY).returncode == 0


def test_the_trainer_listens_before_torch_is_imported():
    code = "import sys; import megatron_dtrpo.train; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=_environment(), cwd=REPOSITORY).returncode == 0
