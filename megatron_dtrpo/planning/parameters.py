"""How many parameters a rank holds: sums over the family's parameter table (`families.parameters`).

TP is the tensor-parallel size, PP the pipeline size. Counts are exact: a test compares them with the model itself.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_dtrpo.config.lora import LoraSettings, target_names
from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.families.parameters import (
    EMBEDDING,
    HEAD,
    SHAPES,
    adapter_parameters,
    count,
    in_layer,
    parameter_table,
    sizes,
)


def widths(model: ModelSettings) -> tuple[int, int]:
    """Query heads x head width, and key/value heads x head width."""
    of = sizes(model, vocabulary=0)
    return of["query"], of["key"]


def matrix_parameters(model: ModelSettings, tp: int) -> int:
    """Of one layer on one rank: the weights of its four matrix products."""
    return sum(count(name, model, tp) for name in _layer_names(model) if SHAPES[name].columns is not None)


def layer_parameters(model: ModelSettings, tp: int) -> int:
    """Of one layer on one rank. Norms are on every rank."""
    return sum(count(name, model, tp) for name in _layer_names(model))


def _layer_names(model: ModelSettings) -> list[str]:
    return [name for name in parameter_table(model) if in_layer(name)]


def vocabulary_parameters(model: ModelSettings, tp: int) -> int:
    """Of the embedding, or of the output matrix, on one rank."""
    return count(EMBEDDING, model, tp)


def stage_layers(model: ModelSettings, pp: int) -> int:
    return model.num_layers // pp


def stage_layer_numbers(model: ModelSettings, pp: int, virtual: int, stage: int) -> list[int]:
    """The layers of a pipeline stage, all its virtual ones together."""
    each = stage_layers(model, pp) // virtual
    return [(part * pp + stage) * each + n for part in range(virtual) for n in range(each)]


def adapters_in(model: ModelSettings, lora: LoraSettings, tp: int, numbers: Iterable[int]) -> int:
    """Of the adapters in the layers of these ``numbers`` on one rank; 0 without adapters."""
    if lora.lora_rank is None:
        return 0
    here = set(numbers)
    targets = target_names(model.num_layers, lora.lora_target_modules)
    return adapter_parameters(model, lora.lora_rank, (name for name in targets if int(name.split(".")[2]) in here), tp)


def stage_parameters(model: ModelSettings, tp: int, pp: int, stage: int) -> int:
    """Of one pipeline stage on one rank. The last stage has a copy of a tied embedding, if it is not the first."""
    total = stage_layers(model, pp) * layer_parameters(model, tp)
    first, last = stage == 0, stage == pp - 1
    if first:
        total += vocabulary_parameters(model, tp)
    if last:
        total += count("decoder.final_layernorm.weight", model, tp)
        if HEAD in parameter_table(model) or not first:
            total += vocabulary_parameters(model, tp)
    return total
