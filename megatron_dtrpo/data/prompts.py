"""Prompts to decode: what a file of them may hold, checked before a model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dtrpo.data.rows import open_rows
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """A row of the file as it was, where it stands, its prompt as text and as token ids [P], P >= 1."""

    row: dict[str, Any]
    location: str
    text: str
    ids: list[int]


def read_prompts(
    path: str | Path, tokenizer: Tokenizer, max_positions: int, apply_chat_template: bool = False
) -> list[Prompt]:
    """Rows with ``prompt`` (text or messages), ``messages`` or ``prompt_ids``.

    Raises UserError naming the first row that cannot be decoded: no prompt, an empty one, one that leaves no position
    for an answer, or one that contains the mask token.
    """
    rows = open_rows(path)
    return [
        make_prompt(rows[index], rows.location(index), tokenizer, max_positions, apply_chat_template)
        for index in range(len(rows))
    ]


def make_prompt(
    row: dict[str, Any], location: str, tokenizer: Tokenizer, max_positions: int, apply_chat_template: bool = False
) -> Prompt:
    """One row of `read_prompts`."""
    try:
        text, ids = _encode(row, tokenizer, apply_chat_template)
        if not ids:
            raise UserError("the prompt is empty; give some text or take the row out")
        if len(ids) >= max_positions:
            raise UserError(
                f"the prompt has {len(ids)} tokens, the model's max_position_embeddings are {max_positions}; shorten it"
            )
        if tokenizer.mask_id in ids:
            raise UserError(f"the prompt contains the mask token {tokenizer.mask_token!r}; remove it")
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
    return Prompt(row, location, text, ids)


def _encode(row: dict[str, Any], tokenizer: Tokenizer, apply_chat_template: bool) -> tuple[str, list[int]]:
    if row.get("prompt_ids") is not None:
        ids = row["prompt_ids"]
        if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids):
            raise UserError(f"prompt_ids: must be a list of token ids from 0 to {tokenizer.vocab_size - 1}")
        return tokenizer.decode(ids), ids
    prompt = row.get("prompt") if row.get("prompt") is not None else row.get("messages")
    if isinstance(prompt, list):
        if not prompt or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt):
            raise UserError("messages: must be a list of objects with role and content")
    elif not isinstance(prompt, str):
        present = ", ".join(sorted(row)) or "nothing"
        raise UserError(f"a row needs prompt, messages or prompt_ids; this one has {present}")
    text = tokenizer.render_prompt(prompt, apply_chat_template)
    return text, tokenizer.encode(text)
