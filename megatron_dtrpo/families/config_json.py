"""Values of a config.json, read alike in every family whose keys are transformers' own."""

from __future__ import annotations

from pathlib import Path

from megatron_dtrpo.errors import UserError


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
