"""The command-line flags of decoding, shared by the verbs that decode."""

from __future__ import annotations

import argparse

from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.config.decoding import RULES, DecodingOptions, default_small_block
from megatron_dtrpo.config.settings import FIELDS
from megatron_dtrpo.errors import UserError


def add_decoding_flags(parser: argparse.ArgumentParser, **defaults) -> None:
    """The flags of `decoding_options`; ``defaults`` replace those of `DecodingOptions`."""
    default = {**vars(DecodingOptions()), "seed": 1234, **defaults}
    parser.add_argument(
        "--max-new-tokens", type=int, default=default["max_new_tokens"], help="Longest response. Default: %(default)s."
    )
    parser.add_argument(
        "--rule",
        choices=RULES,
        help="What a step writes: " + "; ".join(f"{name}: {words}" for name, words in RULES.items()) + ". Default: the "
        "family's own.",
    )
    parser.add_argument(
        "--denoising-steps",
        type=int,
        metavar="N",
        help="static, maskgit_plus: steps that a sub-block is written in. Default: as many as it has tokens.",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=default["threshold"],
        help="Unmask tokens whose confidence is above this, and always the most confident one. 1: one at a time. "
        "Default: %(default)s.",
    )
    parser.add_argument(
        "--small-block-size",
        type=int,
        metavar="N",
        help="Tokens of a sub-block; sub-blocks are "
        "written from left to right. Default: 8, or the block size if that is smaller; under full attention 32, "
        "LLaDA's block length, with maskgit_plus the whole response.",
    )
    parser.add_argument(
        "--sub-block-cache",
        action="store_true",
        help="Recompute the current sub-block only, where "
        "its first token is known: Fast-dLLM v2's approximation, faster.",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=default["temperature"],
        help="0: the most probable token. Default: %(default)s.",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=default["top_p"],
        help="Above temperature 0: sample from the "
        "most probable tokens that together have this probability. Default: %(default)s.",
    )
    parser.add_argument(
        "--seed", type=int, default=default["seed"], help="Seed of what is sampled. Default: %(default)s."
    )


def add_prompt_file_flags(parser: argparse.ArgumentParser) -> None:
    """How a file of prompts is read, in the words of the trainer's settings."""
    for name in ("split", "bad_rows"):
        field = FIELDS[name]
        parser.add_argument(
            "--" + name.replace("_", "-"),
            choices=field.metadata["choices"] or None,
            default=field.default,
            help=field.metadata["help"] + (" Default: %(default)s." if field.default else ""),
        )


def decoding_options(arguments: argparse.Namespace, block_size: int, rule: str = "threshold") -> DecodingOptions:
    """``rule``: the family's own. Raises UserError for values that cannot be."""
    rule = arguments.rule or rule
    small = default_small_block(block_size, rule, arguments.max_new_tokens)
    if arguments.small_block_size is not None:
        small = arguments.small_block_size
    steps = arguments.denoising_steps
    for holds, message in (
        (steps is None or steps >= 1, f"--denoising-steps {steps}: it must be at least 1"),
        (steps is None or rule != "threshold", "--denoising-steps goes with --rule static or maskgit_plus"),
        (
            block_size != FULL or not arguments.sub_block_cache,
            "--sub-block-cache: under full attention nothing is cached: leave it out",
        ),
        (arguments.max_new_tokens >= 1, f"--max-new-tokens {arguments.max_new_tokens}: it must be at least 1"),
        (0 <= arguments.threshold <= 1, f"--threshold {arguments.threshold}: it must be from 0 to 1"),
        (arguments.temperature >= 0, f"--temperature {arguments.temperature}: it must not be negative"),
        (0 < arguments.top_p <= 1, f"--top-p {arguments.top_p}: it must be above 0 and at most 1"),
        (
            small > 0 and (block_size == FULL or (small <= block_size and block_size % small == 0)),
            f"--small-block-size {small}: it must divide the model's block_size {block_size}",
        ),
        (
            block_size > 1 or not arguments.sub_block_cache,
            "--sub-block-cache has no effect with block size 1: leave it out",
        ),
        (
            block_size > 1 or arguments.threshold == DecodingOptions.threshold,
            f"--threshold {arguments.threshold} has no effect with block size 1, one token a pass: leave it out",
        ),
        (arguments.seed >= 0, f"--seed {arguments.seed}: it must not be negative"),
    ):
        if not holds:
            raise UserError(message)
    return DecodingOptions(
        max_new_tokens=arguments.max_new_tokens,
        rule=rule,
        denoising_steps=steps,
        threshold=arguments.threshold,
        small_block_size=small,
        sub_block_cache=arguments.sub_block_cache,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
    )
