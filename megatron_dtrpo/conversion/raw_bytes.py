"""Every byte of a buffer to a file without a buffer of its own, and from it.

Views of a buffer are released even where a write fails: an exception keeps its frames, and their views, until the
interpreter ends, and Python 3.12 crashes when it then frees a buffer before its view.
"""

from __future__ import annotations

import os
from typing import Any, BinaryIO


def write_all(stream: BinaryIO, data: Any) -> None:
    """Writes ``data``, whatever has a buffer of bytes. ``stream`` may take a part at a time."""
    done = 0
    with memoryview(data) as view:
        while done < len(view):
            with view[done:] as rest:
                done += stream.write(rest)


def read_all(descriptor: int, position: int, into: Any) -> bool:
    """Fills ``into``, a writable buffer of bytes, from ``position`` on; False where the file ends first."""
    done = 0
    with memoryview(into) as view:
        while done < len(view):
            with view[done:] as rest:
                count = os.preadv(descriptor, [rest], position + done)
            if count == 0:
                return False
            done += count
    return True
