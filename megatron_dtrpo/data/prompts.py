"""Prompts to decode: what a file of them may hold, checked before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dtrpo.data.examples import encode_records, note_lines
from megatron_dtrpo.data.prompt_records import prompt_record
from megatron_dtrpo.data.record import Messages, Record
from megatron_dtrpo.data.rows import open_rows
from megatron_dtrpo.data.tally import Tally, bad_rows_error, skipped_line
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A row of the file as it was, where it stands, its prompt as text and as token ids [P], P >= 1. ``asked`` is the
    prompt as the row gives it, text or messages; the text where it gives ids. ``notes`` as of `examples.Encoded`."""

    row: dict[str, Any]
    location: str
    text: str
    ids: list[int]
    asked: str | Messages
    notes: tuple[str, ...] = ()


def read_prompts(
    path: str | Path,
    tokenizer: Tokenizer,
    max_positions: int,
    apply_chat_template: bool = False,
    split: str | None = None,
    skipped: Tally | None = None,
) -> list[Prompt]:
    """The prompts of rows, exactly as training on these rows has them (see `records.prompt_record`).

    A row cannot be decoded that has no prompt, an empty one, one that leaves no position for an answer, or one that
    contains the mask token. Such rows are left out and added to ``skipped`` where that is given. Raises UserError that
    names every kind of them where it is not, or where no row is left.
    """
    rows = open_rows(path, split)
    bad = Tally() if skipped is None else skipped
    prompts = []
    for index in range(len(rows)):
        with bad.catching(rows, index):
            prompt = make_prompt(rows[index], rows.location(index), tokenizer, max_positions, apply_chat_template)
            prompts.append(replace(prompt, notes=(*rows.notes, *prompt.notes)))
    if bad.rows and (skipped is None or not prompts):
        raise bad_rows_error(bad, len(rows))
    return prompts


def make_prompt(
    row: dict[str, Any], location: str, tokenizer: Tokenizer, max_positions: int, apply_chat_template: bool = False
) -> Prompt:
    """One row of `read_prompts`."""
    try:
        record = prompt_record(row)
        (encoded,) = encode_records([record], (), tokenizer, apply_chat_template)
        if isinstance(encoded, UserError):
            raise encoded
        if len(encoded.prompt) >= max_positions:
            raise UserError(
                f"the prompt has {len(encoded.prompt)} tokens, the model's max_position_embeddings are "
                f"{max_positions}; shorten it"
            )
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
    asked = record.prompt if isinstance(record, Record) else row.get("prompt") or encoded.prompt_text
    return Prompt(row, location, encoded.prompt_text, encoded.prompt, asked, encoded.notes)


def prompt_notes(prompts: Sequence[Prompt], skipped: Tally | None = None) -> list[str]:
    """Lines that the owner of the data should read about ``prompts`` and about rows that `read_prompts` ``skipped``."""
    about: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        for note in prompt.notes:
            about.setdefault(note, []).append(number)
    left_out = [f"warning: {skipped_line(skipped, len(prompts) + skipped.rows)}"] if skipped else []
    return left_out + note_lines(about, lambda number: prompts[number].location)
