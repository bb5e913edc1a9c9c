"""What a file's name and its own bytes tell: that it is not what its name says, or that it describes a data set and
holds no row of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dtrpo.errors import UserError

_HEAD = 512  # bytes that are looked at
_LARGEST_DESCRIPTION = 1 << 20  # bytes; a larger file is data
# A row has one of these columns; an object with none of them, alone in its file, is no row.
COLUMNS = frozenset(
    "prompt chosen rejected completion messages conversations prompt_ids text "
    "question instruction query problem".split()
)

_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_COMPRESSED = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_TABLES = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
_ZIP = b"PK\x03\x04"
_MARKS_OF_FOUR = (b"\xff\xfe\x00\x00", b"\x00\x00\xfe\xff")
_BYTE_ORDER_MARKS = (b"\xff\xfe", b"\xfe\xff", *_MARKS_OF_FOUR)


def kind_of(path: Path) -> tuple[str, str]:
    """(what the file holds, how it is compressed), as suffixes in lower case: ``(".jsonl", ".gz")``."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return (suffixes[0] if len(suffixes) > 1 else ""), suffixes[-1]
    return (suffixes[-1] if suffixes else ""), ""


def refuse_other_files(path: Path, is_text: bool, compression: str) -> None:
    """Raises UserError where the first bytes of ``path`` are those of another file than its name says: of a Git LFS
    pointer, of a web page; of a table, of something compressed or of wide characters where text should be."""
    head = head_of(path)
    if head.startswith(_POINTER):
        raise UserError(f"{path}: is a Git LFS pointer and the data is elsewhere; run git lfs pull in its folder")
    if head.lstrip().lower().startswith(_PAGES):
        raise UserError(f"{path}: is an HTML page, as a failed download leaves it; fetch the file again")
    if not is_text:
        return
    if head.startswith(_ZIP):
        raise UserError(f"{path}: is a zip archive; unpack it")
    _refuse_other_name(path, head, compression)
    if not compression:
        refuse_wide_text(path, head)


def _refuse_other_name(path: Path, head: bytes, compression: str) -> None:
    plain = path.stem if compression else path.name
    found = next((kind for sign, kind in _COMPRESSED.items() if head.startswith(sign)), "")
    table = next((kind for sign, kind in _TABLES.items() if head.startswith(sign)), "")
    if table:
        raise UserError(f"{path}: holds {table} data under another name; name it {Path(plain).stem}{table}")
    if found and found != compression:
        raise UserError(f"{path}: holds {found} data under another name; name it {plain}{found}")
    if compression and not found and head.lstrip()[:1] in (b"{", b"["):
        raise UserError(f"{path}: is not packed; take {compression} off its name")


def refuse_wide_text(path: Path, head: bytes) -> None:
    """Raises UserError where ``head``, with which the text of ``path`` begins, has characters of two bytes or four."""
    if head.startswith(_BYTE_ORDER_MARKS) or b"\x00" in head[:2]:
        bits = 32 if head[:4] in _MARKS_OF_FOUR or head[:4].count(0) > 2 else 16
        raise UserError(f"{path}: is UTF-{bits} text, as some Windows programs write it; save it as UTF-8")


def head_of(path: Path) -> bytes:
    """The first bytes of a file; none where it cannot be read: opening it reports that."""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def is_description(path: Path) -> bool:
    """Whether a .json file holds one object that is neither a row nor has rows under a key: statistics, a licence, the
    features of a data set."""
    try:
        if path.suffix.lower() != ".json" or path.stat().st_size > _LARGEST_DESCRIPTION:
            return False
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    if not isinstance(value, dict):
        return False
    lists = [item for item in value.values() if isinstance(item, list) and item]
    return not any(map(_is_row, [value, *(item[0] for item in lists)]))


def _is_row(value: Any) -> bool:
    return isinstance(value, dict) and not COLUMNS.isdisjoint(value)
