"""SDPA that follows the mask's work instead of the packed length squared.

Every run of the packed layout starts and ends on a block boundary and a block's tokens share their coordinates, so the
mask is known per pair of blocks. Queries are cut into chunks of whole blocks; a chunk attends exactly the key blocks
that any of its blocks sees. Legend: S packed tokens, s of them queries here, B block size, q and k tokens of a chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dtrpo.diffusion.layout import Coordinates, visible

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
        coordinates: of the queries, ``[s]``; whole blocks.
        keys: coordinates of the keys, ``[S]``: the same ones, or under context parallelism those of all ranks.
        width: query heads times head width on this rank, which says what a query-key pair costs.
    """
    blocks, key_blocks = (Coordinates(*(field[::block_size].cpu() for field in side)) for side in (coordinates, keys))
    seen = visible(blocks.at((slice(None), None)), key_blocks.at((None, slice(None))))
    overhead = CALL_OVERHEAD / (width * block_size**2)  # in pairs of blocks
    device = coordinates.document.device
    within = torch.arange(block_size)
    chunks = []
    for first, last in _cut(blocks, seen, max(1, CHUNK_TOKENS // block_size), overhead):
        rows = seen[first:last]
        attended = rows.any(0).nonzero().squeeze(1)
        key_rows = (attended.unsqueeze(1) * block_size + within).flatten()
        rows = rows[:, attended]
        mask = None
        if not rows.all():
            mask = torch.zeros(rows.shape).masked_fill(~rows, -torch.inf)
            mask = mask.repeat_interleave(block_size, 0).repeat_interleave(block_size, 1).to(device)
        chunks.append(Chunk(first * block_size, last * block_size, key_rows.to(device), mask))
    return chunks


def _cut(blocks: Coordinates, seen: Tensor, step: int, overhead: float) -> list[tuple[int, int]]:
    """Ranges of blocks: each run in steps, neighbours joined where their common rectangle costs less than two calls."""
    run = torch.stack([blocks.document, blocks.branch, blocks.view])
    ends = ((run[:, 1:] != run[:, :-1]).any(0).nonzero().squeeze(1) + 1).tolist() + [seen.shape[0]]
    ranges: list[tuple[int, int]] = []
    start, keys, area = 0, None, 0.0
    for run_start, run_end in zip([0, *ends[:-1]], ends, strict=True):
        for first in range(run_start, run_end, step):
            last = min(first + step, run_end)
            here = seen[first:last].any(0)
            cost = (last - first) * int(here.sum())
            joint = None if keys is None else keys | here
            if joint is not None and (together := (last - start) * int(joint.sum())) < area + cost + overhead:
                ranges[-1], keys, area = (start, last), joint, together
            else:
                ranges.append((first, last))
                start, keys, area = first, here, cost
    return ranges


def segmented_sdpa(query: Tensor, key: Tensor, value: Tensor, chunks: list[Chunk], scale: float) -> Tensor:
    """Attention of ``query [s, heads, d]`` over ``key, value [S, groups, d]``: ``[s, heads, d]``."""
    return _SegmentedSdpa.apply(query, key, value, chunks, scale, torch.is_grad_enabled())


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
    mask = None if mask is None else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


class _SegmentedSdpa(torch.autograd.Function):
    """One autograd node for all chunks. Left to autograd, every slice of the query and every gather of the keys would
    allocate and add a gradient as long as the whole sequence; here a chunk's gradients go straight to their rows."""

    @staticmethod
    def forward(ctx, query, key, value, chunks, scale, with_grad):
        out = torch.empty_like(query)
        ctx.graphs, ctx.keys = [], key.shape[0]
        for chunk in chunks:
            inputs = (query[chunk.start : chunk.stop], key[chunk.keys], value[chunk.keys])
            if with_grad:
                inputs = tuple(t.detach().requires_grad_() for t in inputs)
            with torch.set_grad_enabled(with_grad):
                result = _attend(*inputs, chunk.mask, scale)
            out[chunk.start : chunk.stop] = result.detach()
            if with_grad:
                ctx.graphs.append((chunk, inputs, result))
        return out

    @staticmethod
    def backward(ctx, grad):
        grad_query = torch.empty_like(grad)
        grad_key = grad_value = None
        for chunk, inputs, result in ctx.graphs:
            dq, dk, dv = torch.autograd.grad(result, inputs, grad[chunk.start : chunk.stop])
            if grad_key is None:
                grad_key = dk.new_zeros((ctx.keys, *dk.shape[1:]))
                grad_value = torch.zeros_like(grad_key)
            grad_query[chunk.start : chunk.stop] = dq
            grad_key.index_add_(0, chunk.keys, dk)
            grad_value.index_add_(0, chunk.keys, dv)
        ctx.graphs = None
        return grad_query, grad_key, grad_value, None, None, None
