"""One set of random weights in two models, transformers' Qwen2, Qwen3 or Llama and ours, and what it takes to train the
former. A Llama here is LLaDA's: no biases, no groups of heads, an output matrix of its own. A Qwen3 is SDAR's, which
predicts a token at its own row."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cached_property, partial

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
from megatron_dtrpo.cpu import linear as cpu_linear
from megatron_dtrpo.model.gpt import BlockDiffusionGPTModel
from megatron_dtrpo.model.provider import build_model
from tools.benchmarks.peers.qwen2_weights import megatron_from_qwen2

ROTARY_BASE = {"qwen2": 1000000.0, "llada": 500000.0, "sdar": 1000000.0}
LLADA_EPSILON = 1e-5


def random_qwen2(shape: dict, seed: int = 0) -> Qwen2ForCausalLM:
    """In fp32, embedding and output tied, of transformers' names for a shape."""
    torch.manual_seed(seed)
    config = Qwen2Config(**shape, **_common("qwen2"), tie_word_embeddings=True)
    return Qwen2ForCausalLM(config).float().eval()


def random_qwen3(shape: dict, seed: int = 0) -> Qwen3ForCausalLM:
    """In fp32, embedding and output tied, of transformers' names for a shape; heads are hidden size / heads wide."""
    torch.manual_seed(seed)
    width = shape["hidden_size"] // shape["num_attention_heads"]
    config = Qwen3Config(**shape, head_dim=width, **_common("sdar"), tie_word_embeddings=True)
    return Qwen3ForCausalLM(config).float().eval()


def random_llama(shape: dict, seed: int = 0) -> LlamaForCausalLM:
    """In fp32, as LLaDA is one, of transformers' names for a shape."""
    torch.manual_seed(seed)
    own = {**shape, "num_key_value_heads": shape["num_attention_heads"], "rms_norm_eps": LLADA_EPSILON}
    return LlamaForCausalLM(LlamaConfig(**own, **_common("llada"), tie_word_embeddings=False)).float().eval()


def _common(family: str) -> dict:
    rope = {"rope_type": "default", "rope_theta": ROTARY_BASE[family]}
    return {"rope_parameters": rope, "attn_implementation": "sdpa"}


RANDOM = {"qwen2": random_qwen2, "llada": random_llama, "sdar": random_qwen3}


def settings_of(shape: dict, family: str = "qwen2") -> ModelSettings:
    common = ModelSettings(
        family=family,
        num_layers=shape["num_hidden_layers"],
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=shape["intermediate_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_query_groups=shape["num_key_value_heads"],
        kv_channels=shape["hidden_size"] // shape["num_attention_heads"],
        vocab_size=shape["vocab_size"],
        rotary_base=ROTARY_BASE[family],
        untie_embeddings_and_output_weights=False,
    )
    if family == "llada":
        return replace(common, **_LLADA, num_query_groups=common.num_attention_heads)
    return replace(common, **_SDAR) if family == "sdar" else common


_LLADA = {
    "add_qkv_bias": False,
    "block_size": FULL,
    "norm_epsilon": LLADA_EPSILON,
    "untie_embeddings_and_output_weights": True,
}
_SDAR = {"add_qkv_bias": False, "qk_layernorm": True}


@torch.no_grad()
def copy_into(model: BlockDiffusionGPTModel, peer: PreTrainedModel) -> None:
    """Gives ``model``, of one process, the weights of ``peer``."""
    config = peer.config
    heads, groups, tied = config.num_attention_heads, config.num_key_value_heads, config.tie_word_embeddings
    values = megatron_from_qwen2(peer.state_dict(), heads, groups, tied)
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])


def random_pair(shape: dict, seed: int = 0, family: str = "qwen2") -> tuple[PreTrainedModel, BlockDiffusionGPTModel]:
    """The same weights twice. One process; its process group has been started."""
    peer, model = RANDOM[family](shape, seed), build_model(settings_of(shape, family), ParallelSettings()).eval()
    copy_into(model, peer)
    return peer, model


class Learner:
    """A policy in transformers with what a preference step needs besides: a frozen reference and a fused Adam. All
    peers of one family in a benchmark share one."""

    def __init__(self, shape: dict, *, lr: float, seed: int = 0, family: str = "qwen2"):
        self.policy, self.lr, self.family = RANDOM[family](shape, seed), lr, family
        self.reference = nearby(self.policy, seed)

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.policy.parameters(), lr=self.lr, weight_decay=0.0, fused=True)

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()


def multiply_as_ours(model: PreTrainedModel) -> None:
    """Gives linear layers our CPU's matrix products, so that a comparison is one of layouts."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = partial(_our_linear, module)


def _our_linear(module: torch.nn.Linear, input: torch.Tensor) -> torch.Tensor:
    return cpu_linear.linear(input, module.weight, module.bias, False, False, False, None)


@torch.no_grad()
def nearby(policy: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Another frozen model some way off: with equal ones every loss is ln 2, whatever is wrong."""
    other, generator = copy.deepcopy(policy).requires_grad_(False), torch.Generator().manual_seed(seed)
    for parameter in other.parameters():
        parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    return other
