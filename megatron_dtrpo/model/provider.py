"""Builds this rank's part of the model from the settings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
from megatron_dtrpo.cpu import speed
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.hybrid_names import HALVES
from megatron_dtrpo.model.gpt import BlockDiffusionGPTModel, BlockDiffusionModel
from megatron_dtrpo.model.layer_spec import block_diffusion_block_spec
from megatron_dtrpo.runtime import versions
from megatron_dtrpo.runtime.precision import fused_gradients, fuses_rotary, transformer_precision

# megatron-core's layers in one transformer layer
_LAYERS_EACH = {"gpt": 1, "hybrid": HALVES}


def _leave(tensor: Tensor) -> Tensor:
    return tensor


def _interleaving(parallel: ParallelSettings) -> dict:
    """Two stages that exchange activations and gradients in one batch of messages could mix them up: the interleaved
    schedule sends each by itself, and computes meanwhile."""
    if parallel.num_virtual_stages_per_pipeline_rank == 1:
        return {}
    return {
        "virtual_pipeline_model_parallel_size": parallel.num_virtual_stages_per_pipeline_rank,
        "overlap_p2p_comm": True,
        "batch_p2p_comm": False,
    }


def transformer_config(model: ModelSettings, parallel: ParallelSettings) -> TransformerConfig:
    """megatron-core's configuration of a transformer shaped as Qwen2 or Qwen3."""
    each = _LAYERS_EACH[parallel.model_class]
    return TransformerConfig(
        num_layers=model.num_layers * each,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=model.add_qkv_bias,
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        # model/initialization.py fills the weights, but megatron-core marks shards only when it "initialises".
        init_method=_leave,
        output_layer_init_method=_leave,
        embedding_init_method=_leave,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # Says only how many share a sequence: megatron-core cuts none itself, and our core attention gathers.
        context_parallel_size=parallel.context_parallel_size,
        **_interleaving(parallel),
        # Packed sequences differ in length from micro-batch to micro-batch; stages tell each other the shape.
        variable_seq_lengths=parallel.pipeline_model_parallel_size > 1,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths, even without experts
        # Losses are sums; gradients are divided by the examples or tokens of the whole global batch.
        calculate_per_token_loss=True,
        recompute_granularity=parallel.recompute_granularity,
        recompute_method=parallel.recompute_method,
        recompute_num_layers=parallel.recompute_num_layers and parallel.recompute_num_layers * each,
        recompute_modules=parallel.recompute_modules,
        # Asks Apex of every layer that is megatron-core's own; the output layer always is.
        gradient_accumulation_fusion=fused_gradients(parallel) == "apex",
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        # Keeps half of what the MLP would keep for its backward pass. On a CPU megatron-core's own asks for a compiler.
        bias_activation_fusion=torch.cuda.is_available() or speed.is_on(),
        apply_rope_fusion=fuses_rotary(parallel),
        persist_layer_norm=False,
        **transformer_precision(parallel),
    )


def build_chunks(model: ModelSettings, parallel: ParallelSettings) -> list[BlockDiffusionModel]:
    """This rank's part of the model, with uninitialised weights: load a checkpoint or call `initialize_weights`. One
    stage, or under interleaving so many virtual ones, in the order of their layers."""
    versions.require_model_class(parallel.model_class)
    config, count = transformer_config(model, parallel), parallel.num_virtual_stages_per_pipeline_rank
    build = MODEL_CLASSES[parallel.model_class]
    chunks = [build(config, **_stage(model, stage)) for stage in (range(count) if count > 1 else [None])]
    if fused_gradients(parallel) == "transformer_engine":
        for chunk in chunks:
            _fuse_gradients_of_layers(chunk)
    return chunks


def _fuse_gradients_of_layers(chunk: BlockDiffusionModel) -> None:
    """megatron-core's setting would ask the output layer too, which cannot without Apex. Transformer Engine's layers
    look at an attribute of theirs in every pass."""
    for module in chunk.decoder.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def build_model(model: ModelSettings, parallel: ParallelSettings) -> BlockDiffusionModel:
    """This rank's only stage, for what cannot run several. Raises UserError under interleaving."""
    if parallel.num_virtual_stages_per_pipeline_rank > 1:
        raise UserError("num_virtual_stages_per_pipeline_rank is for training and scoring pairs: leave it out here")
    return build_chunks(model, parallel)[0]


def _stage(model: ModelSettings, vp_stage: int | None) -> dict:
    """What megatron-core's classes ask for a stage, but for its configuration and its layers."""
    return dict(
        vocab_size=model.padded_vocab_size,
        num_tokens=model.vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        parallel_output=True,
        share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=model.rotary_base,
        vp_stage=vp_stage,
    )


def _gpt(config: TransformerConfig, **stage) -> BlockDiffusionModel:
    layers = block_diffusion_block_spec(config, vp_stage=stage["vp_stage"])
    return BlockDiffusionGPTModel(config=config, transformer_layer_spec=layers, **stage)


def _hybrid(config: TransformerConfig, **stage) -> BlockDiffusionModel:
    from megatron_dtrpo.model.hybrid import BlockDiffusionHybridModel, hybrid_layer_pattern, hybrid_stack_spec

    layers, pattern = hybrid_stack_spec(config), hybrid_layer_pattern(config)
    return BlockDiffusionHybridModel(config=config, hybrid_stack_spec=layers, hybrid_layer_pattern=pattern, **stage)


MODEL_CLASSES = {"gpt": _gpt, "hybrid": _hybrid}
