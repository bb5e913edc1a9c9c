"""Keys and values of what has been written, and the attention over them.

The cache has a slot per sequence that is being decoded. A pass writes the keys and values of its tokens at their
positions and attends what its slots hold up to a length each; a noisy block's entries are overwritten by its next pass
and, once the block is full, by the clean one. Entries are copied only where a slot takes another one's place. Under
full attention there is a cache only where decoding approximates by one (`config.decoding.CACHES`).

Legend: s packed tokens of a pass, n slots in it, q tokens per slot, L the longest visible length, g key/value groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dtrpo.config.backends import BACKENDS
from megatron_dtrpo.diffusion.decoding import Pass
from megatron_dtrpo.diffusion.layout import CLEAN, PADDING_DOCUMENT, Coordinates
from megatron_dtrpo.model.attention import PackedAttention, plan_attention
from megatron_dtrpo.rounding import round_up


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

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first ``length`` positions of slot ``source`` to slot ``target``."""
        for keys, values in self._layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]


@dataclass
class CachedAttention(PackedAttention):
    """Attention of tokens in slots, whose keys and values it also caches. What the model runs behind these tokens is
    padding, and gets zeros."""

    cache: Any = None
    slot: Tensor | None = None  # [s]
    position: Tensor | None = None  # [s]

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, layer: int) -> Tensor:
        padding = query.shape[0] - len(self.slot)
        if padding:
            query, key, value = (t[: len(self.slot)] for t in (query, key, value))
        self.cache.write(layer, self.slot, self.position, key, value)
        out = self._attend(query, key, value, scale, layer)
        return F.pad(out, (0, 0, 0, 0, 0, padding)) if padding else out


@dataclass
class PrefillAttention(CachedAttention):
    """Attention of tokens from position 0 on, of several sequences one after the other. The plan is for ``padding``
    more tokens: FlexAttention's kernels are for few lengths, and the model's tokens need not be."""

    padding: int = 0

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, layer: int) -> Tensor:
        count = query.shape[0]
        if self.padding:
            query, key, value = (F.pad(t, (0, 0, 0, 0, 0, self.padding)) for t in (query, key, value))
        return BACKENDS[self.backend].attend(query, key, value, self.plan, scale)[:count]


class Part(NamedTuple):
    """Passes of one form: their ``rows`` of the packed tokens, their ``slots``, and the ``longest`` visible length.
    ``mask``: additive, fp32 ``[n, 1, 1 or q times query heads of a group, L]``, or None where all see all of it."""

    rows: slice
    slots: slice | Tensor
    longest: int
    mask: Tensor | None


@dataclass
class BlockAttention(CachedAttention):
    """Attention of tokens in slots over what their slot holds before a length, their own among it: a block sees itself
    whole."""

    parts: Sequence[Part] = ()

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float, layer: int) -> Tensor:
        found = [self._attend_part(part, query[part.rows], scale, layer) for part in self.parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _attend_part(self, part: Part, query: Tensor, scale: float, layer: int) -> Tensor:
        keys, values = self.cache.read(layer, part.slots, part.longest)
        n, groups, _, width = keys.shape
        heads = query.shape[1] // groups
        # A group's query heads see the same keys: they become more queries, and no key is repeated.
        q = query.view(n, -1, groups, heads, width).permute(0, 2, 3, 1, 4)
        count = q.shape[3]
        out = F.scaled_dot_product_attention(
            q.reshape(n, groups, heads * count, width),
            keys,
            values,
            attn_mask=None if part.mask is None else part.mask.to(query.dtype),
            scale=scale,
        )
        return out.view(n, groups, heads, count, width).permute(0, 3, 1, 2, 4).reshape(query.shape)


def prefill_attention(
    cache: KeyValueCache, slot: Tensor, position: Tensor, block_size: int, width: int, backend: str
) -> PrefillAttention:
    """For the packed tokens ``0 .. length - 1`` of some slots; lengths are multiples of the block size.

    Args:
        slot, position: int64 ``[s]`` of every token, on the device.
        width: of `model.attention.attention_width`; backend: of `config.backends.BACKENDS`.
    """
    count = slot.numel()
    padding = round_up(BACKENDS[backend].padded(count), block_size) - count
    # As `diffusion.layout.pad_to`: noisy blocks without a document, which see themselves.
    shared = torch.zeros(count + padding, dtype=torch.long, device=slot.device)
    view = shared.clone()
    view[count:] = CLEAN + 1
    document = F.pad(slot, (0, padding), value=PADDING_DOCUMENT)
    block = torch.cat((position, torch.arange(padding, device=slot.device))) // block_size
    plan = plan_attention(Coordinates(document, shared, view, block), block_size, backend, width).plan
    return PrefillAttention(backend=backend, plan=plan, cache=cache, slot=slot, position=position, padding=padding)


def whole_attention(
    cache: KeyValueCache | None, slot: Tensor, position: Tensor, padding: int, width: int, backend: str
) -> PackedAttention:
    """Full attention among the tokens of each slot, and among ``padding`` tokens behind them, which the cache, if any,
    does not get.

    Args:
        slot, position: int64 ``[s]`` of every token, on the device.
        width, backend: as of `prefill_attention`.
    """
    document = F.pad(slot, (0, padding), value=PADDING_DOCUMENT)
    shared = torch.zeros_like(document)
    attention = plan_attention(Coordinates(document, shared, shared + CLEAN + 1, shared), 1, backend, width)
    if cache is None:
        return attention
    plan = attention.plan
    return PrefillAttention(backend=backend, plan=plan, cache=cache, slot=slot, position=position, padding=padding)


def form(one: Pass) -> tuple[int, int]:
    """What passes agree in that are attended together: their tokens, and how many of them are clean."""
    return len(one.tokens), one.clean


def block_attention(
    cache: KeyValueCache,
    passes: Sequence[Pass],
    slots: Sequence[int],
    sent: tuple[Tensor, Tensor],
    slot: Tensor,
    position: Tensor,
    heads: int,
) -> BlockAttention:
    """For passes over blocks, those of one `form` side by side.

    Args:
        slots: of each pass.
        sent: ``slots`` and what each pass sees, int64 ``[n]`` each on the device.
        slot, position: int64 ``[s]`` of every token, on the device.
        heads: query heads of a group.
    """
    parts, first, start = [], 0, 0
    for (length, clean), some in itertools.groupby(passes, key=form):
        visible = [one.visible for one in some]
        here, stop = slice(first, first + len(visible)), start + length * len(visible)
        numbers = slots[here]
        contiguous = list(numbers) == list(range(numbers[0], numbers[0] + len(numbers)))
        which = slice(numbers[0], numbers[0] + len(numbers)) if contiguous else sent[0][here]
        mask = None
        if clean or min(visible) != max(visible):
            mask = _mask(sent[1][here], max(visible), length, clean, heads)
        parts.append(Part(slice(start, stop), which, max(visible), mask))
        first, start = here.stop, stop
    return BlockAttention(backend="cached", cache=cache, slot=slot, position=position, parts=parts)


def _mask(visible: Tensor, longest: int, length: int, clean: int, heads: int) -> Tensor:
    """Of passes of one form, see `Part`. ``visible``: int64 ``[n]``."""
    seen = visible.view(-1, 1, 1, 1)
    if clean:
        is_clean = torch.arange(length, device=visible.device) < clean
        seen = (seen - is_clean.view(-1, 1) * (length - clean)).repeat(1, 1, heads, 1)
    hidden = torch.arange(longest, device=visible.device) >= seen
    return torch.zeros(hidden.shape, device=visible.device).masked_fill(hidden, -torch.inf)
