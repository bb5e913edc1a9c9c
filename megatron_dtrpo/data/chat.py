"""Prompts and responses as text, the way TRL renders them.

Text stays as it is; messages go through a chat template. The template is a parameter here, so nothing in this file
knows a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_dtrpo.errors import UserError

Messages = list[dict[str, Any]]
Template = Callable[[Messages, bool], str]  # (messages, add_generation_prompt) -> text


def render_prompt(template: Template, prompt: str | Messages, apply_chat_template: bool) -> str:
    """A prompt's text: with messages, up to where the assistant begins to speak.

    ``apply_chat_template`` makes a text prompt one user message.
    """
    if isinstance(prompt, str) and not apply_chat_template:
        return prompt
    return template(_as_messages(prompt, "user"), True)


def render_response(
    template: Template,
    eos_token: str,
    response: str | Messages,
    prompt: str | Messages | None,
    apply_chat_template: bool,
) -> str:
    """A response's text: with messages, what the template adds to the rendered prompt.

    Templates may write an answer differently after a different prompt; for ``prompt=None`` a short user message
    stands in. Raises UserError where the rendered prompt is not what the answered conversation begins with.
    """
    if isinstance(response, str) and not apply_chat_template:
        return _cut_after_end(response, eos_token)
    before = _as_messages("Hi" if prompt is None else prompt, "user")
    opening = template(before, True)
    whole = template(before + _as_messages(response, "assistant"), False)
    if not whole.startswith(opening):
        raise UserError("the chat template writes this prompt differently once it is answered; give text instead")
    return _cut_after_end(whole[len(opening) :], eos_token)


def _cut_after_end(text: str, eos_token: str) -> str:
    """Drop the white space that templates write after the end token: the decoder stops at the token."""
    stripped = text.rstrip()
    return stripped if stripped.endswith(eos_token) else text


def _as_messages(content: str | Messages, role: str) -> Messages:
    return [{"role": role, "content": content}] if isinstance(content, str) else content
