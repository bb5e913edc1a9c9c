"""The CPU's kernels against the plain formulae, values and gradients, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_dtrpo.cpu import linear as cpu_linear
from megatron_dtrpo.cpu.kernels import apply_rotary_pos_emb, bias_swiglu_impl, rms_norm


def test_swiglu():
    x = torch.randn(5, 1, 14, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(14, dtype=torch.float64)
    for given in (None, bias):
        shifted = x if given is None else x + given
        gate, up = shifted[..., :7], shifted[..., 7:]
        expected, grad = F.silu(gate) * up, torch.randn(5, 1, 7, dtype=torch.float64)
        torch.testing.assert_close(bias_swiglu_impl(x, given), expected, rtol=0, atol=1e-14)
        (ours,) = torch.autograd.grad(bias_swiglu_impl(x, given), x, grad)
        torch.testing.assert_close(ours, torch.autograd.grad(expected, x, grad)[0], rtol=0, atol=1e-14)


def test_rotary():
    t = torch.randn(6, 1, 3, 8, dtype=torch.float64, requires_grad=True)
    half = torch.randn(6, 4, dtype=torch.float64)
    angles = torch.cat([half, half], -1)[:, None, None]
    left, right = t[..., :4], t[..., 4:]
    cos, sin = half.cos()[:, None, None], half.sin()[:, None, None]
    expected = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
    grad = torch.randn_like(expected)
    for _ in range(2):  # the second time with the cosines that the first has left
        ours = apply_rotary_pos_emb(t, angles, config=None)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
        (found,) = torch.autograd.grad(ours, t, grad)
        torch.testing.assert_close(
            found, torch.autograd.grad(expected, t, grad, retain_graph=True)[0], rtol=0, atol=1e-14
        )
    assert apply_rotary_pos_emb(t.float(), angles, config=None).dtype == torch.float32


def test_rms_norm():
    x = torch.randn(5, 1, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 1, 7, dtype=torch.float64)
    expected = F.rms_norm(x, (7,), weight, 1e-3)
    ours = rms_norm(x, weight, 1e-3)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
    oracle = torch.autograd.grad(expected, (x, weight), grad)
    torch.testing.assert_close(torch.autograd.grad(ours, (x, weight), grad), oracle, rtol=0, atol=1e-13)


def test_what_is_cheap_to_make_is_not_kept(monkeypatch: pytest.MonkeyPatch):
    """A linear layer after a norm or a SwiGLU has the gradients of plain torch and keeps none of its input."""
    monkeypatch.setattr(cpu_linear, "copy_to_tensor_model_parallel_region", lambda input, group: input.view_as(input))
    monkeypatch.setattr(cpu_linear, "_is_alone", lambda group: False)
    x = torch.randn(64, 1, 128, requires_grad=True)
    scale, weight = torch.rand(128, requires_grad=True), torch.randn(96, 128, requires_grad=True)
    after_swiglu = torch.randn(96, 64, requires_grad=True)
    for ours, plain, parameter, inputs in (
        (rms_norm(x, scale, 1e-6), F.rms_norm(x, (128,), scale, 1e-6), weight, (x, scale, weight)),
        (bias_swiglu_impl(x, None), F.silu(x[..., :64]) * x[..., 64:], after_swiglu, (x, after_swiglu)),
    ):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.data_ptr()) or t, lambda t: t):
            out = cpu_linear.linear(cpu_linear.copy_to_region(ours), parameter, None, False, False, False, None)
        assert ours.data_ptr() not in kept and x.data_ptr() in kept
        grad = torch.randn_like(out)
        expected = torch.autograd.grad(F.linear(plain, parameter), inputs, grad)
        torch.testing.assert_close(torch.autograd.grad(out, inputs, grad), expected, rtol=1e-4, atol=1e-4)


def test_without_gradient_there_is_no_node(monkeypatch: pytest.MonkeyPatch):
    """Decoding makes the same numbers, bit for bit, without autograd's bookkeeping."""
    x, angles = torch.randn(5, 1, 8, requires_grad=True), torch.randn(5, 1, 1, 8)
    weight = torch.randn(6, 8, requires_grad=True)
    calls = (
        lambda: bias_swiglu_impl(x, None),
        lambda: apply_rotary_pos_emb(x.unsqueeze(2), angles, config=None),
        lambda: rms_norm(x, weight[0], 1e-6),
        lambda: cpu_linear.linear(x, weight, weight[:, 0], False, False, False, None),
    )
    expected = [call() for call in calls]
    assert all(each.grad_fn is not None for each in expected)
    monkeypatch.setattr(torch.autograd.Function, "apply", None)
    with torch.no_grad():
        for call, each in zip(calls, expected, strict=True):
            assert torch.equal(call(), each)


def test_one_process_has_no_regions(monkeypatch: pytest.MonkeyPatch):
    x = torch.randn(3, requires_grad=True)
    for alone in (True, False):
        monkeypatch.setattr(cpu_linear, "_is_alone", lambda group, alone=alone: alone)
        for region in ("copy_to", "reduce_from"):
            theirs = f"{region}_tensor_model_parallel_region"
            monkeypatch.setattr(cpu_linear, theirs, lambda input, group: input.view_as(input))
            assert (getattr(cpu_linear, f"{region}_region")(x) is x) == alone
