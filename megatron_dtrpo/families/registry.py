"""Every model family. A new one is a new file and a row here, which names it: reading settings imports no family."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.family import Family

if TYPE_CHECKING:
    from megatron_dtrpo.config.settings import ModelSettings

# The name, as `ModelSettings.family` records it -> module:row.
FAMILIES: dict[str, str] = {
    "fast_dllm_v2": "megatron_dtrpo.families.qwen2:FAST_DLLM_V2",
    "qwen2": "megatron_dtrpo.families.qwen2:QWEN2",
    "sdar": "megatron_dtrpo.families.qwen3:SDAR",
    "a2d_qwen3": "megatron_dtrpo.families.qwen3:A2D_QWEN3",
    "qwen3": "megatron_dtrpo.families.qwen3:QWEN3",
    "llama": "megatron_dtrpo.families.llama:LLAMA",
    "llada": "megatron_dtrpo.families.llada:LLADA",
    "dream": "megatron_dtrpo.families.qwen2:DREAM",
}

# Of a model that is trained from random weights, and of checkpoints from before the family was recorded.
DEFAULT_FAMILY = "fast_dllm_v2"
DEFAULT_BLOCK_SIZE = 32  # of a starting point, where neither config.json nor the user says one


def families() -> list[Family]:
    """The rows of all families."""
    return [resolve_name(row) for row in FAMILIES.values()]


def family_named(name: str) -> Family:
    """The row with this name."""
    return resolve_name(FAMILIES[name])


def family_of(model: ModelSettings) -> Family:
    """The row of a model's family."""
    return family_named(model.family)


def is_autoregressive(model: ModelSettings) -> bool:
    """See `Family.is_autoregressive`."""
    return family_of(model).is_autoregressive(model.block_size)


def family_of_config(config: dict, where: str | Path) -> Family:
    """The one family whose architecture a config.json names. Raises UserError listing the known ones."""
    names = config.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    known = {row.architecture: row for row in families()}
    if len(names) == 1 and names[0] in known:
        return known[names[0]]
    if len(names) > 1:
        raise UserError(f"{where}: architectures has several, {', '.join(map(str, names))}: leave the one it is")
    name = names[0] if names else "(none)"
    raise UserError(f"{where}: architectures: unknown architecture {name}: known are {', '.join(known)}")


def same_predictions(one: Family, other: Family) -> bool:
    """Whether the same weights predict the same tokens in either family."""
    return (one.prediction_shift, one.attention) == (other.prediction_shift, other.attention)


def mask_tokens() -> tuple[str, ...]:
    """The names of all families' mask tokens: a tokenizer that has one of them needs not declare it."""
    return tuple(dict.fromkeys(row.mask_token for row in families()))
