"""Rank zero's end of the process that talks to clients, which it starts and ends.

That process has HTTP and JSON to itself: they take no time from the model's passes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import stop
from megatron_dtrpo.runtime.garbage import settle
from megatron_dtrpo.serving.messages import Report, Request
from megatron_dtrpo.serving.wire import Frames, framed

if TYPE_CHECKING:
    from megatron_dtrpo.serving.scheduler import Scheduler

CHUNK = 2**20  # bytes read at once
GRACE = 20.0  # seconds for what is being written; torchrun kills half a minute after it asks
CLOSING = 5.0  # seconds for open connections after that


def listen(host: str, port: int) -> socket.socket:
    """Takes the port. Nobody is answered before `Front.run`. Raises UserError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except (OSError, OverflowError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"--host {host} --port {port}: cannot be listened on ({reason}); give another") from None
    return found


class Front:
    """Rank zero's end of the clients' process. ``is_gone``: it ended by itself. ``began``: it answers clients."""

    def __init__(self, process: BaseProcess, wire: socket.socket):
        self._process, self._wire = process, wire
        self._frames, self._ready = Frames(), select.poll()
        self._ready.register(wire, select.POLLIN)
        self.is_gone = self.began = False

    def requests(self, seconds: float) -> list[Request]:
        """What was asked since the last call; waits so long for it."""
        if not self._ready.poll(seconds * 1000):
            return []
        try:
            data = self._wire.recv(CHUNK)
        except OSError:
            data = b""
        self.is_gone |= not data
        return self._frames.feed(data)

    def report(self, report: Report) -> None:
        try:
            self._wire.sendall(framed(report))
        except OSError:
            self.is_gone = True

    def run(self, scheduler: Scheduler) -> str | None:
        """Clients are answered from here on: until SIGTERM, SIGUSR1 or Ctrl-C, and then `GRACE` for the responses that
        are being written. Returns what went wrong."""
        with stop.listening(), _interrupted() as interrupted:
            settle()
            self.began = True
            self.report(Report())
            scheduler.run(lambda: interrupted.is_set() or stop.requested() is not None, GRACE)
        if not self.is_gone:
            return None
        self._process.join(CLOSING)
        return f"the process that talks to clients ended by itself (status {self._process.exitcode})"


@contextmanager
def front(talk: Callable[[socket.socket, socket.socket], None], where: socket.socket) -> Iterator[Front]:
    """Starts the clients' process, and ends it. ``where``: of `listen`. ``talk``: called there with it and the socket
    to this process; it can be pickled."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = socket.socketpair()
    process = context.Process(target=talk, args=(where, theirs), name="http", daemon=True)
    # What it inherits: it is asked to stop by the end of ``theirs``, not by signals to the process group. The tracker,
    # which multiprocessing would start with it, unblocks them.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *stop.SIGNALS))
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    theirs.close()
    found = Front(process, mine)
    try:
        yield found
    finally:
        with contextlib.suppress(OSError):  # it may be gone
            mine.shutdown(socket.SHUT_WR)
        process.join(2 * CLOSING if found.began else 0)
        process.kill()
        mine.close()


@contextmanager
def _interrupted() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C; a second one is a KeyboardInterrupt."""
    event = threading.Event()

    def handler(number, frame) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)
