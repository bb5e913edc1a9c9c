"""A prototype: the block-diffusion model on megatron-core's HybridModel, which is to replace GPTModel there.

A HybridModel is a sequence of layers that each do one thing. A transformer layer is two of them, attention and MLP, cut
out of the spec of the GPT layer. Parameters and checkpoints keep the names of the GPT model
(`families.hybrid_names`), so that either class goes on from the other's checkpoints.

Only newer versions of megatron-core have a HybridModel: `runtime.versions.require_model_class` comes before the import
of this file.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.hybrid_names import HALVES, gpt_name
from megatron_dtrpo.model.gpt import BlockDiffusionModel
from megatron_dtrpo.model.layer_spec import BACKENDS


class Stack(HybridStack):
    """megatron-core's stack of layers, whose final norm is always Transformer Engine's, with a norm that is given."""

    def __init__(self, config: TransformerConfig, submodules: HybridStackSubmodules, *, final_norm: type, **others):
        super().__init__(config, submodules, post_layer_norm=False, **others)
        if self.post_process:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args, **kwargs) -> Tensor:
        """As `HybridStack.forward`: hidden states ``[s, b, h]``."""
        hidden = super().forward(*args, **kwargs)
        return self.final_norm(hidden) if self.post_process else hidden


def hybrid_stack_spec(config: TransformerConfig) -> ModuleSpec:
    """The spec of attention layers, MLP layers and the final norm, with the backend that ``config`` names."""
    layer_spec, final_norm = BACKENDS[config.transformer_impl]
    layer = layer_spec(config.qk_layernorm)
    whole = layer.submodules
    attention = replace(whole, pre_mlp_layernorm=IdentityOp, mlp=IdentityOp, mlp_bda=IdentityFuncOp)
    mlp = replace(whole, input_layernorm=IdentityOp, self_attention=IdentityOp, self_attn_bda=IdentityFuncOp)
    return ModuleSpec(
        module=Stack,
        params={"final_norm": final_norm()},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=layer.module, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )


def hybrid_layer_pattern(config: TransformerConfig) -> str:
    """``*-*-|*-*-``: attention and MLP of every transformer layer, with a bar between pipeline stages, or between
    virtual ones, which megatron-core takes in the order of their layers."""
    stages = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
    stage = (Symbols.ATTENTION + Symbols.MLP) * (config.num_layers // HALVES // stages)
    return Symbols.PIPE.join([stage] * stages)


class BlockDiffusionHybridModel(BlockDiffusionModel, HybridModel):
    """One pipeline stage. Constructor as `HybridModel`; ``position_embedding_type`` must be ``"rope"``, and
    ``config.num_layers`` counts attention and MLP as a layer each, as everywhere in megatron-core's hybrid code."""

    writes_per_layer = 1

    @staticmethod
    def gpt_name(name: str) -> str:
        return gpt_name(name)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As `HybridModel.sharded_state_dict`, with the keys of a GPT model's checkpoint. Raises UserError for one that
        has all layers in one tensor, as Megatron-LM may write them."""
        if metadata and not metadata.get("non_homogeneous_layers", True):
            raise UserError(
                "the checkpoint has all layers in one tensor, which model_class hybrid does not read: load and save it "
                "with model_class gpt first"
            )
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}output_layer._extra_state", None)  # it is empty, and the GPT model writes none
        for each in nested_values(state):
            if isinstance(each, ShardedBase):
                each.key = prefix + gpt_name(each.key.removeprefix(prefix))
        return state
