"""A sequence of rows that stays on disk: what every kind of data file becomes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

Row = dict[str, Any]


class Rows:
    """A read-only sequence of rows. Subclasses say how many there are, how one is read and where it stands; ``notes``
    are about how the file was read (see `examples.note_line`)."""

    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Row:
        """Row ``index`` (0 .. len - 1) as a dictionary. Raises UserError where the row cannot be read."""
        raise NotImplementedError

    def location(self, index: int) -> str:
        """Where row ``index`` stands: ``pairs.jsonl:17`` (lines from 1) or ``pairs.parquet row 16`` (rows from 0)."""
        raise NotImplementedError

    def release(self) -> None:
        """Give back the memory that only made the last reads quick."""

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


class Concatenated(Rows):
    """The rows of several files, one after the other; one file at a time keeps rows in memory."""

    def __init__(self, parts: list[Rows], notes: tuple[str, ...] = ()) -> None:
        self._parts = parts
        self._starts = [0, *accumulate(map(len, parts))]
        self._last = 0
        self.notes = (*dict.fromkeys(note for part in parts for note in part.notes), *notes)

    def __len__(self) -> int:
        return self._starts[-1]

    def location(self, index: int) -> str:
        part = self._part(index)
        return self._parts[part].location(index - self._starts[part])

    def __getitem__(self, index: int) -> Row:
        part = self._part(index)
        if part != self._last:
            self._parts[self._last].release()
            self._last = part
        return self._parts[part][index - self._starts[part]]

    def _part(self, index: int) -> int:
        return bisect_right(self._starts, checked(index, len(self))) - 1


def checked(index: int, length: int) -> int:
    """``index``, or IndexError: a negative index would silently read another row."""
    if not 0 <= index < length:
        raise IndexError(f"row {index} of {length}")
    return index
