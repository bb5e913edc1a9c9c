"""uvicorn's side of a connection: what is written in one turn of the event loop goes out together.

The head of a response, its first event and its end are writes of their own. Each would be a call of the system, and
would wake the client.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol


class _Gathered:
    """A transport, but for `write`."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop):
        self._transport, self._loop = transport, loop
        self._held: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._held:
            self._loop.call_soon(self._flush)
        self._held.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        held, self._held = b"".join(self._held), []
        if held and not self._transport.is_closing():
            self._transport.write(held)


class GatheredProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """For ``http`` of `uvicorn.Config`."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(_Gathered(transport, self.loop))
