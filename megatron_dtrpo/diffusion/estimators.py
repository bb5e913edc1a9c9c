"""Estimators of a response's log-likelihood: from noise to noisy views and weights.

An estimator draws, for one response, ``K`` noisy views of its blocks and a weight per token, such that the surrogate

    L(y) = sum over views k and positions p of  weight[k, p] * log p(y_p | view k)

estimates what it is named for. Policy and reference get the same draws, hence their ratio needs no schedule; only the
plain ``elbo`` draws anew for the reference.

Each is a function ``NoiseRequest -> Noise``; `config.estimators` has a row for each, with its options and properties.
Legend: n blocks, B block size, K views, m maskable tokens of a block.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dtrpo.config.estimators import EstimatorOptions
from megatron_dtrpo.seeds import stable_seed

# Views are numbered from 1; the reference's own draws, where it has any, have the negative numbers.
POLICY, REFERENCE = 1, -1


class Noise(NamedTuple):
    """``masked``: bool ``[K, n, B]``, the tokens each view hides; ``weight``: float64 ``[K, n, B]``, zero where a
    token is not read."""

    masked: Tensor
    weight: Tensor


KEPT = torch.iinfo(torch.long).max


class Recording(NamedTuple):
    """A recorded decoding on the block grid, int64 ``[n, B]`` each. ``written``: the step that wrote the token at each
    place. ``until``: the last step whose pass saw it, `KEPT` unless it was thrown away: such tokens lie behind the
    response's end, where nothing else is maskable."""

    written: Tensor
    until: Tensor

    def writable(self, maskable: Tensor) -> Tensor:
        """Bool ``[n, B]``: the ``maskable`` tokens and those that were thrown away."""
        return maskable | (self.until != KEPT)


class NoiseRequest(NamedTuple):
    """The inputs of a draw.

    ``maskable``: bool ``[n, B]`` (see `layout.Blocks.maskable`). ``generators``: one per base view, so that a view's
    draw does not depend on how many views there are. ``recording``: None where no decoding was recorded.
    """

    maskable: Tensor
    generators: Sequence[torch.Generator]
    options: EstimatorOptions = EstimatorOptions()
    recording: Recording | None = None


def noise_generator(seed: int, epoch: int, index: int, branch: int, view: int) -> torch.Generator:
    """The generator of one view's noise: a function of what is being noised and of nothing else.

    The five integers are hashed because neighbouring seeds must not give related streams.
    """
    seed = stable_seed(struct.pack("<5q", seed, epoch, index, branch, view))
    return torch.Generator().manual_seed(seed)


def dtrpo(request: NoiseRequest) -> Noise:
    """One sampled timestep per block, the newly unmasked tokens only (dTRPO, arXiv 2603.18806, Theorems 1 and 2).

    A uniformly random order of the block's m maskable tokens is cut into ``T = min(steps_per_block, m)`` groups of
    near-equal size, the decoding steps; for one step ``t ~ U{1..T}`` the groups ``t..T`` are masked and group ``t``,
    which that step unmasks, is read with weight ``T / K``. Its expectation is the sum over all steps.
    """
    count = request.maskable.sum(1)
    steps = count.clamp(max=request.options.steps_per_block)
    views = []
    for generator in request.generators:
        group = _random_rank(request.maskable, generator) * steps.unsqueeze(1) // count.clamp(min=1).unsqueeze(1)
        views.append(at_timestep(request.maskable, group, _random_timestep(steps, generator)))
    return _newly_unmasked(views, steps)


def trajectory(request: NoiseRequest) -> Noise:
    """As `dtrpo`, but with the recorded decoding of the response in the place of a random order: T is the number of
    distinct steps that wrote a block, and a view shows what one of them saw, thrown away tokens included."""
    writable = request.recording.writable(request.maskable)
    steps, count = distinct_steps(writable, request.recording.written)
    views = []
    for generator in request.generators:
        step = steps.gather(1, _random_timestep(count, generator).unsqueeze(1)).squeeze(1)
        views.append(at_step(writable, request.recording, step))
    return _newly_unmasked(views, count)


def exact_trajectory(request: NoiseRequest) -> Noise:
    """The exact log-likelihood of a recorded decoding: view k shows what the k-th step of each block saw and reads what
    it wrote, with weight 1. Blocks of fewer steps than views have nothing to read in the last ones."""
    writable = request.recording.writable(request.maskable)
    steps, count = distinct_steps(writable, request.recording.written)
    views = int(count.max())
    masked, read = at_step(writable, request.recording, steps[:, :views].T)
    return Noise(masked, read.double())


