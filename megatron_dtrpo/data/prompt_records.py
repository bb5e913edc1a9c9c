"""The prompt that decoding asks: the one that training on the row has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron_dtrpo.data.fields import (
    as_question,
    messages_advice,
    present_columns,
    read_prompt,
    renaming_advice,
    template_inputs,
)
from megatron_dtrpo.data.messages import read_messages
from megatron_dtrpo.data.record import Messages, Record, TokenRecord
from megatron_dtrpo.data.records import (
    after_last_answer,
    has_implicit_prompt,
    is_conversation,
    preference_record,
    read_conversation,
)
from megatron_dtrpo.data.row_notes import with_notes
from megatron_dtrpo.data.share_gpt import read_columns
from megatron_dtrpo.data.token_fields import read_integers, refuse_inputs
from megatron_dtrpo.errors import UserError


def prompt_record(row: dict[str, Any]) -> Record | TokenRecord:
    """The prompt that training on this row has, without responses: of ``prompt_ids``, a preference row, a conversation
    in ``messages`` up to its last answer, or ``prompt``. ``messages`` without an answer are a prompt as they stand.
    Raises UserError where SFT and preferences would each train another prompt."""
    row, packed = read_columns(row)
    return with_notes(row, packed, _prompt_record(row))


def _prompt_record(row: dict[str, Any]) -> Record | TokenRecord:
    if row.get("prompt_ids") is not None:
        refuse_inputs(row, "prompt_ids")
        return TokenRecord(read_integers(row["prompt_ids"], "prompt_ids"), ())
    readings = {name: _attempt(read, row) for name, applies, read in _PROMPT_COLUMNS if applies(row)}
    records = [each for each in readings.values() if isinstance(each, Record)]
    if not records:
        raise next((each for each in readings.values() if isinstance(each, UserError)), _no_prompt(row))
    if any(_read_words(record) != _read_words(records[0]) for record in records):
        raise UserError(f"{' and '.join(readings)} have different prompts; leave out the columns of one of them")
    return records[0]


def _attempt(read: Callable[[dict[str, Any]], Record], row: dict[str, Any]) -> Record | UserError:
    try:
        return read(row)
    except UserError as error:
        return error


def _no_prompt(row: dict[str, Any]) -> UserError:
    renaming = renaming_advice(row, ["prompt"]) or messages_advice(row, "messages")
    return UserError(f"a row needs prompt, messages or prompt_ids; this one has {present_columns(row)}{renaming}")


def _read_words(record: Record) -> str | Messages:
    """The prompt without the weights of messages, which no template writes."""
    if isinstance(record.prompt, str):
        return record.prompt
    return [{key: value for key, value in message.items() if key != "weight"} for message in record.prompt]


def _pair_prompt(row: dict[str, Any]) -> Record:
    """What `preference_record` takes for the prompt."""
    if not has_implicit_prompt(row):
        return _explicit_prompt(row)
    ids = ("_ids", "_steps", "_discarded")
    record = preference_record({name: value for name, value in row.items() if not name.endswith(ids)})
    assert isinstance(record, Record)  # without ids
    return replace(record, responses=())


def _conversation_prompt(row: dict[str, Any]) -> Record:
    """What `sft_record` takes for the prompt of ``messages``; all of them where the assistant says nothing."""
    messages = read_messages(row["messages"], "messages")
    if all(message["role"] != "assistant" for message in messages):
        return Record(as_question(messages, "messages"), (), template_inputs(row))
    messages, answers = read_conversation(row)
    notes = after_last_answer(messages, answers)
    return Record(as_question(messages[: answers[-1]], "messages"), (), template_inputs(row), notes)


def _explicit_prompt(row: dict[str, Any]) -> Record:
    return Record(read_prompt(row["prompt"]), (), template_inputs(row))


def _is_pair(row: dict[str, Any]) -> bool:
    asks = row.get("prompt") is not None or has_implicit_prompt(row)
    return asks and all(row.get(name) is not None for name in ("chosen", "rejected"))


def _asks(row: dict[str, Any]) -> bool:
    """Whether ``prompt`` is what SFT trains, or what a row without answers asks."""
    labels = is_conversation(row) or (_is_pair(row) and row.get("completion") is None)
    return row.get("prompt") is not None and not labels


def _holds_prompt(row: dict[str, Any]) -> bool:
    """Whether ``messages`` say what is asked; also beside a completion alone, as `generate.py` writes it."""
    return is_conversation(row) or (row.get("messages") is not None and row.get("prompt") is None)


# Columns that say what the prompt is, whether a row has them, and how the objective that trains such a row reads them.
_PROMPT_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], Record]], ...] = (
    ("chosen and rejected", _is_pair, _pair_prompt),
    ("messages", _holds_prompt, _conversation_prompt),
    ("prompt and completion", _asks, _explicit_prompt),
)
