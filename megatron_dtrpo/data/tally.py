"""Findings in rows: every kind of finding, how many rows have it, and where the first of them stand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_dtrpo.data.row_sequence import Rows
from megatron_dtrpo.errors import UserError

_PLACES = 3  # that are named of a kind
_KINDS = 8  # that are named at all


class Tally:
    """Counts findings by kind: messages that differ in numbers and in details behind a semicolon or bracket are one."""

    def __init__(self, kinds: list[dict] | None = None) -> None:
        """``kinds``: what `as_list` gave."""
        self._kinds = {_kind(kind["message"]): kind for kind in kinds or []}

    def add(self, location: str, message: str) -> None:
        """``message`` is about the row at ``location``, and may begin with it."""
        message = message.removeprefix(f"{location}: ")
        kind = self._kinds.setdefault(_kind(message), {"message": message, "rows": 0, "places": []})
        kind["rows"] += 1
        if len(kind["places"]) < _PLACES:
            kind["places"].append(location)

    @contextmanager
    def catching(self, rows: Rows, index: int) -> Iterator[None]:
        """Turns a UserError raised inside into a finding about row ``index``."""
        try:
            yield
        except UserError as error:
            self.add(rows.location(index), str(error))

    def __bool__(self) -> bool:
        return bool(self._kinds)

    @property
    def rows(self) -> int:
        """Findings; those of a row that is dropped at its first are the rows dropped."""
        return sum(kind["rows"] for kind in self._kinds.values())

    def as_list(self) -> list[dict]:
        """For a JSON file."""
        return list(self._kinds.values())

    def lines(self) -> list[str]:
        """One for each kind: ``pairs.jsonl:3: chosen: is empty (5 rows, also pairs.jsonl:7, pairs.jsonl:9)``."""
        return [_line(kind) for kind in self._kinds.values()]

    def __str__(self) -> str:
        """All kinds in one line."""
        lines = self.lines()
        more = [f"and {len(lines) - _KINDS} kinds more"] if len(lines) > _KINDS else []
        return " | ".join(lines[:_KINDS] + more)


def bad_rows_error(bad: Tally, total: int) -> UserError:
    """The error that is raised where ``bad`` rows among ``total`` may not be skipped, or none is left."""
    if bad.rows == total > 1:
        return UserError(f"none of {total} rows can be used: {bad}")
    if total == 1:
        return UserError(str(bad))
    if bad.rows == 1:
        return UserError(f"{bad} (to go on without this row: --bad-rows skip)")
    return UserError(f"{bad.rows} of {total} rows cannot be used (to go on without them: --bad-rows skip): {bad}")


def skipped_line(bad: Tally, total: int) -> str:
    return f"skipped {bad.rows} of {total} rows that cannot be used: {bad}"


def _kind(message: str) -> str:
    return re.sub(r"\d+", "#", re.split(r"[;(]", message)[0])


def _line(kind: dict) -> str:
    first, *others = kind["places"]
    line = f"{first}: {kind['message']}"
    if kind["rows"] == 1:
        return line
    more = ", ..." if kind["rows"] > len(kind["places"]) else ""
    return f"{line} ({kind['rows']} rows, also {', '.join(others)}{more})"
