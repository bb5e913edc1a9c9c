"""Values of a config.json, read alike in every family whose keys are transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dtrpo.errors import UserError

if TYPE_CHECKING:
    from megatron_dtrpo.config.settings import ModelSettings
    from megatron_dtrpo.families.family import Family

DEFAULT_ROPE_THETA = 10000.0  # transformers' for Qwen2, Qwen3 and Llama


def positive(config: dict, key: str, where: str | Path) -> int:
    """Raises UserError, naming the file ``where``, unless ``key`` is a positive integer."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key} is {value!r}: expected a positive integer")
    return value


def heads(config: dict, where: str | Path) -> dict[str, int]:
    """Number and width of the heads. Raises UserError where they do not divide."""
    query, hidden = positive(config, "num_attention_heads", where), positive(config, "hidden_size", where)
    groups = positive(config, "num_key_value_heads", where)
    if query % groups:
        raise UserError(f"{where}: num_attention_heads {query} is not divisible by num_key_value_heads {groups}")
    if config.get("head_dim") is None and hidden % query:
        raise UserError(f"{where}: hidden_size {hidden} is not divisible by num_attention_heads {query}")
    width = hidden // query if config.get("head_dim") is None else positive(config, "head_dim", where)
    return {"num_attention_heads": query, "num_query_groups": groups, "kv_channels": width}


def rope(config: dict) -> dict:
    """The rotary settings of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) as one dictionary."""
    parameters = config.get("rope_parameters") or {}
    parameters = parameters.get("full_attention", parameters)  # transformers 5 may keep them by type of layer
    older = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    return {**older, **(config.get("rope_scaling") or {}), **parameters}


def rotary_base(config: dict, where: str | Path, default: float) -> float:
    """Raises UserError where two keys disagree."""
    both = (config.get("rope_theta"), rope(config).get("rope_theta"))
    if both[0] is not None and both[0] != both[1]:
        raise UserError(f"{where}: rope_theta is {both[0]}, in rope_parameters {both[1]}: which one is right?")
    return float(default if both[1] is None else both[1])


def refuse_other_computations(config: dict, where: str | Path) -> None:
    """Raises UserError, naming the key, for what the model here would compute otherwise than the configuration says:
    sliding windows, scaled rotary angles, other activations, quantised weights."""
    rotary = rope(config)
    rope_key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    lacking = {
        "quantization_config": config.get("quantization_config") is not None,
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "layer_types": any(kind != "full_attention" for kind in config.get("layer_types") or []),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        rope_key: rotary.get("rope_type", rotary.get("type", "default")) != "default",
        "partial_rotary_factor": rotary.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0,
    }
    for key, unsupported in lacking.items():
        if unsupported:
            raise UserError(f"{where}: {key} is {config.get(key)!r}: the model here does not compute that")


def decoder_settings(config: dict, where: str | Path) -> dict[str, Any]:
    """`Family.settings` of a family whose config.json has transformers' keys for a decoder."""
    refuse_other_computations(config, where)
    return {
        **heads(config, where),
        "num_layers": positive(config, "num_hidden_layers", where),
        "hidden_size": positive(config, "hidden_size", where),
        "ffn_hidden_size": positive(config, "intermediate_size", where),
        "max_position_embeddings": positive(config, "max_position_embeddings", where),
        "rotary_base": rotary_base(config, where, DEFAULT_ROPE_THETA),
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "init_method_std": float(config.get("initializer_range", 0.02)),
        "vocab_size": positive(config, "vocab_size", where),
    }


def decoder_assumptions(config: dict, where: str | Path) -> list[str]:
    """`Family.assumptions` for `decoder_settings`."""
    if rope(config).get("rope_theta") is not None:
        return []
    return [f"{where}: no rope_theta: taken as {DEFAULT_ROPE_THETA:.0f}, transformers' own default"]


def block_size_entry(family: Family, model: ModelSettings) -> dict[str, int]:
    """What a config.json says of the block size: nothing under full attention."""
    return {} if family.block_size_key is None else {family.block_size_key: model.block_size}


def decoder_config(family: Family, model: ModelSettings) -> dict:
    """`Family.new_config` for `decoder_settings`, under the family's own architecture."""
    return {
        "architectures": [family.architecture],
        "attention_dropout": 0.0,
        **block_size_entry(family, model),
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "model_type": family.model_type,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_query_groups,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": model.vocab_size,
    }
