"""Whether recorded decodings are such as this model's decoder makes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_dtrpo.data.token_store import RESPONSES, TokenStore
from megatron_dtrpo.errors import UserError


def blocks_in_order(steps: np.ndarray, prompt_length: int, block_size: int) -> bool:
    """Whether the steps of a response, int [R], say that each block was finished before the next one began."""
    first = prompt_length % block_size
    starts = np.arange(-first, len(steps), block_size).clip(min=0)
    earliest, latest = np.minimum.reduceat(steps, starts), np.maximum.reduceat(steps, starts)
    return bool((latest[:-1] < earliest[1:]).all())


def require_steps(store: TokenStore, indices: Iterable[int], block_size: int, who: str) -> None:
    """Raises UserError naming the first row without recorded steps, or the first of ``indices`` whose steps do not
    increase from block to block. ``who`` needs them."""
    missing = store.first_without_steps()
    if missing is not None:
        names = " and ".join(f"{name}_steps" for name in RESPONSES[store.kind])
        raise UserError(f"{store.location(missing)}: has no {names}, which {who} needs in every row")
    for index in indices:
        example = store[int(index)]
        for name, steps in zip(RESPONSES[store.kind], example.steps, strict=True):
            if not blocks_in_order(steps, len(example.prompt), block_size):
                raise UserError(
                    f"{store.location(int(index))}: {name}_steps do not increase from block to block of {block_size} "
                    "tokens; was it recorded with another block_size?"
                )
