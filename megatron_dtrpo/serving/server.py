"""The process that talks to clients. It has no device and no process group: jobs go to rank zero over a socket."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from megatron_dtrpo.runtime.garbage import settle
from megatron_dtrpo.serving.desk import Desk
from megatron_dtrpo.serving.front import CLOSING
from megatron_dtrpo.serving.gathered import GatheredProtocol

UVICORN: dict[str, Any] = {
    "http": GatheredProtocol,
    "lifespan": "off",
    "log_level": "warning",
    "access_log": False,
    "proxy_headers": False,  # nobody asks where a client is
    "timeout_graceful_shutdown": int(CLOSING),
}


def talk(
    where: socket.socket, scheduler: socket.socket, places: int, waiting: int, make_app: Callable[[Desk], ASGIApp]
) -> None:
    """Answers clients on ``where`` from the scheduler's first word on until it is gone.

    Args:
        scheduler: the socket to it; places, waiting: of `Desk`.
        make_app: the application, of the desk that it gives its jobs to.
    """
    desk = Desk(places, waiting)
    server = _Server(uvicorn.Config(make_app(desk), **UVICORN), desk, scheduler)
    settle()
    server.run(sockets=[where])


class _Server(uvicorn.Server):
    """Serves as long as the desk has somebody to hear."""

    def __init__(self, config: uvicorn.Config, desk: Desk, scheduler: socket.socket):
        super().__init__(config)
        self._desk, self._scheduler = desk, scheduler

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if await self._desk.open(self._scheduler, self._close):
            await super().startup(sockets)

    def _close(self) -> None:
        self.should_exit = True
