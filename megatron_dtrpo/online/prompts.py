"""The prompts that a policy answers, with what its rewards compare with."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence

from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.prompts import Prompt, prompt_notes, read_prompts
from megatron_dtrpo.data.tally import Tally
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.online.rewards import load_reward, without_answer


def open_prompts(config: Config, tokenizer: Tokenizer) -> tuple[list[Prompt], list[str]]:
    """The prompts of a run, with what its rewards compare with, and lines about them. Raises UserError."""
    data = config.data
    skipped = Tally() if data.bad_rows == "skip" else None
    longest = config.model.max_position_embeddings
    prompts = read_prompts(data.data_path, tokenizer, longest, data.apply_chat_template, data.split, skipped)
    for name in config.online.rewards:
        load_reward(name)
    return _with_answers(config, prompts, prompt_notes(prompts, skipped))


def _with_answers(config: Config, prompts: list[Prompt], notes: list[str]) -> tuple[list[Prompt], list[str]]:
    """Without the rows in which a built-in verifier finds nothing to compare with, where ``bad_rows`` says skip."""
    problems = [without_answer(config.online.rewards, prompt.row) for prompt in prompts]
    bad = [number for number, problem in enumerate(problems) if problem is not None]
    if not bad:
        return prompts, notes
    line = f"{len(bad)} of {len(prompts)} rows cannot be rewarded: {prompts[bad[0]].location}: {problems[bad[0]]}"
    if config.data.bad_rows == "error" or len(bad) == len(prompts):
        raise UserError(line)
    kept = [prompt for prompt, problem in zip(prompts, problems, strict=True) if problem is None]
    return kept, [*notes, f"warning: left out: {line}"]


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Of the prompts' tokens, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(struct.pack(f"<q{len(prompt.ids)}q", len(prompt.ids), *prompt.ids))
    return digest.hexdigest()


def rows_fingerprint(prompts: Sequence[Prompt]) -> str:
    """Of the rows, in order: what rewards compare with is in them."""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        digest.update(json.dumps(prompt.row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()
