"""Rules of the settings of low-rank adapters, and who else must be left out."""

from __future__ import annotations

import dataclasses

from megatron_dtrpo.config.lora import DEFAULT_TARGETS, LoraSettings, target_names
from megatron_dtrpo.config.settings import FIELDS, Config
from megatron_dtrpo.errors import UserError


def _demand(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


def check_lora(config: Config) -> None:
    """Fills in the layers that have an adapter. Raises UserError naming the key."""
    lora = config.lora
    if lora.lora_rank is None:
        for f in dataclasses.fields(LoraSettings):
            _demand(
                getattr(lora, f.name) == FIELDS[f.name].default,
                f"{f.name} goes with lora_rank: give --lora-rank N, or leave it out",
            )
        return
    lora.lora_target_modules = lora.lora_target_modules or list(DEFAULT_TARGETS)
    for pattern in lora.lora_target_modules:
        _demand(
            target_names(config.model.num_layers, [pattern]),
            f"lora_target_modules: {pattern!r} matches no linear layer: give {', '.join(DEFAULT_TARGETS)}, "
            "or wildcards",
        )
    _demand(lora.lora_alpha > 0, "lora_alpha is 0: the adapters would add nothing")
    _demand(lora.lora_dropout < 1, f"lora_dropout is {lora.lora_dropout}: it must be below 1")
    _check_company(config)


def _check_company(config: Config) -> None:
    """What does not go together with adapters."""
    parallel, drops = config.parallel, config.lora.lora_dropout > 0
    _demand(
        config.objective.trainable_modules is None,
        "trainable_modules with lora_rank: adapters are all that is trained: leave one of the two out",
    )
    _demand(
        parallel.model_class == "gpt",
        f"lora_rank with model_class {parallel.model_class} was never tried: leave one of the two out",
    )
    _demand(
        not config.rounds.move_reference,
        "move_reference with lora_rank: the reference is the model without adapters, in every round: leave it out",
    )
    _demand(
        not parallel.fp8_param_gather,
        "fp8_param_gather with lora_rank: frozen weights are never gathered: leave it out",
    )
    _demand(
        parallel.fp8_format is None or parallel.fp8_recipe != "delayed",
        "fp8_recipe delayed with lora_rank: checkpoints hold adapters only, and not its scales: choose another recipe",
    )
    _demand(
        not drops or config.objective.objective != "policy_gradient",
        "lora_dropout with objective policy_gradient: decoding drops nothing, and training replays it: leave it out",
    )
    _demand(
        not drops or "mlp" not in (parallel.recompute_modules or ()),
        "lora_dropout with recompute_modules mlp: an MLP that is recomputed alone does not know whose tokens it has: "
        "give --recompute-granularity full, or leave mlp out",
    )
