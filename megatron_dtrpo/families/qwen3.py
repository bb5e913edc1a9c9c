"""Qwen3, and the models that are Qwen3 trained to predict by blocks: SDAR with its descendants, and Tiny-A2D.

All have Llama's tensors under the same names, with norms of queries and keys over the width of a head. SDAR and
Tiny-A2D predict a token at its own row.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families import llama
from megatron_dtrpo.families.config_json import decoder_assumptions, decoder_config, decoder_settings
from megatron_dtrpo.families.family import Copy, Family, Rule

if TYPE_CHECKING:
    from megatron_dtrpo.config.settings import ModelSettings

DEFAULT_HEAD_DIM = 128  # transformers' for Qwen3, whatever the hidden size

PARAMETERS: dict[str, Rule] = {
    **llama.PARAMETERS,
    "decoder.layers.*.self_attention.q_layernorm.weight": Copy("model.layers.*.self_attn.q_norm.weight"),
    "decoder.layers.*.self_attention.k_layernorm.weight": Copy("model.layers.*.self_attn.k_norm.weight"),
}


def settings(config: dict, where: str | Path) -> dict[str, Any]:
    """See `Family.settings`."""
    if config.get("attention_bias"):
        raise UserError(f"{where}: attention_bias is true: the model here has no biases on Qwen3's projections")
    return decoder_settings({"head_dim": DEFAULT_HEAD_DIM, **config}, where)


def assumptions(config: dict, where: str | Path) -> list[str]:
    """See `Family.assumptions`."""
    filled = [] if "head_dim" in config else [f"{where}: no head_dim: taken as {DEFAULT_HEAD_DIM}, transformers' own"]
    return [*filled, *decoder_assumptions(config, where)]


def _family(**own: Any) -> Family:
    """A row; ``own``: in which it differs from the others."""

    def new_config(model: ModelSettings) -> dict:
        return {**decoder_config(row, model), "attention_bias": False}

    row = Family(
        parameters=PARAMETERS,
        settings=settings,
        new_config=new_config,
        assumptions=assumptions,
        layers={"add_qkv_bias": False, "qk_layernorm": True},
        mask_token="<MASK>",
        attention="block_causal",
        block_size_key="block_size",
        **own,
    )
    return row


# A starting point, as Qwen2 is.
QWEN3 = _family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    prediction_shift=1,
    block_size=None,
    starting_point=True,
)
SDAR = _family(
    name="sdar",
    architecture="SDARForCausalLM",
    model_type="sdar",
    prediction_shift=0,
    block_size=None,
    rule="dynamic",
)
A2D_QWEN3 = _family(
    name="a2d_qwen3",
    architecture="A2DQwen3LMHeadModel",
    model_type="a2d-qwen3",
    prediction_shift=0,
    block_size=32,
    rule="static",
)
