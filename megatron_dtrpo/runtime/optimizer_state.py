"""The distributed optimizer's state in checkpoints: every process writes and reads its own share and nothing else.

megatron-core's reshardable form is a tensor of each parameter's shape, and it gathers all of them, in fp32, on every
data-parallel process. The form is kept and the gather is not: the share of a process is a stretch of each parameter's
elements, a stretch is a few boxes of the parameter, and a ``torch_dist`` checkpoint stores a tensor in any boxes and
reads it in any others. No message is sent, and a process holds a copy of its own share at most.

megatron-core's gather also forgets the padding between buckets (its param_index_map counts it, its world tensors do
not): with more than one bucket it saves shifted state, wherever a bucket's size is no multiple of
lcm(data-parallel size, 128).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import MethodType

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from torch import Tensor

from megatron_dtrpo.rounding import ceil_divide

STATE = ("param", "exp_avg", "exp_avg_sq")  # main weights and Adam's moments
Box = tuple[tuple[int, ...], tuple[int, ...]]


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Cuts elements ``start:stop`` of a row-major tensor of this shape into boxes, in the order of the elements.

    Returns:
        Offset and shape of each box: at most ``2 len(shape) - 1`` of them.
    """
    if start == stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = math.prod(shape[1:])

    def inside(number: int, start: int, stop: int) -> list[Box]:
        found = boxes(shape[1:], start - number * row, stop - number * row)
        return [((number, *offset), (1, *size)) for offset, size in found]

    first, last = ceil_divide(start, row), stop // row  # whole rows first:last
    if first > last:
        return inside(last, start, stop)
    whole = [((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))] if first < last else []
    return [*inside(first - 1, start, first * row), *whole, *inside(last, last * row, stop)]


def save_own_share(optimizer) -> None:
    """Has megatron-core's distributed optimizers in ``optimizer`` save and load their state as this module does."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        if each.config.use_distributed_optimizer:
            each.sharded_param_state_fully_reshardable = MethodType(_sharded_state, each)
            each.load_parameter_state_from_fully_reshardable = MethodType(_load_state, each)


def _shares(optimizer) -> Iterator[tuple[int, torch.nn.Parameter, int, int]]:
    """Number, parameter, start and stop of every parameter of which this process has a share."""
    parameters = (parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map)
    for number, parameter in enumerate(parameters):
        if parameter in optimizer.model_param_gbuf_map:
            share = optimizer._get_model_param_range_map(parameter)["param"]
            if share.start < share.end:
                yield number, parameter, share.start, share.end


def _sharded_state(optimizer, model_state: dict, is_loading: bool = False, metadata: dict | None = None) -> dict:
    """Stands for ``DistributedOptimizer.sharded_param_state_fully_reshardable``: parameter -> state -> boxes."""
    stored, _ = extract_sharded_tensors_and_factories(model_state)
    stored = {each.data: each for each in nested_values(stored)}
    state = {}
    for number, parameter, start, stop in _shares(optimizer):
        tensors = _empty(stop - start) if is_loading else optimizer._get_main_param_and_optimizer_states(parameter)
        chunks = _chunks(stored[parameter], parameter)
        state[number] = {
            name: dict(enumerate(_cut(f"optimizer.state.{name}", tensors[name].detach(), start, chunks)))
            for name in STATE
        }
    return state


def _empty(count: int) -> dict[str, Tensor]:
    return {name: torch.empty(count, dtype=torch.float32) for name in STATE}


def _chunks(stored: ShardedTensor | ShardedTensorFactory, parameter: Tensor) -> list[tuple[int, ShardedTensor]]:
    """The parts that a checkpoint has of ``parameter``, each with its first element's index: the whole, or the gate and
    the up projection of a gated MLP, which a factory makes of it."""
    if isinstance(stored, ShardedTensor):
        return [(0, stored)]
    parts = replace(stored, data=torch.empty(parameter.shape, dtype=torch.float32, device="meta")).build()
    parts = [part for part in nested_values(parts) if isinstance(part, ShardedTensor)]
    assert all(part.data.is_contiguous() for part in parts), f"{stored.key}: parts that are not made of whole rows"
    return [(part.data.storage_offset(), part) for part in parts]


def _cut(prefix: str, share: Tensor, start: int, chunks: list[tuple[int, ShardedTensor]]) -> Iterator[ShardedTensor]:
    """The boxes of a ``share`` ``[count]`` of a parameter's elements from ``start`` on, as views."""
    for first, chunk in chunks:
        low = max(start, first)
        high = max(low, min(start + len(share), first + math.prod(chunk.local_shape)))
        leading, place = chunk.global_offset[: chunk.prepend_axis_num], chunk.global_offset[chunk.prepend_axis_num :]
        for offset, shape in boxes(chunk.local_shape, low - first, high - first):
            data = share[low - start :][: math.prod(shape)].view(shape)
            low += data.numel()
            yield replace(
                chunk,
                key=f"{prefix}.{chunk.key}",
                data=data,
                dtype=data.dtype,
                local_shape=shape,
                global_offset=(*leading, *(here + inside for here, inside in zip(place, offset, strict=True))),
                axis_fragmentations=None,  # no regular grid
                replica_id=(*chunk.replica_id[:-1], 0),  # nobody else in the data-parallel group has this box
            )


@torch.no_grad()
def _load_state(optimizer, state: dict) -> None:
    """Stands for ``DistributedOptimizer.load_parameter_state_from_fully_reshardable``."""
    for number, parameter, _, _ in _shares(optimizer):
        parts = {name: [found[key] for key in sorted(found)] for name, found in state[number].items()}
        tensors = {name: torch.cat([box.flatten() for box in found]) for name, found in parts.items()}
        optimizer._set_main_param_and_optimizer_states(parameter, tensors)
    if isinstance(optimizer.optimizer, HybridDeviceOptimizer):
        optimizer.optimizer._sync_hdo_state_to_sub_optimizers()
