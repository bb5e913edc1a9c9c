"""Rows of Arrow tables: Parquet, .arrow files, and data sets that `datasets` saved.

All three give a table, and one way turns a table's rows into dictionaries, whatever format or columns a data set was
last looked at with.
"""

from __future__ import annotations

import importlib
import json
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_dtrpo.data.row_sequence import Row, Rows, checked
from megatron_dtrpo.errors import UserError, one_line

_WINDOW = 1024  # rows turned into Python objects at a time


class TableRows(Rows):
    """Rows of one table. Subclasses set ``_path``, ``_size`` and ``_schema`` and give the table of some rows."""

    _path: Path
    _size: int
    _schema: Any
    _window: tuple[int, list[Row]] = (0, [])  # first row, rows decoded from there
    _converters: dict[str, Callable] | None = None

    def _table(self, first: int, most: int):
        """Up to ``most`` rows from row ``first`` on, at least one, as a table; ``first`` is a multiple of ``most``."""
        raise NotImplementedError

    def release(self) -> None:
        self._window = (0, [])

    def __len__(self) -> int:
        return self._size

    def location(self, index: int) -> str:
        return f"{self._path} row {index}"

    def __getitem__(self, index: int) -> Row:
        first, rows = self._window
        if not first <= checked(index, len(self)) < first + len(rows):
            first, rows = self._window = self._decode(index)
        return self._converted(index, rows[index - first])

    def _decode(self, index: int) -> tuple[int, list[Row]]:
        """The window that row ``index`` is in; the row alone where another of them cannot be decoded."""
        for most in (_WINDOW, 1):
            try:
                first, table = self._table(index, most)
                return first, table.to_pylist()
            except (OSError, ValueError, OverflowError, NotImplementedError) as error:  # Arrow's own are ValueErrors
                problem = one_line(error)
        raise UserError(f"{self.location(index)}: cannot be read ({problem})")

    def _converted(self, index: int, row: Row) -> Row:
        if self._converters is None:
            found = {field.name: _converter(field.type) for field in self._schema}
            self._converters = {name: convert for name, convert in found.items() if convert is not None}
        try:
            return {
                name: self._converters[name](value) if value is not None and name in self._converters else value
                for name, value in row.items()
            }
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.location(index)}: holds JSON that cannot be read ({one_line(error)})") from None


def _converter(kind) -> Callable[[Any], Any] | None:
    """What makes a value of the Arrow type ``kind`` what its author wrote; None for what is so already.

    JSON columns are text in the table. The structs of a column share all their keys, so that a key which one row has is
    null in every other: a null in a struct is a key that is not there.
    """
    types = importlib.import_module("pyarrow.types")
    if getattr(kind, "extension_name", None) == "arrow.json":
        return json.loads
    if types.is_struct(kind):
        fields = {field.name: _converter(field.type) or _same for field in kind}
        return lambda value: {name: fields[name](item) for name, item in value.items() if item is not None}
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        of_item = _converter(kind.value_type)
        if of_item is not None:
            return lambda value: [item if item is None else of_item(item) for item in value]
    return None


def _same(value: Any) -> Any:
    return value


class Parquet(TableRows):
    """Rows of a Parquet file; one row group is in memory at a time."""

    def __init__(self, path: Path) -> None:
        pyarrow, parquet = _library(path, "pyarrow"), _library(path, "pyarrow.parquet")
        self._path = path
        try:
            self._file = parquet.ParquetFile(path)
            self._schema = self._file.schema_arrow
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: not a readable Parquet file ({one_line(error)})") from None
        metadata = self._file.metadata
        self._starts = [0, *accumulate(metadata.row_group(g).num_rows for g in range(metadata.num_row_groups))]
        self._size = self._starts[-1]
        self._loaded: tuple[int, Any] = (-1, None)  # row group, its table

    def release(self) -> None:
        super().release()
        self._loaded = (-1, None)

    def _table(self, index: int, most: int):
        group = bisect_right(self._starts, index) - 1
        if self._loaded[0] != group:
            self._loaded = (-1, None)  # let the old table go before the new one is read
            self._loaded = (group, self._file.read_row_group(group))
        within = index - self._starts[group]
        first = within - within % most
        return self._starts[group] + first, self._loaded[1].slice(first, most)


class Arrow(TableRows):
    """Rows of an Arrow file, as a stream (what `datasets` writes) or with random access (Feather); memory-mapped."""

    def __init__(self, path: Path) -> None:
        pyarrow, ipc = _library(path, "pyarrow"), _library(path, "pyarrow.ipc")
        self._path = path
        try:
            source = pyarrow.memory_map(str(path))
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            self._whole = (ipc.open_file if is_file else ipc.open_stream)(source).read_all()
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(f"{path}: not a readable Arrow file ({one_line(error)})") from None
        self._schema, self._size = self._whole.schema, self._whole.num_rows

    def _table(self, index: int, most: int):
        first = index - index % most
        return first, self._whole.slice(first, most)


class SavedDataSet(TableRows):
    """Rows of a data set that `datasets` wrote with ``save_to_disk``, memory-mapped by that library."""

    def __init__(self, path: Path) -> None:
        datasets = _library(path, "datasets")
        self._path = path
        try:
            # All columns as they are stored, whatever format and columns the data set was saved with.
            self._dataset = datasets.load_from_disk(str(path)).with_format("arrow")
        except Exception as error:  # of whatever kind: the library reads files that anything may have written
            raise UserError(f"{path}: not a readable Hugging Face data set ({one_line(error)})") from None
        self._schema, self._size = self._dataset.features.arrow_schema, len(self._dataset)

    def _table(self, index: int, most: int):
        first = index - index % most
        return first, self._dataset[first : min(first + most, self._size)]


def _library(path: Path, name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"{path}: cannot be read here; pip install {name.split('.')[0]}") from None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".parquet": Parquet,
    ".pq": Parquet,
    ".parq": Parquet,
    ".arrow": Arrow,
    ".feather": Arrow,
}
