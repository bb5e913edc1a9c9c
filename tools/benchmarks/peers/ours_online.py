"""Our own policy-gradient step on groups that are decoded already: the trainer's parts, without the loop."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_dtrpo.config.backends import choose_backend
from megatron_dtrpo.config.settings import Config, DataSettings, ModelSettings, ObjectiveSettings
from megatron_dtrpo.model.attention import attention_width
from megatron_dtrpo.model.provider import build_model
from megatron_dtrpo.objectives.policy_gradient import policy_gradient_objective
from megatron_dtrpo.online.documents import Documents
from megatron_dtrpo.online.rollouts import Group
from megatron_dtrpo.training.device_batch import DeviceBatch
from megatron_dtrpo.training.optimizer import wrap_data_parallel
from megatron_dtrpo.training.passes import log_probs, train_pass
from tools.benchmarks.peers.answers import Kind
from tools.benchmarks.peers.weights import Learner, copy_into, settings_of

CLIP = 0.2  # on either side


class OursOnline:
    """The gradient of one group per call of `step`, in place of what the model had."""

    def __init__(self, learner: Learner, shape: dict, kind: Kind, *, mask_id: int, seq_length: int):
        """``seq_length``: packed tokens of a micro-batch."""
        self.learner, self.kind, self.mask_id, self.seq_length = learner, kind, mask_id, seq_length
        self.settings = replace(settings_of(shape, learner.family), block_size=kind.block_size)
        config = online_config(self.settings, kind, "exact_trajectory", 1, seq_length)
        self.model = build_model(self.settings, config.parallel)
        copy_into(self.model, learner.policy)
        self.wrapped = wrap_data_parallel([self.model], config)
        self.device = next(self.model.parameters()).device
        self.backend = choose_backend("auto", self.device.type)
        self.objective = policy_gradient_objective(config.objective)
        self.tokens = 0  # in the last step

    def step(self, group: Group, estimator: str, views: int, rollout_policy=None) -> float:
        """The loss of a group, a mean over its tokens. ``rollout_policy``: transformers', default: the policy."""
        batches = self._batches(group, estimator, views)
        if rollout_policy is not None:
            copy_into(self.model, rollout_policy)
            for batch, old in zip(batches, log_probs(self.wrapped, batches), strict=True):
                batch.given = batch.given._replace(old=old)
            copy_into(self.model, self.learner.policy)
        self.wrapped[0].zero_grad_buffer()
        outcomes = train_pass(self.wrapped, batches, self.objective)
        return float(sum(one.loss for one in outcomes)) / sum(len(one.tokens) for one in group.completions)

    def gradients(self) -> dict[str, Tensor]:
        """Of the last step, by megatron-core's names."""
        return {name: parameter.main_grad for name, parameter in self.model.named_parameters()}

    def weights(self, group: Group, estimator: str, views: int) -> list[Tensor]:
        """How often each token of each answer is read, times its weight."""
        found = [torch.zeros(len(one.tokens), dtype=torch.float64) for one in group.completions]
        (packed,) = self._documents(estimator, views, 2**30).batches([group])
        sequence = packed.batch.sequence
        place = sequence.position[sequence.target_row] + self.kind.shift - len(group.prompt.ids)
        for answer, weights in enumerate(found):
            mine = sequence.target_response == answer
            weights.index_add_(0, place[mine], sequence.target_weight[mine])
        return found

    def _documents(self, estimator: str, views: int, seq_length: int) -> Documents:
        return Documents(online_config(self.settings, self.kind, estimator, views, seq_length), self.mask_id, 0, 1)

    def _batches(self, group: Group, estimator: str, views: int) -> list[DeviceBatch]:
        batches, self.tokens = [], 0
        for packed in self._documents(estimator, views, self.seq_length).batches([group]):
            batch = DeviceBatch(packed.batch, self.device, self.backend, attention_width(self.model.config))
            known = packed.rollout
            extra = batch.steps - known.recorded.shape[1]
            batch.given = known._replace(recorded=torch.nn.functional.pad(known.recorded, (0, extra)))
            batches.append(batch)
            self.tokens += len(packed.batch.sequence)
        return batches


def online_config(settings: ModelSettings, kind: Kind, estimator: str, views: int, seq_length: int) -> Config:
    """The clipped ratio of each token, without a reference, as TraceRL has it."""
    objective = ObjectiveSettings(
        objective="policy_gradient",
        estimator=estimator,
        num_views=views,
        block_start="clean" if kind.shift else None,
        clip_low=CLIP,
        clip_high=CLIP,
    )
    return Config(model=settings, objective=objective, data=DataSettings(seq_length=seq_length, micro_batch_size=2**30))


def packed_tokens(settings: ModelSettings, kind: Kind, group: Group, estimator: str, views: int) -> int:
    """Of a group in one document, counted without running anything."""
    documents = Documents(online_config(settings, kind, estimator, views, 2**30), 0, 0, 1)
    return sum(document.tokens for document in documents.cut(0, group))
