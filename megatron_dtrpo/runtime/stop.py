"""Requests to stop: SIGTERM, on which torchrun gives its processes half a minute, and SIGUSR1, on which nobody hurries
them.

The signals are blocked, so that they wait until the program asks for them. That works from the first line of a program
on, which is long before torch is imported, and no call is interrupted. All threads and child processes that start later
inherit the mask: a process that writes a checkpoint finishes it, although launchers signal whole process groups.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dtrpo.errors import StopRequest

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# What came before they were blocked, or after multiprocessing unblocked SIGTERM, as it does around its first spawn.
_delivered: list[int] = []


def block() -> set[int]:
    """Blocks the signals on this thread and on those that it starts. Returns the mask before."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


@contextmanager
def listening() -> Iterator[None]:
    """Inside, SIGTERM and SIGUSR1 end nothing; `requested` tells of them. On the main thread."""
    handlers = {number: signal.signal(number, lambda signum, frame: _delivered.append(signum)) for number in SIGNALS}
    mask = block()
    try:
        yield
    finally:
        if not mask.intersection(SIGNALS):
            while signal.sigtimedwait(SIGNALS, 0) is not None:
                pass
            _delivered.clear()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def requested() -> str | None:
    """The name of a signal that this process was asked to stop by, or None."""
    numbers = [*_delivered, *sorted(signal.sigpending().intersection(SIGNALS))]
    return signal.Signals(numbers[0]).name if numbers else None


def raise_if_requested() -> None:
    """Raises StopRequest on this process alone; for work whose end `runtime.objects.raise_together` waits for."""
    name = requested()
    if name is not None:
        raise StopRequest(name)


def wait(seconds: float) -> bool:
    """Sleeps for so long, or until a request to stop. Returns whether there was one."""
    return requested() is not None or signal.sigtimedwait(SIGNALS, seconds) is not None
