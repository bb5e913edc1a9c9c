"""Python objects and long waits between processes: on the CPU, over gloo, whatever the device.

On the default process group of a GPU run, NCCL's, an object costs device memory, and a wait is ended by
``--distributed-timeout-minutes``. Here a process may be waited for as long as its work takes: tokenizing on rank zero,
decoding that is longer on one process than on another, a verifier, a harness, a save. Only a process that is gone ends
such a wait early: its connections close, which gloo notices at once.
"""

from __future__ import annotations

import datetime
from typing import TypeVar

import torch.distributed as dist

from megatron_dtrpo.errors import SharedError, StopRequest, UserError
from megatron_dtrpo.runtime import stop

T = TypeVar("T")

PATIENCE = datetime.timedelta(days=1)

_channel: dist.ProcessGroup | None = None  # of all processes; None where there is only one


def open_channel() -> None:
    """Makes the group; collective, after the default group was joined."""
    global _channel
    _channel = dist.new_group(backend="gloo", timeout=PATIENCE) if dist.get_world_size() > 1 else None


def forget_channel() -> None:
    """For after the process groups were destroyed."""
    global _channel
    _channel = None


def gather(value: T) -> list[T]:
    """Every process's ``value``, by rank, on every process; collective."""
    if _channel is None:
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_channel)
    return values


def broadcast(value: T) -> T:
    """Rank zero's ``value``, on every process; collective."""
    box = [value]
    if _channel is not None:
        dist.broadcast_object_list(box, src=0, group=_channel)
    return box[0]


def barrier() -> None:
    """Waits until every process is here."""
    if _channel is not None:
        dist.barrier(group=_channel)


def raise_together(problem: UserError | StopRequest | None) -> None:
    """Raises on every process if one of them has a ``problem``; collective. A process that left alone would leave the
    others in the middle of a collective."""
    problems = [other for other in gather(problem) if other is not None]
    for error in (other for other in problems if isinstance(other, UserError)):
        raise SharedError(str(error))
    for request in problems:
        raise request


def stop_together() -> None:
    """Raises StopRequest on every process if one of them was asked to stop; collective."""
    name = next(filter(None, gather(stop.requested())), None)
    if name is not None:
        raise StopRequest(name)
