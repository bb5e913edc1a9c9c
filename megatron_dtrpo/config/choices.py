"""What a choice that is made anew leaves of older settings: those of a file beside a flag, or those of a run that is
scored by another estimator. What no longer fits is left out and named; what was chosen anew stays, right or wrong."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from megatron_dtrpo.config.estimators import ESTIMATORS
from megatron_dtrpo.config.online_rules import unread_online
from megatron_dtrpo.config.rules import default_estimator, no_reference, unread_options
from megatron_dtrpo.config.settings import FIELDS, Config

CHOICES = frozenset({"objective", "estimator", "loss_type", "lr_decay_style"})


def leave_out_misfits(config: Config, chosen: Collection[str], where: object) -> list[str]:
    """Gives every setting that does not fit the objective, estimator, losses and decay its default, except the
    ``chosen``.

    Args:
        chosen: the settings that were given anew; where none of `CHOICES` is among them, nothing is left out.
        where: what the others were read from.

    Returns:
        A line that names them, or none.
    """
    if not CHOICES & set(chosen):
        return []
    found = []
    for misfits in (_of_another_objective, _of_other_choices):  # the estimator first: what else fits depends on it
        for key, reason in misfits(config).items():
            group, default = config.group_of(key), FIELDS[key].default
            value = getattr(group, key)
            if key not in chosen and value != default:
                setattr(group, key, default)
                found.append(f"{key} {_text(value)} ({reason})")
    return [f"note: {where}: left out: {', '.join(found)}"] if found else []


def _of_another_objective(config: Config) -> dict[str, str]:
    objective = config.objective
    if objective.estimator and objective.objective not in ESTIMATORS[objective.estimator].objectives:
        return {"estimator": f"belongs to objective {', '.join(ESTIMATORS[objective.estimator].objectives)}"}
    return {}


def _of_other_choices(config: Config) -> dict[str, str]:
    objective = config.objective
    name = objective.estimator or default_estimator(objective.objective, config.model)
    estimator, losses = ESTIMATORS[name], objective.loss_type or ["sigmoid"]
    found = {option: f"belongs to {readers}" for option, readers in unread_options(objective, name).items()}
    if not estimator.is_random and objective.num_views not in (None, 1):
        found["num_views"] = f"estimator {name} has no noise to average over views"
    if objective.block_start and objective.block_start not in estimator.block_starts:
        found["block_start"] = f"estimator {name} would be biased"
    if objective.loss_weights and len(objective.loss_weights) != len(losses):
        found.setdefault("loss_weights", f"loss_type is {_text(losses)}")
    found |= unread_online(config)
    if objective.objective != "sft":
        found["assistant_turns"] = "belongs to objective sft"
    if not objective.has_reference:
        found |= dict.fromkeys(("reference", "reference_cache"), no_reference(objective))
    if config.optimizer.lr_decay_style == "constant":
        found["min_lr"] = "belongs to a decay"
    return found


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
