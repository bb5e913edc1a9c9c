"""Rows of JSON lines, JSON arrays and CSV, read by byte offset so that a file of any size reads in flat memory.

They are read here and not by `datasets`, which guesses a type for each column: it makes dates of texts that look like
some, numbers of answers, and nothing of a cell that says "NA". Text stays the text of the file here.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import importlib
import json
import lzma
import mmap
import re
import shutil
import sys
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_dtrpo.data.file_signs import COLUMNS, kind_of, refuse_wide_text
from megatron_dtrpo.data.json_shape import TOKEN, top_object
from megatron_dtrpo.data.row_sequence import Row, Rows, checked
from megatron_dtrpo.errors import UserError, one_line

_UTF8_BOM = b"\xef\xbb\xbf"


def _open_zstd(path: Path) -> Any:
    try:
        pyarrow = importlib.import_module("pyarrow")  # Python 3.14 is the first to read it itself
    except ImportError:
        raise UserError(f"{path}: cannot be unpacked here; pip install pyarrow") from None
    return pyarrow.input_stream(str(path), compression="zstd")


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for one with a key twice, of which Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return found


class TextRows(Rows):
    """Rows of one text file; 16 bytes a row are kept. Share the path between threads, not the instance: it has one file
    handle."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._offsets = array("q")
        self._lines = array("q")

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def location(self, index: int) -> str:
        return f"{self._path}:{self._lines[index]}"

    def _decoded(self, index: int, text: bytes) -> str:
        try:
            return text.removeprefix(_UTF8_BOM).decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.location(index)}: byte {error.start} is not UTF-8; save it as UTF-8") from None

    def _parsed(self, index: int, text: bytes, advice: str) -> Row:
        """The JSON object that ``text`` is."""
        where = self.location(index)
        try:
            row = json.loads(self._decoded(index, text), object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            problem = f"{error.msg} at column {error.colno}"
            raise UserError(f"{where}: not valid JSON ({problem}); {advice}") from None
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets thousands deep
            raise UserError(f"{where}: cannot be read as JSON ({one_line(error)})") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: a row must be a JSON object in braces, this is a {type(row).__name__}")
        return row


class JsonLines(TextRows):
    """One JSON object per line; blank lines do not count as rows."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        super().__init__(path, file)
        offset = 0
        for number, line in enumerate(file, start=1):
            if line.strip() and line.strip() != _UTF8_BOM:
                self._offsets.append(offset)
                self._lines.append(number)
            offset += len(line)

    def __getitem__(self, index: int) -> Row:
        self._file.seek(self._offsets[checked(index, len(self))])
        return self._parsed(index, self._file.readline(), "write one object per line")


class JsonArray(TextRows):
    """The elements of one JSON array, indented or not."""

    def __init__(self, path: Path, file: BinaryIO, key: str | None = None, begin: int = 0) -> None:
        """``key``: the array is a value of the file's one object, under that key, and opens at byte ``begin``."""
        super().__init__(path, file)
        self._key, self._begin = key, begin
        if key is not None:
            shown = key.replace("{", "{{").replace("}", "}}")
            self.notes = (
                f"note: {{count}} rows are the list under the key {shown!r}; other keys of the file are not read",
            )
        self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ends = array("q")
        begin = None
        for end in self._element_ends():
            if begin is not None:
                self._offsets.append(begin)
                self._ends.append(end)
            begin = end + 1
        if len(self) == 1 and not self._text[self._offsets[0] : self._ends[0]].strip():
            self._offsets, self._ends = array("q"), array("q")  # an empty array

    def _element_ends(self) -> Iterator[int]:
        """Where the array opens, and where each of its elements ends."""
        depth = 0
        for token in TOKEN.finditer(self._text, self._begin):
            shape = token[0]
            depth += (shape in b"[{") - (shape in b"]}")
            if (depth == 1 and shape in b"[,") or depth == 0:
                yield token.start()
            if depth == 0:
                break
        if depth != 0:
            raise UserError(f"{self._path}: the JSON array is not closed at the end of the file; is the file complete?")
        if self._key is None and self._text[token.end() :].strip():
            raise UserError(f"{self._path}: goes on behind its JSON array; write one array, or one object per line")

    def location(self, index: int) -> str:
        return f"{self._path} row {index}" + (f" of {self._key!r}" if self._key is not None else "")

    def __getitem__(self, index: int) -> Row:
        begin = self._offsets[checked(index, len(self))]
        return self._parsed(index, self._text[begin : self._ends[index]], "correct it")


class Csv(TextRows):
    """Comma- or tab-separated values under a line of names.

    A cell is text; an empty one is a missing value. Messages are a cell of JSON, token ids and steps are JSON lists.
    """

    def __init__(self, path: Path, file: BinaryIO) -> None:
        super().__init__(path, file)
        csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than a long conversation
        self._delimiter = "\t" if kind_of(path)[0] == ".tsv" else ","
        # Before the reader sees it: a mark in front of a quote would make the quote a part of the name.
        file.seek(len(_UTF8_BOM) if file.read(len(_UTF8_BOM)) == _UTF8_BOM else 0)
        self._refuse_other_delimiter(file)
        lines = _Lines(file, "surrogateescape")
        reader = self._reader(lines)
        self._names: list[str] | None = None
        while True:
            start, number = lines.offset, lines.number + 1
            try:
                cells = next(reader)
            except StopIteration:
                break
            except csv.Error as error:
                if lines.at_end:
                    raise UserError(f"{path}:{number}: a quote opens in this row and never closes") from None
                if self._names is None:
                    raise UserError(f"{path}:{number}: not valid CSV ({one_line(error)})") from None
                cells = ["?"]  # reading the row reports it
            if self._names is None and cells:
                self._names = self._header(number, cells)
            elif cells:
                self._offsets.append(start)
                self._lines.append(number)

    def _refuse_other_delimiter(self, file: BinaryIO) -> None:
        """Raises UserError where the first line has one name, with another character between what should be several."""
        begin = file.tell()
        line = _QUOTED.sub(b"", file.readline())
        file.seek(begin)
        found = next((mark for mark in _DELIMITERS if mark.encode() in line), None)
        if self._delimiter.encode() not in line and found is not None:
            plain = self._path.name.removesuffix(kind_of(self._path)[1])
            advice = _DELIMITERS[found].format(name=Path(plain).stem)
            raise UserError(f"{self._path}:1: its cells are separated by {found!r}, not {self._delimiter!r}; {advice}")

    def _reader(self, lines: _Lines):
        return csv.reader(lines, delimiter=self._delimiter, strict=True)

    def _header(self, number: int, names: list[str]) -> list[str]:
        repeated = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if repeated is not None:
            raise UserError(f"{self._path}:{number}: two columns are named {repeated!r}; rename one")
        return names

    def __getitem__(self, index: int) -> Row:
        self._file.seek(self._offsets[checked(index, len(self))])
        try:
            cells = next(self._reader(_Lines(self._file, "strict")))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.location(index)}: byte {error.start} is not UTF-8; save it as UTF-8") from None
        except csv.Error as error:
            raise UserError(f"{self.location(index)}: not valid CSV ({one_line(error)})") from None
        if len(cells) != len(self._names):
            raise UserError(
                f"{self.location(index)}: {len(cells)} cells under {len(self._names)} names; put quotes around a cell "
                "with a comma in it"
            )
        return {name: self._value(index, name, cell) for name, cell in zip(self._names, cells, strict=True)}

    def _value(self, index: int, name: str, cell: str) -> Any:
        if not cell:
            return None
        is_list = name.endswith(("_ids", "_steps")) or _MESSAGES.match(cell)
        if not is_list:
            return cell
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            raise UserError(
                f"{self.location(index)}: {name}: is a list that is not JSON, as pandas and `datasets` write it into "
                "CSV; save the data as .jsonl or .parquet"
            ) from None


