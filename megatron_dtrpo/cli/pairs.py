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
from typing import TYPE_CHECKING

from megatron_dtrpo.cli.decoding_flags import (
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

if TYPE_CHECKING:
    from megatron_dtrpo.diffusion.decoding import Completion

    Response = tuple[Completion, str]  # with its text

EXAMPLES = """
  megatron-dtrpo pairs --checkpoint RUN --prompts problems.jsonl --output pairs.jsonl --samples 8
"""


def build_parser() -> Parser:
    parser = command_parser("megatron-dtrpo pairs", __doc__, EXAMPLES)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="Checkpoint, run or Hugging Face folder.")
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
    with locate_checkpoint(arguments.checkpoint, config) as source:
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
    from megatron_dtrpo.data.json_line import json_line
    from megatron_dtrpo.evaluation.verifiers import Judge
    from megatron_dtrpo.files import write_atomically

    judge = Judge(verifier)
    lines: list[str] = []
    right_total = wrong_total = endless = both = 0
    for prompt, samples in zip(prompts, completions, strict=True):
        right: list[Response] = []
        wrong: list[Response] = []
        for completion in _different(samples):
            text = tokenizer.decode(completion.answer)
            verdict = judge(prompt.row, prompt.location, text)
            if verdict is not None:
                (right if verdict else wrong).append((completion, text))
        right_total, wrong_total = right_total + len(right), wrong_total + len(wrong)
        # An answer that never ends is no example to follow, whatever number it came past.
        ended = [(completion, text) for completion, text in right if completion.ended]
        endless, right = endless + len(right) - len(ended), ended
        pairs = list(zip(right, wrong, strict=False))[: arguments.pairs_per_prompt]
        both += bool(pairs)
        lines += [json_line(_row(prompt, *pair)) for pair in pairs]
    judge.report()
    without_end = f", of which {endless} have no end token and make no pair" if endless else ""
    counts = f"{right_total} right{without_end}, {wrong_total} wrong"
    if not lines:
        longer = "--max-new-tokens, " if endless else ""
        raise UserError(
            f"no prompt has both a right and a wrong response ({counts} in all): raise {longer}--samples or "
            "--temperature, or take other prompts"
        )
    try:
        write_atomically(Path(arguments.output), "".join(lines))
    except OSError as error:
        raise UserError(f"--output {arguments.output}: cannot be written ({error.strerror})") from None
    print(f"different responses  {right_total + wrong_total} ({counts})")
    print(f"prompts with both    {both} of {len(prompts)}")
    print(f"pairs                {len(lines)} in {arguments.output}")


def _different(samples: list[Completion]) -> list[Completion]:
    """The first of each group of equal responses."""
    return list({tuple(sample.tokens): sample for sample in reversed(samples)}.values())[::-1]


def _row(prompt, chosen: Response, rejected: Response) -> dict:
    """A preference row: the prompt's own row, both responses as text, and exactly as they were decoded, with the
    log-likelihood of everything that was written."""
    from megatron_dtrpo.inference.recording import discarded_rows

    row = {key: value for key, value in prompt.row.items() if key not in ("messages", "completion")}
    row |= {"prompt": prompt.asked, "prompt_ids": prompt.ids}
    for name, (completion, text) in (("chosen", chosen), ("rejected", rejected)):
        row[name] = [{"role": "assistant", "content": text}] if isinstance(prompt.asked, list) else text
        row |= {f"{name}_ids": completion.tokens, f"{name}_steps": completion.steps}
        row[f"{name}_discarded"] = discarded_rows(completion)
        row[f"{name}_log_likelihood"] = completion.log_likelihood()
    return row
