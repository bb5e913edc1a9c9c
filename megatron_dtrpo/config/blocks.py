"""The one axis along which diffusion language models differ: how many tokens a block has.

Blocks of a fixed number of tokens are block diffusion. With `FULL` prompt and response are one block, of whatever
length: full attention, as in LLaDA and Dream.
"""

from __future__ import annotations

FULL = 0
"""The block size that stands for the whole sequence."""


def grain(block_size: int) -> int:
    """Packed tokens come in multiples of so many, which share their document, branch, view and block."""
    return block_size or 1
