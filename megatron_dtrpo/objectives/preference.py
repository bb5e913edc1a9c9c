"""The preference loss on pairs of responses, and its metrics under TRL's names.

``L(y)`` is an estimator's surrogate log-likelihood of a response, ``S(y) = L_policy(y) - L_reference(y)`` and a pair's
margin is ``S(chosen) - S(rejected)``; the steps per block are inside L. Legend: N targets, P pairs. Responses are
ordered chosen, rejected, chosen, rejected, ...
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def response_log_likelihoods(log_probs: Tensor, weight: Tensor, response: Tensor, responses: int) -> Tensor:
    """``L(y) = sum of weight * log p`` per response: ``[N], [N], int64 [N] -> fp64 [responses]``.

    In fp64, because margins are small differences of these large sums.
    """
    return weight.new_zeros(responses).index_add(0, response, log_probs.to(weight.dtype) * weight)


def sigmoid_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """dTRPO's and DPO's loss per pair, with conservative-DPO label smoothing: ``[P] -> [P]``."""
    right, wrong = F.logsigmoid(beta * margin), F.logsigmoid(-beta * margin)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """IPO (arXiv 2310.12036): the margin is regressed to ``1 / (2 beta)``: ``[P] -> [P]``. ``label_smoothing`` must
    be 0, which the configuration checks."""
    return (margin - 1 / (2 * beta)) ** 2


LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {"sigmoid": sigmoid_loss, "ipo": ipo_loss}


def preference_loss(
    policy: Tensor,
    reference: Tensor,
    chosen_length: Tensor,
    *,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    rpo_alpha: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and metrics of every pair.

    Args:
        policy, reference: ``L`` of the responses under each model, ``[2 P]``.
        chosen_length: tokens of the chosen responses, ``[P]``.
        rpo_alpha: weight of the likelihood anchor ``-L_policy(chosen) / chosen_length`` (TRL's ``rpo_alpha``): the
            preference loss alone is content when both log-likelihoods sink, as long as the rejected sinks faster.

    Returns:
        The loss ``[P]``, and the metrics, each ``[P]`` and without gradient.
    """
    policy_chosen, policy_rejected = policy.view(-1, 2).unbind(1)
    gain_chosen, gain_rejected = (policy - reference).view(-1, 2).unbind(1)
    margin = gain_chosen - gain_rejected
    preference = LOSSES[loss_type](margin, beta, label_smoothing)
    nll = -policy_chosen / chosen_length
    loss = preference + rpo_alpha * nll
    metrics = {
        "loss": loss,
        "preference_loss": preference,
        "nll_loss": nll,
        "rewards/chosen": beta * gain_chosen,
        "rewards/rejected": beta * gain_rejected,
        "rewards/accuracies": (margin > 0).to(margin.dtype),
        "rewards/margins": beta * margin,
        "logps/chosen": policy_chosen,
        "logps/rejected": policy_rejected,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}
