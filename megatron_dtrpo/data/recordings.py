"""Whether recorded decodings are such as this model's decoder makes."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.data.stored_examples import RESPONSES, Example, TokenStore
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.rounding import round_up


def blocks_in_order(steps: np.ndarray, prompt_length: int, block_size: int) -> bool:
    """Whether the steps of a response, int [R], say that each block was finished before the next one began."""
    first = prompt_length % block_size
    starts = np.arange(-first, len(steps), block_size).clip(min=0)
    earliest, latest = np.minimum.reduceat(steps, starts), np.maximum.reduceat(steps, starts)
    return bool((latest[:-1] < earliest[1:]).all())


def starts_alone(steps: np.ndarray, prompt_length: int, block_size: int) -> bool:
    """Whether the first token of every block of a response was written before the block's others: it is read where the
    block before is full, and they see it. Steps int [R], in order from block to block."""
    place = np.arange(len(steps))
    start = place - (prompt_length + place) % block_size
    others = (start >= 0) & (start < place)
    return bool((steps[others] > steps[start[others]]).all())


def fits_last_block(example: Example, response: int, block_size: int, block_start: str | None) -> bool:
    """Whether what was thrown away lies in the response's last block and was written while that was decoded."""
    prompt_length, steps = len(example.prompt), example.steps[response]
    discarded = example.discarded[response]
    stop = round_up(prompt_length + len(steps), block_size) - prompt_length  # of the last block, in places
    # Of the blocks before, and of this one's first token where that is a step of its own.
    earlier = steps[: max(stop - block_size + (block_start == "clean"), 0)]
    return bool((discarded[:, 0] < stop).all() and (discarded[:, 2] > earlier.max(initial=-1)).all())


def require_recordings(store: TokenStore, who: str) -> None:
    """Raises UserError naming the first row without a whole recorded decoding. ``who`` needs them."""
    missing, names = store.first_without_steps(), RESPONSES[store.kind]
    if missing is not None:
        fields = " and ".join(f"{name}_steps" for name in names)
        raise UserError(f"{store.location(missing)}: has no {fields}, which {who} needs in every row")
    if store.first_incomplete is not None:
        fields = " and ".join(f"{name}_discarded" for name in names)
        raise UserError(
            f"{store.location(store.first_incomplete)}: has no {fields}, the tokens that its decoding threw away "
            f"behind an end token, which {who} needs: record it anew, or give [] where nothing was thrown away"
        )


def require_steps(store: TokenStore, indices: Iterable[int], block_size: int, block_start: str | None) -> None:
    """Raises UserError naming the first of ``indices`` whose steps no decoder of these blocks takes."""
    for index in indices:
        example = store[int(index)]
        for number, name in enumerate(RESPONSES[store.kind]):
            steps, prompt_length = example.steps[number], len(example.prompt)
            size = block_size or prompt_length + len(steps)
            for holds, problem in (
                (blocks_in_order(steps, prompt_length, size), "steps do not increase from block to block"),
                (
                    block_start != "clean" or starts_alone(steps, prompt_length, size),
                    "steps do not begin with the first token in a block",
                ),
                (
                    fits_last_block(example, number, size, block_start),
                    "discarded holds tokens of another block than the last one",
                ),
            ):
                if not holds:
                    raise UserError(
                        f"{store.location(int(index))}: {name}_{problem} of {size} tokens; was it recorded with "
                        "another block_size?"
                    )


_CHUNK = 4096  # examples whose steps are sorted at once


def noisy_copies(store: TokenStore, block_size: int, block_start: str | None) -> np.ndarray:
    """Noisy blocks (with `FULL` noisy tokens) that replay every step of every response, int64 [n, responses]: the steps
    that wrote each block, its first token left out with ``block_start="clean"``. Every example is recorded."""
    chunks = range(0, len(store), _CHUNK)
    is_alone = block_start == "clean"
    copies = [_copies(store, first, min(first + _CHUNK, len(store)), block_size, is_alone) for first in chunks]
    return np.concatenate(copies)


def _copies(store: TokenStore, first: int, stop: int, block_size: int, starts_alone: bool) -> np.ndarray:
    steps, lengths = store.recorded(first, stop)
    examples, parts = lengths.shape
    part = np.repeat(np.arange(examples * parts), lengths.ravel())
    start = np.repeat(lengths.cumsum() - lengths.ravel(), lengths.ravel())
    prompt = np.repeat(lengths[:, 0], lengths.sum(1))
    position = prompt + np.arange(len(steps)) - start
    read = (part % parts > 0) & ((not starts_alone) or position % block_size > 0)
    thrown = store.discarded(first, stop).astype(np.int64)
    thrown_part = (thrown[:, 0] - first) * parts + 1 + thrown[:, 1]
    part = np.concatenate([part[read], thrown_part])
    # Blocks are written one after the other, so that a step belongs to one of them.
    written = np.unique(part << 32 | np.concatenate([steps[read].astype(np.int64), thrown[:, 4]]))
    copies = np.bincount(written >> 32, minlength=examples * parts).reshape(examples, parts)[:, 1:]
    return copies * (lengths[:, :1] + lengths[:, 1:]) if block_size == FULL else copies
