"""Decoding a file of prompts over all processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.errors import StopRequest
from megatron_dtrpo.runtime import initialize, objects, stop
from megatron_dtrpo.training.engine import Engine

if TYPE_CHECKING:
    from megatron_dtrpo.data.prompts import Prompt

BLOCKS_BETWEEN_CHECKS = 8  # of all sequences that are decoded at once: well under a second


def decode_prompts(
    engine: Engine,
    prompts: Sequence[Prompt],
    options: DecodingOptions,
    *,
    batch_size: int,
    seed: int,
    samples: int = 1,
    end_ids: Iterable[int] = (),
    progress: bool = True,
) -> list[list[Completion]]:
    """``samples`` completions of every prompt, on every process; data-parallel processes share the prompts out, and
    some have none where there are few. Raises StopRequest on every process if one was asked to stop. Collective.

    A completion depends on the prompt's place in the list and the sample's number, not on how many processes there are.
    """
    from tqdm import tqdm

    mine = [(p, s) for p in range(engine.replica, len(prompts), engine.replicas) for s in range(samples)]
    show = progress and engine.is_main and sys.stderr.isatty()
    done, request = [], None
    try:
        with tqdm(total=len(mine), desc="decoding", unit=" responses", disable=not show) as bar:
            done = engine.decoder(end_ids).decode(
                [prompts[p].ids for p, _ in mine],
                options,
                batch_size=batch_size,
                seed=seed,
                keys=mine,
                finished=lambda place, completion: bar.update(),
                stop=_between_blocks(),
            )
    except StopRequest as error:
        request = error
    objects.raise_together(request)
    found = engine.joined(dict(zip(mine, done, strict=True)))
    return [[found[p, s] for s in range(samples)] for p in range(len(prompts))]


def _between_blocks() -> Callable[[int, list[int]], bool]:
    """A ``stop`` of `BlockDecoder.decode` that ends no response. It raises StopRequest on every process of this model
    if one of them was asked to stop: they decode in step, and none may go on alone."""
    group = parallel_state.get_model_parallel_group()
    calls = count()

    def check(place: int, tokens: list[int]) -> bool:
        if next(calls) % BLOCKS_BETWEEN_CHECKS == 0:
            name = stop.requested()
            if group.size() > 1:
                asked = torch.tensor([name is not None], dtype=torch.int32, device=initialize.device())
                dist.all_reduce(asked, dist.ReduceOp.MAX, group=group)
                name = name or ("a signal to another process" if asked.item() else None)
            if name is not None:
                raise StopRequest(name)
        return False

    return check


def efficiency(completions: Sequence[Completion]) -> dict[str, float]:
    """The cost of a response, on average; docs/decoding.md explains the names. ``completions``: one or more."""
    tokens = sum(len(completion.tokens) for completion in completions)
    passes = sum(completion.passes for completion in completions)
    answered = sum(len(completion.answer) for completion in completions)
    clipped = sum(not (completion.ended or completion.stopped) for completion in completions)
    return {
        "completions/mean_length": answered / len(completions),
        "completions/mean_passes": passes / len(completions),
        "completions/tokens_per_pass": tokens / passes,
        "completions/clipped_ratio": clipped / len(completions),
    }


def speed(completions: Sequence[Completion], seconds: float) -> str:
    """Tokens per second, and `efficiency`, in words."""
    tokens, found = sum(len(completion.tokens) for completion in completions), efficiency(completions)
    return (
        f"{len(completions)} responses, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens per second, "
        f"{found['completions/tokens_per_pass']:.2f} tokens per forward pass; "
        f"{found['completions/mean_length']:.1f} tokens and {found['completions/mean_passes']:.1f} passes a response"
    )
