"""torch.compile for kernels, with a limit that is an error, and how often it has compiled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from megatron_dtrpo.errors import UserError

# What any function may need; torch's own limit is 8, which a few lengths with and without gradient soon reach.
_LEAST = 32
# Of one function, and of one function over all modules that it was compiled with. torch renamed them in 2.6.
_LIMITS = ("recompile_limit", "accumulated_recompile_limit", "cache_size_limit", "accumulated_cache_size_limit")


def compiled(function: Callable, dynamic: bool | None = False) -> Callable:
    """``function``, compiled anew for each kind of arguments it meets.

    torch runs a function that it has compiled too often uncompiled, with a warning: FlexAttention would then build the
    dense scores. Here that is a UserError; `allow_variants` says how many are expected.

    Args:
        dynamic: as ``torch.compile``'s: False for a kernel of each shape, None for one of any after two.
    """
    import torch._dynamo  # slow to import, and not needed on a CPU

    allow_variants(_LEAST)
    errors = torch._dynamo.exc
    limit_reached = getattr(errors, "FailOnRecompileLimitHit", None) or errors.FailOnCacheLimitHit
    kernel = torch.compile(function, dynamic=dynamic, fullgraph=True)  # fullgraph makes torch raise at the limit

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return kernel(*args, **kwargs)
        except limit_reached as error:
            raise UserError(
                f"{function.__name__} was compiled {torch._dynamo.config.recompile_limit} times, more often than there "
                "are lengths of packed sequences: TORCH_LOGS=recompiles says why; --attention-backend sdpa does without"
            ) from error

    return call


def allow_variants(count: int) -> None:
    """Lets torch compile one function ``count`` times at least."""
    import torch._dynamo

    config = torch._dynamo.config
    for name in _LIMITS:
        if hasattr(config, name) and getattr(config, name) < count:
            setattr(config, name, count)


def compilations() -> int:
    """Graphs that this process has compiled so far. Once a run is warm the number stands still."""
    dynamo = sys.modules.get("torch._dynamo.utils")
    return dynamo.counters["stats"]["unique_graphs"] if dynamo is not None else 0
