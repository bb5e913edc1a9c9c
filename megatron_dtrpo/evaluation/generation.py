"""Decoding a file of prompts over all processes of a session."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from megatron_dtrpo.data.prompts import Prompt
from megatron_dtrpo.diffusion.decoding import Completion, DecodingOptions
from megatron_dtrpo.evaluation.session import Session


def decode_prompts(
    session: Session,
    prompts: Sequence[Prompt],
    options: DecodingOptions,
    *,
    batch_size: int,
    seed: int,
    samples: int = 1,
    end_ids: Iterable[int] = (),
    progress: bool = True,
) -> list[list[Completion]]:
    """``samples`` completions of every prompt, on every process; data-parallel processes share the prompts out.

    A completion depends on the prompt's place in the list and the sample's number, not on how many processes there are.
    """
    from tqdm import tqdm

    mine = [(p, s) for p in range(session.replica, len(prompts), session.replicas) for s in range(samples)]
    show = progress and session.is_main and sys.stderr.isatty()
    with tqdm(total=len(mine), desc="decoding", unit=" responses", disable=not show) as bar:
        done = session.decoder(end_ids).decode(
            [prompts[p].ids for p, _ in mine],
            options,
            batch_size=batch_size,
            seed=seed,
            keys=mine,
            finished=lambda place, completion: bar.update(),
        )
    found = session.gather(dict(zip(mine, done, strict=True)))
    return [[found[p, s] for s in range(samples)] for p in range(len(prompts))]


def efficiency(completions: Sequence[Completion]) -> dict[str, float]:
    """What a response cost, on average; docs/decoding.md explains the names. ``completions``: one or more."""
    tokens = sum(len(completion.tokens) for completion in completions)
    passes = sum(completion.passes for completion in completions)
    return {
        "completions/mean_length": tokens / len(completions),
        "completions/mean_passes": passes / len(completions),
        "completions/tokens_per_pass": tokens / passes,
        "completions/clipped_ratio": sum(not completion.ended for completion in completions) / len(completions),
    }


def speed(completions: Sequence[Completion], seconds: float) -> str:
    """Tokens per second, and `efficiency`, in words."""
    tokens, found = sum(len(completion.tokens) for completion in completions), efficiency(completions)
    return (
        f"{len(completions)} responses, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens per second, "
        f"{found['completions/tokens_per_pass']:.2f} tokens per forward pass; "
        f"{found['completions/mean_length']:.1f} tokens and {found['completions/mean_passes']:.1f} passes a response"
    )
