"""Makes preference pairs of a checkpoint's own right and wrong answers.

Samples responses to every prompt, has each judged, and writes pairs of a right (chosen) and a wrong one (rejected) with
their exact token ids and recorded decodings, so that --estimator trajectory and exact_trajectory can replay them. The
verifier `numeric` compares the final number of a response with the row's `answer`; give `module:function` for your own:
function(row, text) -> bool. Prompt rows are those of `megatron-dtrpo generate`. Runs under torchrun as well.
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
from megatron_dtrpo.config.parser import add_settings, parse_command
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.registry import family_of

EXAMPLES = """
  megatron-dtrpo pairs --checkpoint RUN --prompts problems.jsonl --output pairs.jsonl --samples 8
"""


def build_parser() -> Parser:
    parser = command_parser("megatron-dtrpo pairs", __doc__, EXAMPLES)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="Checkpoint, run or Hugging Face folder.")
    add_adapter_flag(parser)
    parser.add_argument("--prompts", required=True, metavar="FILE", help="Prompts, with what the verifier needs.")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL file of pairs to write.")
    parser.add_argument("--samples", type=int, default=8, help="Responses per prompt. Default: %(default)s.")
    parser.add_argument(
        "--pairs-per-prompt",
        type=int,
        default=1,
        metavar="N",
        help="At most this many pairs of one prompt, no response twice. Default: %(default)s.",
    )
    parser.add_argument(
        "--verifier", default="numeric", metavar="NAME", help="numeric, or module:function. Default: %(default)s."
    )
    parser.add_argument("--apply-chat-template", action="store_true", help="Wrap text prompts as a user's message.")
    add_prompt_file_flags(parser)
    parser.add_argument("--batch-size", type=int, default=64, help="Responses decoded at once. Default: %(default)s.")
    parser.add_argument("--no-progress", action="store_true", help="No progress bar.")
    add_decoding_flags(parser, temperature=1.0, top_p=1.0)
    add_settings(parser, ["parallel"])
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for flag in ("samples", "pairs_per_prompt", "batch_size"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(arguments, flag)}: it must be at least 1")
    if not Path(arguments.output).resolve().parent.is_dir():
        raise UserError(f"--output {arguments.output}: its folder does not exist")
    if arguments.temperature == 0:
        raise UserError("--temperature 0 writes the same response every time: give a temperature above 0")


def main(argv: list[str] | None = None) -> int:
    return run_command(_build, argv)


def _build(argv: list[str]) -> None:
    arguments, config, _ = parse_command(build_parser(), argv)
    _check(arguments)
    from megatron_dtrpo.data.prompts import prompt_notes, read_prompts
    from megatron_dtrpo.data.tally import Tally
    from megatron_dtrpo.evaluation.generation import decode_prompts, speed
    from megatron_dtrpo.evaluation.session import locate_checkpoint
    from megatron_dtrpo.evaluation.verifiers import load_verifier, require_some_answer

    verifier = load_verifier(arguments.verifier)
    with locate_checkpoint(arguments.checkpoint, config, adapter=arguments.load_adapter) as source:
        options = decoding_options(arguments, config.model.block_size, family_of(config.model).rule)
        limit = config.model.max_position_embeddings
        skipped = Tally() if arguments.bad_rows == "skip" else None
        prompts = read_prompts(
            arguments.prompts, source.tokenizer, limit, arguments.apply_chat_template, arguments.split, skipped
        )
        require_some_answer(arguments.verifier, prompts)
        with source.open() as engine:
            for note in prompt_notes(prompts, skipped) if engine.is_main else ():
                print(note, file=sys.stderr)
            if engine.is_main:
                warn_of_approximation(options)
            started = time.perf_counter()
            completions = decode_prompts(
                engine,
                prompts,
                options,
                batch_size=arguments.batch_size,
                seed=arguments.seed,
                samples=arguments.samples,
                progress=not arguments.no_progress,
            )
            seconds = time.perf_counter() - started
            if engine.is_main:
                print(speed([c for each in completions for c in each], seconds), file=sys.stderr)
                _judge_and_write(engine.tokenizer, prompts, completions, verifier, arguments)


def _judge_and_write(tokenizer, prompts, completions, verifier, arguments) -> None:
    from megatron_dtrpo.evaluation.verifiers import Judge
    from megatron_dtrpo.online.pairs import Pairs, Rewarded, different

    judge, pairs = Judge(verifier), Pairs(arguments.pairs_per_prompt)
    for prompt, samples in zip(prompts, completions, strict=True):
        answers = [(samples[place], tokenizer.decode(samples[place].answer)) for place in different(samples)]
        judged = [(each, text, judge(prompt.row, prompt.location, text)) for each, text in answers]
        pairs.add(prompt, [Rewarded(each, text, verdict) for each, text, verdict in judged if verdict is not None])
    judge.report()
    if not pairs.lines:
        longer = "--max-new-tokens, " if pairs.endless else ""
        raise UserError(
            f"no prompt has both a right and a wrong response ({pairs.counts} in all): raise {longer}--samples or "
            "--temperature, or take other prompts"
        )
    try:
        pairs.write(Path(arguments.output))
    except UserError as error:
        raise UserError(f"--output {error}") from None
    print(f"different responses  {pairs.answers} ({pairs.counts})")
    print(f"prompts with both    {pairs.paired} of {pairs.prompts}")
    print(f"pairs                {len(pairs.lines)} in {arguments.output}")
