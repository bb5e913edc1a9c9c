"""Fast-dLLM v2 for Megatron-Bridge: importing this module registers it with ``AutoBridge``.

The parameters are Qwen2's, name by name and shape by shape, so the mapping is Megatron-Bridge's own. What differs is
the attention: a model built with the default one would be trained as a causal one, without a word.

Nothing here imports this module, because Megatron-Bridge is optional. `conversion.to_megatron` does not need it.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.qwen2 import FAST_DLLM_V2
from megatron_dtrpo.model import layer_spec

try:
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
    from megatron.bridge.models.qwen.qwen2_bridge import Qwen2Bridge
except ImportError as error:
    raise UserError(f"Megatron-Bridge cannot be imported: pip install megatron-bridge ({error})") from error


def _layer_spec(provider) -> ModuleSpec:
    """The layer spec of the provider. Its ``transformer_impl`` says Transformer Engine on every machine, so
    this machine decides."""
    return layer_spec.block_diffusion_layer_spec()


# The name, not the class: that one is code in the checkpoint's folder, which is never run.
@MegatronModelBridge.register_bridge(
    source=FAST_DLLM_V2.architecture, target=GPTModel, model_type=FAST_DLLM_V2.model_type
)
class FastDLLMBridge(Qwen2Bridge):
    """Qwen2's parameters under the block-diffusion layer."""

    def provider_bridge(self, hf_pretrained):
        provider = super().provider_bridge(hf_pretrained)
        provider.transformer_layer_spec = _layer_spec
        return provider