def distinct_steps(writable: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """The steps that wrote each block's ``writable`` tokens (bool ``[n, B]``), without repetition and in order: int64
    ``[n, B]``, filled up with `KEPT`; and how many there are, int64 ``[n]``."""
    ordered = written.masked_fill(~writable, KEPT).sort(1).values
    repeated = torch.zeros_like(writable)
    repeated[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    steps = ordered.masked_fill(repeated, KEPT).sort(1).values
    return steps, (steps != KEPT).sum(1)


def at_step(writable: Tensor, recording: Recording, step: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens masked before, and written in, ``step`` (int64 ``[..., n]``) of each block: bool ``[..., n, B]``
    each."""
    step = step.unsqueeze(-1)
    seen = (recording.written < step) & (step <= recording.until)
    return writable & ~seen, writable & (recording.written == step)


def at_timestep(maskable: Tensor, group: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens masked before, and unmasked in, decoding step ``timestep`` (from 0, int64 ``[n]``) of each block
    whose tokens are unmasked in order of ``group``: bool ``[n, B]`` each."""
    timestep = timestep.unsqueeze(1)
    return maskable & (group >= timestep), maskable & (group == timestep)


def _random_rank(maskable: Tensor, generator: torch.Generator) -> Tensor:
    """A uniformly random order of each block's maskable tokens: int64 ``[n, B]``, theirs are ``0 .. m - 1``."""
    key = torch.rand(maskable.shape, generator=generator, dtype=torch.float64)
    return key.masked_fill(~maskable, torch.inf).argsort(1).argsort(1)


def _random_timestep(steps: Tensor, generator: torch.Generator) -> Tensor:
    """Uniform on ``0 .. steps - 1``: int64 ``[n]``."""
    return (torch.rand(steps.shape, generator=generator, dtype=torch.float64) * steps).long()


def _newly_unmasked(views: Sequence[tuple[Tensor, Tensor]], steps: Tensor) -> Noise:
    """Views (masked, read), each bool ``[n, B]``, of one of ``steps`` (int64 ``[n]``) equally likely steps a block."""
    masked, read = (torch.stack(t) for t in zip(*views, strict=True))
    return Noise(masked, read * (steps.double() / len(views)).view(1, -1, 1))


def elbo(request: NoiseRequest) -> Noise:
    """The evidence lower bound of a masked diffusion model (LLaDA, arXiv 2502.09992).

    Per block ``l ~ U{1..m}`` tokens are masked without replacement and read with weight ``m / (l K)``. Its
    expectation is the average over all orders of the sum over tokens one at a time.
    """
    levels = [
        torch.rand(len(request.maskable), generator=generator, dtype=torch.float64) for generator in request.generators
    ]
    return _masked_to_level(request, levels)


def vrpo(request: NoiseRequest) -> Noise:
    """As `elbo`, with less variance: K views of other levels each, and policy and reference share every draw (VRPO,
    arXiv 2505.19223). The levels of a block's views are stratified, as in Variational Diffusion Models (arXiv
    2107.00630) and not in VRPO: view k's is drawn from ``[(k - 1) / K, k / K)``."""
    views = len(request.generators)
    levels = [
        (k + torch.rand(len(request.maskable), generator=generator, dtype=torch.float64)) / views
        for k, generator in enumerate(request.generators)
    ]
    return _masked_to_level(request, levels)


def _masked_to_level(request: NoiseRequest, levels: Sequence[Tensor]) -> Noise:
    """Masks a share of each block, levels float64 ``[n]`` in ``[0, 1)`` per view: uniform ones give ``l ~ U{1..m}``."""
    count = request.maskable.sum(1)
    masked, weight = [], []
    for level, generator in zip(levels, request.generators, strict=True):
        hidden = (1 + (level * count).long()).minimum(count)  # a level may be rounded up to 1
        masked.append(request.maskable & (_random_rank(request.maskable, generator) < hidden.unsqueeze(1)))
        weight.append(masked[-1] * (count / (hidden.clamp(min=1).double() * len(levels))).unsqueeze(1))
    return Noise(torch.stack(masked), torch.stack(weight))


def mean_field(request: NoiseRequest) -> Noise:
    """Everything masked and everything read: the response's tokens as if independent given the blocks before. There is
    nothing random in it, so that more than one view would repeat the first."""
    views = len(request.generators)
    masked = request.maskable.expand(views, -1, -1).clone()
    return Noise(masked, masked.double() / views)


def exact(request: NoiseRequest) -> Noise:
    """The log-likelihood of an autoregressive model: of block size 1, read from clean rows alone, with weight 1 each
    (`layout.lay_out`). There is nothing to mask, and no view."""
    nothing = request.maskable.new_zeros(0, *request.maskable.shape)
    return Noise(nothing, nothing.double())


def sft(request: NoiseRequest) -> Noise:
    """Fast-dLLM v2's training noise: one ``t ~ U(min_timestep, 1)`` per block, each token masked with probability t and
    read where masked. With ``complementary`` each view is followed by one that masks the rest. Every token weighs 1 in
    all: with ``complementary`` exactly, without it on average over t. With ``sft_weighting`` elbo a masked token weighs
    1 / t, as in LLaDA's training, which is an average of 1 for every t."""
    maskable, options = request.maskable, request.options
    views, timesteps = [], []
    for generator in request.generators:
        timestep = torch.rand((maskable.shape[0], 1), generator=generator, dtype=torch.float64)
        timestep = options.min_timestep + (1 - options.min_timestep) * timestep
        timesteps.append(timestep)
        hidden = maskable & (torch.rand(maskable.shape, generator=generator, dtype=torch.float64) < timestep)
        views += [hidden, maskable & ~hidden] if options.complementary else [hidden]
    masked = torch.stack(views)
    if options.sft_weighting == "elbo":
        return Noise(masked, masked / (len(request.generators) * torch.stack(timesteps)))
    share = 1.0 if options.complementary else (1 + options.min_timestep) / 2  # of a view, or a pair of them, masked
    return Noise(masked, masked.double() / (len(request.generators) * share))
