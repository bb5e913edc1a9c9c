"""Checks the rows of a data file once, before anything is tokenized.

Two responses (chosen, rejected) for preferences, one (the completion) for supervised fine-tuning. The fields are TRL's;
`token_fields` has those of exact token ids.

Messages of the errors raised here do not say which row they are about; the caller, who knows, puts that in front.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from typing import Any

from megatron_dtrpo.data.fields import (
    as_answer,
    as_question,
    messages_advice,
    present_columns,
    put_advice,
    read_prompt,
    read_response,
    renaming_advice,
    require_columns,
    template_inputs,
)
from megatron_dtrpo.data.messages import read_messages, require_text
from megatron_dtrpo.data.record import Messages, Record, TokenRecord
from megatron_dtrpo.data.row_notes import COLUMN_NOTES, REPEATED, refuse_bad_label, repeats, with_notes
from megatron_dtrpo.data.share_gpt import read_columns
from megatron_dtrpo.data.shared_text import shared_prompt
from megatron_dtrpo.data.token_fields import has_ids, token_record
from megatron_dtrpo.errors import UserError

# What was done to a row that its owner may not expect: notes, printed once for a file, with the number of rows.
IMPLICIT_TEXT = (
    "note: {count} rows without a prompt: it is what chosen and rejected share, up to the label of the assistant's turn"
)
IMPLICIT_WORDS = (
    "warning: {count} rows without a prompt and without a label of a turn that is known: the prompt is the lines or "
    "words that chosen and rejected share, which may be the beginning of the answer; give a prompt"
)
IMPLICIT_MESSAGES = "note: {count} rows without a prompt of messages: it is the messages that chosen and rejected share"
AFTER_LAST_ANSWER = (
    "warning: {count} rows go on after the assistant's last answer: what follows it is neither learned nor asked; to "
    "have all messages of a row answered, call the column 'prompt'"
)
NO_PROMPT = "warning: {count} rows begin with the assistant's message: as nothing comes before it, it is not learned"


def preference_record(row: dict[str, Any]) -> Record | TokenRecord:
    """``prompt``, ``chosen``, ``rejected``; or ``chosen`` and ``rejected`` that begin with the prompt (implicit
    prompt), as text or as conversations; or token ids.

    As in TRL, a text prompt beside two conversations is a label, and the prompt is what the conversations share.
    """
    if has_ids(row, ("chosen", "rejected")):
        return token_record(row, ("chosen", "rejected"))
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(row.get("prompt"), list):
        return _implicit_messages(row)
    if isinstance(chosen, str) and isinstance(rejected, str) and row.get("prompt") is None:
        return _implicit_text(row)
    require_columns(row, ("prompt", "chosen", "rejected"))
    return _explicit_record(row, ("chosen", "rejected"))


def sft_record(row: dict[str, Any]) -> Record | TokenRecord:
    """``prompt`` and ``completion``, or ``messages``: the last assistant message answers those before it; or token ids.

    Messages after the last answer are left out: nothing is learned from them. A text prompt beside ``messages`` is a
    label. A row whose ``label`` says that its completion is bad (KTO's data) is an error.
    """
    refuse_bad_label(row.get("label"))
    if has_ids(row, ("completion",)):
        return token_record(row, ("completion",))
    if is_conversation(row):
        messages, answers = read_conversation(row)
        return _answer_record(row, messages, answers[-1], after_last_answer(messages, answers))
    return _completion_record(row)


def sft_turn_records(row: dict[str, Any]) -> list[Record | TokenRecord]:
    """As `sft_record`, with one record for every assistant message of ``messages``, the conversation before it being
    its prompt: each is learned as it is decoded."""
    if has_ids(row, ("completion",)) or not is_conversation(row):
        return [sft_record(row)]
    refuse_bad_label(row.get("label"))
    messages, answers = read_conversation(row)
    notes = (NO_PROMPT,) * (answers[0] == 0) + after_last_answer(messages, answers)
    records = [_answer_record(row, messages, place) for place in answers if place > 0]
    return [*records[:-1], _answer_record(row, messages, answers[-1], notes)]


READERS: dict[str, Callable[[dict[str, Any]], Record | TokenRecord]] = {
    "preference": preference_record,
    "sft": sft_record,
}


def read_row(kind: str, row: dict[str, Any], assistant_turns: str = "last") -> list[Record | TokenRecord]:
    """The examples that a row of data of this ``kind`` is: one, or with ``assistant_turns="all"`` one for every
    assistant message of a conversation. Raises UserError for a row that cannot be used."""
    row, packed = read_columns(row)
    turns = kind == "sft" and assistant_turns == "all"
    first, *others = sft_turn_records(row) if turns else [READERS[kind](row)]
    first = with_notes(row, packed, first)
    return [replace(first, notes=first.notes + COLUMN_NOTES[kind](row)), *others]


def has_implicit_prompt(row: dict[str, Any]) -> bool:
    responses = [row.get(name) for name in ("chosen", "rejected")]
    if all(isinstance(response, list) for response in responses):
        return not isinstance(row.get("prompt"), list)
    return all(isinstance(response, str) for response in responses) and row.get("prompt") is None


def _implicit_messages(row: dict[str, Any]) -> Record:
    chosen, rejected = (read_messages(row[name], name) for name in ("chosen", "rejected"))
    conversations = {"chosen": chosen, "rejected": rejected}
    # The last message is always an answer, so equal conversations still leave one to compare.
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if shared == 0:
        raise UserError("chosen and rejected share no first message; give the prompt as a list of messages")
    for name, messages in conversations.items():
        role = messages[shared]["role"]
        if role != "assistant":
            raise UserError(
                f"{name}[{shared}]: chosen and rejected part at a message of the role {role!r}; end both after the "
                "first answer that differs"
            )
    prompt = as_question(chosen[:shared])
    answers = tuple(as_answer(messages[shared:], name) for name, messages in conversations.items())
    return Record(prompt, answers, template_inputs(row), (IMPLICIT_MESSAGES,))


def _implicit_text(row: dict[str, Any]) -> Record:
    renaming = renaming_advice(row, ["prompt"]) or messages_advice(row, "prompt")
    if renaming:  # two answers that happen to begin with the same words hold no prompt
        raise UserError(f"missing field 'prompt'; the row has {present_columns(row)}{renaming}")
    chosen, rejected = (require_text(row[name], name) for name in ("chosen", "rejected"))
    prompt, has_labels = shared_prompt(chosen, rejected)
    responses = (require_text(chosen[len(prompt) :], "chosen"), require_text(rejected[len(prompt) :], "rejected"))
    return Record(prompt, responses, template_inputs(row), (IMPLICIT_TEXT if has_labels else IMPLICIT_WORDS,))


def _completion_record(row: dict[str, Any]) -> Record:
    require_columns(row, ("prompt", "completion"))
    return _explicit_record(row, ("completion",))


def _explicit_record(row: dict[str, Any], names: tuple[str, ...]) -> Record:
    prompt = read_prompt(row["prompt"])
    responses = tuple(read_response(row[name], name, prompt) for name in names)
    notes = (REPEATED,) * all(repeats(response, prompt) for response in responses)
    return Record(prompt, responses, template_inputs(row), notes)


def is_conversation(row: dict[str, Any]) -> bool:
    """Whether the row's prompt and answer are in ``messages``. A text prompt beside them is a label."""
    return row.get("messages") is not None and row.get("completion") is None and not isinstance(row.get("prompt"), list)


def read_conversation(row: dict[str, Any]) -> tuple[Messages, list[int]]:
    """The row's messages, and the places of the assistant's among them; without those of ``weight`` 0 (OpenAI's), which
    are not to be learned."""
    messages = read_messages(row["messages"], "messages")
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UserError(
            "messages: no message has the role 'assistant'; the last one that has is the completion" + put_advice(row)
        )
    answers = [place for place in answers if messages[place].get("weight", 1)]
    if not answers:
        raise UserError("messages: every message of the assistant has the weight 0; take the row out")
    if answers[-1] == 0:
        raise UserError("messages: nothing comes before the assistant's message; begin with the user's")
    if answers[-1] < len(messages) - 1 and row.get("answer") is not None:
        raise UserError(
            "messages: go on after the assistant's last answer, and 'answer' may be that of what follows; end them "
            "with it, or give all of them as 'prompt'"
        )
    return messages, answers


def after_last_answer(messages: Messages, answers: list[int]) -> tuple[str, ...]:
    return (AFTER_LAST_ANSWER,) * (answers[-1] < len(messages) - 1)


def _answer_record(row: dict[str, Any], messages: Messages, place: int, notes: tuple[str, ...] = ()) -> Record:
    prompt, response = as_question(messages[:place], "messages"), as_answer([messages[place]], "messages")
    return Record(prompt, (response,), template_inputs(row), notes)
