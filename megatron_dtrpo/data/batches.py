"""Micro-batches: packed, noised and deterministic.

A step takes exactly the next ``global_batch_size`` examples in sample order. Their noise depends on what they are, not
on where they are computed, so any layout, micro-batch size and packing budget trains on the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from megatron_dtrpo.config.estimators import ESTIMATORS, Estimator, EstimatorOptions, total_views
from megatron_dtrpo.config.rows import options_of
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.micro_batch import MicroBatch, Sample
from megatron_dtrpo.data.packing import balance, pack
from megatron_dtrpo.data.recordings import noisy_copies
from megatron_dtrpo.data.sampler import SampleOrder
from megatron_dtrpo.data.stored_examples import TokenStore, turn_block_counts
from megatron_dtrpo.diffusion.estimators import (
    KEPT,
    POLICY,
    REFERENCE,
    Noise,
    NoiseRequest,
    Recording,
    distinct_steps,
    noise_generator,
)
from megatron_dtrpo.diffusion.layout import (
    Blocks,
    PackedSequence,
    Turns,
    concatenate,
    lay_out,
    packed_length,
    turn_blocks,
)
from megatron_dtrpo.families.registry import family_of


@dataclass(frozen=True)
class Decoded:
    """The recorded decoding of one response, int64: ``steps [R]`` wrote its tokens; ``discarded [d, 4]`` are the
    (place, token, step, until) of those that it threw away."""

    steps: Tensor
    discarded: Tensor

    def on(self, blocks: Blocks) -> Recording:
        place, _, step, until = self.discarded.unbind(1)
        written = blocks.place(self.steps)
        recording = Recording(written, torch.full_like(written, KEPT))
        blocks.put(recording.written, place, step)
        blocks.put(recording.until, place, until)
        return recording


@dataclass(frozen=True)
class Noising:
    """How examples become packed documents; the same for training, reference scores and evaluation.

    ``stream`` is the sign of the views' numbers: another stream is other noise of the same kind. ``shift`` and
    ``block_start``: where a prediction is read, see `lay_out`. ``keep_steps``: targets know their recorded steps where
    the estimator could do without.
    """

    estimator: str
    options: EstimatorOptions
    num_views: int
    block_start: str | None
    block_size: int
    mask_id: int
    seed: int
    stream: int = POLICY
    shift: int = 1
    keep_steps: bool = False

    @classmethod
    def from_config(cls, config: Config, mask_id: int) -> Noising:
        objective = config.objective
        return cls(
            estimator=objective.estimator,
            options=options_of(EstimatorOptions, objective),
            num_views=objective.num_views,
            block_start=objective.block_start,
            block_size=config.model.block_size,
            mask_id=mask_id,
            seed=config.optimizer.seed,
            shift=family_of(config.model).prediction_shift,
        )

    def for_reference(self) -> Noising:
        """The noise under which the reference is scored: the policy's own, unless the estimator draws anew."""
        return replace(self, stream=REFERENCE) if ESTIMATORS[self.estimator].independent_reference else self

    @property
    def kind(self) -> Estimator:
        return ESTIMATORS[self.estimator]

    @property
    def reads_steps(self) -> bool:
        """Whether documents are made of recorded decodings. Estimators of random levels have no decoding steps."""
        return self.kind.needs_steps or (self.keep_steps and self.kind.autoregressive)

    def packed_length(self, prompt_length, response_lengths):
        """Packed tokens: int (or int array ``[n]``) and one int (or array ``[n]``) per response. Not of an estimator
        with ``every_step``, where they depend on the recording."""
        views = total_views(self.estimator, self.num_views, self.options)
        return packed_length(prompt_length, response_lengths, self.block_size, views)

    def copies(self, blocks: Blocks, decoded: Decoded) -> int:
        """How many noisy blocks (under full attention tokens) one recorded response has."""
        if not self.kind.every_step:
            width = 1 if self.block_size else blocks.prompt_length + blocks.response_length
            return total_views(self.estimator, self.num_views, self.options) * blocks.count * width
        recording = decoded.on(blocks)
        _, count = distinct_steps(recording.writable(blocks.maskable(self.block_start)), recording.written)
        return int(count.sum()) * (1 if self.block_size else blocks.prompt_length + blocks.response_length)

    def packed_lengths(self, store: TokenStore) -> np.ndarray:
        """Packed tokens of every example, int64 ``[n]``."""
        prompt, responses = (lengths.astype(np.int64) for lengths in store.lengths)
        if self.kind.every_step:
            copies = noisy_copies(store, self.block_size, self.block_start)
        else:
            views = total_views(self.estimator, self.num_views, self.options)
            copies = views * turn_block_counts(store, self.block_size)
        return packed_length(prompt, list(responses.T), self.block_size, 0, list(copies.T))

    def noise(self, sample: Sample, branch: int, blocks: Sequence[Blocks], recording: Recording | None = None) -> Noise:
        """The noise of one response, ``branch`` 1, 2, ... of its example, over the blocks of all its turns. What is
        recorded is one turn."""
        generators = [
            noise_generator(self.seed, sample.epoch, sample.index, branch, self.stream * view)
            for view in range(1, self.num_views + 1)
        ]
        maskable = torch.cat([turn.maskable(self.block_start) for turn in blocks])
        return self.kind.draw(NoiseRequest(maskable, generators, self.options, recording))

    def document(
        self,
        sample: Sample,
        prompt: Tensor,
        responses: Sequence[Tensor],
        decoded: Sequence[Decoded] | None = None,
        turns: Sequence[Turns] | None = None,
        branches: Sequence[int] | None = None,
    ) -> PackedSequence:
        """Noises and lays out one example: int64 ``[P]``, ``[R]`` each and, where the estimator reads them, their
        recorded decodings. ``turns``: of each response, the parts that the assistant writes; default: all of it.
        ``branches``: the number that decides each response's noise; default: 1, 2, ..."""
        recorded = decoded if self.reads_steps else None
        numbers = range(1, len(responses) + 1) if branches is None else branches
        turns = [[(0, response.numel())] for response in responses] if turns is None else turns
        blocks = [turn_blocks(prompt.numel(), each, self.block_size) for each in turns]
        recordings = None if recorded is None else [d.on(b[0]) for d, b in zip(recorded, blocks, strict=True)]
        noise = [
            self.noise(sample, numbers[r], blocks[r], None if recordings is None else recordings[r])
            for r in range(len(responses))
        ]
        return lay_out(
            prompt,
            responses,
            [n.masked for n in noise],
            [n.weight for n in noise],
            block_size=self.block_size,
            mask_id=self.mask_id,
            block_start=self.block_start,
            shift=self.shift,
            behind=[(one.discarded[:, 0], one.discarded[:, 1]) for one in recorded or ()],
            every_step=self.kind.every_step,
            turns=turns,
            steps=[recording.written for recording in recordings or ()],
        )


