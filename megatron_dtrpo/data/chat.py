"""Prompts and responses as text, the way TRL renders them.

Text stays as it is; messages go through a chat template. The template is a parameter here, so nothing in this file
knows a tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from megatron_dtrpo.data.record import Messages, TemplateInputs
from megatron_dtrpo.errors import UserError

# (messages, add_generation_prompt=, continue_final_message=, tools=, **variables) -> text
Template = Callable[..., str]
# What a message may say beside its content, and some templates write.
MESSAGE_KEYS = {"reasoning_content", "reasoning", "thinking", "tool_plan", "function_call", "name", "refusal"}
# What is read here, or belongs to a message that templates write without it.
_USUAL_KEYS = {"role", "content", "tool_calls", "tool_call_id", "weight"}
_USUAL_ROLES = ("system", "user", "assistant", "tool")  # what templates write, if with changes


@dataclass(frozen=True)
class Ends:
    """Tokens that may end an answer: the end token, or one of the special tokens that a template writes instead."""

    token: str
    specials: frozenset[str] = frozenset()

    def of_answer(self, tail: str) -> str:
        """The part of ``tail``, a template's text behind an answer's words, that the answer ends with: up to the end
        token, else up to the first special token; nothing where there is none. The rest is not the assistant's."""
        if self.token in tail:
            return tail[: tail.index(self.token) + len(self.token)]
        found = min(((tail.index(s), -len(s)) for s in self.specials if s in tail), default=None)
        return tail[: found[0] - found[1]] if found else ""


@dataclass(frozen=True)
class TemplateForm:
    """How a chat template writes a question and its answer.

    ``start`` stands in front of all words, ``lead`` between a prompt and the answer's words, ``tail`` behind those;
    ``asks``: it writes more when it is asked for the head of the assistant's message; ``writes_keys``: messages are
    written with whatever keys they have; ``unwritten``: those of the roles user and assistant whose words are not.
    """

    start: str
    lead: str
    tail: str
    asks: bool
    writes_keys: bool
    unwritten: tuple[str, ...]


class Piece(NamedTuple):
    """A part of a response's text: written by the assistant, and learned, or read by it, as the reply of a tool."""

    text: str
    is_learned: bool


_WORDS = "\ue000", "\ue001", "\ue002"  # that no template holds


def form_of(template: Template) -> TemplateForm:
    """Raises UserError where the template refuses a question and its answer."""
    first, question, answer = _WORDS
    exchange = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    opening = template(exchange[:1], add_generation_prompt=True)
    whole = template(exchange)
    behind, _, tail = whole.removeprefix(opening).rpartition(answer)
    guided = _attempt(template, [{"role": "system", "content": first}, *exchange])
    start = guided.partition(first)[0] if isinstance(guided, str) and first in guided else whole.partition(question)[0]
    return TemplateForm(
        start=start,
        lead=behind if whole.startswith(opening) else "",
        tail=tail,
        asks=opening != _attempt(template, exchange[:1]),
        writes_keys=whole != _attempt(template, [{**message, first: first} for message in exchange]),
        unwritten=("user",) * (question not in opening) + ("assistant",) * (answer not in whole),
    )


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
    ends: Ends,
    response: str | Messages,
    prompt: str | Messages | None,
    apply_chat_template: bool,
    inputs: TemplateInputs | None = None,
    usual_tail: str = "",
) -> list[Piece]:
    """A response's text: with messages, what the template adds to the rendered prompt, up to the answer's end. It
    begins and ends with what the assistant writes; between two of the assistant's messages lies what it reads.

    Templates may write an answer differently after a different prompt; for ``prompt=None`` a short user message
    stands in. ``usual_tail``: of `TemplateForm`, where it is known. Raises UserError where the rendered prompt is not
    what the answered conversation begins with.
    """
    if isinstance(response, str) and not apply_chat_template:
        return [Piece(_cut_after_end(response, ends.token), True)]
    inputs = inputs or TemplateInputs()
    template = _bound(template, inputs)
    before = _as_messages("Hi" if prompt is None else prompt, "user")
    answers = _as_messages(response, "assistant")
    opening = _opening(template, before)
    if _is_open_thought(before) and len(answers) == 1 and not answers[0].get("tool_calls"):
        return [Piece(answers[0]["content"] + ends.of_answer(_tail(template, before)), True)]
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
    tail = "" if inputs.names() else usual_tail
    if not tail or not whole.endswith(tail, begins[-1]):
        tail = _tail(template, before)
    last = _cut_after_answer(whole[begins[-1] :], tail, ends)
    if len(begins) == 1:
        return [Piece(last, True)]
    hidden = _with_own_ends_only(template, conversation, whole, ends.token)
    return [*_earlier_pieces(whole, hidden, begins, ends.token), Piece(last, True)]


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


