"""Dropout whose noise is a pure function of what is dropped: the same under every layout, packing and resume.

A number stands for a token of an example's view; hashed with the feature's number it says whether the feature is kept.
Integers wrap, as wanted. Nothing here touches a device or global state.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# SplitMix64's and MurmurHash3's finalizers: odd factors that spread every bit over the whole number.
_FACTORS_64 = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_FACTORS_32 = (-0x7A143595, -0x3D4D51CB)


def _spread(value: Tensor) -> Tensor:
    """int64, any shape: neighbouring numbers give unrelated ones."""
    value = (value ^ (value >> 30 & 0x3FFFFFFFF)) * _FACTORS_64[0]
    value = (value ^ (value >> 27 & 0x1FFFFFFFFF)) * _FACTORS_64[1]
    return value ^ (value >> 31 & 0x1FFFFFFFF)


def token_numbers(seed: int, fields: Sequence[Tensor]) -> Tensor:
    """One number for each token, from int64 ``fields`` ``[S]`` that say which token it is: int64 ``[S]``."""
    number = torch.full_like(fields[0], seed)
    for field in fields:
        number = _spread(number ^ _spread(field))
    return number


def kept(token: Tensor, seed: int, features: Tensor, dropout: float) -> Tensor:
    """Which features of which tokens are kept, each with probability ``1 - dropout``.

    Args:
        token: of `token_numbers`, ``[S]``; ``seed``: of the place in the model.
        features: int64 ``[F]``, numbers of the features.

    Returns:
        bool ``[S, F]``.
    """
    row, column = _spread(token ^ seed).int(), _spread(features + 1).int()
    value = row.unsqueeze(1) ^ column
    value = (value ^ (value >> 16 & 0xFFFF)) * _FACTORS_32[0]
    value = (value ^ (value >> 13 & 0x7FFFF)) * _FACTORS_32[1]
    value = value ^ (value >> 16 & 0xFFFF)
    return value >= int(-(2**31) + dropout * 2**32)
