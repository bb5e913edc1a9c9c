"""What settings amount to that one might not see: a line for each."""

from __future__ import annotations

from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.config.estimators import ESTIMATORS
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.settings import FIELDS, Config

# Options of policy_gradient that matter where a ratio is not 1.
_OF_RATIOS = ("clip", "clip_low", "clip_high")


def notes(config: Config) -> list[str]:
    """Lines about a validated configuration."""
    lines = (_steps_per_block(config), _ratios(config), _adapter(config))
    return [line for line in lines if line is not None]


def _steps_per_block(config: Config) -> str | None:
    steps, block_size = config.objective.steps_per_block, config.model.block_size
    if "steps_per_block" not in ESTIMATORS[config.objective.estimator].options or not FULL < block_size < steps:
        return None
    return f"note: steps_per_block {steps} with block_size {block_size}: a block is decoded a token a step"


def _ratios(config: Config) -> str | None:
    if not OBJECTIVES[config.objective.objective].is_online or config.online.updates_per_rollout > 1:
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
