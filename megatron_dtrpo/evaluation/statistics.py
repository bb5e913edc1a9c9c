"""Means over examples, with their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """A mean over examples with its 95% confidence interval."""

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
