"""Estimators of a response's log-likelihood: from noise to noisy views and weights.

An estimator draws, for one response, ``K`` noisy views of its blocks and a weight per token, such that the surrogate

    L(y) = sum over views k and positions p of  weight[k, p] * log p(y_p | view k)

estimates what it is named for. Policy and reference get the same draws, hence their ratio needs no schedule.

Every estimator is a function ``(maskable, generators, options) -> Noise`` in `ESTIMATORS`; ``maskable`` is a bool
``[n, B]`` tensor (see `layout.Blocks.maskable`) and ``generators`` holds one `torch.Generator` per base view, so that
a view's draw does not depend on how many views there are. Legend: n blocks, B block size, K views.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Noise(NamedTuple):
    """``masked``: bool ``[K, n, B]``, the tokens each view hides; ``weight``: float64 ``[K, n, B]``, zero where a
    token is not read."""

    masked: Tensor
    weight: Tensor


@dataclass(frozen=True)
class EstimatorOptions:
    """Knobs of the estimators; each estimator reads the ones its docstring names."""

    steps_per_block: int = 8
    complementary: bool = True
    min_timestep: float = 1e-3


def noise_generator(seed: int, epoch: int, index: int, branch: int, view: int) -> torch.Generator:
    """The generator of one view's noise: a function of what is being noised and of nothing else.

    The five integers are hashed because neighbouring seeds must not give related streams.
    """
    digest = hashlib.blake2b(struct.pack("<5q", seed, epoch, index, branch, view), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def dtrpo(maskable: Tensor, generators: Sequence[torch.Generator], options: EstimatorOptions) -> Noise:
    """One sampled timestep per block, the newly unmasked tokens only (dTRPO, arXiv 2603.18806, Theorems 1 and 2).

    A uniformly random order of the block's m maskable tokens is cut into ``T = min(steps_per_block, m)`` groups of
    near-equal size, the decoding steps; for one step ``t ~ U{1..T}`` the groups ``t..T`` are masked and group ``t``,
    which that step unmasks, is read with weight ``T / K``. Its expectation is the sum over all steps.
    """
    count = maskable.sum(1)
    steps = count.clamp(max=options.steps_per_block)
    draws = [_dtrpo_view(maskable, count, steps, generator) for generator in generators]
    masked, read = (torch.stack(t) for t in zip(*draws, strict=True))
    return Noise(masked, read * (steps.double() / len(generators)).view(1, -1, 1))


def _dtrpo_view(maskable: Tensor, count: Tensor, steps: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    key = torch.rand(maskable.shape, generator=generator, dtype=torch.float64)
    rank = key.masked_fill(~maskable, torch.inf).argsort(1).argsort(1)
    group = rank * steps.unsqueeze(1) // count.clamp(min=1).unsqueeze(1)
    timestep = (torch.rand(steps.shape, generator=generator, dtype=torch.float64) * steps).long().unsqueeze(1)
    return maskable & (group >= timestep), maskable & (group == timestep)


def sft(maskable: Tensor, generators: Sequence[torch.Generator], options: EstimatorOptions) -> Noise:
    """Fast-dLLM v2's training noise: one ``t ~ U(min_timestep, 1)`` per block, each token masked with probability t,
    read with weight 1 where masked. With ``complementary`` each view is followed by one that masks the rest, so that
    every token is learnt once per pair of views."""
    views = []
    for generator in generators:
        timestep = torch.rand((maskable.shape[0], 1), generator=generator, dtype=torch.float64)
        timestep = options.min_timestep + (1 - options.min_timestep) * timestep
        hidden = maskable & (torch.rand(maskable.shape, generator=generator, dtype=torch.float64) < timestep)
        views += [hidden, maskable & ~hidden] if options.complementary else [hidden]
    masked = torch.stack(views)
    return Noise(masked, masked.double())


Estimator = Callable[[Tensor, Sequence[torch.Generator], EstimatorOptions], Noise]

ESTIMATORS: dict[str, Estimator] = {"dtrpo": dtrpo, "sft": sft}


def total_views(name: str, base_views: int, options: EstimatorOptions) -> int:
    """K, the number of noisy views an estimator lays out for ``base_views`` generators."""
    return 2 * base_views if name == "sft" and options.complementary else base_views
