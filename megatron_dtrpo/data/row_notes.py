"""What a row holds that its owner may not expect: notes, said once for a file with the number of rows; and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from megatron_dtrpo.data.record import Messages, Record, TokenRecord
from megatron_dtrpo.errors import UserError

REPEATED = (
    "warning: {count} rows repeat the prompt at the beginning of every answer, so that it comes twice: take it out of "
    "the answers"
)
INVERTED = "warning: {count} rows give the rejected answer a higher score than the chosen one: are the two exchanged?"
WORDLESS = "warning: {count} rows have a message of the user without words, as an image leaves it that was taken out"
LABEL = "warning: {count} rows have a 'label' that says neither that the completion is good nor bad: it is not read"
JSON_TEXT = "warning: {{count}} rows have JSON in {name!r} that holds no messages: it is taken as it stands, as text"
MESSAGES_UNREAD = "warning: {count} rows have 'messages' beside prompt and completion: the messages are not read"
# Columns that belong to a prompt in other people's data (Orca, Alpaca, retrieval) and that no layout reads.
UNREAD = {
    name: f"warning: {{count}} rows have a column {name!r}, which is not read: put its text into the prompt or messages"
    for name in ("system", "system_prompt", "input", "context", "documents", "history")
}


def _sft_notes(row: dict[str, Any]) -> tuple[str, ...]:
    label, messages = row.get("label"), row.get("messages")
    notes = (LABEL,) * (label is not None and _plain_label(label) not in _GOOD_LABELS)
    return notes + (MESSAGES_UNREAD,) * (messages is not None and row.get("completion") is not None)


_SCORES = ("score", "rating", "reward", "quality")


def _score_notes(row: dict[str, Any]) -> tuple[str, ...]:
    for name in _SCORES:
        for chosen, rejected in ((f"{name}_chosen", f"{name}_rejected"), (f"chosen_{name}", f"rejected_{name}")):
            scores = row.get(chosen), row.get(rejected)
            if all(isinstance(score, (int, float)) for score in scores) and scores[0] < scores[1]:
                return (INVERTED,)
    return ()


# What columns beside the answers say of them.
COLUMN_NOTES: dict[str, Callable[[dict[str, Any]], tuple[str, ...]]] = {
    "preference": _score_notes,
    "sft": _sft_notes,
}


def _holds_something(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, list | dict) and bool(value)


def with_notes(row: dict[str, Any], packed: Sequence[str], record: Record | TokenRecord) -> Record | TokenRecord:
    """``record``, with a note for each of the row's `UNREAD` columns that holds text or objects, and for each that is
    JSON text of no messages. Token ids are whole as given."""
    unread = tuple(note for name, note in UNREAD.items() if _holds_something(row.get(name)))
    notes = unread + tuple(JSON_TEXT.format(name=name) for name in packed)
    if isinstance(record.prompt, list) and isinstance(record, Record):
        wordless = any(m["role"] == "user" and not m["content"].strip() for m in record.prompt)
        notes += (WORDLESS,) * wordless
    return replace(record, notes=record.notes + notes) if notes and isinstance(record, Record) else record


_SHORT = 8  # characters of a prompt that an answer may well begin with too


def repeats(response: str | Messages, prompt: str | Messages) -> bool:
    if not isinstance(prompt, str) or not isinstance(response, str):
        return False
    return len(prompt.strip()) > _SHORT and response.strip().startswith(prompt.strip())


_GOOD_LABELS = ("true", "1", "1.0", "yes", "good", "chosen", "desirable", "correct")
_BAD_LABELS = ("false", "0", "0.0", "-1", "-1.0", "no", "bad", "rejected", "undesirable", "dispreferred", "incorrect")


def refuse_bad_label(label: Any) -> None:
    """KTO's data holds completions to avoid beside those to follow."""
    if _plain_label(label) in _BAD_LABELS:
        raise UserError(
            f"label: is {label!r}: the completion is one to avoid, and sft learns what it is given; take the row out"
        )


def _plain_label(label: Any) -> str:
    return str(label).strip().lower()
