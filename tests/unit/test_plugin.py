"""The hooks for Megatron-LM and Megatron-Bridge, called as those two call them."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec, import_module

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.model.attention import BlockDiffusionAttention
from megatron_dtrpo.model.norm import RMSNorm

BRIDGE = "megatron_dtrpo.conversion.bridge"


def core_attention(spec: ModuleSpec) -> type:
    return spec.submodules.self_attention.submodules.core_attention


def imported() -> object:
    """What Megatron-LM's ``args.spec`` leads to."""
    return import_module(["megatron_dtrpo.model.layer_spec", "block_diffusion_layer_spec"])


def test_megatron_lm_takes_the_layer_as_it_is():
    spec = imported()
    # What TransformerBlock asks before it builds layers from it.
    assert isinstance(spec, ModuleSpec) and isinstance(spec.module, type)
    assert core_attention(spec) is BlockDiffusionAttention


def test_frameworks_that_call_the_layer_get_one():
    spec = imported()
    arguments = types.SimpleNamespace(transformer_impl="local")
    called = spec(arguments, None, None)
    assert type(called) is ModuleSpec and called is not spec
    assert core_attention(called) is BlockDiffusionAttention
    assert core_attention(spec()) is BlockDiffusionAttention


def test_norms_of_queries_and_keys_are_a_spec_of_their_own_or_an_argument():
    other = import_module(["megatron_dtrpo.model.layer_spec", "block_diffusion_qk_layernorm_layer_spec"])
    asked = types.SimpleNamespace(transformer_impl="local", qk_layernorm=True)
    for spec, norm in ((imported(), IdentityOp), (other, RMSNorm), (imported()(asked), RMSNorm)):
        attention = spec.submodules.self_attention.submodules
        assert attention.q_layernorm is attention.k_layernorm is norm


BUILD = """
from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
from megatron_dtrpo.runtime import initialize

initialize.start(ParallelSettings(), seed=1)
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import import_module

from megatron_dtrpo.model.provider import transformer_config

spec = import_module(["megatron_dtrpo.model.layer_spec", "block_diffusion_layer_spec"])
model = ModelSettings(
    num_layers=2, hidden_size=32, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2, kv_channels=8
)
built = GPTModel(
    config=transformer_config(model, ParallelSettings()),
    transformer_layer_spec=spec,
    vocab_size=128,
    max_sequence_length=64,
    position_embedding_type="rope",
)
for layer in built.decoder.layers:
    print(type(layer.self_attention.core_attention).__name__)
initialize.stop()
"""


@pytest.mark.slow
def test_megatron_cores_own_model_is_built_from_it():
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-W", "ignore", "-c", BUILD]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.stdout.split() == ["BlockDiffusionAttention"] * 2, ended.stderr[-2000:]


# Megatron-Bridge


class Provider(types.SimpleNamespace):
    """What Megatron-Bridge's ``provide`` does with the layer spec of its ``GPTModelProvider``."""

    def provide(self) -> ModuleSpec:
        spec = self.transformer_layer_spec
        return spec if isinstance(spec, ModuleSpec) else spec(self)


@pytest.fixture
def registered(monkeypatch) -> dict:
    """Megatron-Bridge 0.3.1 as far as it is used: what was registered under which name."""
    registry = {}

    class MegatronModelBridge:
        @classmethod
        def register_bridge(cls, *, source, target, provider=None, model_type=None):
            def decorate(bridge):
                registry[source] = (bridge, target, model_type)
                return bridge

            return decorate

        def provider_bridge(self, hf_pretrained):
            return Provider(num_layers=hf_pretrained.config.num_hidden_layers, transformer_impl="transformer_engine")

    class Qwen2Bridge(MegatronModelBridge):
        def mapping_registry(self):
            return "Qwen2's"

    modules = {
        "megatron.bridge": {},
        "megatron.bridge.models": {},
        "megatron.bridge.models.conversion": {},
        "megatron.bridge.models.conversion.model_bridge": {"MegatronModelBridge": MegatronModelBridge},
        "megatron.bridge.models.qwen": {},
        "megatron.bridge.models.qwen.qwen2_bridge": {"Qwen2Bridge": Qwen2Bridge},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__path__ = []
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, BRIDGE, raising=False)
    yield registry
    sys.modules.pop(BRIDGE, None)


def test_fast_dllm_is_registered_under_the_name_in_its_configuration(registered):
    __import__(BRIDGE)
    ((source, (bridge, target, model_type)),) = registered.items()
    assert (source, target, model_type) == ("Fast_dLLM_QwenForCausalLM", GPTModel, "Fast_dLLM_Qwen")
    pretrained = types.SimpleNamespace(config=types.SimpleNamespace(num_hidden_layers=28))
    provider = bridge().provider_bridge(pretrained)
    assert provider.num_layers == 28
    assert core_attention(provider.provide()) is BlockDiffusionAttention
    assert bridge().mapping_registry() == "Qwen2's"


def test_without_megatron_bridge_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    monkeypatch.delitem(sys.modules, BRIDGE, raising=False)
    with pytest.raises(UserError, match="pip install megatron-bridge"):
        __import__(BRIDGE)
