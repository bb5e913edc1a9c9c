"""From the log-probabilities of one micro-batch's targets to a summed loss, its divisor and summed metrics.

Sums, not means: megatron-core divides gradients by the divisor's total over the global batch, so that no number
depends on how examples were assigned to processes and packed into sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dtrpo.config.losses import LossOptions
from megatron_dtrpo.config.rows import options_of
from megatron_dtrpo.config.settings import ObjectiveSettings
from megatron_dtrpo.objectives.preference import preference_loss
from megatron_dtrpo.objectives.targets import Targets


class Outcome(NamedTuple):
    """``loss``: sum, a scalar with gradient; ``count``: what the loss is to be divided by, a scalar; ``metrics``: sums
    over the micro-batch, fp64 ``[len(metric names)]``; ``per_example``: losses ``[examples]`` without gradient;
    ``slope``: in a training pass, of `training.passes.slope`. ``largest``: a measure whose largest value over the
    global batch is wanted, a scalar."""

    loss: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple has a method of this name
    metrics: Tensor
    per_example: Tensor
    slope: Tensor | None = None
    largest: Tensor | None = None


class Objective(NamedTuple):
    """``metric_names`` are in the order of ``Outcome.metrics``; the first is ``loss``. ``evaluate`` is given the
    policy's targets and what is known of the responses beforehand: ``L`` under the reference, fp64 ``[responses]``, if
    ``reads_reference``; for ``policy_gradient`` a `policy_gradient.Rollout`."""

    metric_names: tuple[str, ...]
    evaluate: Callable[[Targets, Any], Outcome]
    reads_reference: bool = False


def preference_objective(settings: ObjectiveSettings) -> Objective:
    """Mean preference loss over pairs."""
    losses = settings.losses()
    names = ["loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"]
    names += ["logps/chosen", "logps/rejected"]
    names += [f"loss/{name}" for name in losses] if len(losses) > 1 else []
    options = options_of(LossOptions, settings)

    def evaluate(targets: Targets, reference: Tensor | None) -> Outcome:
        if settings.has_reference and reference is None:
            raise ValueError("the losses compare with a reference, and this batch has no scores of one")
        loss, metrics = preference_loss(
            targets.likelihoods(),
            reference,
            targets.length,
            losses=losses,
            options=options,
            length_normalization=settings.length_normalization,
        )
        sums = torch.stack([metrics[name].double().sum() for name in names])
        count = torch.full((), loss.numel(), dtype=torch.int, device=loss.device)
        return Outcome(loss.sum(), count, sums, loss.detach())

    return Objective(tuple(names), evaluate, settings.has_reference)


def sft_objective(settings: ObjectiveSettings) -> Objective:
    """Mean cross-entropy over all response tokens of the global batch, each of which weighs 1 in all its views."""

    def evaluate(targets: Targets, reference: Tensor | None) -> Outcome:
        per_example = -targets.likelihoods()
        loss = per_example.sum()
        count = targets.length.sum().int()  # every token of a response is learned
        return Outcome(loss, count, loss.detach().double()[None], per_example.detach())

    return Objective(("loss",), evaluate)
