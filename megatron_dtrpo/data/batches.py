"""Micro-batches: packed, noised and deterministic.

A step takes exactly the next ``global_batch_size`` examples in sample order. Their noise depends on what they are, not
on where they are computed, so any layout, micro-batch size and packing budget trains on the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megatron_dtrpo.config import Config
from megatron_dtrpo.data.packing import balance, pack
from megatron_dtrpo.data.sampler import Sample, SampleOrder
from megatron_dtrpo.data.token_store import TokenStore
from megatron_dtrpo.diffusion.estimators import (
    ESTIMATORS,
    POLICY,
    REFERENCE,
    EstimatorOptions,
    Noise,
    NoiseRequest,
    noise_generator,
    total_views,
)
from megatron_dtrpo.diffusion.layout import Blocks, PackedSequence, concatenate, lay_out, packed_length


@dataclass
class MicroBatch:
    """One packed sequence and what it was made of: ``samples`` in packed order and the token count of every response,
    int64 ``[responses]``."""

    sequence: PackedSequence
    samples: list[Sample]
    response_length: Tensor

    def map_tensors(self, function) -> MicroBatch:
        """A copy with ``function`` applied to every tensor."""
        return replace(
            self, sequence=self.sequence.map_tensors(function), response_length=function(self.response_length)
        )


@dataclass(frozen=True)
class Noising:
    """How examples become packed documents; the same for training, reference scores and evaluation.

    ``stream`` is the sign of the views' numbers: another stream is other noise of the same kind.
    """

    estimator: str
    options: EstimatorOptions
    num_views: int
    block_start: str
    block_size: int
    mask_id: int
    seed: int
    stream: int = POLICY

    @classmethod
    def from_config(cls, config: Config, mask_id: int) -> Noising:
        objective = config.objective
        options = EstimatorOptions(
            steps_per_block=objective.steps_per_block,
            complementary=objective.complementary,
            min_timestep=objective.min_timestep,
        )
        return cls(
            estimator=objective.estimator,
            options=options,
            num_views=objective.num_views,
            block_start=objective.block_start,
            block_size=config.model.block_size,
            mask_id=mask_id,
            seed=config.optimizer.seed,
        )

    def for_reference(self) -> Noising:
        """The noise under which the reference is scored: the policy's own, unless the estimator draws anew."""
        return replace(self, stream=REFERENCE) if ESTIMATORS[self.estimator].independent_reference else self

    def packed_length(self, prompt_length, response_lengths):
        """Packed tokens: int (or int array ``[n]``) and one int (or array ``[n]``) per response."""
        views = total_views(self.estimator, self.num_views, self.options)
        return packed_length(prompt_length, response_lengths, self.block_size, views)

    def noise(self, sample: Sample, branch: int, blocks: Blocks, steps: Tensor | None = None) -> Noise:
        """The noise of one response, ``branch`` 1 or 2 of its example; ``steps``: its recorded decoding, ``[R]``."""
        generators = [
            noise_generator(self.seed, sample.epoch, sample.index, branch, self.stream * view)
            for view in range(1, self.num_views + 1)
        ]
        recorded = None if steps is None else blocks.place(steps)
        request = NoiseRequest(blocks.maskable(self.block_start), generators, self.options, recorded)
        return ESTIMATORS[self.estimator].draw(request)

    def document(
        self,
        sample: Sample,
        prompt: Tensor,
        responses: Sequence[Tensor],
        steps: Sequence[Tensor] | None = None,
    ) -> PackedSequence:
        """Noises and lays out one example: int64 ``[P]``, ``[R]`` each and, where recorded, the decoding steps ``[R]``
        each."""
        recorded = [None] * len(responses) if steps is None else steps
        blocks = [Blocks(prompt.numel(), response.numel(), self.block_size) for response in responses]
        noise = [self.noise(sample, r + 1, blocks[r], recorded[r]) for r in range(len(responses))]
        return lay_out(
            prompt,
            responses,
            [n.masked for n in noise],
            [n.weight for n in noise],
            block_size=self.block_size,
            mask_id=self.mask_id,
            block_start=self.block_start,
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

    def samples(self, consumed: int) -> list[Sample]:
        """The examples of the step that follows ``consumed`` samples, over all processes."""
        return self.order.take(consumed, self.global_batch_size)

    def step(self, consumed: int) -> list[MicroBatch]:
        """This process's micro-batches of that step, on the CPU; their number may differ between processes."""
        return self.batches(self.samples(consumed))

    def batches(self, samples: Sequence[Sample]) -> list[MicroBatch]:
        """This process's share of ``samples``, packed."""
        prompt_lengths, response_lengths = self.store.lengths
        costs = [
            int(self.noising.packed_length(int(prompt_lengths[s.index]), response_lengths[s.index].tolist()))
            for s in samples
        ]
        mine = balance(costs, self.ranks)[self.rank]
        groups = pack(costs, mine, self.seq_length, self.micro_batch_size)
        return [self.micro_batch([samples[i] for i in group]) for group in groups]

    def micro_batch(self, samples: Sequence[Sample]) -> MicroBatch:
        documents, lengths = [], []
        for sample in samples:
            example = self.store[sample.index]
            (prompt,) = _tensors([example.prompt])
            responses = _tensors(example.responses)
            steps = None if example.steps is None else _tensors(example.steps)
            documents.append(self.noising.document(sample, prompt, responses, steps))
            lengths += [r.numel() for r in responses]
        return MicroBatch(concatenate(documents), list(samples), torch.tensor(lengths))


def _tensors(arrays: Sequence[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(array.astype("int64")) for array in arrays]
