"""LLaDA and LLaDA 1.5: Llama without biases and without groups of heads, which predicts under full attention.

Its config.json and its tensors have the names of OLMo, where it comes from. A layer's ``ff_proj`` is the gate.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.config_json import positive
from megatron_dtrpo.families.family import QKV, Copy, Family, GatedMLP, Rule, Vocabulary

if TYPE_CHECKING:
    from megatron_dtrpo.config.settings import ModelSettings

_LAYER = "model.transformer.blocks.*."
PARAMETERS: dict[str, Rule] = {
    "embedding.word_embeddings.weight": Vocabulary("model.transformer.wte.weight"),
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": Copy(_LAYER + "attn_norm.weight"),
    "decoder.layers.*.self_attention.linear_qkv.weight": QKV(_LAYER + "{q,k,v}_proj.weight"),
    "decoder.layers.*.self_attention.linear_proj.weight": Copy(_LAYER + "attn_out.weight"),
    "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": Copy(_LAYER + "ff_norm.weight"),
    "decoder.layers.*.mlp.linear_fc1.weight": GatedMLP(_LAYER + "{ff,up}_proj.weight"),
    "decoder.layers.*.mlp.linear_fc2.weight": Copy(_LAYER + "ff_out.weight"),
    "decoder.final_layernorm.weight": Copy("model.transformer.ln_f.weight"),
    "output_layer.weight": Vocabulary("model.transformer.ff_out.weight"),
}

# What OLMo's configuration may say otherwise, and the model here would compute otherwise: key -> (OLMo's own default,
# the value here).
_COMPUTES: dict[str, tuple[Any, Any]] = {
    "activation_type": ("swiglu", "silu"),
    "alibi": (False, False),
    "attention_layer_norm": (False, False),
    "bias_for_layer_norm": (False, False),
    "block_group_size": (1, 1),
    "block_type": ("sequential", "llama"),
    "clip_qkv": (None, None),
    "include_bias": (True, False),
    "include_qkv_bias": (False, False),
    "input_emb_norm": (False, False),
    "layer_norm_type": ("default", "rms"),
    "layer_norm_with_affine": (True, True),
    "quantization_config": (None, None),
    "rope": (False, True),
    "rope_scaling": (None, None),
    "scale_logits": (False, False),
}
_DEFAULT_THETA, _DEFAULT_EPSILON = 10000.0, 1e-5


def settings(config: dict, where: str | Path) -> dict[str, Any]:
    """See `Family.settings`."""
    for key, (default, ours) in _COMPUTES.items():
        if (default if config.get(key) is None else config[key]) != ours:
            raise UserError(f"{where}: {key} is {config.get(key)!r}: the model here does not compute that")
    hidden, heads = positive(config, "d_model", where), positive(config, "n_heads", where)
    groups = heads if config.get("n_kv_heads") is None else positive(config, "n_kv_heads", where)
    for name, number, by in (("d_model", hidden, heads), ("n_heads", heads, groups)):
        if number % by:
            divisor = "n_heads" if name == "d_model" else "n_kv_heads"
            raise UserError(f"{where}: {name} {number} is not divisible by {divisor} {by}")
    vocabulary = positive(config, "vocab_size", where)
    rows = vocabulary if config.get("embedding_size") is None else positive(config, "embedding_size", where)
    if rows < vocabulary:
        raise UserError(f"{where}: embedding_size {rows} is less than vocab_size {vocabulary}")
    return {
        "num_layers": positive(config, "n_layers", where),
        "hidden_size": hidden,
        "ffn_hidden_size": positive(config, "mlp_hidden_size", where),
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": hidden // heads,
        "max_position_embeddings": positive(config, "max_sequence_length", where),
        "rotary_base": float(config.get("rope_theta", _DEFAULT_THETA)),
        "norm_epsilon": float(config.get("rms_norm_eps", _DEFAULT_EPSILON)),
        "untie_embeddings_and_output_weights": not config.get("weight_tying", True),
        "init_method_std": float(config.get("init_std", 0.02)),
        "vocab_size": rows,
    }


def assumptions(config: dict, where: str | Path) -> list[str]:
    """See `Family.assumptions`."""
    if "rope_theta" in config:
        return []
    return [f"{where}: no rope_theta: taken as {_DEFAULT_THETA:.0f}, the default of the model's own code"]


def new_config(model: ModelSettings) -> dict:
    """See `Family.new_config`. Raises UserError for heads whose width config.json cannot say."""
    if model.kv_channels * model.num_attention_heads != model.hidden_size:
        raise UserError(f"kv_channels is {model.kv_channels}, in family llada hidden_size / num_attention_heads")
    return {
        **{key: ours for key, (_, ours) in _COMPUTES.items() if ours is not None},
        "architectures": [LLADA.architecture],
        "d_model": model.hidden_size,
        "embedding_size": model.vocab_size,
        "init_std": model.init_method_std,
        "max_sequence_length": model.max_position_embeddings,
        "mlp_hidden_size": model.ffn_hidden_size,
        "model_type": LLADA.model_type,
        "n_heads": model.num_attention_heads,
        "n_kv_heads": model.num_query_groups,
        "n_layers": model.num_layers,
        "rms_norm_eps": model.norm_epsilon,
        "rope_full_precision": True,
        "rope_theta": model.rotary_base,
        "torch_dtype": "float32",
        "use_cache": False,
        "vocab_size": model.vocab_size,
        "weight_tying": not model.untie_embeddings_and_output_weights,
    }


LLADA = Family(
    name="llada",
    architecture="LLaDAModelLM",
    model_type="llada",
    parameters=PARAMETERS,
    settings=settings,
    new_config=new_config,
    assumptions=assumptions,
    layers={"add_qkv_bias": False, "qk_layernorm": False},
    mask_token="<|mdm_mask|>",
    prediction_shift=0,
    attention="full",
    block_size_key=None,
    block_size=0,
    rule="static",
)
