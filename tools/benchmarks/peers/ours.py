"""Our own preference step on pairs given as tokens: the trainer's parts, without files, logs and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_dtrpo.config.backends import choose_backend
from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.config.estimators import EstimatorOptions
from megatron_dtrpo.config.settings import Config, ObjectiveSettings, OptimizerSettings
from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.data.micro_batch import MicroBatch, Sample
from megatron_dtrpo.data.packing import pack
from megatron_dtrpo.diffusion.layout import PackedSequence, concatenate
from megatron_dtrpo.model.attention import attention_width
from megatron_dtrpo.model.provider import build_model
from megatron_dtrpo.objectives.objective import preference_objective
from megatron_dtrpo.training.device_batch import DeviceBatch
from megatron_dtrpo.training.optimizer import build_optimizer, wrap_data_parallel
from megatron_dtrpo.training.passes import score, train_pass
from megatron_dtrpo.training.reference import ReferencePolicy
from tools.benchmarks.peers.pairs import Pair
from tools.benchmarks.peers.weights import Learner, copy_into, settings_of


def noising(estimator: str, views: int, *, block_size: int, mask_id: int, steps_per_block: int) -> Noising:
    """Noise that every contender draws alike; a block's first token is read as Fast-dLLM v2's training reads it."""
    options = EstimatorOptions(steps_per_block=steps_per_block)
    return Noising(estimator, options, views, "noisy", block_size, mask_id, seed=0)


def autoregressive(mask_id: int) -> Noising:
    """No noise: the likelihood of a model of block size 1."""
    return Noising("exact", EstimatorOptions(), 1, "clean", 1, mask_id, seed=0)


def full_attention(views: int, mask_id: int) -> Noising:
    """LLaDA's VRPO of ``views`` samples."""
    return Noising("vrpo", EstimatorOptions(), views, None, FULL, mask_id, seed=0, shift=0)


def sample_of(pair: Pair) -> Sample:
    return Sample(epoch=0, index=pair.index)


Document = Callable[[Pair], PackedSequence]


class Ours:
    """One full preference step per call of `step`, with the live reference or, after `cache_reference`, without."""

    def __init__(
        self,
        learner: Learner,
        shape: dict,
        document: Document,
        *,
        beta: float,
        micro_batch_size: int,
        seq_length: int,
    ):
        self.config = Config(
            objective=ObjectiveSettings(beta=beta),
            optimizer=OptimizerSettings(lr=learner.lr),
        )
        self.document, self.seq_length, self.micro_batch_size = document, seq_length, micro_batch_size
        self.chunks = [build_model(settings_of(shape, learner.family), self.config.parallel)]
        self.device = next(self.chunks[0].parameters()).device
        self.backend = choose_backend("auto", self.device.type)
        copy_into(self.chunks[0], learner.reference)
        self.reference: ReferencePolicy | None = ReferencePolicy(self.chunks)
        copy_into(self.chunks[0], learner.policy)
        self.wrapped = wrap_data_parallel(self.chunks, self.config)
        self.optimizer = build_optimizer(self.wrapped, self.config)
        self.objective = preference_objective(self.config.objective)
        self.cached: dict[int, Tensor] = {}
        self.tokens = 0

    def cache_reference(self, pairs: Sequence[Pair]) -> None:
        """Scores ``pairs`` under the reference once, as `megatron-dtrpo reference` does; `step` then looks them
        up. They stay until `forget_cache`."""
        for pair in pairs:
            self.cached[pair.index] = self._reference_scores(self._batches([pair], self.document))[0]

    def forget_cache(self) -> None:
        self.cached = {}

    def drop_reference(self) -> None:
        """A run with cached scores keeps no reference in memory."""
        self.reference = None

    def step(self, pairs: Sequence[Pair], document: Document | None = None) -> float:
        """The mean loss of ``pairs``, and one update. ``document`` lays out a pair otherwise than the constructor's."""
        batches = self._batches(pairs, document or self.document)
        if self.cached:
            for batch in batches:
                batch.given = torch.cat([self.cached[s.index] for s in batch.samples])
        else:
            for batch, reference in zip(batches, self._reference_scores(batches), strict=True):
                batch.given = reference
        self.wrapped[0].zero_grad_buffer()
        self.optimizer.zero_grad()
        outcomes = train_pass(self.wrapped, batches, self.objective)
        self.optimizer.step()
        return float(sum(o.loss for o in outcomes)) / len(pairs)

    def loss(self, documents: Sequence[PackedSequence]) -> float:
        """The mean loss of pairs that are laid out already, whatever their noise; nothing is updated."""
        batches = [self._on_device(MicroBatch(d, [], torch.ones(d.responses, dtype=torch.long))) for d in documents]
        for batch, reference in zip(batches, self._reference_scores(batches), strict=True):
            batch.given = reference
        with torch.no_grad():
            outcomes = train_pass(self.wrapped, batches, self.objective, forward_only=True)
        return float(sum(o.loss for o in outcomes)) / len(documents)

    def _batches(self, pairs: Sequence[Pair], document: Document) -> list[DeviceBatch]:
        documents = [document(pair) for pair in pairs]
        costs = [len(document) for document in documents]
        self.tokens = sum(costs)
        batches = []
        for group in pack(costs, range(len(pairs)), self.seq_length, self.micro_batch_size):
            lengths = torch.tensor([len(response) for i in group for response in pairs[i].responses])
            packed = concatenate([documents[i] for i in group])
            batches.append(self._on_device(MicroBatch(packed, [sample_of(pairs[i]) for i in group], lengths)))
        return batches

    def _on_device(self, batch: MicroBatch) -> DeviceBatch:
        return DeviceBatch(batch, self.device, self.backend, attention_width(self.chunks[0].config))

    def _reference_scores(self, batches: Sequence[DeviceBatch]) -> list[Tensor]:
        with self.reference.in_place_of_policy():
            return score(self.wrapped, batches)
