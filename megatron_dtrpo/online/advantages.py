"""How much better an answer is than the others of its group: pure functions on rewards.

Legend: n answers of one group, k rewards of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_LEAST_SPREAD = 1e-4  # added to a standard deviation, as TRL does


def has_spread(rewards: np.ndarray, weights: Sequence[float], apart: bool) -> bool:
    """Whether some answer of ``rewards`` fp64 ``[n, k]`` is better than another. ``apart``: in one reward; otherwise
    in their weighted sum."""
    compared = rewards[:, np.flatnonzero(weights)] if apart else rewards @ np.asarray(weights, dtype=float)
    return bool((compared.max(0) > compared.min(0)).any())


def group_advantages(rewards: np.ndarray, weights: Sequence[float], divide: bool, apart: bool) -> np.ndarray:
    """The advantages fp64 ``[n]`` of answers with ``rewards`` fp64 ``[n, k]``, n >= 2.

    Args:
        weights: of the k rewards.
        divide: by the standard deviation within the group (GRPO, arXiv 2402.03300; without it Dr. GRPO, 2503.20783).
        apart: each reward is compared and divided by itself, and the weighted sum comes after (GDPO, LightningRL).
    """
    weight = np.asarray(weights, dtype=float)
    compared = rewards if apart else (rewards @ weight)[:, None]
    centred = compared - compared.mean(0)
    if divide:
        centred = centred / (compared.std(0, ddof=1) + _LEAST_SPREAD)
    return centred @ weight if apart else centred[:, 0]
