"""One set of random weights in two models: transformers' Qwen2 and ours."""

from __future__ import annotations

import torch

from megatron_dtrpo.config import ModelSettings, ParallelSettings
from tests import oracles


def random_pair(shape: dict, seed: int = 0):
    """``(Qwen2ForCausalLM, BlockDiffusionGPTModel)`` in fp32, untied, of transformers' names for a shape. One process;
    its process group has been started."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from megatron_dtrpo.model.provider import build_model

    torch.manual_seed(seed)
    base = 1000000.0
    config = Qwen2Config(
        **shape, rope_parameters={"rope_type": "default", "rope_theta": base}, tie_word_embeddings=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    peer = Qwen2ForCausalLM(config).float().eval()
    settings = ModelSettings(
        num_layers=shape["num_hidden_layers"],
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=shape["intermediate_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_query_groups=shape["num_key_value_heads"],
        kv_channels=shape["hidden_size"] // shape["num_attention_heads"],
        vocab_size=shape["vocab_size"],
        rotary_base=base,
    )
    model = build_model(settings, ParallelSettings()).eval()
    with torch.no_grad():
        values = oracles.megatron_from_qwen2(
            peer.state_dict(), shape["num_attention_heads"], shape["num_key_value_heads"], tied=False
        )
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
    return peer, model
