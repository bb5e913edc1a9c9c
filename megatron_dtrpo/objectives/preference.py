"""Preference losses on pairs of responses, and their metrics under TRL's names.

``L(y)`` is an estimator's surrogate log-likelihood of a response and ``S(y) = L_policy(y) - L_reference(y)`` its gain;
the steps per block are inside L. Names and formulae are TRL's. Legend: N targets, P pairs. Responses are ordered
chosen, rejected, chosen, rejected, ...
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from megatron_dtrpo.config.losses import LOSSES, LossOptions


class Pairs(NamedTuple):
    """The inputs of a loss, ``[P]`` each: ``L`` under the policy, and ``S``. Where there is no reference, ``S`` is
    ``L`` per token."""

    chosen_policy: Tensor
    rejected_policy: Tensor
    chosen_gain: Tensor
    rejected_gain: Tensor

    @property
    def margin(self) -> Tensor:
        return self.chosen_gain - self.rejected_gain


def sigmoid(pairs: Pairs, options: LossOptions) -> Tensor:
    """dTRPO's and DPO's loss (arXiv 2305.18290), with conservative DPO's label smoothing."""
    return _smoothed(options.beta * pairs.margin, options.label_smoothing)


def _smoothed(reward_margin: Tensor, wrong: float) -> Tensor:
    """Cross-entropy of preferring the chosen, where labels are ``wrong`` with this probability: ``[P] -> [P]``."""
    return -(1 - wrong) * F.logsigmoid(reward_margin) - wrong * F.logsigmoid(-reward_margin)


def robust(pairs: Pairs, options: LossOptions) -> Tensor:
    """Robust DPO (arXiv 2403.00409): without bias under labels that are wrong with probability ``label_smoothing``."""
    reward_margin, wrong = options.beta * pairs.margin, options.label_smoothing
    right = -(1 - wrong) * F.logsigmoid(reward_margin) + wrong * F.logsigmoid(-reward_margin)
    return right / (1 - 2 * wrong)


def hinge(pairs: Pairs, options: LossOptions) -> Tensor:
    """SLiC's loss (arXiv 2305.10425); zero, and without gradient, from a reward margin of 1 on."""
    return F.relu(1 - options.beta * pairs.margin)


def ipo(pairs: Pairs, options: LossOptions) -> Tensor:
    """IPO (arXiv 2310.12036): the margin per token is regressed to ``1 / (2 beta)``."""
    return (pairs.margin - 1 / (2 * options.beta)) ** 2


def apo_zero(pairs: Pairs, options: LossOptions) -> Tensor:
    """APO-zero (arXiv 2408.06266): the chosen becomes likelier and the rejected less likely, each by itself."""
    return F.sigmoid(-options.beta * pairs.chosen_gain) + F.sigmoid(options.beta * pairs.rejected_gain)


def simpo(pairs: Pairs, options: LossOptions) -> Tensor:
    """SimPO (arXiv 2405.14734): the policy's log-likelihoods per token differ by ``simpo_gamma / beta`` at least."""
    difference = pairs.chosen_policy - pairs.rejected_policy
    return _smoothed(options.beta * difference - options.simpo_gamma, options.label_smoothing)


def sft(pairs: Pairs, options: LossOptions) -> Tensor:
    """The likelihood anchor: mean ``-log p`` of the chosen's tokens. A preference loss alone is content when both
    log-likelihoods sink, as long as the rejected sinks faster."""
    return -pairs.chosen_policy


def preference_loss(
    policy: Tensor,
    reference: Tensor | None,
    length: Tensor,
    *,
    losses: dict[str, float],
    options: LossOptions,
    length_normalization: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of every pair.

    Args:
        policy, reference: ``L`` of the responses under each model, ``[2 P]``; no reference where no loss reads one.
        length: tokens of the responses, ``[2 P]``.
        losses: name -> weight; the loss is their weighted sum.
        length_normalization: whether every loss sees log-likelihoods per token.

    Returns:
        The loss ``[P]``, and the metrics, each ``[P]`` and without gradient. With several losses ``loss/NAME`` is one
        of them, without its weight.
    """
    gain = policy / length if reference is None else policy - reference
    pairs, per_token = _pairs(policy, gain), _pairs(policy / length, gain / length)
    values = {
        name: LOSSES[name].of(per_token if LOSSES[name].per_token or length_normalization else pairs, options)
        for name in losses
    }
    loss: Any = sum(weight * values[name] for name, weight in losses.items())
    margin = pairs.margin
    metrics = {
        "loss": loss,
        "rewards/chosen": options.beta * pairs.chosen_gain,
        "rewards/rejected": options.beta * pairs.rejected_gain,
        "rewards/accuracies": (margin.sign() + 1) / 2,  # a tie counts half
        "rewards/margins": options.beta * margin,
        "logps/chosen": pairs.chosen_policy,
        "logps/rejected": pairs.rejected_policy,
    }
    if len(losses) > 1:
        metrics |= {f"loss/{name}": value for name, value in values.items()}
    return loss, {name: value.detach() for name, value in metrics.items()}


def _pairs(policy: Tensor, gain: Tensor) -> Pairs:
    """``[2 P]`` each."""
    return Pairs(*policy.view(-1, 2).unbind(1), *gain.view(-1, 2).unbind(1))
