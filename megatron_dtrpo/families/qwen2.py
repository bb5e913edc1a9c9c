"""Qwen2 and Qwen2.5; Fast-dLLM v2, which is one of them trained to predict by blocks; and Dream, under full attention.

All have the same tensors under the same names, with biases on query, key and value, and without a norm of queries and
keys. Small ones tie the output matrix to the embedding. Fast-dLLM v2's config.json adds ``bd_size``, its block size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megatron_dtrpo.families.config_json import decoder_assumptions, decoder_config, decoder_settings
from megatron_dtrpo.families.family import QKV, Copy, Family, GatedMLP, Rule, Vocabulary

if TYPE_CHECKING:
    from megatron_dtrpo.config.settings import ModelSettings

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


def new_config(model: ModelSettings) -> dict:
    """See `Family.new_config`. It names transformers' class for both: Fast-dLLM v2's is code beside its weights."""
    return decoder_config(QWEN2, model)


def dream_config(model: ModelSettings) -> dict:
    """See `Family.new_config`. Under transformers' class full attention would be lost."""
    return decoder_config(DREAM, model)


_SHARED: dict[str, Any] = dict(
    parameters=PARAMETERS,
    settings=decoder_settings,
    assumptions=decoder_assumptions,
    layers={"add_qkv_bias": True, "qk_layernorm": False},
    prediction_shift=1,
)
_BY_BLOCKS: dict[str, Any] = dict(
    new_config=new_config,
    mask_token="|<MASK>|",
    attention="block_causal",
    block_size_key="bd_size",
    **_SHARED,
)

FAST_DLLM_V2 = Family(
    name="fast_dllm_v2",
    architecture="Fast_dLLM_QwenForCausalLM",
    model_type="Fast_dLLM_Qwen",
    block_size=32,
    **_BY_BLOCKS,
)
# A starting point: it decodes token by token until it is trained to predict by blocks.
QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    block_size=None,
    starting_point=True,
    **_BY_BLOCKS,
)
DREAM = Family(
    name="dream",
    architecture="DreamModel",
    model_type="Dream",
    new_config=dream_config,
    mask_token="<|mask|>",
    attention="full",
    block_size_key=None,
    block_size=0,
    rule="maskgit_plus",
    **_SHARED,
)
