"""The prototype on megatron-core's HybridModel: names, refusals, Transformer Engine's layers. That it computes what the
GPT model does, see tests/distributed/test_model.py; that it trains so, tests/distributed/test_hybrid_model.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_dtrpo.config.rules import validate
from megatron_dtrpo.config.settings import Config, ModelSettings, ParallelSettings
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.hybrid_names import gpt_name
from megatron_dtrpo.families.parameters import SHAPES
from megatron_dtrpo.runtime import initialize, precision, versions

MODEL = ModelSettings(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=128,
    block_size=8,
)
HYBRID = ParallelSettings(model_class="hybrid")
needs_hybrid = pytest.mark.skipif(not versions.has_hybrid_model(), reason="this megatron-core has no HybridModel")


def test_every_layer_is_an_attention_and_an_mlp():
    for pattern in SHAPES:
        for layer in (0, 1, 6, 13):
            name = pattern.replace("*", str(layer))
            half = 2 * layer + (".mlp." in name)
            hybrid = pattern.replace("*", str(half)).replace("final_layernorm", "final_norm")
            assert gpt_name(hybrid) == name


def test_without_a_hybrid_model_one_line(monkeypatch):
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    initialize.enable_device()
    from megatron_dtrpo.model.provider import build_chunks

    for refuses in (lambda: precision.check_machine(HYBRID), lambda: build_chunks(MODEL, HYBRID)):
        with pytest.raises(UserError, match=r"^model_class hybrid needs megatron-core 0\.18 or newer, and this is 0\."):
            refuses()
    precision.check_machine(ParallelSettings())


def test_fp8_is_refused():
    parallel = replace(HYBRID, bf16=True, fp8_format="hybrid")
    with pytest.raises(
        UserError, match="^fp8_format with model_class hybrid was never tried: leave one of the two out$"
    ):
        validate(
            Config(model=replace(MODEL, hidden_size=256, ffn_hidden_size=512, kv_channels=64), parallel=parallel), 1
        )


@needs_hybrid
def test_a_dry_run_counts_transformer_layers(capsys):  # before what starts a process group
    from megatron_dtrpo.training.dry_run import dry_run

    def report(name: str) -> str:
        layout = ParallelSettings(pipeline_model_parallel_size=2, tensor_model_parallel_size=2, model_class=name)
        config = Config(model=replace(MODEL), parallel=layout)
        config.optimizer.train_iters = 1
        dry_run(config, set(), 4, None)
        return capsys.readouterr().out

    assert report("hybrid") == report("gpt")
    assert "stage 1: layers 2, " in report("hybrid")


def build(**parallel):
    from megatron_dtrpo.model.initialization import initialize_weights
    from megatron_dtrpo.model.provider import build_model

    model = build_model(MODEL, ParallelSettings(**parallel))
    initialize_weights(model, 3)
    return model


@needs_hybrid
@pytest.mark.parametrize("backend", ["local", "transformer_engine"])
def test_checkpoints_and_fingerprints_are_the_gpt_models(fused, alone, backend):
    """With either backend, whose norms have names of their own."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from megatron_dtrpo.checkpoint.distributed import _SHARDING
    from megatron_dtrpo.checkpoint.fingerprint import weights_fingerprint

    gpt, hybrid = (build(transformer_impl=backend, model_class=name) for name in ("gpt", "hybrid"))
    assert type(hybrid.decoder).__mro__[1].__name__ == "HybridStack" and len(hybrid.decoder.layers) == 4
    states = [list(nested_values(model.sharded_state_dict(metadata=dict(_SHARDING)))) for model in (gpt, hybrid)]
    mine, theirs = ({each.key: each for each in state} for state in states)
    assert mine.keys() == theirs.keys() and len(mine) == len(states[0]) == len(states[1])
    for key, each in mine.items():
        assert type(each) is type(theirs[key])
        if isinstance(each.data, torch.Tensor):
            assert torch.equal(each.data, theirs[key].data), key
    assert weights_fingerprint(gpt) == weights_fingerprint(hybrid)


@needs_hybrid
def test_a_checkpoint_with_all_layers_in_one_tensor_is_refused(alone):
    with pytest.raises(
        UserError, match="^the checkpoint has all layers in one tensor, which model_class hybrid does not"
    ):
        build(model_class="hybrid").sharded_state_dict(metadata={"non_homogeneous_layers": False})
