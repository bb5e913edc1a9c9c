"""Rewards for runs whose answers are random bytes."""

from __future__ import annotations

import zlib


def parity(row: dict, text: str) -> float:
    """0, 1 or 2 by the text's checksum: any two answers may differ, and equal ones never do."""
    return zlib.crc32(text.encode()) % 3


def same(row: dict, text: str) -> float:
    """Nothing to learn from."""
    return 1.0


def broken(row: dict, text: str) -> float:
    return row["solution"]


def even(row: dict, text: str) -> bool:
    """Right or wrong by the text's checksum."""
    return zlib.crc32(text.encode()) % 2 == 0
