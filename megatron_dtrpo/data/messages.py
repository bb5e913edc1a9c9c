"""The messages of a conversation, checked and brought into one form."""

from __future__ import annotations

import json
import re
from typing import Any

from megatron_dtrpo.data.record import Messages
from megatron_dtrpo.errors import UserError

_DEEPEST = 100
_NO_TEXT = {"images", "image", "audio", "audios", "video", "videos"}


def read_messages(value: Any, name: str) -> Messages:
    """``value`` as messages with a ``role`` and a ``content``; ``name`` is the field it stands in.

    Keys without a value are left out, for a table has every key in every message. Content may be missing where
    ``tool_calls`` are; those may be JSON text. Raises UserError where a message is none.
    """
    if not isinstance(value, list):
        raise UserError(f"{name}: must be a list of messages, not {kind_of(value)}")
    if not value:
        raise UserError(f"{name}: is an empty list; give at least one message")
    return [_message(message, f"{name}[{number}]") for number, message in enumerate(value)]


_COLUMNS = ("prompt", "messages", "chosen", "rejected", "completion")
_BOTH = ({"role", "content"}, {"from", "value"})  # an answer to a text may be a list of objects with one of them
_ONE_OF_THEM = tuple({key} for pair in _BOTH for key in pair)
_PRINTED = re.compile(r"\s*\[\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")  # as JSON or as Python prints it


def unpack_messages(row: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """``row`` with messages in place of their JSON text, as tables give them, and the columns whose text is other JSON.

    Text that is no JSON stays text, and so does an answer in JSON to a text prompt. Raises UserError for messages that
    are no JSON, and for objects where only messages can be meant: in ``prompt``, or in dialogues without one.
    """
    found = {name: _json_of(row[name], name) for name in _COLUMNS if isinstance(row.get(name), str)}
    found = {name: value for name, value in found.items() if isinstance(value, (dict, list))}
    asks_in_text = isinstance(row.get("prompt"), str) and not _has(found.get("prompt"), _ONE_OF_THEM)
    keys = {name: _BOTH if asks_in_text and name != "prompt" else _ONE_OF_THEM for name in found}
    messages = {name for name, value in found.items() if name == "messages" or _has(value, keys[name])}
    others = [name for name in found if name not in messages]
    for name in others:
        value, answers = found[name], name != "prompt" and row.get("prompt") is not None
        items = list(value.values()) if isinstance(value, dict) else value
        if isinstance(value, dict) and {"role", "content"} <= value.keys():
            raise UserError(f"{name}: is JSON text of one message; give a list of messages")
        if not answers and items and all(isinstance(item, dict) for item in items):
            raise UserError(f"{name}: is JSON text of objects that are no messages; give messages, or other text")
    noted = [name for name in others if not _is_plain(found[name])]
    return {**row, **{name: found[name] for name in messages}}, tuple(noted)


def _json_of(text: str, name: str) -> Any:
    """What ``text`` is as a JSON list or object, else None."""
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        if _PRINTED.match(text):
            raise UserError(
                f"{name}: is a list that is not JSON, as Python prints it; save the data as .jsonl or .parquet"
            ) from None
        return None


def _has(value: Any, keys: tuple[set[str], ...]) -> bool:
    """Whether ``value`` is a list of objects, and one of them has one of these sets of ``keys``."""
    is_list = isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
    return is_list and any(each <= item.keys() for item in value for each in keys)


def _is_plain(value: Any) -> bool:
    """Whether it is a list of numbers, which any text may be: ``[3, 1, 2]``."""
    return isinstance(value, list) and not any(isinstance(item, (str, list, dict)) for item in value)


def _message(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{name}: a message is an object with role and content, not {kind_of(value)}")
    message = {key: item for key, item in value.items() if item is not None}
    if not isinstance(message.get("role"), str):
        raise UserError(f"{name}: 'role' must be text, not {kind_of(message.get('role'))}")
    for key in _NO_TEXT & message.keys():
        raise UserError(f"{name}: has {key!r}; models here read text only, take the row out")
    if message.get("weight", 1) not in (0, 1):
        raise UserError(f"{name}: 'weight' must be 0 or 1, not {message['weight']!r}")
    if isinstance(message.get("content"), list):
        message["content"] = _joined_parts(message["content"], name)
    calls = _tool_calls(message.pop("tool_calls", None), name)
    require_encodable({**message, "tool_calls": calls}, name)
    if calls:
        message["tool_calls"] = calls
        if message["role"] != "assistant":
            raise UserError(f"{name}: has tool_calls and the role {message['role']!r}; only the assistant calls tools")
        if "content" not in message:
            return {**message, "content": None}
    if not isinstance(message.get("content"), str):
        raise UserError(f"{name}: 'content' must be text, not {kind_of(message.get('content'))}")
    return message


def _joined_parts(parts: list[Any], name: str) -> str:
    """The text of a message that is given in parts, ``{"type": "text", "text": "2+2?"}``, as OpenAI's may be."""
    if not parts or not all(isinstance(part, dict) and isinstance(part.get("type"), str) for part in parts):
        raise UserError(f"{name}: 'content' must be text, not a list; parts of it have a type each")
    for part in parts:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise UserError(
                f"{name}: 'content' has a part of the type {part['type']!r}; models here read text only, take the row "
                "out"
            )
    return "".join(part["text"] for part in parts)


def _tool_calls(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError):
            raise UserError(f"{name}: 'tool_calls' is text that is no JSON; give a list of objects") from None
    if not (value is None or (isinstance(value, list) and all(isinstance(call, dict) for call in value))):
        raise UserError(f"{name}: 'tool_calls' must be a list of objects")
    return value or []


def require_text(value: str, name: str) -> str:
    """``value``. Raises UserError where it is nothing but white space or cannot be encoded."""
    if not value.strip():
        raise UserError(f"{name}: is empty; give some text or take the row out")
    require_encodable(value, name)
    return value


def require_encodable(value: Any, name: str, depth: int = 0) -> None:
    """JSON can spell half a character (a lone surrogate), which no tokenizer takes, and nest as deep as no template
    reads. Raises UserError where a text of ``value`` is such, or where it is such a list or object."""
    if depth > _DEEPEST:
        raise UserError(f"{name.split('.')[0]}: is nested deeper than {_DEEPEST} levels; write it flatter")
    if isinstance(value, dict):
        for key, item in value.items():
            require_encodable(str(key), f"{name}: a key")
            require_encodable(item, f"{name}.{key}", depth + 1)
    if isinstance(value, list):
        for number, item in enumerate(value):
            require_encodable(item, f"{name}[{number}]", depth + 1)
    if not isinstance(value, str):
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: character {error.start} is half a surrogate pair; remove it") from None


def kind_of(value: Any) -> str:
    """The kind of a JSON value, in words."""
    names = {str: "text", list: "a list", dict: "an object", type(None): "missing", bool: "a boolean"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
