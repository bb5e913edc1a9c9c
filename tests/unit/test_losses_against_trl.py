"""Every preference loss against TRL's own code, on log-probabilities made by hand."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from megatron_dtrpo.config.losses import LOSSES, LossOptions
from megatron_dtrpo.objectives.preference import preference_loss

pytest.importorskip("trl", minversion="1.16")

LENGTHS = ((5, 3), (1, 7), (4, 4), (9, 2))  # tokens of chosen and rejected
OPTIONS = [LossOptions(beta=0.5), LossOptions(beta=0.1, label_smoothing=0.2, simpo_gamma=1.3), LossOptions(beta=2.0)]


@pytest.fixture(scope="module")
def token_log_probs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of policy and reference, ``[8, 9]``, and which are of a response, bool ``[8, 9]``; chosen, rejected, chosen..."""
    generator = torch.Generator().manual_seed(4)
    is_response = torch.arange(9) < torch.tensor(LENGTHS).view(-1, 1)
    policy, reference = (-torch.rand(8, 9, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    return policy * is_response, reference * is_response, is_response


def trl_dpo(name: str, options: LossOptions, pair: int, token_log_probs, weights=None) -> tuple[torch.Tensor, dict]:
    """TRL's `DPOTrainer` on one pair: its loss and its metrics. The model is one that returns ``token_log_probs``."""
    from trl import DPOTrainer

    policy, reference, is_response = (t[2 * pair : 2 * pair + 2] for t in token_log_probs)
    names = [name] if isinstance(name, str) else name
    identity = SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t)
    trainer = SimpleNamespace(
        accelerator=identity,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=names,
        loss_weights=weights or [1.0] * len(names),
        beta=options.beta,
        label_smoothing=options.label_smoothing,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    nothing = torch.zeros_like(policy)
    outputs = SimpleNamespace(log_probs=policy, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())
    mask = torch.cat([torch.zeros(2, 1, dtype=torch.bool), is_response], dim=1)  # one token of prompt
    inputs = {
        "input_ids": torch.zeros(mask.shape, dtype=torch.long),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[:1].sum(1),
        "ref_rejected_logps": reference[1:].sum(1),
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, return_outputs=False)
    return loss, {key: values[0] for key, values in trainer._metrics["train"].items()}


def trl_cpo(name: str, options: LossOptions, chosen: torch.Tensor, rejected: torch.Tensor):
    """TRL's `CPOTrainer.cpo_loss`: losses and rewards, of log-probabilities ``[P]``."""
    from trl.experimental.cpo import CPOTrainer

    trainer = SimpleNamespace(
        alpha=0.0,
        loss_type=name,
        beta=options.beta,
        simpo_gamma=options.simpo_gamma,
        label_smoothing=options.label_smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )
    return CPOTrainer.cpo_loss(trainer, chosen, rejected)


def ours(losses: dict[str, float], options: LossOptions, token_log_probs, per_token: bool = False, reference=True):
    policy, base, _ = (t.sum(1) for t in token_log_probs)
    lengths = torch.tensor(LENGTHS).flatten()
    return preference_loss(
        policy, base if reference else None, lengths, losses=losses, options=options, length_normalization=per_token
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo", "robust", "apo_zero", "sft"])
def test_losses_are_those_of_dpo(token_log_probs, name, options):
    if name == "sigmoid":  # which has no label smoothing there
        options = LossOptions(beta=options.beta)
    loss, _ = ours({name: 1.0}, options, token_log_probs)
    expected = [trl_dpo(name, options, pair, token_log_probs)[0] for pair in range(4)]
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_length_normalisation_is_that_of_sigmoid_norm(token_log_probs, options):
    options = LossOptions(beta=options.beta)
    loss, _ = ours({"sigmoid": 1.0}, options, token_log_probs, per_token=True)
    expected = [trl_dpo("sigmoid_norm", options, pair, token_log_probs)[0] for pair in range(4)]
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["ipo", "sft", "simpo"])
def test_losses_per_token_are_not_divided_twice(token_log_probs, name):
    once, twice = (ours({name: 1.0}, OPTIONS[0], token_log_probs, per_token=flag)[0] for flag in (False, True))
    assert torch.equal(once, twice)


@pytest.mark.parametrize("names", [["sigmoid", "sft"], ["apo_zero", "sft", "hinge"]])
def test_weighted_losses_are_those_of_dpo(token_log_probs, names):
    weights = [0.8, 0.3, 1.5][: len(names)]
    loss, metrics = ours(dict(zip(names, weights, strict=True)), OPTIONS[0], token_log_probs)
    expected = [trl_dpo(names, OPTIONS[0], pair, token_log_probs, weights)[0] for pair in range(4)]
    torch.testing.assert_close(loss, torch.stack(expected), rtol=1e-12, atol=1e-12)
    for name in names:  # each of them is logged without its weight
        alone = [trl_dpo(name, OPTIONS[0], pair, token_log_probs)[0] for pair in range(4)]
        torch.testing.assert_close(metrics[f"loss/{name}"], torch.stack(alone), rtol=1e-12, atol=1e-12)


def test_rewards_and_log_probabilities_are_those_of_dpo(token_log_probs):
    _, metrics = ours({"sigmoid": 1.0}, OPTIONS[1], token_log_probs)
    for pair in range(4):
        _, expected = trl_dpo("sigmoid", OPTIONS[1], pair, token_log_probs)
        names = [name for name in expected if name.startswith(("rewards/", "logps/"))]
        assert len(names) == 6
        assert {name: metrics[name][pair].item() for name in names} == pytest.approx({n: expected[n] for n in names})


@pytest.mark.parametrize("options", OPTIONS)
def test_label_smoothing_of_sigmoid_is_that_of_cpo(token_log_probs, options):
    policy, reference, _ = (t.sum(1) for t in token_log_probs)
    gain = policy - reference
    expected, _, _ = trl_cpo("sigmoid", options, gain[::2], gain[1::2])
    torch.testing.assert_close(ours({"sigmoid": 1.0}, options, token_log_probs)[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS)
def test_simpo_is_that_of_cpo(token_log_probs, options):
    """On log-probabilities per token, without a reference."""
    policy, _, is_response = token_log_probs
    mean = policy.sum(1) / is_response.sum(1)
    expected, chosen, rejected = trl_cpo("simpo", options, mean[::2], mean[1::2])
    loss, metrics = ours({"simpo": 1.0}, options, token_log_probs, reference=False)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    beside, _ = ours(
        {"simpo": 1.0}, options, token_log_probs
    )  # where another loss reads a reference, this one does not
    torch.testing.assert_close(beside, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["rewards/chosen"], chosen, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(metrics["rewards/rejected"], rejected, rtol=1e-12, atol=1e-12)


def test_every_loss_is_compared():
    assert set(LOSSES) == {"sigmoid", "hinge", "ipo", "robust", "apo_zero", "sft", "simpo"}
    assert {name for name, loss in LOSSES.items() if not loss.reads_reference} == {"sft", "simpo"}
