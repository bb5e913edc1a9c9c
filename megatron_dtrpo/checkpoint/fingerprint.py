"""A fingerprint of a model's weights, adapters left out: exact, and the same under every layout.

Every element's raw bits count with an odd factor that says where in the unsharded parameter it lies, summed modulo
2^64: changing one element always changes the sum, and each process can add up its own part.

An adapter may be trained beside weights in bf16 and used beside the same ones in fp32: the fingerprint of its base is
that of the weights rounded to bf16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_dtrpo.model.chunks import chunks_of
from megatron_dtrpo.model.initialization import global_parameter_names, shared_name
from megatron_dtrpo.model.lora import is_adapter
from megatron_dtrpo.runtime import objects

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROWS = 1024  # summed at a time


def weights_fingerprint(model: torch.nn.Module | Sequence[torch.nn.Module]) -> str:
    """Hex fingerprint of all stages' parameters, on every process; collective. ``model`` is this rank's stage, or a
    list of its virtual ones."""
    return _digest(model, rounded=False)


def base_fingerprint(model: torch.nn.Module | Sequence[torch.nn.Module]) -> str:
    """As `weights_fingerprint`, of the weights rounded to bf16."""
    return _digest(model, rounded=True)


def _digest(model, rounded: bool) -> str:
    gathered = objects.gather([_own_sums(chunk, rounded) for chunk in chunks_of(model)])
    total: dict[str, int] = {}
    for part in (sums for rank in gathered for sums in rank):
        for name, value in part.items():
            total[name] = (total.get(name, 0) + value) % 2**64
    return digest_of(total)


def digest_of(sums: dict[str, int]) -> str:
    """The fingerprint of a model whose parameters, each under its name and type, have these sums."""
    return hashlib.sha256(json.dumps(sorted(sums.items())).encode()).hexdigest()


def rounded_name(name: str) -> str:
    """Under which a parameter that is rounded counts."""
    return f"{name} {torch.bfloat16}"


def _own_sums(model: Any, rounded: bool) -> dict[str, int]:
    """Parameter (name, type) -> the sum over the part that this process counts; every element has one that does."""
    sums: dict[str, int] = {}
    tp = model.pg_collection.tp
    if parallel_state.get_data_parallel_rank(with_context_parallel=True) != 0:
        return sums
    for name, parameter in global_parameter_names(model).items():
        if shared_name(model, name) != name or is_adapter(name):
            continue
        sharded = getattr(parameter, "tensor_model_parallel", False)
        if not sharded and tp.rank() != 0:
            continue
        indices = [torch.arange(size, device=parameter.device) for size in parameter.shape]
        if sharded:
            indices[parameter.partition_dim] = _sharded_indices(parameter, tp)
        if rounded:
            sums[rounded_name(name)] = sum_of_rounded(parameter.detach(), indices)
        else:
            sums[f"{name} {parameter.dtype}"] = _sum_of_bits(parameter.detach(), indices)
    return sums


def _sharded_indices(parameter: Any, tp) -> Tensor:
    """Where this rank's part lies along the divided dimension; a stride of 2 marks two stacked matrices."""
    dim, stride = parameter.partition_dim, parameter.partition_stride
    whole = torch.arange(parameter.shape[dim] * tp.size(), device=parameter.device)
    return whole.unflatten(0, (stride, tp.size(), -1))[:, tp.rank()].flatten()


def sum_of_rounded(values: Tensor, indices: list[Tensor]) -> int:
    """As `_sum_of_bits`, of values rounded to bf16."""
    return _sum_of_bits(values.float().bfloat16(), indices)


def _sum_of_bits(parameter: Tensor, indices: list[Tensor]) -> int:
    """``[rows, columns]`` or ``[rows]``, and the unsharded index of each of them. Products and sums wrap, as wanted."""
    bits = parameter.contiguous().view(_INTEGERS[parameter.element_size()])
    bits = bits if bits.dim() == 2 else bits.unsqueeze(1)
    rows, columns = (*indices, indices[0].new_zeros(1))[:2]
    total = 0
    for part, row in zip(bits.split(_ROWS), rows.split(_ROWS), strict=True):
        # 2^32 columns are more than any matrix has, whatever part of them is here.
        factor = 2 * ((row.unsqueeze(1) << 32) + columns) + 1
        total += (part.long() * factor).sum().item()
    return total % 2**64
