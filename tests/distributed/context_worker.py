"""One context-parallel rank of `test_context_parallel.py`: ``main(INPUT, OUTPUT)`` in the fork server.

INPUT holds a padded packed sequence, the rows of every rank, whole queries, keys and values, and the gradient of what
comes out. Every rank runs its rows; OUTPUT is what they computed, put together again.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from megatron_dtrpo.config.settings import ParallelSettings
from megatron_dtrpo.runtime import initialize


def whole(part: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The ranks' rows ``[s, ...]``, gathered and put back into packed order."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    gathered = torch.cat(parts)
    out = torch.empty_like(gathered)
    out[order] = gathered
    return out


def main(source: str, target: str) -> None:
    initialize.start(ParallelSettings(context_parallel_size=int(os.environ["WORLD_SIZE"])), seed=1)
    from megatron.core import parallel_state

    from megatron_dtrpo.model.attention import plan_attention
    from megatron_dtrpo.model.context_parallel import add_up

    case = torch.load(source, weights_only=False)
    group, rows, coordinates = parallel_state.get_context_parallel_group(), case["rows"], case["coordinates"]
    mine, order = rows[group.rank()], rows.flatten()
    attention = plan_attention(coordinates.at(mine), case["block_size"], "sdpa", 8, coordinates.at(order), group)
    inputs = [tensor[mine].requires_grad_() for tensor in case["qkv"]]
    out = attention.attend(*inputs, 0.3, layer=1)
    out.backward(case["upstream"][mine])

    parts = torch.full((3,), float(group.rank() + 1), dtype=torch.float64, requires_grad=True)
    total = add_up(parts * 1.0, group)
    (total * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    result = {
        "out": whole(out.detach(), order),
        "gradients": [whole(tensor.grad, order) for tensor in inputs],
        "total": total.detach(),
        "gradient_of_parts": parts.grad,
    }
    if group.rank() == 0:
        torch.save(result, target)
    initialize.stop()
