"""Qwen2's and Qwen3's weights by megatron-core's names: an oracle of the conversion too, so that nothing of the package
is used."""

from __future__ import annotations

import torch
from torch import Tensor


def megatron_from_qwen2(state: dict[str, Tensor], heads: int, groups: int, tied: bool) -> dict[str, Tensor]:
    """Unsharded megatron-core parameters from Qwen2's or Qwen3's (or gradients from gradients).

    Megatron keeps q, k and v in one matrix, key/value group by group: the group's query heads, its key, its value; and
    gate and up in one, gate first. Qwen2 has biases on q, k and v, Qwen3 has norms of queries and keys.
    """
    per_group = heads // groups

    def fuse_qkv(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        width = q.shape[0] // heads
        rows = []
        for g in range(groups):
            for h in range(g * per_group, (g + 1) * per_group):
                rows.append(q[h * width : (h + 1) * width])
            rows.append(k[g * width : (g + 1) * width])
            rows.append(v[g * width : (g + 1) * width])
        return torch.cat(rows)

    out = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }
    if not tied:
        out["output_layer.weight"] = state["lm_head.weight"]
    layer = 0
    while f"model.layers.{layer}.input_layernorm.weight" in state:
        theirs, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            if f"{theirs}self_attn.q_proj.{kind}" not in state:
                continue
            out[f"{ours}self_attention.linear_qkv.{kind}"] = fuse_qkv(
                *(state[f"{theirs}self_attn.{name}_proj.{kind}"] for name in "qkv")
            )
        out[f"{ours}self_attention.linear_proj.weight"] = state[f"{theirs}self_attn.o_proj.weight"]
        out[f"{ours}mlp.linear_fc1.weight"] = torch.cat(
            [state[f"{theirs}mlp.gate_proj.weight"], state[f"{theirs}mlp.up_proj.weight"]]
        )
        out[f"{ours}mlp.linear_fc2.weight"] = state[f"{theirs}mlp.down_proj.weight"]
        out[f"{ours}input_layernorm.weight"] = state[f"{theirs}input_layernorm.weight"]
        out[f"{ours}pre_mlp_layernorm.weight"] = state[f"{theirs}post_attention_layernorm.weight"]
        for letter in "qk":
            norm = f"{theirs}self_attn.{letter}_norm.weight"
            if norm in state:
                out[f"{ours}self_attention.{letter}_layernorm.weight"] = state[norm]
        layer += 1
    return out
