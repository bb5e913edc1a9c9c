"""Log-probabilities and preference losses against the plain formulas."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dtrpo.config.losses import LossOptions
from megatron_dtrpo.objectives.logprobs import vocab_parallel_log_probs
from megatron_dtrpo.objectives.preference import preference_loss
from megatron_dtrpo.objectives.targets import Targets
from tests.support import oracles


def random_logits(dtype, rows=9, vocabulary=37, scale=5.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * scale).to(dtype)
    return logits.requires_grad_(), torch.randint(0, vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize(
    "dtype, forward, backward",
    [(torch.float64, 1e-13, 1e-13), (torch.float32, 2e-6, 1e-6), (torch.bfloat16, 2e-6, 0.02)],
)
def test_log_probs_and_gradients(dtype, forward, backward):
    logits, target = random_logits(dtype)
    upstream = torch.linspace(-2, 3, len(target), dtype=torch.float64)
    out = vocab_parallel_log_probs(logits, target)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    wide = logits.detach().double().requires_grad_()  # the logits as they are, rounded to dtype
    expected = torch.log_softmax(wide, -1)[torch.arange(len(target)), target]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=forward)

    (gradient,) = torch.autograd.grad(out, logits, upstream.to(out.dtype))
    assert gradient.dtype == dtype
    (right,) = torch.autograd.grad(expected, wide, upstream)
    torch.testing.assert_close(gradient.double(), right, rtol=0, atol=backward)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_log_probs_leave_their_input_alone(dtype):
    logits, target = random_logits(dtype)
    before, target_before = logits.detach().clone(), target.clone()
    vocab_parallel_log_probs(logits, target).sum().backward()
    assert torch.equal(logits.detach(), before) and torch.equal(target, target_before)


@pytest.mark.parametrize("probability", oracles.SHARP)
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 1e-2), (torch.float32, 1e-2), (torch.float64, 1e-9)])
def test_the_targets_gradient_is_kept_where_the_model_is_sure(dtype, tolerance, probability):
    """``1 - p`` of a p that was rounded to bf16 is 0 from 0.998 on, and wrong by a tenth from 0.97 on."""
    logits, target, expected = oracles.sharp_logits(probability, dtype)
    vocab_parallel_log_probs(logits.requires_grad_(), target).sum().backward()
    torch.testing.assert_close(logits.grad.double(), expected, rtol=tolerance, atol=1e-9)


def test_log_probs_of_extreme_logits():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, -1e4, -1e4], [3e38, 0.0, 0.0]], requires_grad=True)
    out = vocab_parallel_log_probs(logits, torch.tensor([1, 2, 0]))
    torch.testing.assert_close(out, torch.tensor([-1e4, -math.log(3), 0.0]))
    out.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_log_probs_of_no_targets():
    logits, target = random_logits(torch.float32, rows=0)
    out = vocab_parallel_log_probs(logits, target)
    assert out.shape == (0,)
    out.sum().backward()
    assert logits.grad.shape == (0, 37)


def test_log_probs_pass_gradcheck():
    logits, target = random_logits(torch.float64, rows=4, vocabulary=5, scale=1.0)
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_log_probs(x, target), logits)


def targets(log_probs, weight, response, responses, **kwargs) -> Targets:
    nothing = torch.zeros_like(response)
    return Targets(log_probs, weight, response, nothing, nothing, torch.ones(responses, dtype=torch.long), **kwargs)


def test_likelihoods_of_responses():
    log_probs = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0], requires_grad=True)
    weight = torch.tensor([1.0, 0.5, 3.0, 2.0, 1.0], dtype=torch.float64)
    response = torch.tensor([2, 0, 2, 0, 3])
    out = targets(log_probs, weight, response, 5).likelihoods()
    assert out.dtype == torch.float64
    assert out.tolist() == [-1.0 - 16.0, 0.0, -1.0 - 12.0, -16.0, 0.0]
    out.sum().backward()
    assert log_probs.grad.tolist() == weight.tolist()


def test_likelihoods_are_sums_in_double_precision():
    log_probs = torch.full((100_000,), -0.1)
    ones = torch.ones(100_000, dtype=torch.float64)
    out = targets(log_probs, ones, torch.zeros(100_000, dtype=torch.long), 1).likelihoods()
    assert out.item() == pytest.approx(-100_000 * torch.tensor(0.1).double().item(), rel=1e-12)


def test_sums_are_added_up_over_processes_that_share_a_sequence():
    ones, response = torch.ones(3, dtype=torch.float64), torch.tensor([0, 0, 1])
    part = targets(torch.tensor([-1.0, -2.0, -4.0]), ones, response, 2, add_up=lambda total: total + 10)
    assert part.likelihoods().tolist() == [7.0, 6.0]
    assert part.sum_by_response(ones).tolist() == [12.0, 11.0]


@pytest.mark.parametrize("beta", [0.1, 0.5, 3.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_ln_2_where_the_policy_is_the_reference(beta, label_smoothing):
    scores = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 50
    options = LossOptions(beta, label_smoothing)
    loss, metrics = preference_loss(scores, scores.clone(), torch.ones(6), losses={"sigmoid": 1.0}, options=options)
    assert loss.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-15)
    assert metrics["rewards/margins"].tolist() == [0.0] * 3
    assert metrics["rewards/accuracies"].tolist() == [0.5] * 3  # ties, as score counts them


@pytest.mark.parametrize(
    "name, first",
    [("sigmoid", math.log(2)), ("robust", math.log(2)), ("hinge", 1.0), ("apo_zero", 1.0), ("ipo", 25 / 4)],
)
def test_losses_of_the_first_step(name, first):
    """Policy = reference: what docs/metrics.md says; ipo's is ``1 / (4 beta^2)``."""
    scores = torch.tensor([-20.0, -31.0, -5.0, -2.0], dtype=torch.float64)
    options, lengths = LossOptions(beta=0.2), torch.tensor([3, 9, 2, 2])
    for per_token in (False, True):
        loss, _ = preference_loss(
            scores, scores.clone(), lengths, losses={name: 1.0}, options=options, length_normalization=per_token
        )
        assert loss.tolist() == pytest.approx([first] * 2, rel=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "hinge", "robust", "simpo", "apo_zero"])
def test_extreme_margins_stay_finite(name):
    policy = torch.tensor([1e5, -1e5, -1e5, 1e5], dtype=torch.float64, requires_grad=True)
    loss, _ = preference_loss(
        policy, torch.zeros_like(policy), torch.ones(4), losses={name: 1.0}, options=LossOptions(1.0)
    )
    assert loss[0].item() == 0.0 and 1.0 < loss[1].item() < 3e5
    loss.sum().backward()
    assert torch.isfinite(policy.grad).all() and policy.grad[:2].tolist() == [0.0, 0.0]


def test_metrics_are_without_gradient():
    policy = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    losses = {"sigmoid": 1.0, "sft": 0.5}
    loss, metrics = preference_loss(policy, policy.detach() - 1, torch.ones(4), losses=losses, options=LossOptions())
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())
