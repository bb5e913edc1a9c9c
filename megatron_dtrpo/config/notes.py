"""What settings amount to that one might not see: a line for each."""

from __future__ import annotations

from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.config.estimators import ESTIMATORS
from megatron_dtrpo.config.settings import FIELDS, Config

# Options of policy_gradient that matter where a ratio is not 1.
_OF_RATIOS = ("clip", "clip_low", "clip_high")


def notes(config: Config) -> list[str]:
    """Lines about a validated configuration."""
    lines = [of(config) for of in (_steps_per_block, _ratios, _adapter, _denoising_steps, _unread)]
    return [line for line in lines if line is not None]


def _steps_per_block(config: Config) -> str | None:
    steps, block_size = config.objective.steps_per_block, config.model.block_size
    if "steps_per_block" not in ESTIMATORS[config.objective.estimator].options or not FULL < block_size < steps:
        return None
    return f"note: steps_per_block {steps} with block_size {block_size}: a block is decoded a token a step"


def _ratios(config: Config) -> str | None:
    if config.online.updates_per_rollout > 1:
        return None
    given = [key for key in _OF_RATIOS if getattr(config.objective, key) != FIELDS[key].default]
    if not given:
        return None
    return f"note: updates_per_rollout 1: every ratio is 1, and {', '.join(given)} changes nothing"


def _adapter(config: Config) -> str | None:
    run = config.run
    if run.load_adapter is None or run.reference is not None or not config.objective.has_reference:
        return None
    return f"note: the reference is {run.load} without the adapter {run.load_adapter}: the first rewards are not 0"


def _denoising_steps(config: Config) -> str | None:
    steps, small = config.online.rollout_denoising_steps, config.online.rollout_small_block_size
    places = small or config.model.block_size
    if steps is None or not FULL < places < steps:
        return None
    return f"note: rollout_denoising_steps {steps} with sub-blocks of at most {places}: they are written a token a step"


def _unread(config: Config) -> str | None:
    objective, online = config.objective, config.online
    found = []
    if objective.kl_estimator != FIELDS["kl_estimator"].default and objective.kl_coefficient == 0:
        found.append("kl_estimator without kl_coefficient")
    if online.resamplings != FIELDS["resamplings"].default and not online.drop_equal_groups:
        found.append("resamplings without drop_equal_groups")
    return f"note: {' and '.join(found)}: changes nothing" if found else None
