"""A row of data, read: a prompt and its responses as the user wrote them, or as token ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Messages = list[dict[str, Any]]
TEMPLATE_SETTINGS = {"messages", "add_generation_prompt", "continue_final_message", "tools"}  # no row may set them


@dataclass(frozen=True)
class TemplateInputs:
    """Inputs of the chat template beside the messages of a row: tools, as JSON schemas, and the template's own
    variables."""

    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)

    def names(self) -> str:
        """The columns of the row that hold something."""
        return " and ".join(["tools"] * bool(self.tools) + ["chat_template_kwargs"] * bool(self.variables))


@dataclass(frozen=True)
class Record:
    """A prompt and its responses, each text or a message list. A list of a response holds the assistant's message, or
    several with the replies of tools between them. ``inputs`` go to the chat template; ``notes`` say what was done to
    the row."""

    prompt: str | Messages
    responses: tuple[str | Messages, ...]
    inputs: TemplateInputs = TemplateInputs()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenRecord:
    """A prompt and its responses as token ids; ``steps`` has one integer per response token, ``discarded`` the
    (place, token, step, until) of every discarded one (`diffusion.decoding.Discarded`); None where not recorded."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    steps: tuple[list[int], ...] | None = None
    discarded: tuple[list[tuple[int, int, int, int]], ...] | None = None
    notes: tuple[str, ...] = ()
