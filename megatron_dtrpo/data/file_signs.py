"""What the first bytes of a file tell: that it is not what its name says, or that it describes a data set and holds no
row of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_dtrpo.errors import UserError

_HEAD = 512  # bytes that are looked at
_LARGEST_DESCRIPTION = 1 << 20  # bytes; a larger file is data
# Columns that a row has one of; an object with none of them, alone in its file, is no row.
_COLUMNS = {"prompt", "messages", "conversations", "chosen", "rejected", "completion", "prompt_ids", "text"} | {
    "question",
    "instruction",
    "query",
    "problem",
}

_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGES = (b"<!doctype html", b"<html")
_PACKED = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
_TABLES = {b"PAR1": ".parquet", b"ARROW1": ".arrow"}
_ARCHIVES = {b"PK\x03\x04": "a zip archive"}
_WIDE = (b"\xff\xfe", b"\xfe\xff")  # the mark of UTF-16, and the beginning of UTF-32's


def refuse_other_files(path: Path, is_text: bool, compression: str) -> None:
    """Raises UserError where the file's first bytes are those of another kind of file than its name says: a Git LFS
    pointer, a web page, something packed, a table, or text that is not UTF-8."""
    head = head_of(path)
    if head.startswith(_POINTER):
        raise UserError(f"{path}: is a Git LFS pointer, the data is elsewhere; run git lfs pull in its folder")
    if head.lstrip().lower().startswith(_PAGES):
        raise UserError(f"{path}: is an HTML page, as a failed download leaves; fetch the file again")
    if is_text:
        found = _PACKED if compression else {**_PACKED, **_TABLES, **_ARCHIVES}
        _refuse_packed(path, head, found, compression)
    if is_text and not compression:
        refuse_wide_text(path, head)


def _refuse_packed(path: Path, head: bytes, found: dict[bytes, str], compression: str) -> None:
    for sign, kind in found.items():
        if head.startswith(sign) and kind != compression:
            advice = f"give it the name that says so, as {path.stem}{kind}" if kind[0] == "." else "unpack it"
            advice = f"name it {path.name}{kind}" if kind in _PACKED.values() and not compression else advice
            raise UserError(f"{path}: holds {kind} data under another name; {advice}")


def refuse_wide_text(path: Path, head: bytes) -> None:
    """Raises UserError where ``head``, the first bytes of the text of ``path``, has characters of two bytes."""
    if head.startswith(_WIDE) or b"\x00" in head[:2]:
        raise UserError(f"{path}: is UTF-16 text, as some Windows programs write; save it as UTF-8")


def head_of(path: Path) -> bytes:
    """The first bytes of a file; none where it cannot be read, which whoever opens it says."""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD)
    except OSError:
        return b""


def is_description(path: Path) -> bool:
    """Whether a .json file holds one object that is neither a row nor a list of rows under a key: statistics, licences,
    the features of a data set."""
    try:
        if path.suffix.lower() != ".json" or path.stat().st_size > _LARGEST_DESCRIPTION:
            return False
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and not (_is_row(value) or any(map(_is_row, first_rows(value).values())))


def first_rows(value: dict[str, Any]) -> dict[str, Any]:
    """The first object of each list of objects in ``value``, by key."""
    lists = {key: item for key, item in value.items() if isinstance(item, list) and item}
    return {key: item[0] for key, item in lists.items() if all(isinstance(each, dict) for each in item)}


def _is_row(value: dict[str, Any]) -> bool:
    return not _COLUMNS.isdisjoint(value)
