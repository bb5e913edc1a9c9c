"""The command-line flags of decoding, shared by the verbs that decode."""

from __future__ import annotations

import argparse
import sys

from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.config.decoding import CACHES, RULES, DecodingOptions, default_small_block
from megatron_dtrpo.config.settings import FIELDS
from megatron_dtrpo.errors import UserError


def add_adapter_flag(parser: argparse.ArgumentParser) -> None:
    """The adapter beside --checkpoint."""
    parser.add_argument(
        "--load-adapter",
        metavar="DIR",
        help="Adapter (LoRA) of these weights. A run that trained one may be --checkpoint itself.",
    )


def add_decoding_flags(parser: argparse.ArgumentParser, **defaults) -> None:
    """The flags of `decoding_options`; ``defaults`` replace those of `DecodingOptions`."""
    default = {**vars(DecodingOptions()), "seed": 1234, **defaults}
    parser.add_argument(
        "--max-new-tokens", type=int, default=default["max_new_tokens"], help="Longest response. Default: %(default)s."
    )
    parser.add_argument(
        "--rule",
        choices=RULES,
        help="What a step writes: "
        + "; ".join(f"{name}: {row.words}" for name, row in RULES.items())
        + ". Default: the "
        "family's own.",
    )
    parser.add_argument(
        "--denoising-steps",
        type=int,
        metavar="N",
        help=f"{_readers('denoising_steps')}: steps that a sub-block is written in. Default: as many as it has tokens.",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help=f"{_readers('threshold')}: unmask tokens whose confidence is above this. Default: the rule's own, "
        + ", ".join(f"{row.threshold} of {name}" for name, row in RULES.items() if row.threshold is not None)
        + ".",
    )
    parser.add_argument(
        "--small-block-size",
        type=int,
        metavar="N",
        help="Tokens of a sub-block; sub-blocks are written from left to right. Default: the block, with threshold 8 "
        "if that divides it; under full attention 32, LLaDA's block length, with Dream's rules the whole response.",
    )
    parser.add_argument(
        "--sub-block-cache",
        nargs="?",
        const="dual",
        choices=CACHES,
        help="An approximation, faster, Fast-dLLM's: after a sub-block's first pass over the whole block, under full "
        "attention over prompt and response, compute anew "
        + "; ".join(f"{name}: {words}" for name, words in CACHES.items())
        + ". Without a word: dual. A decoding made so is not replayed exactly.",
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


def _readers(option: str) -> str:
    """The rules that read an option, for people."""
    return ", ".join(name for name, row in RULES.items() if option in row.reads)


def decoding_options(arguments: argparse.Namespace, block_size: int, rule: str = "threshold") -> DecodingOptions:
    """``rule``: the family's own. Raises UserError for values that cannot be, and for those that nothing would read."""
    if block_size == 1:
        _refuse_options_of_blocks(arguments)
    rule = "leftmost" if block_size == 1 else arguments.rule or rule
    small = default_small_block(block_size, rule, arguments.max_new_tokens)
    if arguments.small_block_size is not None:
        small = arguments.small_block_size
    for option in ("denoising_steps", "threshold"):
        value = getattr(arguments, option)
        if value is not None and option not in RULES[rule].reads:
            flag = "--" + option.replace("_", "-")
            raise UserError(f"{flag} {value}: --rule {rule} does not read it; {_readers(option)} do: leave it out")
    steps, threshold = arguments.denoising_steps, arguments.threshold
    for holds, message in (
        (steps is None or steps >= 1, f"--denoising-steps {steps}: it must be at least 1"),
        (arguments.max_new_tokens >= 1, f"--max-new-tokens {arguments.max_new_tokens}: it must be at least 1"),
        (threshold is None or 0 <= threshold <= 1, f"--threshold {threshold}: it must be from 0 to 1"),
        (arguments.temperature >= 0, f"--temperature {arguments.temperature}: it must not be negative"),
        (0 < arguments.top_p <= 1, f"--top-p {arguments.top_p}: it must be above 0 and at most 1"),
        (
            small > 0 and (block_size == FULL or (small <= block_size and block_size % small == 0)),
            f"--small-block-size {small}: it must divide the model's block_size {block_size}",
        ),
        (
            not arguments.sub_block_cache or small != block_size,
            f"--sub-block-cache has no effect where a sub-block is the block of {block_size} tokens: leave it out, or "
            "give a smaller --small-block-size",
        ),
        (arguments.seed >= 0, f"--seed {arguments.seed}: it must not be negative"),
    ):
        if not holds:
            raise UserError(message)
    return DecodingOptions(
        max_new_tokens=arguments.max_new_tokens,
        rule=rule,
        denoising_steps=steps,
        threshold=threshold,
        small_block_size=small,
        sub_block_cache=arguments.sub_block_cache,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
    )


def _refuse_options_of_blocks(arguments: argparse.Namespace) -> None:
    """A model of block size 1 writes from left to right, a token a pass, whatever the rule."""
    for option in ("rule", "threshold", "denoising_steps", "sub_block_cache"):
        value = getattr(arguments, option)
        if value not in (None, "leftmost"):
            flag = "--" + option.replace("_", "-")
            raise UserError(f"{flag} {value} has no effect with block size 1, one token a pass: leave it out")


def warn_of_approximation(options: DecodingOptions) -> None:
    """Says of recorded decodings that they are not those that training replays."""
    if options.sub_block_cache:
        print(
            f"warning: --sub-block-cache {options.sub_block_cache} is an approximation: the recorded decodings replay "
            "otherwise than they were made; leave it out for --estimator trajectory and exact_trajectory",
            file=sys.stderr,
        )
