"""Starts and ends a process: device, process groups, megatron-core's parallel state, seeds."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_dtrpo.config.settings import ParallelSettings
from megatron_dtrpo.cpu import shim as cpu
from megatron_dtrpo.cpu import speed
from megatron_dtrpo.errors import SharedError, StopRequest
from megatron_dtrpo.runtime import objects
from megatron_dtrpo.runtime.environment import local_rank as local_rank
from megatron_dtrpo.runtime.environment import local_world_size as local_world_size
from megatron_dtrpo.runtime.environment import rank as rank
from megatron_dtrpo.runtime.environment import world_size as world_size


def device() -> torch.device:
    return torch.device("cpu") if cpu.is_cpu() else torch.device("cuda", torch.cuda.current_device())


def enable_device() -> None:
    """Makes megatron-core usable on this machine: the one door to it. Parallel state, without which nothing of
    megatron-core is built, is made behind it (`start`, `simulated_rank`), so that modules may be imported in any order.
    Idempotent."""
    # On GPUs before Blackwell messages of tensor parallelism overlap the matrix products that they were issued before
    # only if all go through one queue, which megatron-core and Transformer Engine count on. Read when CUDA starts.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    cpu.enable()


@contextmanager
def process_groups(parallel: ParallelSettings, seed: int) -> Iterator[None]:
    """Between `start` and `stop`. An error that this process alone may have leaves the groups as they are: to leave one
    in order is to wait for the others, which may be waiting for this process. `train.run_command` then ends it."""
    start(parallel, seed)
    try:
        yield
    except BaseException as error:
        if world_size() == 1 or isinstance(error, (SharedError, StopRequest)):
            stop()
        raise
    stop()


def start(parallel: ParallelSettings, seed: int) -> None:
    """Joins the process group (of one, when not started by torchrun) and builds megatron-core's parallel state."""
    enable_device()
    speed.use_huge_pages()
    backend = "gloo" if cpu.is_cpu() else "nccl"
    if not cpu.is_cpu():
        torch.cuda.set_device(local_rank())
    timeout = datetime.timedelta(minutes=parallel.distributed_timeout_minutes)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    objects.open_channel()
    build_parallel_state(parallel)
    # Nothing of ours draws from these streams (weights and noise have generators of their own); megatron-core's
    # tensor-parallel regions ask that they exist.
    model_parallel_cuda_manual_seed(seed)


def build_parallel_state(parallel: ParallelSettings) -> None:
    """megatron-core's process groups within the one that was joined."""
    virtual = parallel.num_virtual_stages_per_pipeline_rank
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=parallel.distributed_timeout_minutes,
    )


def stop() -> None:
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        objects.forget_channel()
