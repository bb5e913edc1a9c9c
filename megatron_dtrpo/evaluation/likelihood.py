"""Log-likelihoods of many continuations, each given its context, by the estimators of training.

Continuations of one context share its tokens, and documents share packed sequences up to a token budget. The noise of a
continuation is drawn from the seed, its context and its length: a result does not depend on what else is asked for, and
the choices of one question that are equally long are compared under the same draws.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.data.micro_batch import MicroBatch, Sample
from megatron_dtrpo.data.packing import balance, pack
from megatron_dtrpo.diffusion.layout import PackedSequence, concatenate, share_prompt
from megatron_dtrpo.seeds import stable_seed
from megatron_dtrpo.training.engine import Engine

CHUNK = 256  # documents whose packed sequences are alive at once


class Continuation(NamedTuple):
    """``tokens``: what is scored, given ``context``: one token id or more each."""

    context: tuple[int, ...]
    tokens: tuple[int, ...]


def content_key(ids: Sequence[int]) -> int:
    """A number from 0 to 2**63 - 1 that stands for ``ids``, the same in every process and version."""
    return stable_seed(",".join(map(str, ids)).encode())


def score_continuations(
    engine: Engine, noising: Noising, continuations: Sequence[Continuation], budget: int
) -> list[float]:
    """``L`` of every continuation, on every process; collective.

    Args:
        budget: tokens of one packed sequence, clean and noisy together; what is longer by itself goes alone.
    """
    documents = _documents(noising, continuations, budget)
    scores: dict[int, float] = {}
    show = engine.is_main and sys.stderr.isatty()
    with tqdm(total=len(continuations), desc="scoring", unit=" continuations", disable=not show) as bar:
        for start in range(0, len(documents), CHUNK):
            found = engine.joined(
                _score_share(engine, noising, continuations, documents[start : start + CHUNK], budget)
            )
            scores |= found
            bar.update(len(found))
    return [scores[number] for number in range(len(continuations))]


def _cost(noising: Noising, continuations: Sequence[Continuation], numbers: Sequence[int]) -> int:
    """Packed tokens of the document with these continuations of one context."""
    lengths = [len(continuations[number].tokens) for number in numbers]
    return int(noising.packed_length(len(continuations[numbers[0]].context), lengths))


def _documents(noising: Noising, continuations: Sequence[Continuation], budget: int) -> list[list[int]]:
    """Numbers of continuations that share a context and, together, keep within the budget."""
    documents: list[list[int]] = []
    open_documents: dict[tuple[int, ...], list[int]] = {}
    for number, continuation in enumerate(continuations):
        document = open_documents.get(continuation.context)
        if document is None or _cost(noising, continuations, [*document, number]) > budget:
            document = open_documents[continuation.context] = []
            documents.append(document)
        document.append(number)
    return documents


def _score_share(
    engine: Engine,
    noising: Noising,
    continuations: Sequence[Continuation],
    documents: Sequence[list[int]],
    budget: int,
) -> dict[int, float]:
    """This replica's share, on its last pipeline stage."""
    costs = [_cost(noising, continuations, numbers) for numbers in documents]
    mine = balance(costs, engine.replicas)[engine.replica]
    batches, order = [], []
    for group in pack(costs, mine, budget, len(mine)):
        sequence = concatenate([_document(noising, continuations, documents[place]) for place in group])
        order.append([number for place in group for number in documents[place]])
        lengths = torch.tensor([len(continuations[number].tokens) for number in order[-1]])
        batches.append(MicroBatch(sequence, [], lengths))
    found: dict[int, float] = {}
    for numbers, values in zip(order, engine.score(batches), strict=False):  # no results but on the last stage
        found |= zip(numbers, values.tolist(), strict=True)
    return found


def _document(noising: Noising, continuations: Sequence[Continuation], numbers: Sequence[int]) -> PackedSequence:
    context = continuations[numbers[0]].context
    sample, prompt = Sample(0, content_key(context)), torch.tensor(context)
    responses = [torch.tensor(continuations[number].tokens) for number in numbers]
    return share_prompt([noising.document(sample, prompt, [response]) for response in responses])
