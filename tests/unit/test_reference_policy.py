"""The live reference keeps its own values of what is trained and of what is frozen and differs, and shares the rest."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_dtrpo.config.settings import Config, DataSettings, ModelSettings, ParallelSettings

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


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("patterns", [None, ["mlp"]], ids=["all trained", "mlp"])
def test_what_is_equal_and_frozen_is_shared(alone, tied, patterns):
    """In the policy's place, also when that was trained, every tensor is that of the model that it came from."""
    from megatron_dtrpo.config.rules import validate
    from megatron_dtrpo.model.initialization import global_parameter_names, initialize_weights
    from megatron_dtrpo.model.provider import build_model
    from megatron_dtrpo.planning.memory import plan_stage
    from megatron_dtrpo.training.reference import ReferencePolicy, select_trainable

    config = Config(
        model=dataclasses.replace(MODEL, untie_embeddings_and_output_weights=not tied), data=DataSettings(seq_length=64)
    )
    policy, other = (build_model(config.model, ParallelSettings()) for _ in range(2))
    for model in (policy, other):
        initialize_weights(model, seed=1)
    theirs = global_parameter_names(other)
    own = {"embedding.word_embeddings.weight", "decoder.layers.0.self_attention.linear_qkv.weight"}
    with torch.no_grad():
        for name in own:
            theirs[name][1, 2:4] += 0.5
    own |= set(theirs) if patterns is None else {name for name in theirs if ".mlp." in name}
    select_trainable([policy], patterns)
    names = {parameter: name for name, parameter in global_parameter_names(policy).items()}

    reference = ReferencePolicy([policy], [other])
    assert {names[parameter] for parameter, _ in reference.frozen} == own
    for parameter, value in reference.frozen:  # taken over, not copied once more
        assert value.data_ptr() == theirs[names[parameter]].data_ptr() and not value.requires_grad
    validate(config, 1)
    kept = sum(value.nbytes for _, value in reference.frozen)
    assert kept <= plan_stage(config, 1, 0).reference and (patterns or kept == plan_stage(config, 1, 0).reference)

    before = [parameter.detach().clone() for parameter in policy.parameters()]
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    trained = [parameter.detach().clone() for parameter in policy.parameters()]
    with reference.in_place_of_policy():
        assert all(torch.equal(p, theirs[name]) for name, p in global_parameter_names(policy).items())
    assert all(torch.equal(p, value) for p, value in zip(policy.parameters(), trained, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))


def test_the_starting_point_is_kept_as_it_was(alone):
    """Without a reference of its own the policy's trained tensors are copied, and training in place leaves the copy."""
    from megatron_dtrpo.training.reference import ReferencePolicy

    policy = torch.nn.Linear(2, 2)
    start = policy.weight.detach().clone()
    reference = ReferencePolicy([policy])
    with torch.no_grad():
        policy.weight.add_(1)
    with reference.in_place_of_policy():
        assert torch.equal(policy.weight, start)
    assert torch.equal(policy.weight, start + 1)
