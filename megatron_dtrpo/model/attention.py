"""Core attention over the packed layout.

The mask is `diffusion.layout.visible` and nothing else. A backend turns the coordinates of one packed sequence into a
plan, once per micro-batch, and every layer runs that plan. The plan travels through megatron-core as
``packed_seq_params``: activation checkpointing passes that object by closure, whereas ``attention_mask`` may only
carry tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dtrpo.config.backends import BACKENDS
from megatron_dtrpo.diffusion.layout import Coordinates
from megatron_dtrpo.model.context_parallel import gather_keys_and_values


@dataclass
class PackedAttention(PackedSeqParams):
    """The attention of one packed sequence. ``qkv_format="sbhd"`` keeps megatron-core's own packed-sequence code,
    which knows documents but not views, out of the way."""

    qkv_format: str = "sbhd"
    backend: str = "sdpa"
    plan: Any = None
    group: Any = None  # context-parallel process group that keys and values are gathered over
    token: Tensor | None = None  # a number for each of this rank's tokens, which dropout draws from

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, layer: int) -> Tensor:
        """``query [s, heads, d]``, ``key, value [s, groups, d]`` to ``[s, heads, d]``. All layers share one plan; a
        key/value cache (`inference.cache`) keeps something for each."""
        if self.group is not None:
            key, value = gather_keys_and_values(key, value, self.group)
        return BACKENDS[self.backend].attend(query, key, value, self.plan, scale)


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
