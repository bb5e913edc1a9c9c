"""The linear layer of megatron-core on a CPU: each fp32 product by the faster of the two libraries that torch carries.

torch gives fp32 products to MKL, which on processors other than Intel's stays at 256-bit instructions. oneDNN uses what
the processor has: with 512-bit instructions (AMD Zen 5) all products take half the time at the same precision. With
256-bit ones (AMD Zen 4) it takes 5% less where both factors lie row by row, and half as much more where the first is
transposed, as in a weight's gradient: it copies that factor. On Intel's processors MKL is faster at every product (Xeon
with 512-bit instructions: 145 to 190 GFLOP/s a core where oneDNN reaches 70 to 165, weight gradients the least).
"""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from megatron_dtrpo.cpu.kernels import Recipe, recipe_of, run


def _is_intel(about: Path = Path("/proc/cpuinfo")) -> bool:
    """Of a processor that does not say what it is, False."""
    return about.exists() and "GenuineIntel" in about.read_text()


_INTEL = _is_intel()
_WIDE = torch.backends.cpu.get_cpu_capability() == "AVX512"

# Multiply-adds below which starting a oneDNN product (some ten microseconds) costs more than it saves.
LEAST_WORK = 2**20


def times_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a [m, k]`` times the transpose of ``b [n, k]``: ``[m, n]``."""
    if _faster_by_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return torch.mm(a, b.t())


def _faster_by_onednn(a: Tensor, b: Tensor) -> bool:
    """A matter of type, shape, strides and processor, never of a timing: a run that resumes multiplies as before."""
    suits = a.dtype is torch.float32 and a.numel() * b.shape[0] >= LEAST_WORK
    suits = suits and not _INTEL and (_WIDE or a.stride(-1) == 1)
    return suits and torch.backends.mkldnn.is_available()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
        ctx.make = recipe.make
        ctx.save_for_backward(weight, *(recipe.sources if weight.requires_grad else ()))
        out = times_transposed(input.flatten(0, -2), weight)
        if bias is not None:
            out += bias
        return out.view(*input.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight, *sources = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        needs_input, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_input = grad_weight = None
        if needs_input:
            grad_input = times_transposed(rows, weight.t()).view(*grad.shape[:-1], weight.shape[1])
        if needs_weight:
            grad_weight = times_transposed(rows.t(), ctx.make(*sources).flatten(0, -2).t())
        return grad_input, grad_weight, rows.sum(0) if needs_bias else None, None


def _itself(input: Tensor) -> Tensor:
    return input


def copy_to_region(input: Tensor, group=None) -> Tensor:
    """megatron-core's ``copy_to_tensor_model_parallel_region``, whose result is made as its input is; of one process
    its input itself, without a node."""
    if _is_alone(group):
        return input
    result, recipe = copy_to_tensor_model_parallel_region(input, group), recipe_of(input)
    if recipe is not None:
        result.recipe = recipe
    return result


def reduce_from_region(input: Tensor, group=None) -> Tensor:
    """megatron-core's ``reduce_from_tensor_model_parallel_region``; of one process its input itself."""
    return input if _is_alone(group) else reduce_from_tensor_model_parallel_region(input, group)


def _is_alone(group) -> bool:
    return get_tensor_model_parallel_group_if_none(group).size() == 1


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient_accumulation_fusion,
    allreduce_dgrad: bool,
    sequence_parallel: bool,
    tp_group,
    grad_output_buffer=None,
    wgrad_deferral_limit=None,
    gtp_remat_size: int = 1,
) -> Tensor:
    """``input [s, b, k]`` times the transpose of ``weight [n, k]``, plus ``bias [n]``, with the signature and the
    collectives of megatron-core's ``linear_with_grad_accumulation_and_async_allreduce``. Its overlap of collectives
    with products needs streams; here one follows the other. ``gtp_remat_size`` (from 0.18 or 0.19 on): weights that are
    sharded once more, which no setting of ours asks for."""
    assert gtp_remat_size == 1
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
    elif allreduce_dgrad:
        input = copy_to_region(input, tp_group)
    return run(_Linear, input, weight, bias, recipe_of(input) or Recipe(_itself, (input,)))
