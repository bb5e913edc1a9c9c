"""The messages of a conversation, checked and brought into one form."""

from __future__ import annotations

import json
from typing import Any

from megatron_dtrpo.data.chat import Messages
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
    """What a JSON value is, in words."""
    names = {str: "text", list: "a list", dict: "an object", type(None): "missing", bool: "a boolean"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else type(value).__name__)