# What may stand between cells, and what to do where the file's name promises another of them.
_DELIMITERS = {
    "\t": "name it {name}.tsv",
    ";": "save it with commas",
    "|": "save it with commas",
    ",": "name it {name}.csv",
}
_QUOTED = re.compile(rb'"[^"]*"')

# A list of messages, as JSON or as Python prints it.
_MESSAGES = re.compile(r"\s*\[\s*['\"]?\s*\{\s*['\"]+(role|content)['\"]+\s*:")


class _Lines:
    """Lines of a file as text, and how far they were read: for `csv.reader`, which reads none before it needs it."""

    def __init__(self, file: BinaryIO, errors: str) -> None:
        self._file, self._errors = file, errors
        self.offset, self.number, self.at_end = file.tell(), 0, False

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._file.readline()
        if not line:
            self.at_end = True
            raise StopIteration
        self.offset += len(line)
        self.number += 1
        return line.decode("utf-8", self._errors)


def _open_json(path: Path) -> Rows:
    """An array where the file begins with a bracket; the one list of objects in an object; else one object per line."""
    file = _open_binary(path)
    start = file.read(4096).removeprefix(_UTF8_BOM).lstrip()
    file.seek(0)
    if start.startswith(b"["):
        return JsonArray(path, file)
    return (_list_in_object(path, file) if start.startswith(b"{") else None) or JsonLines(path, file)


def _list_in_object(path: Path, file: BinaryIO) -> Rows | None:
    """The rows of a file that is one object around them; None where the object is a row, or is not alone."""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = top_object(text)
    if found is None or not found.is_alone:
        return None
    if COLUMNS.isdisjoint(found.keys):
        if len(found.lists) == 1:
            return JsonArray(path, file, *next(iter(found.lists.items())))
        if found.lists:
            raise UserError(
                f"{path}: holds several lists of objects ({', '.join(found.lists)}); write each into a file of its own"
            )
    if found.is_indented:
        raise UserError(f"{path}: is one object over several lines; write it in one line, or in an array")
    return None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": lambda path: JsonLines(path, _open_binary(path)),
    ".ndjson": lambda path: JsonLines(path, _open_binary(path)),
    ".json": _open_json,
    ".csv": lambda path: Csv(path, _open_binary(path)),
    ".tsv": lambda path: Csv(path, _open_binary(path)),
}


def _open_binary(path: Path) -> BinaryIO:
    """The file's bytes in any order; a compressed file is unpacked into a temporary one, which vanishes with its
    handle."""
    compression = kind_of(path)[1]
    if not compression:
        try:
            return path.open("rb")
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror or one_line(error)})") from None
    unpacked = tempfile.TemporaryFile()
    try:
        with _OPENERS[compression](path) as packed:
            shutil.copyfileobj(packed, unpacked)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{path}: cannot be unpacked ({reason}); is the file complete?") from None
    unpacked.seek(0)
    refuse_wide_text(path, unpacked.read(4))
    unpacked.seek(0)
    return unpacked
