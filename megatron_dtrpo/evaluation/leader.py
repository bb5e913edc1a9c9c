"""One process leads: it calls functions that all processes then run together, with the arguments that it gave.

For programs that are to run once, on the first process, and now and then need the model that all processes hold.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

_WAIT = datetime.timedelta(days=7)  # how long the leader may be busy with something else


class Leader:
    """``calls``: what can be called, by name; every process makes one `Leader` of the same."""

    def __init__(self, calls: Mapping[str, Callable[[Any], Any]]):
        self.calls = dict(calls)
        self._listening = False
        # On the CPU, because a device's collectives may not wait for long.
        self._channel = dist.new_group(backend="gloo", timeout=_WAIT) if dist.get_world_size() > 1 else None

    def call(self, name: str, argument: Any) -> Any:
        """On the first process, inside `leading`: runs ``calls[name](argument)`` on all; returns its own result."""
        self._listening = False  # should this raise, the others are in the middle of it and hear nothing
        self._tell((name, argument))
        result = self.calls[name](argument)
        self._listening = True
        return result

    @contextmanager
    def leading(self) -> Iterator[None]:
        """On the first process: lets the others go in the end."""
        self._listening = True
        try:
            yield
        finally:
            if self._listening:
                self._tell(None)

    def follow(self) -> None:
        """On the other processes: takes part in every call until the first lets them go."""
        while (message := self._tell(None)) is not None:
            name, argument = message
            self.calls[name](argument)

    def _tell(self, message: Any) -> Any:
        """The first process's message, on every process; collective."""
        box = [message]
        if self._channel is not None:
            dist.broadcast_object_list(box, src=0, group=self._channel)
        return box[0]
