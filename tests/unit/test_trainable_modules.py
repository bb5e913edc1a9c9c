"""Patterns of ``trainable_modules`` match the names of modules, the same ones whoever computes the layers."""

from __future__ import annotations

import pytest

from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
from megatron_dtrpo.errors import UserError

MODEL = ModelSettings(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=8,
    vocab_size=64,
    make_vocab_size_divisible_by=4,
    block_size=4,
)
MLP = {"mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
QKV = {"self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"}
PROJ = {"self_attention.linear_proj.weight"}
NORMS = {"input_layernorm.weight", "pre_mlp_layernorm.weight"}
EMBEDDING, HEAD, FINAL = "embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"


def every_layer(names: set[str]) -> set[str]:
    return {f"decoder.layers.{number}.{name}" for number in (0, 1) for name in names}


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize(
    "patterns, expected",
    [
        (["mlp"], every_layer(MLP)),
        (["mlp", "linear_proj"], every_layer(MLP | PROJ)),  # what the paper trains
        (["self_attention"], every_layer(QKV | PROJ)),
        (["linear_qkv"], every_layer(QKV)),
        (["linear_qkv.bias"], every_layer({"self_attention.linear_qkv.bias"})),
        (["linear_fc?"], every_layer(MLP)),
        (["pre_mlp_layernorm"], every_layer({"pre_mlp_layernorm.weight"})),
        (["*layernorm"], every_layer(NORMS) | {FINAL}),
        (["layers.1"], {name for name in every_layer(MLP | QKV | PROJ | NORMS) if ".1." in name}),
        (["layers.1.mlp"], {name for name in every_layer(MLP) if ".1." in name}),
        (["decoder"], every_layer(MLP | QKV | PROJ | NORMS) | {FINAL}),
        (["output_layer", "embedding"], {HEAD, EMBEDDING}),
        (["decoder.layers.0.mlp.linear_fc1.weight"], {"decoder.layers.0.mlp.linear_fc1.weight"}),
    ],
)
def test_patterns_match_names_of_modules(fused, alone, impl, patterns, expected):
    from megatron_dtrpo.model.initialization import global_parameter_names
    from megatron_dtrpo.model.provider import build_model
    from megatron_dtrpo.training.reference import check_patterns, select_trainable

    model = build_model(MODEL, ParallelSettings(transformer_impl=impl))
    matched = select_trainable([model], patterns)
    assert {name for name, p in global_parameter_names(model).items() if p.requires_grad} == expected
    check_patterns(patterns, matched)


@pytest.mark.parametrize("pattern", ["layernorm", "linear", "mlp.", "MLP", "proj"])
def test_a_part_of_a_name_matches_nothing(alone, pattern):
    from megatron_dtrpo.model.provider import build_model
    from megatron_dtrpo.training.reference import check_patterns, select_trainable

    matched = select_trainable([build_model(MODEL, ParallelSettings())], [pattern, "mlp"])
    with pytest.raises(UserError, match=f"trainable_modules: '{pattern}' names no module") as error:
        check_patterns([pattern, "mlp"], matched)
    assert "*" in str(error.value) and "\n" not in str(error.value)
