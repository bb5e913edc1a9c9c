"""Whole numbers rounded up, exactly: no float is made on the way."""

from __future__ import annotations


def ceil_divide(number: int, by: int) -> int:
    """``number / by``, rounded up; ``by`` is positive."""
    return -(-number // by)


def round_up(number: int, step: int) -> int:
    """The least multiple of ``step``, which is positive, that is not below ``number``."""
    return ceil_divide(number, step) * step
