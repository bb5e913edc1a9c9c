"""Prompts and responses as text, the way TRL renders them.

Text stays as it is; messages go through a chat template. The template is a parameter here, so nothing in this file
knows a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from megatron_dtrpo.errors import UserError

Messages = list[dict[str, Any]]
# (messages, add_generation_prompt=, continue_final_message=, tools=, **variables) -> text
Template = Callable[..., str]
TEMPLATE_SETTINGS = {"messages", "add_generation_prompt", "continue_final_message", "tools"}  # no row may set them
# What a message may say beside its content, and some templates write.
MESSAGE_KEYS = {"reasoning_content", "reasoning", "thinking", "tool_plan", "function_call", "name", "refusal"}
_USUAL_ROLES = ("system", "user", "assistant", "tool")  # what templates write, if with changes


@dataclass(frozen=True)
class TemplateInputs:
    """What a row gives to the chat template beside its messages: tools, as JSON schemas, and the template's own
    variables."""

    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)

    def names(self) -> str:
        """The columns of the row that hold something."""
        return " and ".join(["tools"] * bool(self.tools) + ["chat_template_kwargs"] * bool(self.variables))


class Piece(NamedTuple):
    """A part of a response's text: written by the assistant, and learned, or read by it, as the reply of a tool."""

    text: str
    is_learned: bool


def render_prompt(
    template: Template, prompt: str | Messages, apply_chat_template: bool, inputs: TemplateInputs | None = None
) -> str:
    """A prompt's text. Messages are rendered up to where the assistant begins to speak, or, if the last one is the
    assistant's own, goes on to speak.

    ``apply_chat_template`` makes a text prompt one user message. Raises UserError where the template does not write
    the ``inputs``.
    """
    inputs = inputs or TemplateInputs()
    if isinstance(prompt, str) and not apply_chat_template:
        if inputs.names():
            raise UserError(
                f"{inputs.names()}: the prompt is text, which no chat template writes; give messages, or "
                "apply_chat_template"
            )
        return prompt
    messages = _as_messages(prompt, "user")
    text = _opening(_bound(template, inputs), messages)
    if inputs.tools and text == _opening(_bound(template, TemplateInputs(None, inputs.variables)), messages):
        raise UserError("tools: the chat template does not write them; take them out or use another template")
    return text


def render_response(
    template: Template,
    eos_token: str,
    response: str | Messages,
    prompt: str | Messages | None,
    apply_chat_template: bool,
    inputs: TemplateInputs | None = None,
) -> list[Piece]:
    """A response's text: with messages, what the template adds to the rendered prompt. It begins and ends with what the
    assistant writes; between two of the assistant's messages lies what it reads.

    Templates may write an answer differently after a different prompt; for ``prompt=None`` a short user message
    stands in. Raises UserError where the rendered prompt is not what the answered conversation begins with.
    """
    if isinstance(response, str) and not apply_chat_template:
        return [Piece(_cut_after_end(response, eos_token), True)]
    template = _bound(template, inputs or TemplateInputs())
    before = _as_messages("Hi" if prompt is None else prompt, "user")
    answers = _as_messages(response, "assistant")
    opening = _opening(template, before)
    if _is_open_thought(before) and len(answers) == 1 and not answers[0].get("tool_calls"):
        return [Piece(_cut_after_end(answers[0]["content"] + _ending(template, before), eos_token), True)]
    conversation = _joined(before, answers)
    whole = _write(template, conversation)
    # Where each of the assistant's messages begins in `whole`; the first continues a prompt that ends with one.
    openings = [opening]
    for place in range(len(conversation) - len(answers) + 1, len(conversation)):
        if conversation[place]["role"] == "assistant":
            openings.append(_opening(template, conversation[:place]))
    if not all(whole.startswith(opening) for opening in openings):
        raise UserError("the chat template writes this prompt differently once it is answered; give text instead")
    begins = [len(opening) for opening in openings]
    if len(begins) == 1:
        return [Piece(_cut_after_end(whole[begins[0] :], eos_token, opening), True)]
    return _pieces(whole, _with_own_ends_only(template, conversation, whole, eos_token), begins, eos_token)


def _with_own_ends_only(template: Template, messages: Messages, whole: str, eos_token: str) -> str:
    """``whole``, the template's text of ``messages``, where no end token is one that a message holds: other characters
    stand for those. Raises UserError where they cannot."""
    stand_in = "\ue000" * len(eos_token)
    hidden = _write(template, _replaced(messages, eos_token, stand_in))
    if hidden.replace(stand_in, eos_token) != whole:
        raise UserError(f"an end token {eos_token!r} inside a message changes the chat template's text; remove it")
    return hidden


