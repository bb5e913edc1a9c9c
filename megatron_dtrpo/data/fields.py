"""The columns of a row, each checked for itself: prompts, responses, what goes to the chat template; and advice where
one is missing or has another name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from megatron_dtrpo.data.messages import kind_of, read_messages, require_encodable, require_text
from megatron_dtrpo.data.record import TEMPLATE_SETTINGS, Messages, TemplateInputs
from megatron_dtrpo.errors import UserError

# What data sets call a column elsewhere: Orca's pairs, GSM8K, Alpaca.
_OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "problem", "Prompt", "user_prompt", "context", "input"),
    "completion": ("answer", "response", "output", "solution"),
}
_DIALOGUES = ("messages", "conversation", "dialog", "dialogue", "chat")


def put_advice(row: dict[str, Any]) -> str:
    """Advice about the answer of a conversation that has none."""
    name = next((name for name in ("answer", *_OTHER_NAMES["completion"]) if isinstance(row.get(name), str)), None)
    return f"; put the text of {name!r} into such a message" if name else ""


def template_inputs(row: dict[str, Any]) -> TemplateInputs:
    """``tools`` and ``chat_template_kwargs``, or their JSON text; null, also of a variable, and empty mean none."""
    tools = _unpacked(row.get("tools"), "tools") or None
    variables = _unpacked(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if tools is not None:
        if not isinstance(tools, list):
            raise UserError(f"tools: must be a list of objects, not {kind_of(tools)}")
        tools = [_unpacked(tool, f"tools[{place}]") for place, tool in enumerate(tools)]
        for place, tool in enumerate(tools):
            if not isinstance(tool, dict):
                raise UserError(f"tools[{place}]: must be an object, a JSON schema, not {kind_of(tool)}")
    if not isinstance(variables, dict):
        raise UserError(f"chat_template_kwargs: must be an object, not {kind_of(variables)}")
    for name in sorted(TEMPLATE_SETTINGS & variables.keys()):
        raise UserError(f"chat_template_kwargs: {name!r} is no variable for a row to set; take it out")
    require_encodable(tools, "tools")
    require_encodable(variables, "chat_template_kwargs")
    return TemplateInputs(tools, {name: value for name, value in variables.items() if value is not None})


def _unpacked(value: Any, name: str) -> Any:
    """``value``, or what its JSON text says."""
    if not isinstance(value, str) or not value.strip():
        return None if isinstance(value, str) else value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise UserError(f"{name}: is text that is no JSON; give a list or object, or its JSON text") from None


def require_columns(row: dict[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if row.get(name) is None]
    if missing == ["completion"] and isinstance(row["prompt"], list) and row.get("messages") is not None:
        raise UserError(
            "missing field 'completion' beside a prompt of messages; if the messages hold the answer: take prompt out"
        )
    if missing:
        renaming = renaming_advice(row, missing) or ("prompt" in missing and messages_advice(row, "messages")) or ""
        is_kto = "chosen" in missing and row.get("label") is not None
        no_pair = "; a completion and its label (KTO) are no pair" if is_kto else one_answer_advice(row, missing)
        raise UserError(f"missing field {missing[0]!r}; the row has {present_columns(row)}{no_pair}{renaming}")


def one_answer_advice(row: dict[str, Any], missing: Sequence[str]) -> str:
    """The objectives of a row that has one answer where a pair of them is ``missing``."""
    answer = next((n for n in ("completion", *_OTHER_NAMES["completion"], *_DIALOGUES) if row.get(n) is not None), None)
    if answer is None or not {"chosen", "rejected"} <= set(missing):
        return ""
    online = "; of a prompt and what its answer is compared with: --objective policy_gradient"
    return f"; one answer, {answer!r}, is no pair: give --objective sft{online if answer == 'answer' else ''}"


def renaming_advice(row: dict[str, Any], missing: Sequence[str]) -> str:
    """Columns to rename, where columns of the row are likely the ``missing`` ones."""
    found = [(next((o for o in _OTHER_NAMES.get(name, ()) if row.get(o) is not None), None), name) for name in missing]
    renamed = ", ".join(f"{other!r} to {name!r}" for other, name in found if other is not None)
    return f"; rename {renamed}" if renamed else ""


def messages_advice(row: dict[str, Any], name: str) -> str:
    """Columns to rename, where a column of the row holds messages and the ``name`` of them is another."""
    found = [key for key in _DIALOGUES if isinstance(row.get(key), list) and row[key] and isinstance(row[key][0], dict)]
    return f"; rename {found[0]!r} to {name!r}" if found and found[0] != name else ""


def present_columns(row: dict[str, Any]) -> str:
    """Their names in one line, which a name of line breaks or other controls would break."""
    names = sorted(name for name, value in row.items() if value is not None)
    return ", ".join(name if name.isprintable() else repr(name) for name in names) or "nothing"


def read_prompt(value: Any) -> str | Messages:
    """A prompt that the row gives apart from its responses; it may end with the beginning of the assistant's answer."""
    if isinstance(value, str):
        return require_text(value, "prompt")
    if not isinstance(value, list):
        raise UserError(f"prompt: must be text or a list of messages, not {kind_of(value)}")
    messages = read_messages(value, "prompt")
    last = messages[-1]
    if last["role"] == "assistant" and last.get("tool_calls"):
        raise UserError("prompt: ends with calls of tools that have no reply; add the tool's message")
    return messages if last["role"] == "assistant" else as_question(messages, "prompt")


def as_question(messages: Messages, name: str = "prompt") -> Messages:
    """Messages that the assistant is to answer."""
    role = messages[-1]["role"]
    if role == "assistant":
        raise UserError(f"{name}: two messages of the assistant in a row; join them")
    if role == "system":
        raise UserError(f"{name}: the prompt ends with a message of the role 'system'; end it with the user's")
    return messages


def read_response(value: Any, name: str, prompt: str | Messages) -> str | Messages:
    if not isinstance(value, (str, list)):
        raise UserError(f"{name}: must be text or a list of messages, not {kind_of(value)}")
    if isinstance(value, str) != isinstance(prompt, str):
        raise UserError(f"{name}: is {kind_of(value)} but the prompt is {kind_of(prompt)}; give both in one form")
    return require_text(value, name) if isinstance(value, str) else as_answer(read_messages(value, name), name)


def as_answer(messages: Messages, name: str) -> Messages:
    """The assistant's message, or several with replies of tools between them."""
    roles = [message["role"] for message in messages]
    listed = ", ".join(roles)
    if roles[0] != "assistant":
        raise UserError(f"{name}: must begin with the assistant's message after the prompt, not {listed}")
    for role in roles:
        if role not in ("assistant", "tool"):
            advice = "it after the first answer" if name == "completion" else "both after the first answer that differs"
            raise UserError(f"{name}: a message of the role {role!r} follows the answer; end {advice}")
    if roles[-1] != "assistant":
        raise UserError(f"{name}: must end with the assistant's message, not {listed}")
    if any(pair == ("assistant", "assistant") for pair in pairwise(roles)):
        raise UserError(f"{name}: two messages of the assistant in a row; join them")
    for message in messages:
        if not message.get("weight", 1):
            raise UserError(f"{name}: a message of the assistant has the weight 0, not to be learned; take the row out")
        if not message.get("tool_calls"):
            require_text(message["content"], name)
    return messages
