"""How responses are decoded, as a command is told to."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dtrpo.config.blocks import FULL

# Rules, and what they do: by these words the flag is explained.
RULES = {
    "threshold": "all tokens surer than --threshold, and always the surest (Fast-dLLM v2)",
    "static": "the surest, as many in each of --denoising-steps (SDAR, LLaDA)",
    "maskgit_plus": "the surest, by Dream's schedule over --denoising-steps",
}


@dataclass(frozen=True)
class DecodingOptions:
    """``small_block_size`` divides the block size; under full attention, where sub-blocks are counted from the
    response's first token, it is any length, LLaDA's block length. ``rule``: of `RULES`; one with a schedule writes a
    sub-block in ``denoising_steps`` steps, None: a token a step. With ``sub_block_cache`` the passes of a sub-block
    after its first one (with prediction shift 1: after its first token is known) compute that sub-block only, against
    keys and values that its last whole-block pass left: Fast-dLLM v2's approximation. ``temperature`` 0 is greedy, and
    then ``top_p`` has no effect."""

    max_new_tokens: int = 512
    rule: str = "threshold"
    denoising_steps: int | None = None
    threshold: float = 0.9
    small_block_size: int = 8
    sub_block_cache: bool = False
    temperature: float = 0.0
    top_p: float = 0.95


LLADA_BLOCK = 32  # LLaDA's block length in its own examples


def default_small_block(block_size: int, rule: str, max_new_tokens: int) -> int:
    """Tokens of a sub-block where nobody says how many."""
    if block_size != FULL:
        return min(8, block_size)
    return max_new_tokens if rule == "maskgit_plus" else min(LLADA_BLOCK, max_new_tokens)
