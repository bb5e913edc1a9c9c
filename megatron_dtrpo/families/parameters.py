"""Shapes of the parameters that megatron-core's GPT may have, by name, and which of them a model has.

A name with ``*`` stands in every layer. Sizes are named: see `sizes`. Counts are exact: a test compares them with the
model itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from megatron_dtrpo.families.family import Rule
from megatron_dtrpo.families.registry import family_of

if TYPE_CHECKING:
    from megatron_dtrpo.config.settings import ModelSettings

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"
_QKV_BIAS = "decoder.layers.*.self_attention.linear_qkv.bias"
_Q_NORM, _K_NORM = (f"decoder.layers.*.self_attention.{letter}_layernorm.weight" for letter in "qk")


class Shape(NamedTuple):
    """``rows``: of each Hugging Face tensor in it. ``columns``: None for a vector. ``divided``: whether tensor
    parallelism gives each process a part; the others are whole on each."""

    rows: tuple[str, ...]
    columns: str | None
    divided: bool


SHAPES = {
    EMBEDDING: Shape(("vocabulary",), "hidden", True),
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": Shape(("hidden",), None, False),
    "decoder.layers.*.self_attention.linear_qkv.weight": Shape(("query", "key", "key"), "hidden", True),
    _QKV_BIAS: Shape(("query", "key", "key"), None, True),
    _Q_NORM: Shape(("head",), None, False),
    _K_NORM: Shape(("head",), None, False),
    "decoder.layers.*.self_attention.linear_proj.weight": Shape(("hidden",), "query", True),
    "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": Shape(("hidden",), None, False),
    "decoder.layers.*.mlp.linear_fc1.weight": Shape(("ffn", "ffn"), "hidden", True),
    "decoder.layers.*.mlp.linear_fc2.weight": Shape(("hidden",), "ffn", True),
    "decoder.final_layernorm.weight": Shape(("hidden",), None, False),
    HEAD: Shape(("vocabulary",), "hidden", True),
}

# Parameters that a model has only under a setting.
_CONDITIONS = {
    _QKV_BIAS: lambda model: model.add_qkv_bias,
    _Q_NORM: lambda model: model.qk_layernorm,
    _K_NORM: lambda model: model.qk_layernorm,
    HEAD: lambda model: model.untie_embeddings_and_output_weights,
}


def sizes(model: ModelSettings, vocabulary: int) -> dict[str, int]:
    """The named sizes of a model with ``vocabulary`` rows in embedding and output matrix."""
    return {
        "hidden": model.hidden_size,
        "query": model.num_attention_heads * model.kv_channels,
        "key": model.num_query_groups * model.kv_channels,
        "head": model.kv_channels,
        "ffn": model.ffn_hidden_size,
        "vocabulary": vocabulary,
    }


def in_layer(name: str) -> bool:
    return "*" in name


def parameter_table(model: ModelSettings) -> dict[str, Rule]:
    """The rows of the family's table that this model has, in the model's order."""
    table = family_of(model).parameters
    return {name: rule for name, rule in table.items() if name not in _CONDITIONS or _CONDITIONS[name](model)}


def adapter_parameters(model: ModelSettings, rank: int, layers: Iterable[str], tp: int) -> int:
    """Numbers in the low-rank adapters beside linear ``layers``, as in ``decoder.layers.0.mlp.linear_fc1``, on one of
    ``tp`` processes."""
    names = (f"decoder.layers.*.{layer.split('.', 3)[3]}.weight" for layer in layers)
    return sum(_adapter_count(name, model, rank, tp) for name in names)


def _adapter_count(name: str, model: ModelSettings, rank: int, tp: int) -> int:
    """A matrix of the input's width for each part, and one of the output's. Tensor parallelism divides the first where
    the layer writes to the residual stream, else the second."""
    shape, of = SHAPES[name], sizes(model, vocabulary=0)
    into, out = len(shape.rows) * of[shape.columns], sum(of[size] for size in shape.rows)
    return rank * (into // tp + out if shape.rows == ("hidden",) else into + out // tp)


def model_parameters(model: ModelSettings) -> int:
    """Numbers in the whole model; a tied matrix counts once."""
    names = parameter_table(model)
    return sum(count(name, model, tp=1) * (model.num_layers if in_layer(name) else 1) for name in names)


def count(name: str, model: ModelSettings, tp: int) -> int:
    """Numbers in one parameter (of one layer) on one of ``tp`` processes; the vocabulary is padded."""
    shape, of = SHAPES[name], sizes(model, model.padded_vocab_size if model.vocab_size else 0)
    whole = sum(of[size] for size in shape.rows) * (1 if shape.columns is None else of[shape.columns])
    return whole // tp if shape.divided else whole
