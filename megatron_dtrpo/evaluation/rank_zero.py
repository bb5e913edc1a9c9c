"""Rank zero calls functions that all processes then run together, with the arguments that it gave.

For programs that are to run once, on the first process, and now and then need the model that all processes hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from megatron_dtrpo.runtime import objects


class RankZero:
    """``calls``: what can be called, by name; every process makes one `RankZero` of the same."""

    def __init__(self, calls: Mapping[str, Callable[[Any], Any]]):
        self.calls = dict(calls)
        self._listening = False

    def call(self, name: str, argument: Any) -> Any:
        """On the first process, inside `calling`: runs ``calls[name](argument)`` on all; returns its own result."""
        self._listening = False  # should this raise, the others are in the middle of it and hear nothing
        objects.broadcast((name, argument))
        result = self.calls[name](argument)
        self._listening = True
        return result

    @contextmanager
    def calling(self) -> Iterator[None]:
        """On the first process: lets the others go in the end."""
        self._listening = True
        try:
            yield
        finally:
            if self._listening:
                objects.broadcast(None)

    def follow(self) -> None:
        """On the other processes: takes part in every call until the first lets them go."""
        while (message := objects.broadcast(None)) is not None:
            name, argument = message
            self.calls[name](argument)
