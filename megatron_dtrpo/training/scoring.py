"""Surrogate log-likelihoods of preference pairs."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dtrpo.data.batches import BatchBuilder
from megatron_dtrpo.data.micro_batch import MicroBatch, Sample
from megatron_dtrpo.runtime import objects
from megatron_dtrpo.training.engine import Engine

CHUNK = 256  # pairs whose micro-batches are alive at once


def score_pairs(engine: Engine, builder: BatchBuilder, indices: list[int]) -> dict[int, tuple[float, float]]:
    """``L`` of chosen and rejected per example index, on every process; collective. The noise is that of epoch 0."""
    scores: dict[int, tuple[float, float]] = {}
    for start in range(0, len(indices), CHUNK):
        objects.stop_together()
        batches = builder.batches([Sample(0, index) for index in indices[start : start + CHUNK]])
        scores |= {s.index: pair for s, pair in gathered_scores(engine, batches).items()}
    return {index: scores[index] for index in indices}


def gathered_scores(engine: Engine, batches: Sequence[MicroBatch]) -> dict[Sample, tuple[float, float]]:
    """``L`` of chosen and rejected of every sample in any process's ``batches``, on every process; collective."""
    mine: dict[Sample, tuple[float, float]] = {}
    for batch, values in zip(batches, engine.score(batches), strict=False):  # no results but on the last stage
        mine.update(zip(batch.samples, map(tuple, values.view(-1, 2).tolist()), strict=True))
    return engine.joined(mine)
