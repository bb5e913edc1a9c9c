"""From the log-probabilities of one micro-batch to a summed loss, its divisor and summed metrics.

Sums, not means: megatron-core divides gradients by the divisor's total over the global batch, so that no number
depends on how examples were dealt to processes and packed into sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dtrpo.config import ObjectiveSettings
from megatron_dtrpo.data.batches import MicroBatch
from megatron_dtrpo.objectives.preference import preference_loss, response_log_likelihoods


class Outcome(NamedTuple):
    """``loss``: sum, a scalar with gradient; ``count``: what the loss is to be divided by, a scalar; ``metrics``: sums
    over the micro-batch, fp64 ``[len(metric names)]``; ``per_example``: losses ``[examples]`` without gradient."""

    loss: Tensor
    count: Tensor
    metrics: Tensor
    per_example: Tensor


class Objective(NamedTuple):
    """``metric_names`` are in the order of ``Outcome.metrics``; the first is ``loss``."""

    metric_names: tuple[str, ...]
    evaluate: Callable[[Tensor, MicroBatch, Tensor | None], Outcome]


def log_likelihoods(log_probs: Tensor, batch: MicroBatch) -> Tensor:
    """``L`` of each response of a micro-batch: ``[N] -> [responses]``."""
    sequence = batch.sequence
    return response_log_likelihoods(log_probs, sequence.target_weight, sequence.target_response, sequence.responses)


def preference_objective(settings: ObjectiveSettings) -> Objective:
    """Mean preference loss over pairs."""
    names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"]
    names += ["logps/chosen", "logps/rejected"]
    if settings.rpo_alpha:
        names += ["preference_loss", "nll_loss"]

    def evaluate(log_probs: Tensor, batch: MicroBatch, reference: Tensor | None) -> Outcome:
        loss, metrics = preference_loss(
            log_likelihoods(log_probs, batch),
            reference,
            batch.response_length[::2],
            loss_type=settings.loss_type,
            beta=settings.beta,
            label_smoothing=settings.label_smoothing,
            rpo_alpha=settings.rpo_alpha,
        )
        sums = torch.stack([metrics[name].double().sum() for name in names])
        count = torch.tensor(loss.numel(), dtype=torch.int, device=loss.device)
        return Outcome(loss.sum(), count, sums, loss.detach())

    return Objective(tuple(names), evaluate)


def sft_objective(settings: ObjectiveSettings) -> Objective:
    """Mean cross-entropy over all predicted tokens of the global batch."""

    def evaluate(log_probs: Tensor, batch: MicroBatch, reference: Tensor | None) -> Outcome:
        per_example = -log_likelihoods(log_probs, batch)
        loss = per_example.sum()
        count = torch.tensor(log_probs.numel(), dtype=torch.int, device=loss.device)
        return Outcome(loss, count, loss.detach().double()[None], per_example.detach())

    return Objective(("loss",), evaluate)


OBJECTIVES = {"preference": preference_objective, "sft": sft_objective}
