"""The layer for Megatron-LM's ``--spec megatron_dtrpo.megatron_lm block_diffusion_layer_spec``.

Megatron-LM hands what it imports to ``GPTModel`` as it is and never calls it: a function would fail there. Frameworks
built on it do call it, with ``(args, config, vp_stage)``, if it can be called. The object here serves both: it is a
layer spec, and calling it gives one.
"""

from __future__ import annotations

from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_dtrpo.model import layer_spec


class LayerSpec(ModuleSpec):
    """A `ModuleSpec` of one layer that may also be called."""

    def __call__(self, args=None, config=None, vp_stage=None) -> ModuleSpec:
        """``args`` are Megatron-LM's, whose ``transformer_impl`` decides; without them this machine does."""
        return layer_spec.block_diffusion_layer_spec(getattr(args, "transformer_impl", None))


def _layer_spec() -> LayerSpec:
    spec = layer_spec.block_diffusion_layer_spec()
    return LayerSpec(module=spec.module, params=spec.params, submodules=spec.submodules)


block_diffusion_layer_spec = _layer_spec()
