"""How many parameters a rank holds.

Legend: h hidden size, f MLP width, q query heads x head width, k key/value heads x head width, V padded vocabulary,
L layers, TP tensor-parallel and PP pipeline size. Counts are exact: a test compares them with the model itself.
"""

from __future__ import annotations

from megatron_dtrpo.config.settings import ModelSettings


def widths(model: ModelSettings) -> tuple[int, int]:
    """``(q, k)`` in the legend's words."""
    return model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels


def matrix_parameters(model: ModelSettings, tp: int) -> int:
    """Of one layer on one rank: the weights of its four matrix products."""
    h, f, (q, k) = model.hidden_size, model.ffn_hidden_size, widths(model)
    return (h * (q + 2 * k) + q * h + h * 2 * f + f * h) // tp


def layer_parameters(model: ModelSettings, tp: int) -> int:
    """Of one layer on one rank. Norms are on every rank."""
    q, k = widths(model)
    biases = (q + 2 * k) // tp if model.add_qkv_bias else 0
    return matrix_parameters(model, tp) + biases + 2 * model.hidden_size


def vocabulary_parameters(model: ModelSettings, tp: int) -> int:
    """Of the embedding, or of the output matrix, on one rank."""
    return model.padded_vocab_size * model.hidden_size // tp


def stage_layers(model: ModelSettings, pp: int) -> int:
    return model.num_layers // pp


def stage_parameters(model: ModelSettings, tp: int, pp: int, stage: int) -> int:
    """Of one pipeline stage on one rank. The last stage has a copy of a tied embedding, if it is not the first."""
    total = stage_layers(model, pp) * layer_parameters(model, tp)
    first, last = stage == 0, stage == pp - 1
    if first:
        total += vocabulary_parameters(model, tp)
    if last:
        total += model.hidden_size
        if model.untie_embeddings_and_output_weights or not first:
            total += vocabulary_parameters(model, tp)
    return total


def model_parameters(model: ModelSettings) -> int:
    """Of the whole model."""
    return stage_parameters(model, tp=1, pp=1, stage=0)