class BatchBuilder:
    """Builds one data-parallel process's micro-batches of a step."""

    def __init__(
        self,
        store: TokenStore,
        order: SampleOrder,
        noising: Noising,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        seq_length: int,
        data_parallel_rank: int,
        data_parallel_size: int,
    ):
        self.store, self.order, self.noising = store, order, noising
        self.global_batch_size = global_batch_size
        self.micro_batch_size, self.seq_length = micro_batch_size, seq_length
        self.rank, self.ranks = data_parallel_rank, data_parallel_size

    @cached_property
    def packed_lengths(self) -> np.ndarray:
        return self.noising.packed_lengths(self.store)

    def samples(self, consumed: int) -> list[Sample]:
        """The examples of the step that follows ``consumed`` samples, over all processes."""
        return self.order.take(consumed, self.global_batch_size)

    def step(self, consumed: int) -> list[MicroBatch]:
        """This process's micro-batches of that step, on the CPU; their number may differ between processes."""
        return self.batches(self.samples(consumed))

    def batches(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """This process's share of ``samples``, packed."""
        costs = self.packed_lengths[[s.index for s in samples]].tolist()
        mine = balance(costs, self.ranks)[self.rank]
        groups = pack(costs, mine, self.seq_length, self.micro_batch_size)
        return [self.micro_batch([samples[i] for i in group]) for group in groups]

    def micro_batch(self, samples: Sequence[Sample]) -> MicroBatch:
        documents, lengths = [], []
        for sample in samples:
            example = self.store[sample.index]
            (prompt,) = _tensors([example.prompt])
            responses = _tensors(example.responses)
            decoded = None
            if example.steps is not None:
                decoded = [Decoded(*_tensors(pair)) for pair in zip(example.steps, example.discarded, strict=True)]
            documents.append(self.noising.document(sample, prompt, responses, decoded, example.turns))
            lengths += [sum(end - begin for begin, end in turns) for turns in example.turns]
        return MicroBatch(concatenate(documents), list(samples), torch.tensor(lengths))


def _tensors(arrays: Sequence[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(array.astype("int64")) for array in arrays]
