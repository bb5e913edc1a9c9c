"""Which example comes when: a pure function of the seed and of how many samples have been consumed.

Nothing is kept between steps that a checkpoint would have to store. A run that resumes, or that runs on another number
of ranks, sees the same examples in the same order.
"""

from __future__ import annotations

import numpy as np

from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.stored_examples import TokenStore
from megatron_dtrpo.errors import UserError


def epoch_order(n: int, seed: int, epoch: int, shuffle: bool = True) -> np.ndarray:
    """The order in which epoch ``epoch`` visits ``n`` examples: a permutation of 0 .. n - 1, int64 [n].

    It depends on ``seed`` (>= 0) and ``epoch`` alone; global random state is neither read nor changed.
    """
    if not shuffle:
        return np.arange(n, dtype=np.int64)
    # NumPy promises the same raw bits in every version, which it does not for Generator.permutation.
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(bits, kind="stable")


class SampleOrder:
    """Maps a count of consumed samples to the samples that come next, epoch after epoch."""

    def __init__(self, indices: np.ndarray, seed: int, shuffle: bool = True) -> None:
        """``indices`` int [n], n >= 1: the examples to visit once an epoch, as ``select_by_length`` gives them."""
        if len(indices) == 0:
            raise ValueError("no examples to order")
        self._indices = np.asarray(indices)
        self._seed = seed
        self._shuffle = shuffle
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        """Samples in an epoch."""
        return len(self._indices)

    def take(self, consumed: int, count: int) -> list[Sample]:
        """The ``count`` samples after the first ``consumed`` (>= 0) of the run."""
        n = len(self._indices)
        samples: list[Sample] = []
        used: dict[int, np.ndarray] = {}
        while len(samples) < count:
            epoch, start = divmod(consumed + len(samples), n)
            order = used[epoch] = self._orders[epoch] if epoch in self._orders else self._order(epoch)
            wanted = order[start : start + count - len(samples)]
            samples.extend(Sample(epoch, index) for index in wanted.tolist())
        if used:
            self._orders = dict(list(used.items())[-1:])  # the next call goes on from the last epoch
        return samples

    def _order(self, epoch: int) -> np.ndarray:
        return self._indices[epoch_order(len(self._indices), self._seed, epoch, self._shuffle)]


def select_by_length(
    store: TokenStore, lengths: np.ndarray, budget: int, on_too_long: str = "skip"
) -> tuple[np.ndarray, int]:
    """Examples whose packed length (``lengths``, int [n]) is at most ``budget`` tokens: (their numbers, int64 [m]; how
    many were left out).

    ``on_too_long="error"`` raises UserError at the first example that is longer. So does a budget that fits none.
    """
    if on_too_long not in ("skip", "error"):
        raise UserError(f"on_too_long: unknown {on_too_long!r}; use skip or error")
    fits = lengths <= budget
    if not fits.all() and on_too_long == "error":
        first = int(np.argmin(fits))
        problem = f"packs into {lengths[first]} tokens, the budget is {budget}"
        raise UserError(f"{store.location(first)}: {problem}; raise the budget or skip rows that are too long")
    if not fits.any():
        shortest = int(lengths.min())
        problem = f"no example packs into {budget} tokens, the shortest takes {shortest}"
        raise UserError(f"{store.source}: {problem}; raise the budget")
    usable = np.flatnonzero(fits)
    return usable, len(store) - len(usable)
