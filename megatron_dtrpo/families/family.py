"""A model family: a row of names and numbers, and the rules by which its parameters are named.

A rule stands in a family's parameter table beside the name of a Megatron parameter. It names the Hugging Face tensors
that this parameter consists of: ``*`` is the number of the layer, ``{q,k,v}`` are several tensors in that order. How
rows are cut and joined is written in `conversion.mapping`, a function for each kind of rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_dtrpo.config.settings import ModelSettings

_ALTERNATIVES = re.compile(r"\{([^}]*)\}")


@dataclass(frozen=True)
class Rule:
    """The names of the Hugging Face tensors that make up one Megatron parameter."""

    pattern: str

    def sources(self, layer: int | None) -> tuple[str, ...]:
        """The names in ``layer``; None for a parameter outside of the layers."""
        name = self.pattern.replace("*", str(layer))
        found = _ALTERNATIVES.search(name)
        if found is None:
            return (name,)
        return tuple(name[: found.start()] + word + name[found.end() :] for word in found[1].split(","))


class Copy(Rule):
    """One tensor, as it is."""


class QKV(Rule):
    """Query, key and value: joined key/value group by key/value group."""


class GatedMLP(Rule):
    """Gate and up: one above the other."""


class Vocabulary(Rule):
    """A row for each token: below it, padding."""


@dataclass(frozen=True)
class Family:
    """One row of the registry."""

    name: str
    """As `ModelSettings.family` records it."""
    architecture: str
    """The entry of ``architectures`` in config.json that tells the family."""
    model_type: str
    """``model_type`` in config.json."""
    parameters: Mapping[str, Rule]
    """Megatron's name of each parameter that a model of this family may have, in the model's order, and its rule."""
    settings: Callable[[dict, str | Path], dict[str, Any]]
    """Fields of `ModelSettings` from a config.json and its path, without the block size and `layers`. Raises UserError
    for what the model here would compute otherwise than the configuration says."""
    new_config: Callable[[ModelSettings], dict]
    """config.json of a model that was trained from random weights."""
    layers: Mapping[str, Any]
    """Fields of `ModelSettings` that say what a layer has, with the values that every model of the family has."""
    mask_token: str
    """The token that stands for a masked position; ``--add-mask-token`` adds it where a tokenizer has none."""
    prediction_shift: int
    """1 where a token is predicted by the row before it, 0 where by its own row."""
    attention: str
    """``block_causal``: a block sees itself and the blocks before it. ``full``: prompt and response are one block."""
    block_size_key: str | None
    """The key of config.json that holds the block size; None under full attention."""
    block_size: int | None
    """Where config.json lacks the key; None: import is told how many tokens. 0 under full attention
    (`config.blocks.FULL`)."""
    rule: str = "threshold"
    """How it decodes unless told otherwise: of `config.decoding.RULES`."""
    starting_point: bool = False
    """It predicts token by token until it is trained to predict by blocks, of any size."""
    assumptions: Callable[[dict, str | Path], list[str]] = lambda config, where: []
    """What ``settings`` filled in and a user may not have meant, a line each."""

    @property
    def is_full(self) -> bool:
        return self.attention == "full"

    @property
    def has_block_start(self) -> bool:
        """Whether a block's first token may be read in two places: the row before predicts it, and is of another
        block."""
        return self.prediction_shift == 1 and self.attention == "block_causal"

    def is_autoregressive(self, block_size: int) -> bool:
        """Whether a model of this block size predicts token by token, and no token stands for a masked one."""
        return block_size == 1 and self.has_block_start

    def mismatch(self, model: ModelSettings) -> str | None:
        """Why a model of these settings is none of this family; None where it is one."""
        for key, value in self.layers.items():
            if getattr(model, key) != value:
                return f"{key} is {str(not value).lower()}, in family {self.name} it is {str(value).lower()}"
        if self.is_full and model.block_size:
            return f"block_size is {model.block_size}, in family {self.name} it is 0, for full attention"
        if not self.is_full and not model.block_size:
            return f"block_size is 0, for full attention, which family {self.name} has not"
        return None
