"""Damage to what torch.save wrote."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path


def flip_a_bit(file: Path, offset: int, length: int, part: str) -> None:
    """In the middle of a part of what torch.save wrote there."""
    with zipfile.ZipFile(io.BytesIO(file.read_bytes()[offset : offset + length])) as archive:
        info = archive.getinfo(part)
    with file.open("r+b") as stream:
        stream.seek(offset + info.header_offset + 26)
        head = 30 + sum(int.from_bytes(stream.read(2), "little") for _ in range(2))
        place = offset + info.header_offset + head + info.file_size // 2
        stream.seek(place)
        (byte,) = stream.read(1)
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))
