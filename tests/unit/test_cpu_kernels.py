"""The CPU's kernels against the plain formulae, values and gradients, in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_dtrpo.runtime.cpu_kernels import apply_rotary_pos_emb, bias_swiglu_impl


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
