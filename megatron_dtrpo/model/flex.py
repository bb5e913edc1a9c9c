"""Attention of the packed layout by FlexAttention: kernels that are compiled for the mask predicate."""

from __future__ import annotations

import functools

from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from megatron_dtrpo.config.backends import few_lengths
from megatron_dtrpo.diffusion.layout import Coordinates, visible
from megatron_dtrpo.diffusion.sharding import GRAIN
from megatron_dtrpo.runtime.compiler import allow_variants, compiled


def plan(coordinates: Coordinates, keys: Coordinates, block_size: int, width: int, grain: int = GRAIN):
    """A FlexAttention block mask; compiled, because eagerly it would build the dense mask."""

    def mask_mod(batch, head, query, key):
        return visible(coordinates.at(query), keys.at(key))

    lengths, device = (coordinates.document.numel(), keys.document.numel()), coordinates.document.device
    return _mask_builder(device.type == "cuda")(mask_mod, None, None, *lengths, device=device, BLOCK_SIZE=grain)


@functools.cache
def _mask_builder(compile_it: bool):
    """FlexAttention's ``create_block_mask``; compiled for any length, after two."""
    return compiled(create_block_mask, dynamic=None) if compile_it else create_block_mask


def flex_variants(longest: int) -> int:
    """How many kernels are compiled at most for sequences of up to ``longest`` tokens: for each of their lengths one
    with gradient, one without (the reference, recomputation's first pass, decoding) and one in training where nothing
    before the layer is trained. Head widths and strides are the same throughout a run."""
    lengths, length = 0, 0
    while length < longest:
        length = few_lengths(length + 1)
        lengths += 1
    return 3 * max(lengths, 1)


@functools.cache
def flex_kernel(compile_it: bool):
    """FlexAttention; compiled it never builds the scores, eagerly it is a dense oracle."""
    return compiled(flex_attention) if compile_it else flex_attention


def attend(query: Tensor, key: Tensor, value: Tensor, plan, scale: float) -> Tensor:
    if query.is_cuda:
        allow_variants(flex_variants(key.shape[0]))
    # The value is a view of all three projections, and under context parallelism key and value are views of what was
    # gathered: the backward pass would keep that whole.
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key.contiguous(), value.contiguous()))
    out = flex_kernel(query.is_cuda)(q, k, v, block_mask=plan, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)
