"""Surrogate log-likelihoods of preference pairs under a checkpoint, and what they say about a policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from megatron_dtrpo.data.batches import BatchBuilder, MicroBatch
from megatron_dtrpo.data.sampler import Sample
from megatron_dtrpo.model.attention import attention_width
from megatron_dtrpo.model.chunks import chunks_of
from megatron_dtrpo.runtime import objects
from megatron_dtrpo.training.step import DeviceBatch, score

CHUNK = 256  # pairs whose micro-batches are alive at once


def score_pairs(
    model, builder: BatchBuilder, indices: list[int], device: torch.device, backend: str
) -> dict[int, tuple[float, float]]:
    """``L`` of chosen and rejected per example index, on every process; collective. The noise is that of epoch 0.
    ``model`` is this rank's stage, or a list of its virtual ones."""
    scores: dict[int, tuple[float, float]] = {}
    for start in range(0, len(indices), CHUNK):
        objects.stop_together()
        batches = builder.batches([Sample(0, index) for index in indices[start : start + CHUNK]])
        scores |= {s.index: pair for s, pair in gathered_scores(model, batches, device, backend).items()}
    return {index: scores[index] for index in indices}


def gathered_scores(
    model, batches: list[MicroBatch], device: torch.device, backend: str, multiple: int = 1
) -> dict[Sample, tuple[float, float]]:
    """``L`` of chosen and rejected of every sample in any process's ``batches``, on every process; collective.
    ``multiple``: of `DeviceBatch`."""
    width = attention_width(chunks_of(model)[0].config)
    on_device = [DeviceBatch(batch, device, backend, width, multiple) for batch in batches]
    results = score(model, on_device) if batches else []
    mine: dict[Sample, tuple[float, float]] = {}
    for batch, values in zip(batches, results, strict=False):  # no results but on the last stage
        mine.update(zip(batch.samples, map(tuple, values.view(-1, 2).tolist()), strict=True))
    return joined(mine)


def joined(found: dict) -> dict:
    """What any process ``found``, on every process; collective. Those that found the same key have the same value."""
    # Tensor- and context-parallel processes hold the same: one of them speaks.
    speaks = parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0
    return {key: value for part in objects.gather(found if speaks else {}) for key, value in part.items()}


@dataclass(frozen=True)
class Summary:
    """A mean over pairs with its 95% confidence interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]"


def accuracy(margins: list[float]) -> Summary:
    """Share of pairs with a positive margin, a tie counting half, with Wilson's interval (sensible near 0 and 1)."""
    n, z = len(margins), 1.96
    p = sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins) / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Summary(p, max(0.0, centre - half), min(1.0, centre + half))


def mean(values: list[float]) -> Summary:
    """The mean with a normal interval."""
    n = len(values)
    m = sum(values) / n
    deviation = math.sqrt(sum((v - m) ** 2 for v in values) / (n - 1)) if n > 1 else math.inf
    half = 1.96 * deviation / math.sqrt(n)
    return Summary(m, m - half, m + half)
