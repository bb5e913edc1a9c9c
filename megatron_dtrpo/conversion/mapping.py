"""The parameter table, read in both directions: which Hugging Face rows make up which Megatron tensor.

Megatron fuses what Hugging Face keeps apart, and always along the first axis: q, k and v group by group, gate above
up, padding below the vocabulary. Every tensor of the table is therefore a list of row ranges, its *segments*. Import
gathers them, export puts them back, a bounded number of rows at a time, and no value is ever computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from megatron_dtrpo.config.settings import ModelSettings

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


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


class Piece(NamedTuple):
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


class _Row(NamedTuple):
    """One row of the table. Sizes are named; see `_sizes`. ``columns`` is None for vectors."""

    key: str
    arrange: Arrangement
    sources: tuple[tuple[str, str], ...]
    columns: str | None


def _attention(kind: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"model.layers.{{n}}.self_attn.{part}_proj.{kind}", size)
        for part, size in (("q", "query"), ("k", "key"), ("v", "key"))
    )


_LAYER, _THEIRS = "decoder.layers.{n}.", "model.layers.{n}."

_EMBEDDING = _Row("embedding.word_embeddings.weight", padded, ((EMBEDDING, "vocabulary"),), "hidden")
_QKV_BIAS = _Row(_LAYER + "self_attention.linear_qkv.bias", by_group, _attention("bias"), None)
_FINAL_NORM = _Row("decoder.final_layernorm.weight", stacked, (("model.norm.weight", "hidden"),), None)
_HEAD = _Row("output_layer.weight", padded, ((HEAD, "vocabulary"),), "hidden")
_LAYER_TABLE = (
    _Row(
        _LAYER + "self_attention.linear_qkv.layer_norm_weight",
        stacked,
        ((_THEIRS + "input_layernorm.weight", "hidden"),),
        None,
    ),
    _Row(_LAYER + "self_attention.linear_qkv.weight", by_group, _attention("weight"), "hidden"),
    _QKV_BIAS,
    _Row(
        _LAYER + "self_attention.linear_proj.weight",
        stacked,
        ((_THEIRS + "self_attn.o_proj.weight", "hidden"),),
        "query",
    ),
    _Row(
        _LAYER + "mlp.linear_fc1.layer_norm_weight",
        stacked,
        ((_THEIRS + "post_attention_layernorm.weight", "hidden"),),
        None,
    ),
    _Row(
        _LAYER + "mlp.linear_fc1.weight",
        stacked,
        ((_THEIRS + "mlp.gate_proj.weight", "ffn"), (_THEIRS + "mlp.up_proj.weight", "ffn")),
        "hidden",
    ),
    _Row(_LAYER + "mlp.linear_fc2.weight", stacked, ((_THEIRS + "mlp.down_proj.weight", "hidden"),), "ffn"),
)

# Modules that keep state of their own beside weights (FP8 scales under Transformer Engine). Both layer specs ask for
# these objects; they are empty in a converted checkpoint. Layer modules come per layer.
STATEFUL = ("decoder.final_layernorm",)
STATEFUL_IN_LAYER = tuple(
    _LAYER + module
    for module in (
        "self_attention.core_attention",
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    )
)


def _sizes(model: ModelSettings, vocabulary: int) -> dict[str, int]:
    return {
        "hidden": model.hidden_size,
        "query": model.num_attention_heads * model.kv_channels,
        "key": model.num_query_groups * model.kv_channels,
        "ffn": model.ffn_hidden_size,
        "vocabulary": vocabulary,
    }


def _tensor(row: _Row, layer: int | None, model: ModelSettings, sizes: dict[str, int]) -> MegatronTensor:
    segments = row.arrange([(name.format(n=layer), sizes[size]) for name, size in row.sources], model)
    columns = () if row.columns is None else (sizes[row.columns],)
    shape = (sum(segment.rows for segment in segments), *columns)
    return MegatronTensor(row.key.format(n=layer), layer, shape, tuple(segments))


def megatron_tensors(model: ModelSettings, vocabulary: int) -> list[MegatronTensor]:
    """Every tensor of the Megatron model, in the model's order; ``vocabulary`` rows are Hugging Face's."""
    sizes = _sizes(model, vocabulary)
    tensors = [_tensor(_EMBEDDING, None, model, sizes)]
    for layer in range(model.num_layers):
        for row in _LAYER_TABLE:
            if row is not _QKV_BIAS or model.add_qkv_bias:
                tensors.append(_tensor(row, layer, model, sizes))
    tensors.append(_tensor(_FINAL_NORM, None, model, sizes))
    if model.untie_embeddings_and_output_weights:
        tensors.append(_tensor(_HEAD, None, model, sizes))
    return tensors


def huggingface_tensors(tensors: list[MegatronTensor]) -> dict[str, list[Piece]]:
    """The same table the other way round: Hugging Face name -> its rows, from the first to the last."""
    found: dict[str, list[tuple[int, Piece]]] = {}
    for tensor in tensors:
        row = 0
        for segment in tensor.segments:
            if segment.source is not None:
                piece = Piece(tensor, row, segment.rows)
                found.setdefault(segment.source, []).append((segment.start, piece))
            row += segment.rows
    return {name: [piece for _, piece in sorted(pieces, key=lambda p: p[0])] for name, pieces in found.items()}


def huggingface_shape(pieces: list[Piece]) -> tuple[int, ...]:
    """Shape of the Hugging Face tensor that ``pieces`` make up."""
    return (sum(piece.rows for piece in pieces), *pieces[0].tensor.shape[1:])


def count_parameters(tensors: dict[str, list[Piece]]) -> int:
    """Parameters of the Hugging Face model: without padding, a tied matrix once."""
    return sum(math.prod(huggingface_shape(pieces)) for pieces in tensors.values())


def segments_between(tensor: MegatronTensor, start: int, stop: int) -> list[tuple[int, Segment]]:
    """What rows ``start:stop`` of a tensor consist of: (row within that range, segment)."""
    found, row = [], 0
    for segment in tensor.segments:
        low, high = max(start, row), min(stop, row + segment.rows)
        if low < high:
            found.append((low - start, Segment(segment.source, segment.start + low - row, high - low)))
        row += segment.rows
    return found


def stateful_keys(model: ModelSettings) -> list[str]:
    layers = [pattern.format(n=layer) for layer in range(model.num_layers) for pattern in STATEFUL_IN_LAYER]
    return [*STATEFUL, *layers]
