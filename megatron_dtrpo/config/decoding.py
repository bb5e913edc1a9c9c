"""How responses are decoded, as a command is told to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodingOptions:
    """``small_block_size`` divides the block size. With ``sub_block_cache`` the passes of a sub-block after its first
    one (with prediction shift 1: after its first token is known) compute that sub-block only, against keys and values
    that its last whole-block pass left: Fast-dLLM v2's approximation. ``temperature`` 0 is greedy, and then ``top_p``
    has no effect."""

    max_new_tokens: int = 512
    threshold: float = 0.9
    small_block_size: int = 8
    sub_block_cache: bool = False
    temperature: float = 0.0
    top_p: float = 0.95
