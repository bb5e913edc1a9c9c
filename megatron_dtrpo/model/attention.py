"""Core attention over the packed layout.

The mask is `diffusion.layout.visible` and nothing else. A backend turns the coordinates of one packed sequence into a
plan, once per micro-batch, and every layer runs that plan. The plan travels through megatron-core as
``packed_seq_params``: activation checkpointing passes that object by closure, whereas ``attention_mask`` may only
carry tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dtrpo.diffusion.layout import Coordinates, visible
from megatron_dtrpo.diffusion.sharding import GRAIN
from megatron_dtrpo.model.context_parallel import gather_keys_and_values
from megatron_dtrpo.model.segmented_sdpa import plan_chunks, segmented_sdpa
from megatron_dtrpo.rounding import round_up
from megatron_dtrpo.runtime.compiler import allow_variants, compiled


@dataclass
class PackedAttention(PackedSeqParams):
    """The attention of one packed sequence. ``qkv_format="sbhd"`` keeps megatron-core's own packed-sequence code,
    which knows documents but not views, out of the way."""

    qkv_format: str = "sbhd"
    backend: str = "sdpa"
    plan: Any = None
    group: Any = None  # context-parallel process group that keys and values are gathered over

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, layer: int) -> Tensor:
        """``query [s, heads, d]``, ``key, value [s, groups, d]`` to ``[s, heads, d]``. All layers share one plan; a
        key/value cache (`inference.cache`) keeps something for each."""
        if self.group is not None:
            key, value = gather_keys_and_values(key, value, self.group)
        return BACKENDS[self.backend].attend(query, key, value, self.plan, scale)


def _flex_plan(coordinates: Coordinates, keys: Coordinates, block_size: int, width: int, grain: int = GRAIN):
    """A FlexAttention block mask; compiled, because eagerly it would build the dense mask."""

    def mask_mod(batch, head, query, key):
        return visible(coordinates.at(query), keys.at(key))

    lengths, device = (coordinates.document.numel(), keys.document.numel()), coordinates.document.device
    return _mask_builder(device.type == "cuda")(mask_mod, None, None, *lengths, device=device, BLOCK_SIZE=grain)


@functools.cache
def _mask_builder(compile_it: bool):
    """FlexAttention's ``create_block_mask``; compiled for any length, after two."""
    from torch.nn.attention.flex_attention import create_block_mask

    return compiled(create_block_mask, dynamic=None) if compile_it else create_block_mask


# Tokens below which a GPU is no faster for fewer of them: it reads the weights in any case.
_SHORTEST = 512


def few_lengths(length: int) -> int:
    """``length`` tokens, rounded up to one of eight lengths per doubling, multiples of 512: kernels are compiled for a
    length, and packed sequences of one token budget then have one or two. At most an eighth is padding, or 511."""
    return round_up(length, max(_SHORTEST, 2 ** (max(length, 1).bit_length() - 4)))


def flex_variants(longest: int) -> int:
    """How many kernels are compiled at most for sequences of up to ``longest`` tokens: for each of their lengths one
    with gradient, one without (the reference, recomputation's first pass, decoding) and one in training where nothing
    before the layer is trained. Head widths and strides are the same throughout a run."""
    lengths, length = 0, 0
    while length < longest:
        length = few_lengths(length + 1)
        lengths += 1
    return 3 * max(lengths, 1)


def _any_length(length: int) -> int:
    return length


@functools.cache
def flex_kernel(compile_it: bool):
    """FlexAttention; compiled it never builds the scores, eagerly it is a dense oracle."""
    from torch.nn.attention.flex_attention import flex_attention

    return compiled(flex_attention) if compile_it else flex_attention


def _flex(query: Tensor, key: Tensor, value: Tensor, plan, scale: float) -> Tensor:
    if query.is_cuda:
        allow_variants(flex_variants(key.shape[0]))
    # The value is a view of all three projections, and under context parallelism key and value are views of what was
    # gathered: the backward pass would keep that whole.
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key.contiguous(), value.contiguous()))
    out = flex_kernel(query.is_cuda)(q, k, v, block_mask=plan, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


class Backend(NamedTuple):
    """``plan``: from the coordinates of queries and keys, block size and width. ``attend``: of ``[s, heads, d]``
    tensors under the plan. ``padded``: the length a packed sequence is padded to."""

    plan: Callable[[Coordinates, Coordinates, int, int], Any]
    attend: Callable[[Tensor, Tensor, Tensor, Any, float], Tensor]
    padded: Callable[[int], int]


BACKENDS = {
    "sdpa": Backend(plan_chunks, segmented_sdpa, _any_length),
    "flex": Backend(_flex_plan, _flex, few_lengths),
}


def choose_backend(name: str, device: torch.device) -> str:
    """Resolves ``attention_backend``."""
    return name if name != "auto" else "flex" if device.type == "cuda" else "sdpa"


def attention_width(config: TransformerConfig) -> int:
    """Query heads times head width on one tensor-parallel rank."""
    return config.num_attention_heads * config.kv_channels // config.tensor_model_parallel_size


def plan_attention(
    coordinates: Coordinates, block_size: int, backend: str, width: int, keys: Coordinates | None = None, group=None
) -> PackedAttention:
    """Prepares the attention of one packed sequence.

    Args:
        coordinates: ``[s]`` on the device that computes.
        width: of `attention_width`.
        keys, group: under context parallelism the coordinates ``[S]`` of all ranks' tokens, rank by rank, and the
            process group that has them.
    """
    plan = BACKENDS[backend].plan(coordinates, coordinates if keys is None else keys, block_size, width)
    return PackedAttention(backend=backend, plan=plan, group=group)


class BlockDiffusionAttention(MegatronModule):
    """The ``core_attention`` of the layer spec. Holds no parameters and no state of a micro-batch."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
    ):
        super().__init__(config=config)
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type=None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedAttention | None = None,
    ) -> Tensor:
        """``query [s, 1, heads, d]``, ``key`` and ``value [s, 1, groups, d]`` of one packed sequence to
        ``[s, 1, heads * d]``. ``attention_mask`` and ``attention_bias`` are ignored: the plan is the mask."""
        out = packed_seq_params.attend(
            query.squeeze(1), key.squeeze(1), value.squeeze(1), self.softmax_scale, self.layer_number
        )
        return out.reshape(out.shape[0], 1, -1)
