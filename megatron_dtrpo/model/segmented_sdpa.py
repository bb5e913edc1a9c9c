"""SDPA that follows the mask's work instead of the packed length squared.

A block's tokens share their coordinates, so the mask is known per pair of blocks. Queries are cut into chunks of whole
blocks; a chunk attends exactly the key blocks that any of its blocks sees. Blocks may differ in length: under full
attention each view of a response is one. Legend: S packed tokens, s of them queries here, q and k tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dtrpo.diffusion.layout import Coordinates, runs, visible

CHUNK_TOKENS = 64  # long enough to fill the matrix units, short enough to skip what a run's early queries cannot see

# What one more SDPA call costs, forward and backward, in multiply-adds of the attention itself: measured as 0.3 ms
# on a core that does 5e9 of them a second. Runs of short documents share a call where that is cheaper.
CALL_OVERHEAD = 1.5e6


class Chunk(NamedTuple):
    """Queries ``start:stop``, the packed rows ``[k]`` of the keys they see, and the additive fp32 mask ``[q, k]``
    (``None`` where everything is seen)."""

    start: int
    stop: int
    keys: Tensor
    mask: Tensor | None


def plan_chunks(coordinates: Coordinates, keys: Coordinates, block_size: int, width: int) -> list[Chunk]:
    """Cuts one packed sequence into chunks.

    Args:
        coordinates: of the queries, ``[s]``. Their blocks are what shares its coordinates, whatever ``block_size`` is.
        keys: coordinates of the keys, ``[S]``: the same ones, or under context parallelism those of all ranks.
        width: query heads times head width on this rank, which says what a query-key pair costs.
    """
    (blocks, lengths), (key_blocks, key_lengths) = (runs(side.map(Tensor.cpu)) for side in (coordinates, keys))
    seen = visible(blocks.at((slice(None), None)), key_blocks.at((None, slice(None))))
    device = coordinates.document.device
    ends, key_block = lengths.cumsum(0).tolist(), torch.arange(len(key_lengths)).repeat_interleave(key_lengths)
    chunks = []
    for first, last in _cut(blocks, lengths, seen, key_lengths, CALL_OVERHEAD / width):
        rows = seen[first:last]
        attended = rows.any(0)
        key_rows = attended[key_block].nonzero().squeeze(1)
        mask = None
        if not rows[:, attended].all():
            mask = torch.zeros(rows.shape).masked_fill(~rows, -torch.inf)[:, key_block[key_rows]]
            mask = mask.repeat_interleave(lengths[first:last], 0).to(device)
        chunks.append(Chunk(ends[first] - int(lengths[first]), ends[last - 1], key_rows.to(device), mask))
    return chunks


def _cut(
    blocks: Coordinates, lengths: Tensor, seen: Tensor, key_lengths: Tensor, overhead: float
) -> list[tuple[int, int]]:
    """Ranges of blocks: each view in steps of `CHUNK_TOKENS`, or a block where that is longer, neighbours joined where
    their common rectangle costs less than two calls. ``overhead``: of a call, in pairs of tokens."""
    ranges: list[tuple[int, int]] = []
    start, keys, area = 0, None, 0.0
    before = [0, *lengths.cumsum(0).tolist()]
    for first, last in _steps(blocks, before):
        here = seen[first:last].any(0)
        cost = (before[last] - before[first]) * int(key_lengths[here].sum())
        joint = None if keys is None else keys | here
        if joint is not None:
            together = (before[last] - before[start]) * int(key_lengths[joint].sum())
            if together < area + cost + overhead:
                ranges[-1], keys, area = (start, last), joint, together
                continue
        ranges.append((first, last))
        start, keys, area = first, here, cost
    return ranges


def _steps(blocks: Coordinates, before: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbouring blocks of one view, as many as `CHUNK_TOKENS` holds. ``before``: the tokens before each block."""
    view = torch.stack([blocks.document, blocks.branch, blocks.view])
    is_new = [True, *(view[:, 1:] != view[:, :-1]).any(0).tolist(), True]
    first = 0
    for last in range(1, len(before)):
        if is_new[last] or before[last + 1] - before[first] > CHUNK_TOKENS:
            yield first, last
            first = last


