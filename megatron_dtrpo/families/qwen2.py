"""Qwen2 and Qwen2.5, and Fast-dLLM v2, which is one of them trained to predict by blocks.

Both have the same tensors under the same names, with biases on query, key and value, and without a norm of queries and
keys. Small ones tie the output matrix to the embedding. Fast-dLLM v2's config.json adds ``bd_size``, its block size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dtrpo.families.config_json import heads, positive, refuse_other_computations, rope, rotary_base
from megatron_dtrpo.families.family import QKV, Copy, Family, GatedMLP, Rule, Vocabulary

if TYPE_CHECKING:
    from megatron_dtrpo.config.settings import ModelSettings

DEFAULT_ROPE_THETA = 10000.0  # transformers' for Qwen2

PARAMETERS: dict[str, Rule] = {
    "embedding.word_embeddings.weight": Vocabulary("model.embed_tokens.weight"),
    "decoder.layers.*.self_attention.linear_qkv.layer_norm_weight": Copy("model.layers.*.input_layernorm.weight"),
    "decoder.layers.*.self_attention.linear_qkv.weight": QKV("model.layers.*.self_attn.{q,k,v}_proj.weight"),
    "decoder.layers.*.self_attention.linear_qkv.bias": QKV("model.layers.*.self_attn.{q,k,v}_proj.bias"),
    "decoder.layers.*.self_attention.linear_proj.weight": Copy("model.layers.*.self_attn.o_proj.weight"),
    "decoder.layers.*.mlp.linear_fc1.layer_norm_weight": Copy("model.layers.*.post_attention_layernorm.weight"),
    "decoder.layers.*.mlp.linear_fc1.weight": GatedMLP("model.layers.*.mlp.{gate,up}_proj.weight"),
    "decoder.layers.*.mlp.linear_fc2.weight": Copy("model.layers.*.mlp.down_proj.weight"),
    "decoder.final_layernorm.weight": Copy("model.norm.weight"),
    "output_layer.weight": Vocabulary("lm_head.weight"),
}


def settings(config: dict, where: str | Path) -> dict[str, Any]:
    """See `Family.settings`."""
    refuse_other_computations(config, where)
    return {
        **heads(config, where),
        "num_layers": positive(config, "num_hidden_layers", where),
        "hidden_size": positive(config, "hidden_size", where),
        "ffn_hidden_size": positive(config, "intermediate_size", where),
        "max_position_embeddings": positive(config, "max_position_embeddings", where),
        "rotary_base": rotary_base(config, where, DEFAULT_ROPE_THETA),
        "norm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "add_qkv_bias": True,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "init_method_std": float(config.get("initializer_range", 0.02)),
        "vocab_size": positive(config, "vocab_size", where),
    }


def assumptions(config: dict, where: str | Path) -> list[str]:
    """See `Family.assumptions`."""
    if rope(config).get("rope_theta") is not None:
        return []
    return [f"{where}: no rope_theta: taken as {DEFAULT_ROPE_THETA:.0f}, transformers' own default"]


def mismatch(model: ModelSettings) -> str | None:
    """See `Family.mismatch`."""
    return None if model.add_qkv_bias else "add_qkv_bias is false: Qwen2 has these biases"


def new_config(model: ModelSettings) -> dict:
    """See `Family.new_config`. It names transformers' class for both: Fast-dLLM v2's is code beside its weights."""
    return {
        "architectures": [QWEN2.architecture],
        "attention_dropout": 0.0,
        QWEN2.block_size_key: model.block_size,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_method_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_position_embeddings,
        "model_type": QWEN2.model_type,
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


_SHARED: dict[str, Any] = dict(
    parameters=PARAMETERS,
    settings=settings,
    new_config=new_config,
    assumptions=assumptions,
    mismatch=mismatch,
    mask_token="|<MASK>|",
    prediction_shift=1,
    attention="block_causal",
    block_size_key="bd_size",
)

FAST_DLLM_V2 = Family(
    name="fast_dllm_v2",
    architecture="Fast_dLLM_QwenForCausalLM",
    model_type="Fast_dLLM_Qwen",
    block_size=32,
    **_SHARED,
)
# A starting point: it decodes token by token until it is trained to predict by blocks.
QWEN2 = Family(name="qwen2", architecture="Qwen2ForCausalLM", model_type="qwen2", block_size=None, **_SHARED)
