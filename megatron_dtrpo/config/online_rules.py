"""Rules of the settings of ``objective policy_gradient`` and of rounds, and who else must leave them out."""

from __future__ import annotations

import dataclasses

from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.config.decoding import RULES
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.policy_gradient import RATIOS, PolicyGradientOptions
from megatron_dtrpo.config.settings import FIELDS, Config, OnlineSettings, RoundSettings
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.registry import family_of

# Of the data's settings those that belong to pairs and examples.
_OF_EXAMPLES = {
    "global_batch_size": "an iteration takes rollout_prompts x group_size answers",
    "make_response_length_divisible_by": "answers stay as they were decoded",
    "overlong": "answers are as long as they were decoded",
}
_POLICY_GRADIENT, _ONLINE, _ROUNDS = (
    [f.name for f in dataclasses.fields(kind)] for kind in (PolicyGradientOptions, OnlineSettings, RoundSettings)
)
# Of the settings of rollouts those that rounds read.
_READ_BY_ROUNDS = (
    *("group_size", "rewards", "reward_weights", "reward_timeout", "reward_workers"),
    *(name for name in _ONLINE if name.startswith("rollout_") and name != "rollout_prompts"),
)


def _demand(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


def unread_online(config: Config) -> dict[str, str]:
    """The settings that the objective does not read because it is, or is not, online or in rounds; and why."""
    kind = OBJECTIVES[config.objective.objective]
    rounds = dict.fromkeys(_ROUNDS, "belongs to objective preference")
    if kind.is_online:
        return _OF_EXAMPLES | rounds
    online = dict.fromkeys([*_POLICY_GRADIENT, *_ONLINE], "belongs to objective policy_gradient")
    if not kind.compares_pairs:
        return online | rounds
    if config.rounds.rounds:
        return {key: reason for key, reason in online.items() if key not in _READ_BY_ROUNDS}
    either = dict.fromkeys(_READ_BY_ROUNDS, "belongs to objective policy_gradient, or to rounds")
    return online | either | {key: "goes with rounds" for key in _ROUNDS if key != "rounds"}


def rollout_rule(config: Config) -> str:
    """The rule that answers are decoded by; with block size 1 there is one."""
    if config.model.block_size == 1:
        return "leftmost"
    return config.online.rollout_rule or family_of(config.model).rule


def check_online(config: Config) -> None:
    """Raises UserError naming the key."""
    for key, reason in unread_online(config).items():
        value = getattr(config.group_of(key), key)
        _demand(
            value == FIELDS[key].default,
            f"{key} with objective {config.objective.objective}: {reason}: leave it out",
        )
    if OBJECTIVES[config.objective.objective].is_online:
        _check_rollouts(config)
        _check_policy_gradient(config)
    elif config.rounds.rounds:
        _check_rollouts(config)
        _check_rounds(config)


def _check_rollouts(config: Config) -> None:
    """What answers, and their rewards, are subject to wherever they are decoded."""
    online = config.online
    _demand(online.rewards, "rewards is missing: give --rewards numeric, or module:function of your own")
    for name in online.rewards:
        _demand(online.rewards.count(name) == 1, f"rewards has {name} twice: give it once, with reward_weights")
    if online.reward_weights is not None:
        given, wanted = len(online.reward_weights), len(online.rewards)
        _demand(given == wanted, f"reward_weights has {given} weights, rewards {wanted}: give as many of both")
        _demand(any(online.reward_weights), "reward_weights are all 0: there is nothing to learn")
    _demand(online.reward_timeout > 0, "reward_timeout 0: no reward could be computed: give seconds")
    _demand(online.group_size > 1, "group_size 1: an answer is compared with the others of its group: give 2 or more")
    _demand(
        online.rollout_temperature > 0,
        "rollout_temperature 0: all answers of a group would be the same one: leave it at 1",
    )
    rule = rollout_rule(config)
    for option in ("threshold", "denoising_steps"):
        _demand(
            getattr(online, f"rollout_{option}") is None or option in RULES[rule].reads,
            f"rollout_{option}: decoding by the rule {rule} does not read it: leave it out",
        )
    _demand(
        online.rollout_rule in (None, rule),
        f"rollout_rule {online.rollout_rule} has no effect with block size 1, one token a pass: leave it out",
    )
    longest = config.model.max_position_embeddings
    _demand(
        online.rollout_max_new_tokens < longest,
        f"rollout_max_new_tokens {online.rollout_max_new_tokens} leaves no room for a prompt in the model's "
        f"max_position_embeddings {longest}: give less",
    )
    small, block_size = online.rollout_small_block_size, config.model.block_size
    _demand(
        small is None or block_size == FULL or block_size % small == 0,
        f"rollout_small_block_size {small} does not divide block_size {block_size}: change it or leave it out",
    )


def _check_rounds(config: Config) -> None:
    _demand(config.run.load, "rounds: who is to answer the prompts? Give --load, a checkpoint")
    _demand(
        config.run.reference_cache is None,
        "reference_cache holds scores of pairs, and rounds make their own: leave it out",
    )


def _check_policy_gradient(config: Config) -> None:
    online, objective = config.online, config.objective
    estimator, ratio = objective.estimator, objective.ratio
    _demand(
        online.reward_aggregation == "sum_then_normalize" or online.advantage_std,
        "reward_aggregation normalize_then_sum divides by each reward's spread: leave advantage_std on",
    )
    _demand(
        online.rollout_temperature == 1,
        f"rollout_temperature {online.rollout_temperature}: training replays the probabilities of temperature 1: "
        "leave it out",
    )
    _demand(
        online.updates_per_rollout <= online.rollout_prompts,
        f"updates_per_rollout {online.updates_per_rollout} is more than the {online.rollout_prompts} rollout_prompts: "
        "every update takes whole groups",
    )
    _demand(
        estimator in RATIOS[ratio].estimators,
        f"ratio {ratio} goes with estimator {', '.join(RATIOS[ratio].estimators)}, not {estimator}: change one of the "
        "two",
    )
    _demand(
        not objective.self_normalize or objective.clip == "always",
        f"self_normalize with clip {objective.clip}: it divides the weights of clip always: give that, or leave it out",
    )
    _demand(
        not objective.self_normalize or online.updates_per_rollout > 1,
        "self_normalize with updates_per_rollout 1: every ratio is 1, and so is their mean: leave it out",
    )
    _demand(
        not objective.length_normalization or ratio == "sequence",
        f"length_normalization with ratio {ratio}: it is for ratio sequence: leave it out",
    )
    _demand(
        config.run.reference_cache is None,
        "reference_cache holds scores of pairs, and policy_gradient writes its own answers: leave it out",
    )
    _demand(
        config.parallel.fp8_format is None,
        "fp8_format with objective policy_gradient was never tried: leave it out",
    )
