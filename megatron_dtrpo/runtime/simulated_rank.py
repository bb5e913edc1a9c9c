"""One process in the place of any rank of any number, with tensors that use no memory.

torch's "fake" process group answers every collective at once with what it was given; tensors on the meta device have
shapes and no storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_dtrpo.config.settings import ParallelSettings
from megatron_dtrpo.runtime import initialize

_new_group = dist.new_group


def _fake_group(*args, **kwargs):
    return _new_group(*args, **(kwargs | {"backend": "fake"}))


@contextmanager
def rank_of(parallel: ParallelSettings, rank: int, world_size: int) -> Iterator[None]:
    """Inside, this process is ``rank`` of ``world_size`` under this layout. No process group may exist; none does
    afterwards."""
    initialize.enable_device()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        with mock.patch.object(dist, "new_group", _fake_group):  # megatron-core asks for gloo groups beside its own
            initialize.build_parallel_state(parallel)
        model_parallel_cuda_manual_seed(1)  # nothing is drawn, but megatron-core asks that the streams exist
        yield
    finally:
        initialize.stop()


@contextmanager
def without_memory() -> Iterator[None]:
    """Inside, what megatron-core builds is on the meta device. It allocates on the current device by name, so that a
    default device is not enough."""
    with mock.patch.object(torch.cuda, "current_device", lambda: torch.device("meta")), torch.device("meta"):
        yield
