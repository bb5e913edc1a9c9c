"""Policy gradient on rollouts: ratios, clipping, the KL to the reference, and their mean.

A ratio ``rho`` of policy to rollout policy covers a *unit*: a token, what a decoding step wrote, or a response. A
response's gain is the sum over its units of ``weight * min(rho A, clip(rho) A)``; the weights are the estimator's, so
that with ``exact_trajectory`` it is the sum over all decoding steps, and with ``trajectory`` an unbiased estimate of
it. Where policy and rollout policy are one, rho is 1 and every choice of the unit has the same gradient,
``A * grad L``.

Legend: N targets that this process predicts, R responses of the micro-batch, T decoding steps, V views, U units.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dtrpo.config.policy_gradient import CLIPS, KL_ESTIMATORS, RATIOS, PolicyGradientOptions
from megatron_dtrpo.config.rows import function_named, options_of
from megatron_dtrpo.objectives.objective import Objective, Outcome
from megatron_dtrpo.objectives.targets import Targets


class Rollout(NamedTuple):
    """What is known of a micro-batch's responses before the policy is run on them.

    ``advantage``, ``share`` (their weight in the mean), ``count`` (their part of its divisor) and ``correct`` (1 where
    the reward is positive, else 0): fp64 ``[R]``. ``group``: the number of each one's group in the update, int64
    ``[R]``. ``recorded``: log-probability with which the decoder wrote the tokens of each step, fp64 ``[R, T]``, or
    None. ``old``, ``reference``: log-probabilities of the targets under rollout policy and reference, fp32 ``[N]``;
    None: the present policy's, and no reference. ``mean_ratio``: of each one's group, the mean of its clipped ratios,
    which divides its gain, fp64 ``[R]``; None: 1.
    """

    advantage: Tensor
    share: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple has a method of this name
    correct: Tensor
    group: Tensor
    recorded: Tensor | None = None
    old: Tensor | None = None
    reference: Tensor | None = None
    mean_ratio: Tensor | None = None


class Units(NamedTuple):
    """``log_ratio`` and ``weight`` of each unit, fp64 ``[U]``, the ``response`` that it belongs to, int64 ``[U]``, and
    the sum of one value per unit over each response, ``[U] -> [R]``."""

    log_ratio: Tensor
    weight: Tensor
    response: Tensor
    by_response: Callable[[Tensor], Tensor]


def token_ratio(targets: Targets, gain: Tensor, per_token: bool) -> Units:
    """A ratio for every target. ``gain``: its log-ratio, fp64 ``[N]``."""
    return Units(gain, targets.weight, targets.response, targets.sum_by_response)


def step_ratio(targets: Targets, gain: Tensor, per_token: bool) -> Units:
    """A ratio for what each decoding step wrote, in each view that shows it."""
    count = targets.sum_by_step(torch.ones_like(gain))
    weight = targets.sum_by_step(targets.weight) / count.clamp(min=1)
    shape = count.shape
    response = torch.arange(shape[0], device=gain.device).view(-1, *[1] * (count.dim() - 1)).expand(shape)

    def by_response(values: Tensor) -> Tensor:
        return values.view(shape).flatten(1).sum(1)

    return Units(targets.sum_by_step(gain).flatten(), weight.flatten(), response.flatten(), by_response)


def sequence_ratio(targets: Targets, gain: Tensor, per_token: bool) -> Units:
    """A ratio for each response; ``per_token``: of its log-probability per token, and counted once a token (GSPO)."""
    log_ratio = targets.sum_by_response(gain * targets.weight)
    length = targets.length.double()
    response = torch.arange(length.numel(), device=gain.device)
    if per_token:
        return Units(log_ratio / length, length, response, lambda values: values)
    return Units(log_ratio, torch.ones_like(length), response, lambda values: values)


def pessimistic(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """PPO's gain ``[U]`` (arXiv 1707.06347): a ratio that went too far in the right direction gains nothing more.
    Ratios are clipped to ``low .. high``."""
    ratio = log_ratio.exp()
    return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def always_clipped(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Clipped whatever the sign of the advantage, and then a weight of ``grad log p`` (StableDRL, arXiv 2603.06743; of
    tokens CISPO, arXiv 2506.13585): a ratio that went too far counts for ``low`` or ``high``, and still counts."""
    weight = log_ratio.detach().exp().clamp(low, high)
    return weight * _with_gradient(log_ratio) * advantage


def _with_gradient(log_prob: Tensor) -> Tensor:
    """1, with the gradient of ``log_prob``."""
    return 1 + log_prob - log_prob.detach()


def k1(policy: Tensor, reference: Tensor) -> Tensor:
    """``log p - log p_reference`` of sampled tokens, ``[N]`` each: without bias, and of either sign. Its gradient is
    ``k1 grad log p``, that of a reward of so much less: on average KL(policy | reference)'s. The plain derivative,
    ``grad log p``, is zero on average."""
    return (policy - reference).detach() * _with_gradient(policy)


