"""config.json of the architectures we know, to the settings of our model and back.

Whatever our model would compute otherwise than the configuration says (sliding windows, scaled rotary angles, other
activations, quantised weights) is an error here, not a surprise later.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.errors import UserError, one_line

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
DEFAULT_BLOCK_SIZE = 32
DEFAULT_ROPE_THETA = 10000.0  # transformers' for Qwen2

# Architecture -> whether it decodes by blocks as it is.
ARCHITECTURES = {"Fast_dLLM_QwenForCausalLM": True, "Qwen2ForCausalLM": False}


def refuse_lfs_pointer(path: Path) -> None:
    """Raises UserError for the few lines that git leaves in place of a large file that was not fetched."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f"{path}: a Git LFS pointer, not the file: run `git lfs pull` in {path.parent}")


def read_json(path: Path) -> dict:
    """A JSON object from a file of the user's. Raises UserError."""
    refuse_lfs_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def read_config(folder: str | Path) -> dict:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / ADAPTER).is_file() and not any(folder.glob("model*.safetensors")):
        raise UserError(f"{folder}: an adapter (LoRA), not a model: merge it into its base first and give that folder")
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not a Hugging Face checkpoint: {CONFIG} is missing")
    return read_json(folder / CONFIG)


def architecture(config: dict, where: str | Path) -> str:
    """The one known architecture that a configuration names. Raises UserError listing the known ones."""
    names = config.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    if len(names) == 1 and names[0] in ARCHITECTURES:
        return names[0]
    raise UserError(
        f"{where}: unknown architecture {', '.join(map(str, names)) or '(none)'}: known are {', '.join(ARCHITECTURES)}"
    )


def model_settings(
    config: dict,
    where: str | Path,
    block_size: int | None = None,
    make_vocab_size_divisible_by: int = ModelSettings.make_vocab_size_divisible_by,
) -> ModelSettings:
    """The settings of the same model here. ``block_size`` fills in where the configuration has none.

    Raises:
        UserError: naming the file ``where`` and the key.
    """
    try:
        return _settings(config, where, block_size, make_vocab_size_divisible_by)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: a value has the wrong type: {error}") from None


def _settings(
    config: dict, where: str | Path, block_size: int | None, make_vocab_size_divisible_by: int
) -> ModelSettings:
    name = architecture(config, where)
    _refuse_what_we_lack(config, where)
    heads, hidden = _positive(config, "num_attention_heads", where), _positive(config, "hidden_size", where)
    groups = _positive(config, "num_key_value_heads", where)
    if heads % groups:
        raise UserError(f"{where}: num_attention_heads {heads} is not divisible by num_key_value_heads {groups}")
    if config.get("head_dim") is None and hidden % heads:
        raise UserError(f"{where}: hidden_size {hidden} is not divisible by num_attention_heads {heads}")
    own = _positive(config, "bd_size", where) if "bd_size" in config else None
    if own is None and ARCHITECTURES[name]:
        own = DEFAULT_BLOCK_SIZE
    if own is not None and block_size is not None and own != block_size:
        raise UserError(f"{where}: bd_size is {own}: it cannot be imported with --block-size {block_size}")
    return ModelSettings(
        num_layers=_positive(config, "num_hidden_layers", where),
        hidden_size=hidden,
        ffn_hidden_size=_positive(config, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=hidden // heads if config.get("head_dim") is None else _positive(config, "head_dim", where),
        max_position_embeddings=_positive(config, "max_position_embeddings", where),
        rotary_base=_rotary_base(config, where),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        add_qkv_bias=True,
        untie_embeddings_and_output_weights=not config.get("tie_word_embeddings", False),
        init_method_std=float(config.get("initializer_range", 0.02)),
        vocab_size=_positive(config, "vocab_size", where),
        make_vocab_size_divisible_by=make_vocab_size_divisible_by,
        block_size=own or block_size or DEFAULT_BLOCK_SIZE,
    )


def _positive(config: dict, key: str, where: str | Path) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where}: {key} is {value!r}: expected a positive integer")
    return value


def _rope(config: dict) -> dict:
    """The rotary settings of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) as one dictionary."""
    parameters = config.get("rope_parameters") or {}
    parameters = parameters.get("full_attention", parameters)  # transformers 5 may keep them by type of layer
    older = {"rope_theta": config["rope_theta"]} if config.get("rope_theta") is not None else {}
    return {**older, **(config.get("rope_scaling") or {}), **parameters}


def _rotary_base(config: dict, where: str | Path) -> float:
    both = (config.get("rope_theta"), _rope(config).get("rope_theta"))
    if both[0] is not None and both[0] != both[1]:
        raise UserError(f"{where}: rope_theta is {both[0]}, in rope_parameters {both[1]}: which one is right?")
    return float(DEFAULT_ROPE_THETA if both[1] is None else both[1])


def assumptions(config: dict, where: str | Path) -> list[str]:
    """What ``model_settings`` filled in and a user may not have meant, a line each."""
    if _rope(config).get("rope_theta") is not None:
        return []
    return [f"{where}: no rope_theta: taken as {DEFAULT_ROPE_THETA:.0f}, transformers' own default"]


def _refuse_what_we_lack(config: dict, where: str | Path) -> None:
    rope = _rope(config)
    rope_key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    lacking = {
        "quantization_config": config.get("quantization_config") is not None,
        "use_sliding_window": bool(config.get("use_sliding_window")),
        "layer_types": any(kind != "full_attention" for kind in config.get("layer_types") or []),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        rope_key: rope.get("rope_type", rope.get("type", "default")) != "default",
        "partial_rotary_factor": rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0,
    }
    for key, unsupported in lacking.items():
        if unsupported:
            raise UserError(f"{where}: {key} is {config.get(key)!r}: the model here does not compute that")


def new_config(model: ModelSettings) -> dict:
    """config.json of a model that was not imported but trained from random weights here."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bd_size": model.block_size,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "model_type": "qwen2",
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
