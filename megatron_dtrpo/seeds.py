"""A seed that stands for something, the same in every process, on every machine and in every version."""

from __future__ import annotations

import hashlib


def stable_seed(of: bytes) -> int:
    """A number from 0 to 2**63 - 1, which every generator takes. Neighbouring inputs give unrelated numbers."""
    return int.from_bytes(hashlib.blake2b(of, digest_size=8).digest(), "little") >> 1
