"""What a row of a data file must hold, checked once, before anything is tokenized.

A record is a prompt and its responses as the user wrote them, text or message lists: two responses (chosen, rejected)
for preferences, one (the completion) for supervised fine-tuning. The fields are TRL's. A row may instead give exact
token ids, ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` or ``completion_ids``, which are then taken as they are, and
with them a recorded decoding: the step at which each response token was unmasked, ``chosen_steps`` and
``rejected_steps``, and what was thrown away behind an end token, ``chosen_discarded`` and ``rejected_discarded``.

Messages of the errors raised here do not say which row they are about; the caller, who knows, puts that in front.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from megatron_dtrpo.data.chat import Messages
from megatron_dtrpo.errors import UserError

MOST = 2**31 - 2  # of an id or a step, so that they, and steps plus one, are 32-bit integers


@dataclass(frozen=True)
class Record:
    """A prompt and its responses, each text or a message list; the response lists hold one assistant message."""

    prompt: str | Messages
    responses: tuple[str | Messages, ...]


@dataclass(frozen=True)
class TokenRecord:
    """A prompt and its responses as token ids; ``steps`` has one integer per response token, ``discarded`` the
    (place, token, step, until) of every discarded one (`diffusion.decoding.Discarded`); None where not recorded."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    steps: tuple[list[int], ...] | None = None
    discarded: tuple[list[tuple[int, int, int, int]], ...] | None = None


def preference_record(row: dict[str, Any]) -> Record | TokenRecord:
    """``prompt``, ``chosen``, ``rejected``; or whole conversations in ``chosen`` and ``rejected`` (implicit prompt); or
    token ids.

    As in TRL, a text prompt beside two conversations is a label, and the prompt is what the conversations share.
    """
    if _has_ids(row, ("chosen", "rejected")):
        return _token_record(row, ("chosen", "rejected"))
    conversations = all(isinstance(row.get(name), list) for name in ("chosen", "rejected"))
    implicit = conversations and not isinstance(row.get("prompt"), list)
    _require(row, ("chosen", "rejected") if implicit else ("prompt", "chosen", "rejected"))
    if not implicit:
        prompt = _prompt(row["prompt"])
        return Record(prompt, tuple(_response(row[name], name, prompt) for name in ("chosen", "rejected")))
    chosen, rejected = (_messages(row[name], name) for name in ("chosen", "rejected"))
    # The last message is always an answer, so equal conversations still leave one to compare.
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if shared == 0:
        raise UserError("chosen and rejected share no first message; give the prompt as a list of messages")
    prompt = _prompt(chosen[:shared])
    answers = {"chosen": chosen[shared:], "rejected": rejected[shared:]}
    return Record(prompt, tuple(_response(answer, name, prompt) for name, answer in answers.items()))


def sft_record(row: dict[str, Any]) -> Record | TokenRecord:
    """``prompt`` and ``completion``, or ``messages``: the last assistant message answers those before it; or token ids.

    Messages after the last answer are left out: nothing is learned from them.
    """
    if _has_ids(row, ("completion",)):
        return _token_record(row, ("completion",))
    if "messages" not in row or "prompt" in row:
        _require(row, ("prompt", "completion"))
        prompt = _prompt(row["prompt"])
        return Record(prompt, (_response(row["completion"], "completion", prompt),))
    messages = _messages(row["messages"], "messages")
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UserError("messages: no message has the role 'assistant'; the last one that has is the completion")
    if answers[-1] == 0:
        raise UserError("messages: nothing comes before the assistant's message; begin with the user's")
    prompt = _prompt(messages[: answers[-1]], name="messages")
    return Record(prompt, (_response([messages[answers[-1]]], "messages", prompt),))


READERS: dict[str, Callable[[dict[str, Any]], Record | TokenRecord]] = {
    "preference": preference_record,
    "sft": sft_record,
}


def _has_ids(row: dict[str, Any], names: tuple[str, ...]) -> bool:
    fields = [f"{name}_ids" for name in ("prompt", *names)]
    fields += [f"{name}_{what}" for name in names for what in ("steps", "discarded")]
    return any(row.get(field) is not None for field in fields)


def _token_record(row: dict[str, Any], names: tuple[str, ...]) -> TokenRecord:
    ids = [f"{name}_ids" for name in ("prompt", *names)]
    steps, discarded = ([f"{name}_{what}" for name in names] for what in ("steps", "discarded"))
    given = [field for field in ids + steps + discarded if row.get(field) is not None]
    missing = [field for field in ids if field not in given]
    if missing:
        raise UserError(f"{given[0]} without {missing[0]}; give {', '.join(ids)} together")
    prompt, *responses = (_integers(row[field], field) for field in ids)
    if not _together(steps, given):
        if _together(discarded, given):
            raise UserError(f"{discarded[0]} without {steps[0]}: give both")
        return TokenRecord(prompt, tuple(responses))
    recorded = tuple(_integers(row[field], field) for field in steps)
    for field, of, response, each in zip(steps, ids[1:], responses, recorded, strict=True):
        if len(each) != len(response):
            raise UserError(f"{field}: {len(each)} steps for the {len(response)} tokens of {of}; give one per token")
    if not _together(discarded, given):
        return TokenRecord(prompt, tuple(responses), recorded)
    thrown = tuple(_discarded(row[field], field, each) for field, each in zip(discarded, recorded, strict=True))
    return TokenRecord(prompt, tuple(responses), recorded, thrown)


