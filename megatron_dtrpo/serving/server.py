"""Runs the HTTP server beside the scheduler's loop, until it is asked to stop."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import stop
from megatron_dtrpo.serving.scheduler import Scheduler

GRACE = 20.0  # seconds for what is being written; torchrun kills half a minute after it asks
CLOSING = 5.0  # seconds for open connections after that


def listen(host: str, port: int) -> socket.socket:
    """Takes the port. Nobody is answered before `serve`. Raises UserError where it cannot be had."""
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


def serve(app, scheduler: Scheduler, where: socket.socket) -> None:
    """Serves until SIGTERM, SIGUSR1 or Ctrl-C; then waits `GRACE` for responses that are being written."""
    config = uvicorn.Config(app, lifespan="off", log_level="warning", timeout_graceful_shutdown=int(CLOSING))
    server = uvicorn.Server(config)
    with stop.listening(), _interrupted() as interrupted:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [where]}, name="http")
        thread.start()

        def asked_to_stop() -> bool:
            return interrupted.is_set() or stop.requested() is not None or not thread.is_alive()

        try:
            scheduler.run(asked_to_stop, GRACE)
        finally:
            server.should_exit = True
            thread.join(2 * CLOSING)
            where.close()


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
