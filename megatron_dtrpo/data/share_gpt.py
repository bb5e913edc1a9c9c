"""ShareGPT's way to write conversations, ``{"from": "human", "value": "2+2?"}`` in a column ``conversations``, brought
into the form of `messages`."""

from __future__ import annotations

from typing import Any

from megatron_dtrpo.data.messages import unpack_messages
from megatron_dtrpo.errors import UserError

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
_COLUMNS = ("prompt", "messages", "chosen", "rejected", "completion")


def read_columns(row: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """As `unpack_messages`, with every message in ``role`` and ``content`` and ``conversations`` under the name of what
    they are. Raises UserError for a speaker that is not known."""
    row, packed = unpack_messages(_with_messages(row))
    return {**row, **{name: _converted(row[name], name) for name in _COLUMNS if name in row}}, packed


def _with_messages(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with its ``conversations`` as ``messages``; as ``prompt`` where chosen and rejected are the answers."""
    conversations = row.get("conversations")
    if not (isinstance(conversations, str) or _first(conversations)) or row.get("messages") is not None:
        return row
    name = "prompt" if _is_answer(row.get("chosen")) and row.get("prompt") is None else "messages"
    return {**{key: value for key, value in row.items() if key != "conversations"}, name: conversations}


def _is_answer(value: Any) -> bool:
    first = value if isinstance(value, dict) else _first(value)
    speaker = first.get("from") or first.get("role")
    return isinstance(speaker, str) and _ROLES.get(speaker) == "assistant"


def _first(value: Any) -> dict[str, Any]:
    """The first message of a list; empty where there is none."""
    return value[0] if isinstance(value, list) and value and isinstance(value[0], dict) else {}


def _converted(value: Any, name: str) -> Any:
    """``value`` where it is no list of messages; an answer may be one message alone."""
    if isinstance(value, dict) and value.get("from") is not None:
        value = [value]
    if not isinstance(value, list):
        return value
    return [_message(item, f"{name}[{place}]") for place, item in enumerate(value)]


def _message(item: Any, name: str) -> Any:
    if not isinstance(item, dict) or item.get("from") is None:
        return item
    if item.get("role") is not None:
        raise UserError(f"{name}: has both 'from' and 'role'; give one")
    role = _ROLES.get(item["from"]) if isinstance(item["from"], str) else None
    if role is None:
        raise UserError(f"{name}: 'from' is {item['from']!r}, none of {', '.join(_ROLES)}; write role and content")
    rest = {key: value for key, value in item.items() if key not in ("from", "value", "role")}
    return {"role": role, "content": item.get("value"), **{k: v for k, v in rest.items() if v is not None}}
