"""Writes responses to prompts with a checkpoint, block by block.

Prompt rows (JSONL, Parquet) hold `prompt` (text or messages), `messages` or `prompt_ids`, or are rows of training data,
whose prompt is decoded as it is trained (docs/data.md). Each output row is the input row with `completion`,
`completion_ids` and `completion_passes` (the forward passes that it took). With --record-trajectory it also has
`completion_steps` (the decoding step that wrote each token), `completion_confidence` and `completion_discarded`
(tokens that were thrown away behind an end token). --trace writes a page that replays the decoding. RUN is a checkpoint
or run folder, or an exported Hugging Face folder. Runs under torchrun too: tensor, pipeline and data parallel.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from megatron_dtrpo.cli.decoding_flags import (
    add_adapter_flag,
    add_decoding_flags,
    add_prompt_file_flags,
    decoding_options,
    warn_of_approximation,
)
from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser
from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.config.parser import add_settings, parse_command
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.registry import family_of

EXAMPLES = """
  megatron-dtrpo generate --checkpoint RUN --prompt "Tom has 3 apples, buys 4. How many now? "
  megatron-dtrpo generate --checkpoint RUN --prompts prompts.jsonl --output answers.jsonl --batch-size 16
"""
TRACED = 20  # decodings on one page: enough to choose from, small enough to open anywhere


def build_parser() -> Parser:
    parser = command_parser("megatron-dtrpo generate", __doc__, EXAMPLES)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="Checkpoint, run or Hugging Face folder.")
    add_adapter_flag(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="One prompt; the response is printed.")
    parser.add_argument("--prompts", metavar="FILE", help="Many prompts.")
    parser.add_argument("--output", metavar="FILE", help="JSONL file to write; needed with --prompts.")
    parser.add_argument("--apply-chat-template", action="store_true", help="Wrap text prompts as a user's message.")
    add_prompt_file_flags(parser)
    parser.add_argument("--batch-size", type=int, default=16, help="Prompts decoded at once. Default: %(default)s.")
    parser.add_argument(
        "--stop-token",
        action="append",
        default=[],
        metavar="TOKEN",
        help="A token that ends a response and stays in it, beside the tokenizer's end token; may be repeated.",
    )
    parser.add_argument(
        "--verifier",
        metavar="NAME",
        help="Judge the responses: numeric (the final number against the "
        "row's answer) or module:function. Prints the share that is right.",
    )
    parser.add_argument("--record-trajectory", action="store_true", help="Write each token's decoding step.")
    parser.add_argument("--trace", metavar="FILE.html", help=f"Write a page that replays the first {TRACED} prompts.")
    parser.add_argument("--no-progress", action="store_true", help="No progress bar.")
    add_decoding_flags(parser)
    add_settings(parser, ["parallel"])
    return parser


def _check(arguments: argparse.Namespace) -> None:
    if (arguments.prompt is None) == (arguments.prompts is None):
        raise UserError("give either --prompt TEXT or --prompts FILE")
    if arguments.prompt is not None and arguments.split is not None:
        raise UserError("--split is a part of --prompts FILE: leave it out")
    if arguments.prompts is not None and arguments.output is None:
        raise UserError("--output is missing: give the JSONL file to write")
    if arguments.record_trajectory and arguments.output is None:
        raise UserError("--record-trajectory writes columns of --output FILE: give that too")
    if arguments.temperature == 0 and arguments.top_p != DecodingOptions.top_p:
        raise UserError(
            f"--top-p {arguments.top_p}: at temperature 0 nothing is drawn: give --temperature, or leave it out"
        )
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size}: it must be at least 1")
    for flag in ("output", "trace"):
        path = getattr(arguments, flag)
        if path and not Path(path).resolve().parent.is_dir():
            raise UserError(f"--{flag} {path}: its folder does not exist")


def main(argv: list[str] | None = None) -> int:
    return run_command(_generate, argv)


def _generate(argv: list[str]) -> None:
    arguments, config, _ = parse_command(build_parser(), argv)
    _check(arguments)
    from megatron_dtrpo.data.prompts import make_prompt, prompt_notes, read_prompts
    from megatron_dtrpo.data.tally import Tally
    from megatron_dtrpo.evaluation.generation import decode_prompts, speed
    from megatron_dtrpo.evaluation.session import locate_checkpoint, token_ids
    from megatron_dtrpo.evaluation.verifiers import Judge, load_verifier, require_some_answer

    judge = Judge(load_verifier(arguments.verifier)) if arguments.verifier else None
    with locate_checkpoint(arguments.checkpoint, config, adapter=arguments.load_adapter) as source:
        options = decoding_options(arguments, config.model.block_size, family_of(config.model).rule)
        end_ids = token_ids(source.tokenizer, arguments.stop_token)
        known = (source.tokenizer, config.model.max_position_embeddings, arguments.apply_chat_template)
        skipped = Tally() if arguments.bad_rows == "skip" else None
        if arguments.prompts is not None:
            prompts = read_prompts(arguments.prompts, *known, arguments.split, skipped)
        else:
            prompts = [make_prompt({"prompt": arguments.prompt}, "--prompt", *known)]
        if arguments.verifier:
            require_some_answer(arguments.verifier, prompts)
        with source.open() as engine:
            for note in prompt_notes(prompts, skipped) if engine.is_main else ():
                print(note, file=sys.stderr)
            if engine.is_main and arguments.record_trajectory:
                warn_of_approximation(options)
            started = time.perf_counter()
            decoded = decode_prompts(
                engine,
                prompts,
                options,
                batch_size=arguments.batch_size,
                seed=arguments.seed,
                end_ids=end_ids,
                progress=not arguments.no_progress,
            )
            seconds = time.perf_counter() - started
            if engine.is_main:
                completions = [samples[0] for samples in decoded]
                verdicts = _judge(engine.tokenizer, prompts, completions, judge, arguments.verifier)
                _write(engine.tokenizer, prompts, completions, verdicts, arguments)
                unfinished = sum(not completion.ended for completion in completions)
                print(f"{speed(completions, seconds)}; {unfinished} without an end token", file=sys.stderr)


def _judge(tokenizer, prompts, completions, judge, name: str) -> list[bool | None]:
    """Whether each response is right; None where nobody can say. Prints the share of those that are."""
    if judge is None:
        return [None] * len(prompts)
    from megatron_dtrpo.evaluation.statistics import accuracy

    verdicts = [
        judge(prompt.row, prompt.location, tokenizer.decode(completion.answer))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    judge.report()
    judged = [verdict for verdict in verdicts if verdict is not None]
    if not judged:
        raise UserError(f"--verifier {name}: no response could be judged; {judge.failures[0]}")
    print(f"exact match          {accuracy([1.0 if verdict else -1.0 for verdict in judged])}")
    return verdicts


def _write(tokenizer, prompts, completions, verdicts, arguments) -> None:
    from megatron_dtrpo.data.json_line import json_line
    from megatron_dtrpo.files import write_atomically
    from megatron_dtrpo.inference.recording import discarded_rows

    lines = []
    for prompt, completion, verdict in zip(prompts, completions, verdicts, strict=True):
        row = {**prompt.row, "completion": tokenizer.decode(completion.answer), "completion_ids": completion.tokens}
        row["completion_passes"] = completion.passes
        if arguments.verifier:
            row["correct"] = verdict
        if arguments.record_trajectory:
            row["completion_steps"] = completion.steps
            row["completion_confidence"] = [round(c, 6) for c in completion.confidence]
            row["completion_discarded"] = discarded_rows(completion)
        lines.append(json_line(row))
    try:
        if arguments.output:
            write_atomically(Path(arguments.output), "".join(lines))
        if arguments.trace:
            write_atomically(Path(arguments.trace), _trace_page(tokenizer, prompts, completions, arguments))
    except OSError as error:
        raise UserError(
            f"{error.filename or arguments.output or arguments.trace}: cannot be written ({error.strerror})"
        ) from None
    if arguments.prompt is not None:
        print(tokenizer.decode(completions[0].answer))


def _trace_page(tokenizer, prompts, completions, arguments) -> str:
    from megatron_dtrpo.evaluation.session import token_ids
    from megatron_dtrpo.inference.trace import trace_of, trace_page

    end_ids, traced = token_ids(tokenizer, arguments.stop_token), zip(prompts[:TRACED], completions, strict=False)
    traces = [trace_of(prompt.text, completion, tokenizer, end_ids) for prompt, completion in traced]
    return trace_page(traces, f"Decoding with {Path(arguments.checkpoint).name}")
