"""The transformer layer of a block-diffusion model: megatron-core's GPT layer with two parts exchanged.

The core attention becomes ours, because the packed layout is neither causal nor dense, and the local backend's norm
becomes one that takes sequence parallelism. Everything else, and with it every sharded key of a checkpoint, is
megatron-core's: its local spec writes its norms under the names that they have inside Transformer Engine's fused
layers, so that either backend reads the other's checkpoints.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dtrpo.model.attention import BlockDiffusionAttention
from megatron_dtrpo.model.norm import RMSNorm
from megatron_dtrpo.runtime.precision import default_transformer_impl


def _with_our_attention(spec: ModuleSpec) -> ModuleSpec:
    spec.submodules.self_attention.submodules.core_attention = BlockDiffusionAttention
    # The mask comes from the packed layout, not from a type that a kernel knows.
    spec.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.arbitrary
    return spec


def _local_layer_spec(qk_layernorm: bool) -> ModuleSpec:
    spec = _with_our_attention(get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=qk_layernorm))
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    if qk_layernorm:
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return spec


def _transformer_engine_layer_spec(qk_layernorm: bool) -> ModuleSpec:
    return _with_our_attention(get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm))


def _transformer_engine_norm() -> type:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


# transformer_impl -> (layer spec, final norm)
BACKENDS = {
    "local": (_local_layer_spec, lambda: RMSNorm),
    "transformer_engine": (_transformer_engine_layer_spec, _transformer_engine_norm),
}


class LayerSpec(ModuleSpec):
    """The spec of one layer, which may also be called.

    Megatron-LM hands what ``--spec`` imports to ``GPTModel`` as it is and never calls it: a function would fail there.
    Frameworks built on it call it with ``(args, config, vp_stage)`` if it can be called.
    """

    def __call__(self, args=None, config=None, vp_stage=None) -> ModuleSpec:
        """A spec with the backend that ``args`` names (itself, or as ``args.transformer_impl``); default: Transformer
        Engine's where it is installed and there is a GPU. With norms of queries and keys where ``config.qk_layernorm``
        or else ``args.qk_layernorm`` says so."""
        named = args if isinstance(args, str) else getattr(args, "transformer_impl", None)
        source = args if config is None else config
        return BACKENDS[named or default_transformer_impl()][0](getattr(source, "qk_layernorm", False))


def _default_layer_spec(qk_layernorm: bool) -> LayerSpec:
    spec = BACKENDS[default_transformer_impl()][0](qk_layernorm)
    return LayerSpec(module=spec.module, params=spec.params, submodules=spec.submodules)


block_diffusion_layer_spec = _default_layer_spec(qk_layernorm=False)
# For Megatron-LM's --spec with its --qk-layernorm, which an uncalled spec knows nothing of.
block_diffusion_qk_layernorm_layer_spec = _default_layer_spec(qk_layernorm=True)


def block_diffusion_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The spec of this pipeline stage's layers and of the final norm, with the backend that ``config`` names."""
    layer_spec, final_norm = BACKENDS[config.transformer_impl]
    layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer_spec(config.qk_layernorm)] * layers, layer_norm=final_norm())
