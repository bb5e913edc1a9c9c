"""Eager counterparts of megatron-core's fused kernels, for the CPU, where its own fusions ask for a compiler.

Each is one autograd node that keeps its input and nothing made from it, and goes through memory as seldom as eager
torch can. Signatures are those of the functions they stand in for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_and_up,) = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, -1)
        result = torch.empty_like(gate_and_up)
        grad_gate, grad_up = result.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return result


def bias_swiglu_impl(input: Tensor, bias: Tensor | None, fp8_input_store=False, cpu_offload_input=False) -> Tensor:
    """``silu(gate) * up`` of ``[..., 2 f]``, gate first: ``[..., f]``."""
    return _SwiGlu.apply(input if bias is None else input + bias)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(t, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


def _rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs ``(t[i], t[i + d / 2])`` by angles whose ``cos`` and ``sin`` repeat after ``d / 2``."""
    half = t.shape[-1] // 2
    out = t * cos
    out[..., :half].addcmul_(t[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(t[..., :half], sin[..., half:])
    return out


def apply_rotary_pos_emb(t: Tensor, freqs: Tensor, config, cu_seqlens=None, mscale: float = 1.0, cp_group=None):
    """``t [s, b, heads, d]`` turned by angles ``freqs [s, 1, 1, d]``. Cosines and sines are made once for the queries
    and keys of all layers: they stay with the angles."""
    made = getattr(freqs, "_cos_sin", None)
    if made is None or made[0].dtype != t.dtype:
        made = freqs._cos_sin = (torch.cos(freqs).to(t.dtype), torch.sin(freqs).to(t.dtype))
    return _Rotary.apply(t, *made)
