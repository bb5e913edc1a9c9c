"""FlexAttention in bf16 beside torch's own attention in fp32 under the dense mask: output, gradients, compilations."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_checks.common import Result, Size, has_gpu, verdict

HEADS, GROUPS, WIDTH = 14, 2, 128  # a 7B model's on one of two tensor-parallel ranks
ALLOWED = 0.02  # relative, of bf16


def compare(size: Size, folder: Path) -> Result:
    """Queries, keys and values as one projection makes them, so that keys and values are strided."""
    from megatron_dtrpo.runtime import initialize

    initialize.enable_device()
    from megatron_dtrpo.runtime.compiler import compilations

    rows = [_at_length(length, seed=0) for length in size.lengths]
    compiled = compilations()
    again = [_at_length(length, seed=1) for length in size.lengths]  # other sequences of the same lengths
    more = compilations() - compiled
    worst = {name: max(row["errors"][name] for row in rows + again) for name in rows[0]["errors"]}
    told = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
    times = ", ".join(f"{row['tokens']}: {row['seconds'] * 1e3:.1f} ms" for row in again)
    note = "" if has_gpu() else "; on a CPU uncompiled and without a backward pass"
    return verdict(
        max(worst.values()) < ALLOWED and more == 0,
        f"worst errors {told}; {more} compilations the second time; {times}{note}",
        first=rows,
        second=again,
        compiled=compiled,
        compiled_again=more,
    )


def _at_length(tokens: int, seed: int) -> dict:
    from megatron_dtrpo.config.backends import BACKENDS, few_lengths
    from megatron_dtrpo.config.settings import ModelSettings
    from megatron_dtrpo.diffusion.layout import visible
    from megatron_dtrpo.model.attention import plan_attention
    from megatron_dtrpo.runtime.transfer import to_device
    from tools.benchmarks.layers import SIZES, packed

    device = torch.device("cuda" if has_gpu() else "cpu")
    sequence = packed(ModelSettings(num_layers=1, **SIZES["tiny"]), few_lengths(tokens), seed)
    sequence = sequence.map_tensors(lambda tensor: to_device(tensor, device))
    generator = torch.Generator(device).manual_seed(seed)
    shape = (len(sequence), GROUPS, (HEADS // GROUPS + 2) * WIDTH)
    projected = torch.randn(shape, generator=generator, device=device).bfloat16()
    upstream = torch.randn(len(sequence), HEADS, WIDTH, generator=generator, device=device).bfloat16()
    attention = plan_attention(sequence.coordinates(), sequence.block_size, "flex", HEADS * WIDTH)
    coordinates = sequence.coordinates()
    mask = visible(coordinates.at((slice(None), None)), coordinates.at((None, slice(None))))

    def flex(query, key, value):
        return BACKENDS["flex"].attend(query, key, value, attention.plan, WIDTH**-0.5)

    def dense(query, key, value):
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        k, v = (t.repeat_interleave(HEADS // GROUPS, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=WIDTH**-0.5)[0].transpose(0, 1)

    ours, _ = _outputs(flex, projected, upstream)
    theirs, _ = _outputs(dense, projected.float(), upstream.float())
    _, seconds = _outputs(flex, projected, upstream)
    errors = {name: _relative(ours[name], theirs[name]) for name in ours}
    return {"tokens": len(sequence), "errors": errors, "seconds": seconds}


def _outputs(attend, projected, upstream) -> tuple[dict[str, torch.Tensor], float]:
    """Output and, where there is a backward pass, the gradient of the projection's three parts; and the seconds."""
    leaf = projected.clone().requires_grad_(has_gpu())
    query, key, value = leaf.split([HEADS // GROUPS * WIDTH, WIDTH, WIDTH], dim=-1)
    torch.cuda.synchronize()
    started = time.perf_counter()
    out = attend(query.reshape(-1, HEADS, WIDTH), key, value)
    if leaf.requires_grad:
        out.backward(upstream)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    found = {"output": out.detach()}
    if leaf.grad is not None:
        parts = leaf.grad.split([HEADS // GROUPS * WIDTH, WIDTH, WIDTH], dim=-1)
        found |= dict(zip(("d query", "d key", "d value"), parts, strict=True))
    return found, seconds


def _relative(found: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((found.float() - oracle.float()).norm() / oracle.float().norm())
