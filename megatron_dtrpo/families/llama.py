"""Llama, and the many models of other names that are one: SmolLM2, Seed-Coder, TinyLlama.

Qwen2's tensors under the same names, without a bias anywhere.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families import qwen2
from megatron_dtrpo.families.config_json import decoder_assumptions, decoder_config, decoder_settings
from megatron_dtrpo.families.family import Family, Rule

if TYPE_CHECKING:
    from megatron_dtrpo.config.settings import ModelSettings

PARAMETERS: dict[str, Rule] = {name: rule for name, rule in qwen2.PARAMETERS.items() if not name.endswith("bias")}


def settings(config: dict, where: str | Path) -> dict[str, Any]:
    """See `Family.settings`."""
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise UserError(f"{where}: {key} is true: the model here has no biases on Llama's projections")
    if config.get("num_key_value_heads") is None:  # models from before there were groups of heads
        config = {**config, "num_key_value_heads": config.get("num_attention_heads")}
    return decoder_settings(config, where)


def new_config(model: ModelSettings) -> dict:
    """See `Family.new_config`."""
    return {**decoder_config(LLAMA, model), "attention_bias": False, "mlp_bias": False}


# A starting point, as Qwen2 is.
LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    model_type="llama",
    parameters=PARAMETERS,
    settings=settings,
    new_config=new_config,
    assumptions=decoder_assumptions,
    layers={"add_qkv_bias": False, "qk_layernorm": False},
    mask_token="<|mask|>",
    prediction_shift=1,
    attention="block_causal",
    block_size_key="block_size",
    block_size=None,
    starting_point=True,
)
