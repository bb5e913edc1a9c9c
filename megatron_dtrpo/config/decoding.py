"""How responses are decoded, as a command is told to."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dtrpo.config.blocks import FULL


@dataclass(frozen=True)
class Rule:
    """What a step of decoding writes: all that is surer than a threshold if that is at least its share, else so many of
    those that its order puts first.

    Attributes:
        words: by these the flag is explained.
        order: ``confidence``, of `diffusion.sampling.PLACES` or of `diffusion.sampling.MEASURES`.
        share: how many tokens a step writes at least, of `diffusion.sampling.SHARES`.
        threshold: of its own program; None: it has none.
    """

    words: str
    order: str = "confidence"
    share: str = "even"
    threshold: float | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        """The options that matter to it, of those that do not to every rule."""
        reads = {"threshold": self.threshold is not None, "denoising_steps": self.share != "one"}
        return tuple(option for option, does in reads.items() if does)

    @property
    def is_dreams(self) -> bool:
        return self.share in ("time", "drawn")


RULES = {
    "threshold": Rule(
        "all tokens surer than --threshold, and always the surest (Fast-dLLM v2)", share="one", threshold=0.9
    ),
    "static": Rule("the surest, as many in each of --denoising-steps (LLaDA, SDAR)"),
    "dynamic": Rule(
        "all tokens surer than --threshold if these are as many as static writes, else as static (SDAR)",
        threshold=0.85,
    ),
    "leftmost": Rule("the first masked ones, as many as static writes (SDAR)", order="position"),
    "maskgit_plus": Rule("the surest, by Dream's schedule over --denoising-steps", share="time"),
    "entropy": Rule("as maskgit_plus, those of the lowest entropy", order="entropy", share="time"),
    "topk_margin": Rule(
        "as maskgit_plus, those of the largest margin between the first and the second choice",
        order="margin",
        share="time",
    ),
    "origin": Rule("by Dream's schedule too, at random", order="time", share="drawn"),
}

# What a pass inside a sub-block computes anew, and what it takes from the last pass over the whole block.
CACHES = {
    "prefix": "the sub-block and what follows it, and keep what precedes it",
    "dual": "the sub-block alone, and keep what precedes and follows it",
}


@dataclass(frozen=True)
class DecodingOptions:
    """``small_block_size`` divides the block size; under full attention, where sub-blocks are counted from the
    response's first token, it is any length, LLaDA's block length. ``rule``: of `RULES`; one with a schedule writes a
    sub-block in ``denoising_steps`` steps, None: as many as it has tokens. ``threshold`` None: the rule's own, if it
    has one. ``sub_block_cache``: of `CACHES`, Fast-dLLM's approximations; None computes every pass whole.
    ``temperature`` 0 is greedy, and then ``top_p`` has no effect."""

    max_new_tokens: int = 512
    rule: str = "threshold"
    denoising_steps: int | None = None
    threshold: float | None = None
    small_block_size: int = 8
    sub_block_cache: str | None = None
    temperature: float = 0.0
    top_p: float = 0.95

    def __post_init__(self):
        if self.threshold is None:
            object.__setattr__(self, "threshold", RULES[self.rule].threshold)


LLADA_BLOCK = 32  # LLaDA's block length in its own examples


def default_small_block(block_size: int, rule: str, max_new_tokens: int) -> int:
    """Tokens of a sub-block where nobody says how many: only Fast-dLLM v2 and LLaDA divide what they write at once."""
    if block_size == FULL:
        return max_new_tokens if RULES[rule].is_dreams else min(LLADA_BLOCK, max_new_tokens)
    return 8 if rule == "threshold" and block_size % 8 == 0 else block_size