def _replaced(value: Any, old: str, new: str) -> Any:
    """``value`` of JSON with every text changed."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        return {_replaced(key, old, new): _replaced(item, old, new) for key, item in value.items()}
    return [_replaced(item, old, new) for item in value] if isinstance(value, list) else value


def _pieces(whole: str, hidden: str, begins: list[int], eos_token: str) -> list[Piece]:
    """``whole`` from the first of ``begins``, where the assistant begins to speak: each time up to its end token,
    which is the next one in ``hidden``."""
    pieces = []
    for begin, following in zip(begins, begins[1:], strict=False):
        end = hidden.find(eos_token, begin, following) + len(eos_token)
        if end < begin + len(eos_token):
            raise UserError(
                f"the chat template ends an assistant's message without the end token {eos_token!r}; name the one it "
                "writes with --eos-token"
            )
        pieces += [Piece(whole[begin:end], True), Piece(whole[end:following], False)]
    return [*pieces, Piece(_cut_after_end(whole[begins[-1] :], eos_token, whole[: begins[0]]), True)]


def _bound(template: Template, inputs: TemplateInputs) -> Template:
    return partial(template, tools=inputs.tools or None, **inputs.variables)


def _opening(template: Template, messages: Messages) -> str:
    """The text in front of the assistant's next words."""
    if _is_open_thought(messages):
        asked, begun = _opening(template, messages[:-1]), messages[-1]["content"]
        return asked if asked.endswith(begun) else asked + begun
    if messages[-1]["role"] == "assistant":
        return _write(template, messages, continue_final_message=True)
    return _write(template, messages, add_generation_prompt=True)


def _is_open_thought(messages: Messages) -> bool:
    """Whether the last message is the assistant's and ends within a thought. Templates take a thought for one that is
    complete (Qwen3's writes an empty one in front of it), so this message is continued as it stands."""
    *asked, last = messages
    content = last.get("content") or ""
    begun = last["role"] == "assistant" and asked and asked[-1]["role"] != "assistant" and not last.get("tool_calls")
    return bool(begun) and content.rfind("<think>") > content.rfind("</think>")


def _ending(template: Template, before: Messages) -> str:
    """What the template writes behind the words of an assistant's message that ends a conversation."""
    word = "\ue000"
    return _write(template, [*before[:-1], {"role": "assistant", "content": word}]).rpartition(word)[2]


def unwritten_keys(template: Template, messages: Messages, inputs: TemplateInputs) -> list[str]:
    """Those of `MESSAGE_KEYS` that a message has and that the template does not write, even where it is the last."""
    template = _bound(template, inputs)
    found: list[str] = []
    for number, message in enumerate(messages):
        for key in MESSAGE_KEYS & message.keys() - set(found):
            without = {name: value for name, value in message.items() if name != key}
            texts = [_attempt(partial(_write, template), [*messages[:number], each]) for each in (message, without)]
            if isinstance(texts[0], str) and texts[0] == texts[1]:
                found.append(key)
    return sorted(found)


def _write(template: Template, messages: Messages, **how: bool) -> str:
    """The template's text of ``messages``. Calls of tools that it does not write are a UserError.

    A message with calls may have no content. Most templates then take an empty text, some a missing one only.
    """
    if not any(message.get("tool_calls") for message in messages):
        return _with_every_message(template(messages, **how), messages)
    filled = [{**message, "content": message.get("content") or ""} for message in messages]
    without = [{key: value for key, value in message.items() if key != "tool_calls"} for message in filled]
    silent = _attempt(template, without, **how)
    attempts = [_attempt(template, variant, **how) for variant in (filled, messages)]
    for text in attempts:
        if isinstance(text, str) and text != silent:
            return _with_every_message(text, messages)
    if isinstance(attempts[0], UserError):
        raise attempts[0]
    raise UserError("tool_calls: the chat template does not write them; take the row out or use another template")


def _with_every_message(text: str, messages: Messages) -> str:
    """``text``. Templates pass over a role that they do not know: UserError where a message is not in it."""
    for message in messages:
        role = message["role"]
        if role not in _USUAL_ROLES and (message.get("content") or "").strip() not in text:
            raise UserError(
                f"the chat template does not write the message of the role {role!r}; use one of "
                f"{', '.join(_USUAL_ROLES)}, or another template"
            )
    return text


def _attempt(template: Template, messages: Messages, **how: bool) -> str | UserError:
    try:
        return template(messages, **how)
    except UserError as error:
        return error


def _joined(before: Messages, answers: Messages) -> Messages:
    """The whole conversation. An answer to a prompt that ends with the assistant's message continues that message."""
    if before[-1]["role"] != "assistant":
        return before + answers
    last, first = before[-1], answers[0]
    content = (last.get("content") or "") + (first.get("content") or "")
    return [*before[:-1], {**last, **first, "content": content}, *answers[1:]]


def _cut_after_end(text: str, eos_token: str, opening: str = "") -> str:
    """Drop what templates write after the end token: the decoder stops at the token. That is white space, and with some
    (LLaDA's) what stands at the end of every conversation, the ``opening`` too: the head of the next message."""
    head = opening.rpartition(eos_token)[2]
    stripped = (text.removesuffix(head) if head.strip() and text.endswith(eos_token + head) else text).rstrip()
    return stripped if stripped.endswith(eos_token) else text


def _as_messages(content: str | Messages, role: str) -> Messages:
    return [{"role": role, "content": content}] if isinstance(content, str) else content
