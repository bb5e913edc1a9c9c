"""From groups of answers to packed micro-batches, and what the objective is to know of each answer.

A document is a prompt with the answers of its group. A group that does not fit the token budget becomes several
documents, each with the prompt and some of the answers; an answer's noise is its own, so that no number changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.batches import Decoded, Noising
from megatron_dtrpo.data.micro_batch import MicroBatch
from megatron_dtrpo.data.packing import balance, pack
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.diffusion.layout import concatenate, empty_sequence, packed_length, pad_to, turn_blocks
from megatron_dtrpo.objectives.policy_gradient import Rollout, shares

if TYPE_CHECKING:
    from megatron_dtrpo.online.rollouts import Group


class Document(NamedTuple):
    """Some answers of the group ``number``, by their places in it, in ``tokens`` packed tokens."""

    number: int
    places: list[int]
    tokens: int


class Packed(NamedTuple):
    """A micro-batch, and what is known of its answers; ``recorded`` has as many columns as the longest decoding."""

    batch: MicroBatch
    rollout: Rollout


class Documents:
    """The micro-batches of an update for one data-parallel process."""

    def __init__(self, config: Config, mask_id: int, rank: int, ranks: int):
        self.config, self.rank, self.ranks = config, rank, ranks
        self.noising = replace(Noising.from_config(config, mask_id), keep_steps=True)
        self.records = self.noising.reads_steps

    def batches(self, groups: Sequence[Group]) -> list[Packed]:
        """This process's share of ``groups``; one without an answer where there are fewer documents than processes."""
        documents = [document for number, group in enumerate(groups) for document in self.cut(number, group)]
        costs = [document.tokens for document in documents]
        mine = balance(costs, self.ranks)[self.rank]
        data = self.config.data
        bundles = pack(costs, mine, data.seq_length, data.micro_batch_size)
        known = self._shares(groups)
        found = [self._packed(groups, [documents[i] for i in bundle], known) for bundle in bundles]
        return found or [self._nothing()]

    def cut(self, number: int, group: Group) -> list[Document]:
        """The documents of a group: as few as the budget allows, answers in order."""
        P, block_size = len(group.prompt.ids), self.config.model.block_size
        copies = [self._copies(P, completion) for completion in group.completions]

        def cost(places: list[int]) -> int:
            lengths = [len(group.completions[place].tokens) for place in places]
            return packed_length(P, lengths, block_size, 0, [copies[place] for place in places])

        documents: list[list[int]] = [[]]
        for place in range(len(group.completions)):
            if documents[-1] and cost([*documents[-1], place]) > self.config.data.seq_length:
                documents.append([])
            documents[-1].append(place)
        return [Document(number, places, cost(places)) for places in documents]

    def _copies(self, P: int, completion: Completion) -> int:
        (blocks,) = turn_blocks(P, [(0, len(completion.tokens))], self.config.model.block_size)
        return self.noising.copies(blocks, decoded(completion))

    def _shares(self, groups: Sequence[Group]) -> dict[tuple[int, int], tuple[float, float]]:
        """By group and place: the weight of an answer in the loss, and its part of the divisor."""
        keys = [(number, place) for number, group in enumerate(groups) for place in range(len(group.completions))]
        lengths = torch.tensor([len(groups[number].completions[place].tokens) for number, place in keys])
        share, count = shares(lengths, torch.tensor([number for number, _ in keys]), self.config.objective.mean)
        return dict(zip(keys, zip(share.tolist(), count.tolist(), strict=True), strict=True))

    def _packed(self, groups: Sequence[Group], documents: Sequence[Document], shares_of) -> Packed:
        sequences, samples, lengths, rows, numbers, recordings = [], [], [], [], [], []
        for document in documents:
            group = groups[document.number]
            answers = [group.completions[place] for place in document.places]
            sequences.append(
                self.noising.document(
                    group.sample,
                    torch.tensor(group.prompt.ids),
                    [torch.tensor(one.tokens) for one in answers],
                    [decoded(one) for one in answers],
                    branches=[1 + group.members[place] for place in document.places],
                )
            )
            samples += [group.sample] * len(answers)
            lengths += [len(one.tokens) for one in answers]
            numbers += [document.number] * len(answers)
            for place, one in zip(document.places, answers, strict=True):
                share, count = shares_of[document.number, place]
                rows.append([group.advantages[place], share, count, float(group.total[place] > 0)])
                recordings.append(recorded(one))
        table = torch.tensor(rows, dtype=torch.float64)
        batch = MicroBatch(concatenate(sequences), samples, torch.tensor(lengths))
        advantage, share, count, correct = table.unbind(1)
        steps = _stacked(recordings) if self.records else None
        return Packed(batch, Rollout(advantage, share, count, correct, torch.tensor(numbers), steps))

    def _nothing(self) -> Packed:
        grain = self.config.model.block_size or 1
        none = torch.zeros(0, dtype=torch.float64)
        sequence = pad_to(empty_sequence(grain), grain, pad_id=0)
        batch = MicroBatch(sequence, [], torch.zeros(0, dtype=torch.long))
        nobody = Rollout(none, none, none, none, none.long(), none.view(0, 0) if self.records else None)
        return Packed(batch, nobody)


def decoded(completion: Completion) -> Decoded:
    discarded = [token[:4] for token in completion.discarded]
    return Decoded(torch.tensor(completion.steps), torch.tensor(discarded, dtype=torch.long).view(-1, 4))


def recorded(completion: Completion) -> list[float]:
    """The log-probability with which each step wrote its tokens, those that were thrown away included."""
    thrown = [(token.step, token.confidence) for token in completion.discarded]
    kept = list(zip(completion.steps, completion.confidence, strict=True))
    total = [0.0] * (1 + max(step for step, _ in kept + thrown))
    for step, confidence in kept + thrown:
        total[step] += math.log(confidence) if confidence > 0 else -math.inf
    return total


def _stacked(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    """``[R, longest]``, filled up with zeros."""
    table = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.float64)
    for line, row in zip(table, rows, strict=True):
        line[: len(row)] = torch.tensor(row, dtype=torch.float64)
    return table
