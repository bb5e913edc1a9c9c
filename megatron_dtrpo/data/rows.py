"""Rows of a data file by number, whatever the file is, and where each row came from.

JSON lines, Parquet and Hugging Face data sets all become the same thing: a sequence of dictionaries that stays on
disk, plus ``location(i)``, the words that an error message about row ``i`` begins with.
"""

from __future__ import annotations

import json
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_dtrpo.errors import UserError

Row = dict[str, Any]

_UTF8_BOM = b"\xef\xbb\xbf"
_PARQUET_WINDOW = 1024  # rows turned into Python objects at a time


class Rows:
    """A read-only sequence of rows. Subclasses say how many there are, how one is read and where it stands."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Row:
        """Row ``index`` (0 .. len - 1) as a dictionary. Raises UserError where the row cannot be read."""
        raise NotImplementedError

    def location(self, index: int) -> str:
        """Where row ``index`` stands: ``pairs.jsonl:17`` (lines from 1) or ``pairs.parquet row 16`` (rows from 0)."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


class JsonLines(Rows):
    """One JSON object per line; blank lines do not count as rows.

    Only the byte offset and line number of each row are kept (16 bytes a row), so a file of any size reads in flat
    memory. One instance holds one file handle: share the path between threads, not the instance.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets = array("q")
        self._lines = array("q")
        self._file = _open_binary(path)
        offset = 0
        for number, line in enumerate(self._file, start=1):
            if line.strip() and line.strip() != _UTF8_BOM:
                self._offsets.append(offset)
                self._lines.append(number)
            offset += len(line)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def location(self, index: int) -> str:
        return f"{self._path}:{self._lines[index]}"

    def __getitem__(self, index: int) -> Row:
        self._file.seek(self._offsets[_checked(index, len(self))])
        line = self._file.readline()
        try:
            row = json.loads(line.removeprefix(_UTF8_BOM).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{self.location(index)}: byte {error.start} is not UTF-8; save it as UTF-8") from None
        except json.JSONDecodeError as error:
            problem = f"{error.msg} at column {error.colno}"
            raise UserError(f"{self.location(index)}: not valid JSON ({problem}); write one object per line") from None
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits; brackets thousands deep
            problem = str(error).splitlines()[0]
            raise UserError(f"{self.location(index)}: cannot be read as JSON ({problem})") from None
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise UserError(f"{self.location(index)}: a row must be a JSON object in braces, this is a {kind}")
        return row


class Parquet(Rows):
    """Rows of one Parquet file, or of a folder of them in order of name; one row group is in memory at a time."""

    def __init__(self, files: list[Path]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError(f"{files[0]}: reading Parquet needs: pip install pyarrow") from None
        self._paths = files
        self._files = []
        for path in files:
            try:
                self._files.append(parquet.ParquetFile(path))
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{path}: not a readable Parquet file ({_first_line(error)})") from None
        # Row number at which each (file, row group) starts.
        self._groups = [(f, g) for f, file in enumerate(self._files) for g in range(file.num_row_groups)]
        sizes = [self._files[f].metadata.row_group(g).num_rows for f, g in self._groups]
        self._starts = [0, *accumulate(sizes)]
        self._file_starts = [0, *accumulate(file.metadata.num_rows for file in self._files)]
        self._loaded: tuple[int, Any] = (-1, None)  # row group, its table
        self._window: tuple[int, list[Row]] = (0, [])  # first row, rows decoded from there

    def __len__(self) -> int:
        return self._starts[-1]

    def location(self, index: int) -> str:
        file = bisect_right(self._file_starts, index) - 1
        return f"{self._paths[file]} row {index - self._file_starts[file]}"

    def __getitem__(self, index: int) -> Row:
        first, rows = self._window
        if not first <= _checked(index, len(self)) < first + len(rows):
            first, rows = self._window = self._decode(index)
        return rows[index - first]

    def _decode(self, index: int) -> tuple[int, list[Row]]:
        import pyarrow

        group = bisect_right(self._starts, index) - 1
        if self._loaded[0] != group:
            self._loaded = (-1, None)  # let the old table go before the new one is read
            file, number = self._groups[group]
            try:
                self._loaded = (group, self._files[file].read_row_group(number))
            except (OSError, pyarrow.ArrowException) as error:
                raise UserError(f"{self.location(index)}: cannot be read ({_first_line(error)})") from None
        within = index - self._starts[group]
        first = within - within % _PARQUET_WINDOW
        return self._starts[group] + first, self._loaded[1].slice(first, _PARQUET_WINDOW).to_pylist()


class HuggingFaceRows(Rows):
    """Rows of a data set that ``datasets`` wrote with ``save_to_disk`` (memory-mapped by that library)."""

    def __init__(self, path: Path) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError(f"{path}: reading a Hugging Face data set needs: pip install datasets") from None
        self._path = path
        try:
            self._dataset = datasets.load_from_disk(str(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable Hugging Face data set ({_first_line(error)})") from None

    def __len__(self) -> int:
        return len(self._dataset)

    def location(self, index: int) -> str:
        return f"{self._path} row {index}"

    def __getitem__(self, index: int) -> Row:
        return self._dataset[_checked(index, len(self))]


def open_rows(path: str | Path) -> Rows:
    """Open a ``.jsonl``, ``.json`` (one object per line) or ``.parquet`` file, or a folder.

    A folder is either a Hugging Face data set saved with ``save_to_disk`` or holds Parquet files. Nothing is ever
    downloaded. Raises UserError for a path that does not exist, is of another kind, or holds no rows; a malformed
    row raises when it is read.
    """
    path = Path(path)
    rows = _open_folder(path) if path.is_dir() else _open_file(path)
    if len(rows) == 0:
        raise UserError(f"{path}: holds no rows; give a data file with at least one")
    return rows


def _open_file(path: Path) -> Rows:
    if not path.exists():
        raise UserError(f"{path}: no such file; give the path of a .jsonl or .parquet file or of a data set folder")
    if path.suffix in (".jsonl", ".json"):
        return JsonLines(path)
    if path.suffix == ".parquet":
        return Parquet([path])
    raise UserError(f"{path}: unknown kind of file {path.suffix!r}; use .jsonl, .json (an object per line) or .parquet")


def _open_folder(path: Path) -> Rows:
    if (path / "dataset_dict.json").exists():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise UserError(f"{path}: holds several splits ({splits}); give the folder of one of them")
    if (path / "dataset_info.json").exists() and (path / "state.json").exists():
        return HuggingFaceRows(path)
    files = sorted(path.glob("*.parquet"))
    if files:
        return Parquet(files)
    raise UserError(f"{path}: this folder is neither a data set saved with save_to_disk nor holds .parquet files")


def _open_binary(path: Path):
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None


def _checked(index: int, length: int) -> int:
    """``index``, or IndexError: a negative index would silently read another row."""
    if not 0 <= index < length:
        raise IndexError(f"row {index} of {length}")
    return index


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
