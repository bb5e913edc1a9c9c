"""torch.compile for kernels, with a limit that is an error, and how often it has compiled."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from megatron_dtrpo.errors import UserError

# What any function may need; torch's own limit is 8, which a few lengths with and without gradient soon reach.
_LEAST = 32
# torch has renamed these settings. The limits are of one function, and of one over all that it was compiled for.
_FAIL = ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit")
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
    errors: Any = torch._dynamo.exc
    config: Any = torch._dynamo.config
    limit_reached = getattr(errors, "FailOnRecompileLimitHit", None) or errors.FailOnCacheLimitHit
    fail, limit = _known(config, *_FAIL), _known(config, "recompile_limit", "cache_size_limit")
    kernel = torch.compile(function, dynamic=dynamic)

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            # For this call alone: what megatron-core compiles may run uncompiled.
            with config.patch(**{fail: True}):
                return kernel(*args, **kwargs)
        except limit_reached as error:
            raise UserError(
                f"{function.__name__} was compiled {getattr(config, limit)} times, more often than there are lengths "
                "of packed sequences: TORCH_LOGS=recompiles says why; --attention-backend sdpa does without"
            ) from error

    return call


def _known(config, *names: str) -> str:
    """The first of ``names`` that this torch has among its settings."""
    return next(name for name in names if hasattr(config, name))


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
