"""Bytes to files and from them, a part at a time, and what is left behind where that fails."""

from __future__ import annotations

import io
import os

import pytest

from megatron_dtrpo.conversion.raw_bytes import read_all, write_all


class Slow(io.RawIOBase):
    """Takes three bytes at a time, and ``room`` in all."""

    def __init__(self, room: int):
        self.room, self.taken = room, b""

    def write(self, data) -> int:
        if len(self.taken) >= self.room:
            raise OSError("full")
        self.taken += bytes(data[:3])
        return min(len(data), 3)


def test_every_byte_is_written():
    stream = Slow(100)
    write_all(stream, b"0123456789")
    assert stream.taken == b"0123456789"


def test_a_failed_write_leaves_no_view_of_the_buffer():
    """The exception is kept, as an interpreter that ends keeps it. A buffer with views refuses to be closed."""
    buffer = io.BytesIO(b"0123456789")
    with pytest.raises(OSError, match="full") as kept, buffer.getbuffer() as data:
        write_all(Slow(4), data)
    buffer.close()
    assert kept.traceback


@pytest.mark.parametrize(("position", "whole"), [(0, True), (2, True), (3, False), (20, False)])
def test_reading_says_where_the_file_ends_first(tmp_path, position, whole):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(10)))
    into = bytearray(8)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert read_all(descriptor, position, into) == whole
    finally:
        os.close(descriptor)
    if whole:
        assert into == bytes(range(position, position + 8))
    into.clear()  # a buffer with views would refuse
