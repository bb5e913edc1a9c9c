"""torch.compile for kernels of fixed shapes, and how often it has compiled."""

from __future__ import annotations

import sys
from collections.abc import Callable

# Per function. torch's own limit, 8, is soon reached by a few lengths with and without gradient, and beyond it
# FlexAttention falls back to building the dense scores.
SHAPES = 64


def compiled(function: Callable) -> Callable:
    """``function``, compiled anew for each shape it meets, `SHAPES` at most."""
    import torch._dynamo  # slow to import, and not needed on a CPU

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, SHAPES)
    return torch.compile(function, dynamic=False)


def compilations() -> int:
    """Graphs that this process has compiled so far. Once a run is warm the number stands still."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo is not None else 0
