"""Keys and values of what has been written, and the attention over them.

The cache has a slot per sequence that is being decoded. A pass writes the keys and values of its tokens at their
positions and attends what its slots hold up to a length each; a noisy block's entries are overwritten by its next pass
and, once the block is full, by the clean one. No entry is ever copied or thrown away.

Legend: s packed tokens of a pass, n slots in it, q tokens per slot, L the longest visible length, g key/value groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dtrpo.diffusion.layout import CLEAN, Coordinates
from megatron_dtrpo.model.attention import PackedAttention
from megatron_dtrpo.model.segmented_sdpa import plan_chunks, segmented_sdpa


class KeyValueCache:
    """Per layer keys and values ``[slots, g, capacity, d]``, allocated when a layer first writes."""

    def __init__(self, slots: int, capacity: int):
        self.slots, self.capacity = slots, capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def write(self, layer: int, slot: Tensor, position: Tensor, key: Tensor, value: Tensor) -> None:
        """``slot, position [s]`` say where ``key, value [s, g, d]`` go."""
        if layer not in self._layers:
            shape = (self.slots, key.shape[1], self.capacity, key.shape[2])
            # Zeros, because attention multiplies what it masks by 0, and 0 x NaN is NaN.
            self._layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self._layers[layer]
        keys[slot, :, position] = key
        values[slot, :, position] = value

    def read(self, layer: int, slots: slice | Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, g, length, d]`` of ``slots``; views where ``slots`` is a slice."""
        keys, values = self._layers[layer]
        return keys[slots, :, :length], values[slots, :, :length]

    def move(self, source: int, target: int) -> None:
        """Makes slot ``target`` a copy of slot ``source``."""
        for keys, values in self._layers.values():
            keys[target] = keys[source]
            values[target] = values[source]


@dataclass
class PrefillAttention(PackedAttention):
    """Attention of clean tokens from position 0 on, of several sequences one after the other, which it also caches."""

    cache: Any = None
    slot: Tensor | None = None  # [s]
    position: Tensor | None = None  # [s]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, layer: int) -> Tensor:
        self.cache.write(layer, self.slot, self.position, key, value)
        return segmented_sdpa(query, key, value, self.plan, scale)


@dataclass
class BlockAttention(PackedAttention):
    """Attention of ``q`` tokens in each of n slots over everything its slot holds before a length, its own tokens among
    it: a block sees itself whole. ``mask`` is additive, fp32 ``[n, 1, 1, L]``, or None where all lengths agree."""

    cache: Any = None
    slot: Tensor | None = None  # [s]
    position: Tensor | None = None  # [s]
    slots: slice | Tensor | None = None
    longest: int = 0
    mask: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, layer: int) -> Tensor:
        self.cache.write(layer, self.slot, self.position, key, value)
        keys, values = self.cache.read(layer, self.slots, self.longest)
        n, groups, _, width = keys.shape
        heads = query.shape[1] // groups
        # A group's query heads see the same keys: they become more queries, and no key is repeated.
        q = query.view(n, -1, groups, heads, width).permute(0, 2, 3, 1, 4)
        count = q.shape[3]
        out = F.scaled_dot_product_attention(
            q.reshape(n, groups, heads * count, width),
            keys,
            values,
            attn_mask=None if self.mask is None else self.mask.to(query.dtype),
            scale=scale,
        )
        return out.view(n, groups, heads, count, width).permute(0, 3, 1, 2, 4).reshape(query.shape)


def prefill_attention(
    cache: KeyValueCache,
    slots: Sequence[int],
    lengths: Sequence[int],
    block_size: int,
    width: int,
    device: torch.device,
) -> PrefillAttention:
    """For the packed tokens ``0 .. length - 1`` of each slot; lengths are multiples of the block size.

    Args:
        width: of `model.attention.attention_width`.
    """
    slot = torch.repeat_interleave(torch.tensor(slots), torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths])
    shared = torch.zeros_like(slot)
    coordinates = Coordinates(slot, shared, torch.full_like(slot, CLEAN), position // block_size)
    coordinates = Coordinates(*(field.to(device) for field in coordinates))
    plan = plan_chunks(coordinates, coordinates, block_size, width)
    return PrefillAttention(
        backend="prefill", plan=plan, cache=cache, slot=slot.to(device), position=position.to(device)
    )


def block_attention(
    cache: KeyValueCache,
    slots: Sequence[int],
    starts: Sequence[int],
    count: int,
    visible: Sequence[int],
    device: torch.device,
) -> BlockAttention:
    """For ``count`` tokens of each slot from position ``start`` on, which see positions before ``visible``."""
    longest = max(visible)
    position = (torch.tensor(starts).unsqueeze(1) + torch.arange(count)).flatten()
    mask = None
    if min(visible) != longest:
        hidden = torch.arange(longest) >= torch.tensor(visible).unsqueeze(1)
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None, :].to(device)
    contiguous = list(slots) == list(range(slots[0], slots[0] + len(slots)))
    return BlockAttention(
        backend="cached",
        cache=cache,
        slot=torch.tensor(slots).repeat_interleave(count).to(device),
        position=position.to(device),
        slots=slice(slots[0], slots[0] + len(slots)) if contiguous else torch.tensor(slots, device=device),
        longest=longest,
        mask=mask,
    )