def segmented_sdpa(query: Tensor, key: Tensor, value: Tensor, chunks: list[Chunk], scale: float) -> Tensor:
    """Attention of ``query [s, heads, d]`` over ``key, value [S, groups, d]``: ``[s, heads, d]``."""
    return _SegmentedSdpa.apply(query, key, value, chunks, scale)


class Kernel(NamedTuple):
    """SDPA of one chunk, of ``q [1, heads, q, d]`` and ``k, v [1, groups, k, d]``. ``forward`` gives the output and
    what ``backward`` wants of the softmax; ``backward`` gives the gradients of q, k and v."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]


def _flash_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)


def _flash_backward_on_cpu(grad, q, k, v, out, log_sum, mask, scale) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, log_sum, 0.0, False, attn_mask=mask, scale=scale
    )


def _anywhere(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    # A group's query heads see the same keys: they become more queries, because CUDA's fast kernels take a mask only
    # where there are as many query heads as key heads.
    folded = q.reshape(1, k.shape[1], -1, q.shape[3])
    if mask is not None:
        mask = mask.repeat(folded.shape[2] // q.shape[2], 1)
    out = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scale)
    return out.reshape(q.shape), q.new_empty(0)


def _backward_anywhere(grad, q, k, v, out, nothing, mask, scale) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
        return torch.autograd.grad(_anywhere(q, k, v, mask, scale)[0], (q, k, v), grad)


# Device types whose kernel can be called without autograd keeping each chunk's copy of the keys; others run it again.
KERNELS = {"cpu": Kernel(_flash_on_cpu, _flash_backward_on_cpu)}
ANY_DEVICE = Kernel(_anywhere, _backward_anywhere)


def _heads_first(t: Tensor) -> Tensor:
    """``[tokens, heads, d]`` to ``[1, heads, tokens, d]``."""
    return t.transpose(0, 1).unsqueeze(0)


class _SegmentedSdpa(torch.autograd.Function):
    """One autograd node for all chunks, which keeps the whole query, key, value and output and no chunk's. Left to
    autograd, every slice of the query and every gather of the keys would stay in memory, and allocate and add a
    gradient as long as the whole sequence; here a chunk's gradients go straight to their rows."""

    @staticmethod
    def forward(ctx, query, key, value, chunks, scale):
        ctx.chunks, ctx.scale, ctx.kernel = chunks, scale, KERNELS.get(query.device.type, ANY_DEVICE)
        out, statistics = torch.empty_like(query), []
        for chunk in chunks:
            result, kept = ctx.kernel.forward(*_inputs(query, key, value, chunk), scale)
            out[chunk.start : chunk.stop] = result.squeeze(0).transpose(0, 1)
            statistics.append(kept)
        if any(ctx.needs_input_grad):
            # The value is a view of all three projections; the query and the key, which were rotated, are not.
            ctx.save_for_backward(query, key, value.contiguous(), out, *statistics)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, *statistics = ctx.saved_tensors
        grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for chunk, kept in zip(ctx.chunks, statistics, strict=True):
            rows = slice(chunk.start, chunk.stop)
            *inputs, mask = _inputs(query, key, value, chunk)
            dq, dk, dv = ctx.kernel.backward(
                _heads_first(grad[rows]), *inputs, _heads_first(out[rows]), kept, mask, ctx.scale
            )
            grad_query[rows] = dq.squeeze(0).transpose(0, 1)
            grad_key.index_add_(0, chunk.keys, dk.squeeze(0).transpose(0, 1))
            grad_value.index_add_(0, chunk.keys, dv.squeeze(0).transpose(0, 1))
        return grad_query, grad_key, grad_value, None, None


def _inputs(query: Tensor, key: Tensor, value: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    mask = None if chunk.mask is None else chunk.mask.to(query.dtype)
    q, k, v = (_heads_first(t) for t in (query[chunk.start : chunk.stop], key[chunk.keys], value[chunk.keys]))
    return q, k, v, mask
