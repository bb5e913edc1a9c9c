"""Context parallelism's collectives: every rank's keys and values to all, and a response's parts added up.

Group-query attention has few key/value heads, so gathering them costs little beside the attention itself, and the
local queries then attend to everything under the one mask. Both functions do nothing in a group of one.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, reduce_from_tensor_model_parallel_region
from torch import Tensor


def gather_keys_and_values(key: Tensor, value: Tensor, group) -> tuple[Tensor, Tensor]:
    """``[s, groups, d]`` each to ``[S, groups, d]`` each, rank by rank; the backward pass adds up what the ranks'
    queries ask of a key and leaves each rank its own: a reduce-scatter.

    Args:
        group: the context-parallel process group, ``S / s`` ranks.
    """
    both = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1), group=group)  # one message
    return both.split((key.shape[-1], value.shape[-1]), dim=-1)


def add_up(parts: Tensor, group) -> Tensor:
    """The sum of the ranks' ``parts``, any shape, on every rank. A rank's gradient reaches its own part, once."""
    return reduce_from_tensor_model_parallel_region(parts.contiguous(), group)
