"""What a micro-batch's loss asks of the logits: the difference between a step that has nothing to learn and one whose
gradients were lost."""

from __future__ import annotations

import pytest
import torch

from megatron_dtrpo.training.passes import slope


def test_slope_is_the_gradient_that_enters_the_logits():
    log_probs = torch.tensor([-0.5, -2.0, -1e-3], requires_grad=True)
    weight = torch.tensor([1.0, 3.0, -2.0])
    loss = -(log_probs * weight).sum()
    expected = sum(abs(w) * (1 - p) for w, p in zip(weight.tolist(), log_probs.exp().tolist(), strict=True))
    assert slope(loss, log_probs).item() == pytest.approx(expected, rel=1e-5)
    loss.backward()  # the graph is still there
    assert log_probs.grad.tolist() == [-1.0, -3.0, 2.0]


@pytest.mark.parametrize("log_probs, scale", [([], 1.0), ([0.0, 0.0], 1.0), ([-1.0, -3.0], 0.0)])
def test_no_slope_where_there_is_nothing_to_learn(log_probs, scale):
    """No target; every target certain; a loss that is content."""
    log_probs = torch.tensor(log_probs, requires_grad=True)
    assert slope(log_probs.sum() * scale, log_probs).item() == 0


def test_a_loss_without_a_graph_has_a_slope():
    log_probs = torch.tensor([-1.0])
    assert slope(log_probs.sum(), log_probs).item() > 0
