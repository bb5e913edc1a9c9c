"""A family's parameter table, read in both directions: which Hugging Face rows make up which Megatron tensor.

The names stand in `families`; how a rule's tensors are cut and joined stands here, in `ARRANGEMENTS`.
Megatron fuses what Hugging Face keeps apart, and always along the first axis: q, k and v group by group, gate above
up, padding below the vocabulary. Every tensor of the table is therefore a list of row ranges, its *segments*. Import
gathers them, export puts them back, a bounded number of rows at a time, and no value is ever computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.families.family import QKV, Copy, GatedMLP, Rule, Vocabulary
from megatron_dtrpo.families.parameters import EMBEDDING, HEAD, SHAPES, in_layer, parameter_table, sizes
from megatron_dtrpo.families.registry import family_of


class Segment(NamedTuple):
    """``rows`` consecutive rows of a Megatron tensor: those of the Hugging Face tensor ``source`` from ``start`` on,
    or rows that it does not have (``source`` is None)."""

    source: str | None
    start: int
    rows: int


class MegatronTensor(NamedTuple):
    """One tensor of the Megatron checkpoint: its sharded key, its shape and what it consists of."""

    key: str
    layer: int | None
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]


class Part(NamedTuple):
    """``rows`` consecutive rows of a Hugging Face tensor: those of ``tensor`` from row ``start`` on."""

    tensor: MegatronTensor
    start: int
    rows: int


# An arrangement turns (names and row counts of the sources, model) into segments.
Sources = list[tuple[str, int]]
Arrangement = Callable[[Sources, ModelSettings], list[Segment]]


def stacked(sources: Sources, model: ModelSettings) -> list[Segment]:
    """One after the other; a single one is a copy."""
    return [Segment(name, 0, rows) for name, rows in sources]


def by_group(sources: Sources, model: ModelSettings) -> list[Segment]:
    """Key/value group by group: the group's query heads, its key, its value."""
    return [
        Segment(name, group * (rows // model.num_query_groups), rows // model.num_query_groups)
        for group in range(model.num_query_groups)
        for name, rows in sources
    ]


def padded(sources: Sources, model: ModelSettings) -> list[Segment]:
    """The vocabulary and, below it, what makes it divisible."""
    ((name, rows),) = sources
    padding = model.padded_vocab_size - rows
    return [Segment(name, 0, rows), *([Segment(None, 0, padding)] if padding else [])]


ARRANGEMENTS: dict[type[Rule], Arrangement] = {Copy: stacked, QKV: by_group, GatedMLP: stacked, Vocabulary: padded}


# Modules that keep state of their own beside weights (FP8 scales under Transformer Engine). Both layer specs ask for
# these objects; they are empty in a converted checkpoint. Layer modules come per layer.
STATEFUL = ("decoder.final_layernorm",)
STATEFUL_IN_LAYER = tuple(
    "decoder.layers.{n}." + module
    for module in (
        "self_attention.core_attention",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
)
_QK_NORMS = tuple(f"decoder.layers.{{n}}.self_attention.{letter}_layernorm" for letter in "qk")


def _tensor(name: str, rule: Rule, layer: int | None, model: ModelSettings, of: dict[str, int]) -> MegatronTensor:
    shape = SHAPES[name]
    sources = [(source, of[rows]) for source, rows in zip(rule.sources(layer), shape.rows, strict=True)]
    segments = ARRANGEMENTS[type(rule)](sources, model)
    columns = () if shape.columns is None else (of[shape.columns],)
    rows = sum(segment.rows for segment in segments)
    return MegatronTensor(name.replace("*", str(layer)), layer, (rows, *columns), tuple(segments))


def megatron_tensors(model: ModelSettings, vocabulary: int) -> list[MegatronTensor]:
    """Every tensor of the Megatron model, in the model's order; ``vocabulary`` rows are Hugging Face's."""
    table, of = parameter_table(model), sizes(model, vocabulary)
    names = list(table)
    layer_names = [name for name in names if in_layer(name)]
    first = names.index(layer_names[0])
    before = [(name, None) for name in names[:first]]
    layers = [(name, layer) for layer in range(model.num_layers) for name in layer_names]
    after = [(name, None) for name in names[first:] if not in_layer(name)]
    return [_tensor(name, table[name], layer, model, of) for name, layer in (*before, *layers, *after)]


def embedding_name(model: ModelSettings) -> str:
    """Hugging Face's name of the embedding."""
    return family_of(model).parameters[EMBEDDING].pattern


def head_name(model: ModelSettings) -> str:
    """Hugging Face's name of the output matrix, also where the embedding is all there is of it."""
    return family_of(model).parameters[HEAD].pattern


def holds_vocabulary(tensor: MegatronTensor) -> bool:
    """Whether it has a row for each token."""
    return tensor.key in (EMBEDDING, HEAD)


def huggingface_tensors(tensors: list[MegatronTensor]) -> dict[str, list[Part]]:
    """The same table the other way round: Hugging Face name -> its rows, from the first to the last."""
    found: dict[str, list[tuple[int, Part]]] = {}
    for tensor in tensors:
        row = 0
        for segment in tensor.segments:
            if segment.source is not None:
                part = Part(tensor, row, segment.rows)
                found.setdefault(segment.source, []).append((segment.start, part))
            row += segment.rows
    return {name: [part for _, part in sorted(parts, key=lambda p: p[0])] for name, parts in found.items()}


def huggingface_shape(parts: list[Part]) -> tuple[int, ...]:
    """Shape of the Hugging Face tensor that ``parts`` make up."""
    return (sum(part.rows for part in parts), *parts[0].tensor.shape[1:])


def count_parameters(tensors: dict[str, list[Part]]) -> int:
    """Parameters of the Hugging Face model: without padding, a tied matrix once."""
    return sum(math.prod(huggingface_shape(parts)) for parts in tensors.values())


def segments_between(tensor: MegatronTensor, start: int, stop: int) -> list[tuple[int, Segment]]:
    """The segments of rows ``start:stop`` of a tensor: (row within that range, segment)."""
    found, row = [], 0
    for segment in tensor.segments:
        low, high = max(start, row), min(stop, row + segment.rows)
        if low < high:
            found.append((low - start, Segment(segment.source, segment.start + low - row, high - low)))
        row += segment.rows
    return found


def stateful_keys(model: ModelSettings) -> list[str]:
    patterns = STATEFUL_IN_LAYER + (_QK_NORMS if model.qk_layernorm else ())
    layers = [pattern.format(n=layer) for layer in range(model.num_layers) for pattern in patterns]
    return [*STATEFUL, *layers]
