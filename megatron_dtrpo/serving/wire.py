"""Messages over a socket between two processes of one program, each pickled and behind its length."""

from __future__ import annotations

import pickle
import struct
from typing import Any

LENGTH = struct.Struct("!Q")


def framed(message: Any) -> bytes:
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    return LENGTH.pack(len(body)) + body


class Frames:
    """Bytes as they come, as messages."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are whole with ``data``."""
        self._bytes += data
        found, start = [], 0
        while len(self._bytes) >= start + LENGTH.size:
            (length,) = LENGTH.unpack_from(self._bytes, start)
            end = start + LENGTH.size + length
            if len(self._bytes) < end:
                break
            found.append(pickle.loads(memoryview(self._bytes)[end - length : end]))
            start = end
        del self._bytes[:start]
        return found