def _earlier_pieces(whole: str, hidden: str, begins: list[int], eos_token: str) -> list[Piece]:
    """``whole`` between the first and the last of ``begins``, where the assistant begins to speak: each time up to its
    end token, which is the next one in ``hidden``."""
    pieces = []
    for begin, following in zip(begins, begins[1:], strict=False):
        end = hidden.find(eos_token, begin, following) + len(eos_token)
        if end < begin + len(eos_token):
            raise UserError(
                f"the chat template ends an assistant's message without the end token {eos_token!r}; name the one it "
                "writes with --eos-token"
            )
        pieces += [Piece(whole[begin:end], True), Piece(whole[end:following], False)]
    return pieces


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


def _tail(template: Template, before: Messages) -> str:
    """Text that the template adds behind an assistant's message that answers or continues ``before``."""
    word = _WORDS[0]
    asked = before[:-1] if before[-1]["role"] == "assistant" else before
    return _write(template, [*asked, {"role": "assistant", "content": word}]).rpartition(word)[2]


def _cut_after_answer(text: str, tail: str, ends: Ends) -> str:
    """Drop what templates write behind an answer's end, such as the head of the next message, from a ``text`` that ends
    with ``tail``. The decoder stops at the end."""
    if not text.endswith(tail):
        return _cut_after_end(text, ends.token)
    return text[: len(text) - len(tail)] + ends.of_answer(tail)


def unwritten_keys(template: Template, messages: Messages, inputs: TemplateInputs, unread: set[str]) -> list[str]:
    """Keys that a message has and that the template does not write, even where it is the last: without `_USUAL_KEYS`,
    with those that are ``unread`` for certain."""
    template = _bound(template, inputs)
    found = [key for key in unread if any(key in message for message in messages)]
    for number, message in enumerate(messages):
        for key in message.keys() - _USUAL_KEYS - set(found):
            without = {name: value for name, value in message.items() if name != key}
            texts = [_attempt(partial(_write, template), [*messages[:number], each]) for each in (message, without)]
            if isinstance(texts[0], str) and texts[0] == texts[1]:
                found.append(key)
    return sorted(found)


def unusual_keys(messages: Messages) -> set[str]:
    return {key for message in messages for key in message} - _USUAL_KEYS


def unwritten_roles(messages: Messages, text: str) -> list[str]:
    """Roles of those ``messages`` whose words are not in ``text``, the template's. Thoughts may be left out, and
    characters escaped."""
    return sorted({message["role"] for message in messages if not _is_written(message, text)})


def _is_written(message: dict[str, Any], text: str) -> bool:
    content = message.get("content") or ""
    visible = content.rpartition("</think>")[2].strip() if message["role"] == "assistant" else content.strip()
    return visible in text or all(word in text for word in re.findall(r"\w+", visible))


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


def _cut_after_end(text: str, eos_token: str) -> str:
    """Drop white space behind an end token: the decoder stops at the token."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(eos_token) else text


def _as_messages(content: str | Messages, role: str) -> Messages:
    return [{"role": role, "content": content}] if isinstance(content, str) else content
