"""Recomputed activations give the gradients that kept ones give, whatever is trained.

megatron-core's recomputation is reentrant: what it runs gets no gradient unless one of its inputs requires one, and
where the embedding is frozen the first layer's does not.
"""

from __future__ import annotations

import pytest
import torch

from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
from megatron_dtrpo.diffusion.layout import lay_out

MODEL = ModelSettings(
    num_layers=3,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    num_query_groups=1,
    kv_channels=8,
    vocab_size=64,
    make_vocab_size_divisible_by=4,
    block_size=4,
)
RECOMPUTED = {
    "uniform": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "uniform, all": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 3},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
    "attention": {"recompute_granularity": "selective"},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "both": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}
TRAINED = [
    None,
    ["mlp"],
    ["linear_proj"],
    ["linear_fc2"],
    ["linear_qkv"],
    ["output_layer"],
    ["word_embeddings"],
    ["final_layernorm"],
    ["layers.0"],
    ["layers.2"],
]


def gradients(trained: list[str] | None, impl: str, **recompute) -> dict[str, torch.Tensor]:
    from megatron_dtrpo.model.attention import attention_width, plan_attention
    from megatron_dtrpo.model.initialization import global_parameter_names, initialize_weights
    from megatron_dtrpo.model.provider import build_model
    from megatron_dtrpo.training.reference import select_trainable

    model = build_model(MODEL, ParallelSettings(transformer_impl=impl, **recompute))
    initialize_weights(model, 3)
    select_trainable([model], trained)
    masked = torch.ones(1, 3, 4, dtype=torch.bool)
    sequence = lay_out(
        torch.arange(5), [torch.arange(9)], [masked], [masked.double()], block_size=4, mask_id=63, block_start="clean"
    )
    attention = plan_attention(sequence.coordinates(), 4, "sdpa", attention_width(model.config))
    out = model(sequence.tokens, sequence.position, attention, sequence.target_row, sequence.target_token)
    out.sum().backward()
    return {name: p.grad for name, p in global_parameter_names(model).items() if p.requires_grad}


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("trained", TRAINED, ids=lambda patterns: patterns[0] if patterns else "everything")
def test_gradients_do_not_depend_on_recomputation(fused, alone, impl, trained):
    expected = gradients(trained, impl)
    assert expected and all(gradient.abs().max() > 1e-9 for gradient in expected.values())
    for name, recompute in RECOMPUTED.items():
        got = gradients(trained, impl, **recompute)
        assert got.keys() == expected.keys()
        for parameter, gradient in expected.items():
            assert got[parameter] is not None, f"{name}: {parameter} has no gradient"
            torch.testing.assert_close(got[parameter], gradient, rtol=1e-4, atol=1e-7, msg=f"{name}: {parameter}")


def test_recomputation_leaves_a_pass_without_gradient_alone(alone):
    from megatron_dtrpo.model.attention import attention_width, plan_attention
    from megatron_dtrpo.model.initialization import initialize_weights
    from megatron_dtrpo.model.provider import build_model

    model = build_model(MODEL, ParallelSettings(**RECOMPUTED["uniform"]))
    initialize_weights(model, 3)
    masked = torch.ones(1, 3, 4, dtype=torch.bool)
    sequence = lay_out(
        torch.arange(5), [torch.arange(9)], [masked], [masked.double()], block_size=4, mask_id=63, block_start="clean"
    )
    attention = plan_attention(sequence.coordinates(), 4, "sdpa", attention_width(model.config))
    with torch.no_grad():
        assert not model(sequence.tokens, sequence.position, attention).requires_grad
