"""Python's garbage collector."""

from __future__ import annotations

import gc


def settle() -> None:
    """What was made until now is there to stay: the collector need not visit it again. For a process that is set up and
    begins its work; a program that imported torch has a million objects."""
    gc.collect()
    gc.freeze()