def k3(policy: Tensor, reference: Tensor) -> Tensor:
    """``r - 1 - log r`` with ``r = p_reference / p``, ``[N]``: without bias, and never negative (Schulman). On average
    its gradient is KL(reference | policy)'s."""
    difference = reference - policy
    return torch.expm1(difference) - difference


def policy_gradient_objective(settings) -> Objective:
    """``settings``: an ``ObjectiveSettings``. Evaluates targets beside a `Rollout`."""
    options = options_of(PolicyGradientOptions, settings)
    gain_of, (low, high) = function_named(CLIPS[options.clip]), _limits(options)
    divergence = function_named(KL_ESTIMATORS[options.kl_estimator])
    names = ["loss", "ratio", "clip/fraction", "entropy", "rollout/logp_gap"]
    names += ["kl"] if options.kl_coefficient else []
    names += ["loss/likelihood"] if options.likelihood_coefficient else []

    def evaluate(targets: Targets, rollout: Rollout) -> Outcome:
        policy = targets.log_prob.double()
        old = policy.detach() if rollout.old is None else rollout.old.double()
        units, advantage = _units(targets, policy - old, settings), rollout.advantage
        ratio = units.log_ratio.exp()
        gain = gain_of(units.log_ratio, advantage[units.response], low, high)
        loss = -units.by_response(units.weight * gain)
        if rollout.mean_ratio is not None:
            loss = loss / rollout.mean_ratio

        weight = units.by_response(units.weight).clamp(min=1e-9)
        is_clipped = (gain != ratio * advantage[units.response]).double()
        gap, largest = _gap(targets, old, rollout.recorded)
        length = targets.length.double()
        metrics = {
            "ratio": units.by_response(units.weight * ratio) / weight,
            "clip/fraction": units.by_response(units.weight * is_clipped) / weight,
            "entropy": -targets.sum_by_response(targets.weight * old) / length,
            "rollout/logp_gap": gap / length,
        }
        if options.kl_coefficient:
            kl = targets.sum_by_response(targets.weight * divergence(policy, rollout.reference.double()))
            loss = loss + options.kl_coefficient * kl
            metrics["kl"] = kl / length
        if options.likelihood_coefficient:
            unlikely = -targets.likelihoods() * rollout.correct
            loss = loss + options.likelihood_coefficient * unlikely
            metrics["loss/likelihood"] = unlikely / length
        loss = rollout.share * loss
        sums = [loss.sum(), *((rollout.count * metrics[name]).sum() for name in names[1:])]
        return Outcome(
            loss.sum(),
            rollout.count.sum().int(),
            torch.stack([value.detach().double() for value in sums]),
            loss.detach(),
            largest=largest,
        )

    return Objective(tuple(names), evaluate, reads_reference=options.kl_coefficient > 0)


def _limits(options: PolicyGradientOptions) -> tuple[float, float]:
    return 1 - options.clip_low, 1 + options.clip_high


def _units(targets: Targets, gain: Tensor, settings) -> Units:
    return RATIOS[settings.ratio].of(targets, gain, settings.length_normalization)


def clipped_ratios(settings, targets: Targets, rollout: Rollout) -> Tensor:
    """Of each response the sum over its units of weight x clipped ratio, and of weight: fp64 ``[R, 2]``. The quotient
    of their sums over a group is `Rollout.mean_ratio`: with it a group's gradient is a weighted mean of its units'
    ``A grad log p``, whatever their ratios are (StableDRL)."""
    units = _units(targets, targets.log_prob.double() - rollout.old.double(), settings)
    clipped = units.log_ratio.exp().clamp(*_limits(settings))
    return torch.stack([units.by_response(each) for each in (units.weight * clipped, units.weight)], 1)


def _gap(targets: Targets, old: Tensor, recorded: Tensor | None) -> tuple[Tensor, Tensor]:
    """How far the trainer's log-probabilities are from those that the decoder recorded: per response the sum over the
    steps that are laid out, ``[R]``, and the largest, a scalar."""
    if recorded is None:
        nothing = old.new_zeros(targets.length.numel())
        return nothing, old.new_zeros(())
    computed, count = targets.sum_by_step(old), targets.sum_by_step(torch.ones_like(old))
    difference = (computed - recorded.unsqueeze(1)).abs().masked_fill(count == 0, 0)
    return difference.flatten(1).sum(1), difference.max() if difference.numel() else old.new_zeros(())


def shares(lengths: Tensor, group: Tensor, mean: str) -> tuple[Tensor, Tensor]:
    """The weight of each response in the loss, and its part of what the loss is divided by: fp64 ``[n]`` each, of the
    ``lengths`` int64 ``[n]`` of all responses of an update and the ``group`` int64 ``[n]`` that each belongs to."""
    length, one = lengths.double(), torch.ones(lengths.numel(), dtype=torch.float64)
    if mean == "token":
        return one, length
    if mean == "response":
        return 1 / length, one
    groups = int(group.max()) + 1
    tokens = torch.zeros(groups, dtype=torch.float64).index_add(0, group, length)
    return (len(group) / groups / tokens)[group], one  # the divisor, the number of responses, is to be whole
