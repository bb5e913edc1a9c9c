"""Eager counterparts of megatron-core's fused kernels, for the CPU, where its own fusions ask for a compiler.

Each is one autograd node that keeps its input and nothing made from it, and goes through memory as seldom as eager
torch can. Signatures are those of the functions they stand in for.

What costs little to make is not kept by the linear layer that reads it (`cpu_linear`), but made again: of a layer with
a feed-forward width of 8/3 of the hidden width that halves what a token keeps until its gradient comes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Recipe(NamedTuple):
    """How a tensor is made again: ``make(*sources)``."""

    make: Callable[..., Tensor]
    sources: tuple[Tensor, ...]


def remember(result: Any, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Leaves with ``result`` how it was made. The sources are kept for a gradient anyway."""
    if result.requires_grad:
        result.recipe = Recipe(make, tuple(t.detach() for t in sources))
    return result


def recipe_of(tensor: Tensor) -> Recipe | None:
    return getattr(tensor, "recipe", None)


class _NoGradient:
    """The context of a node that no gradient will come to."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def run(node: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """``node.apply``; where no gradient is asked for without autograd's bookkeeping, which costs more than a small
    kernel."""
    return node.apply(*arguments) if torch.is_grad_enabled() else node.forward(_NoGradient(), *arguments)


def _swiglu(gate_and_up: Tensor) -> Tensor:
    gate, up = gate_and_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_and_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_and_up)
        return _swiglu(gate_and_up)

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
    gate_and_up = input if bias is None else input + bias
    return remember(run(_SwiGlu, gate_and_up), _swiglu, gate_and_up)


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


def apply_rotary_pos_emb(t: Tensor, freqs: Any, config, cu_seqlens=None, mscale: float = 1.0, cp_group=None):
    """``t [s, b, heads, d]`` turned by angles ``freqs [s, 1, 1, d]``. Cosines and sines are made once for the queries
    and keys of all layers: they stay with the angles."""
    made = getattr(freqs, "_cos_sin", None)
    if made is None or made[0].dtype != t.dtype:
        made = freqs._cos_sin = (torch.cos(freqs).to(t.dtype), torch.sin(freqs).to(t.dtype))
    return run(_Rotary, t, *made)


def _normalize(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """``x [..., h]`` times ``scale [..., 1]``, its inverse root mean square, and ``weight [h]``."""
    return torch.mul(x, scale).mul_(weight)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        return _normalize(x, weight, scale)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        needs_x, needs_weight, _ = ctx.needs_input_grad
        grad_x = grad_weight = None
        if needs_x:
            grad_x = grad * weight
            along = torch.linalg.vecdot(grad_x, x).unsqueeze(-1)  # what would only make x longer
            grad_x.mul_(scale).addcmul_(x, along.mul_(scale**3).div_(-x.shape[-1]))
        if needs_weight:
            grad_weight = torch.mul(x, scale).mul_(grad).flatten(0, -2).sum(0)
        return grad_x, grad_weight, None


def supports(x: Tensor) -> bool:
    """Whether `rms_norm` is for ``x``: lower precisions are torch's, which computes them in fp32."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x [..., h]`` over its root mean square, times ``weight [h]``. Of what it `supports`."""
    with torch.no_grad():
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
    return remember(run(_RmsNorm, x, weight, scale), _normalize, x, weight, scale)