def _together(fields: list[str], given: list[str]) -> bool:
    """Whether all of ``fields`` are ``given``, or none; raises UserError where some are."""
    found = [field for field in fields if field in given]
    if found and found != fields:
        raise UserError(f"{found[0]} alone; give {' and '.join(fields)} together")
    return bool(found)


DISCARDED = ("place", "token", "step", "until")


def _discarded(value: Any, name: str, steps: list[int]) -> list[tuple[int, int, int, int]]:
    """Discarded tokens of a response that ``steps`` wrote, ordered by place."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{name}: must be a list of objects with {', '.join(DISCARDED)}")
    found = []
    for number, item in enumerate(value):
        for key in DISCARDED:
            if type(item.get(key)) is not int or not 0 <= item[key] <= MOST:
                raise UserError(f"{name}[{number}]: {key} must be an integer from 0 to {MOST}, not {item.get(key)!r}")
        found.append(tuple(item[key] for key in DISCARDED))
    found.sort()
    for number, (place, _, step, until) in enumerate(found):
        if place < len(steps) or (number and place == found[number - 1][0]):
            raise UserError(f"{name}: place {place} holds a token already; the response has {len(steps)}")
        before = {*steps, *(other[2] for other in found[:number])}
        if not step < until or until not in before:
            raise UserError(f"{name}: place {place}: until {until} must be the step, after step {step}, that wrote an "
                            "end token before it")  # fmt: skip
    return found


def _integers(value: Any, name: str) -> list[int]:
    if not isinstance(value, list):
        raise UserError(f"{name}: must be a list of integers, not {_kind(value)}")
    if not value:
        raise UserError(f"{name}: is an empty list; give at least one token or take the row out")
    for place, item in enumerate(value):
        if type(item) is not int or not 0 <= item <= MOST:
            shown = item if isinstance(item, (int, float)) else _kind(item)
            raise UserError(f"{name}[{place}]: must be an integer from 0 to {MOST}, not {shown}")
    return value


def _require(row: dict[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if row.get(name) is None]
    if missing:
        present = ", ".join(sorted(name for name, value in row.items() if value is not None)) or "nothing"
        raise UserError(f"missing field {missing[0]!r}; the row has {present}")


def _prompt(value: Any, name: str = "prompt") -> str | Messages:
    if isinstance(value, str):
        return _text(value, name)
    if not isinstance(value, list):
        raise UserError(f"{name}: must be text or a list of messages, not {_kind(value)}")
    messages = _messages(value, name)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{name}: the prompt ends with an assistant message; end it with the user's")
    return messages


def _response(value: Any, name: str, prompt: str | Messages) -> str | Messages:
    if not isinstance(value, (str, list)):
        raise UserError(f"{name}: must be text or a list of messages, not {_kind(value)}")
    if isinstance(value, str) != isinstance(prompt, str):
        raise UserError(f"{name}: is {_kind(value)} but the prompt is {_kind(prompt)}; give both in one form")
    if isinstance(value, str):
        return _text(value, name)
    messages = _messages(value, name)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"{name}: must be one assistant message after the prompt, not {roles}")
    _text(messages[0]["content"], name)
    return messages


def _messages(value: Any, name: str) -> Messages:
    if not isinstance(value, list):
        raise UserError(f"{name}: must be a list of messages, not {_kind(value)}")
    if not value:
        raise UserError(f"{name}: is an empty list; give at least one message")
    for number, message in enumerate(value):
        if not isinstance(message, dict):
            raise UserError(f"{name}[{number}]: a message is an object with role and content, not {_kind(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise UserError(f"{name}[{number}]: {key!r} must be text, not {_kind(message.get(key))}")
        _encodable(message["content"], f"{name}[{number}]")
    return value


def _text(value: str, name: str) -> str:
    if not value.strip():
        raise UserError(f"{name}: is empty; give some text or take the row out")
    _encodable(value, name)
    return value


def _encodable(value: str, name: str) -> None:
    """JSON can spell half a character (a lone surrogate), which no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: character {error.start} is half a surrogate pair; remove it") from None


def _kind(value: Any) -> str:
    names = {str: "text", list: "a list", dict: "an object", type(None): "missing", bool: "a boolean"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
