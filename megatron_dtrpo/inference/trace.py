"""A decoding as it happened, and the page that replays it.

The page is one HTML file that needs nothing else: it can be mailed, opened from a disk or put on any server, and
never asks a network for anything. It is written in ``trace.html``, ``trace.css`` and ``trace.js``; this file puts
them and the decodings together.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.diffusion.decoding import Completion, Discarded
from megatron_dtrpo.errors import UserError

_SOURCES = {"html": "trace.html", "css": "trace.css", "tokens": "tokens.js", "js": "trace.js"}


@dataclass(frozen=True)
class DiscardedToken:
    """A token that was written behind the place of a later end token, and was thrown away with it.

    ``place``: how many tokens behind the response's first one it stood. ``step`` wrote it, ``until`` wrote the end
    token. ``token_text``, ``confidence`` and ``block``: as `Trace` has them; ``ends``: it is an end token itself.
    """

    place: int
    token_text: str
    step: int
    until: int
    confidence: float
    block: int
    ends: bool = False


@dataclass(frozen=True)
class Trace:
    """How one response of n tokens was decoded: ``token_texts``, ``steps``, ``confidence``, ``blocks`` of n entries.

    ``token_texts``: the text each token adds; joined they are ``text``. Tokens without text, as the end token, have ''.
    ``steps``: the decoding step, from 0, in which each token appeared.
    ``confidence``: the probability, 0 to 1, that the model gave each token when it appeared.
    ``blocks``: each token's block on the absolute grid, prompt included; blocks follow each other in the response.
    ``discarded``: what stood behind the end for some steps, by place; it is no part of ``text``.
    ``answer_length``: tokens up to the first end token. Under full attention others are written and stay behind it.
    """

    prompt: str
    token_texts: tuple[str, ...]
    steps: tuple[int, ...]
    confidence: tuple[float, ...]
    blocks: tuple[int, ...]
    text: str
    discarded: tuple[DiscardedToken, ...] = ()
    answer_length: int | None = None  # all


def trace_of(prompt: str, completion: Completion, tokenizer: Tokenizer, end_ids: Collection[int] = ()) -> Trace:
    """How ``completion`` was decoded. ``end_ids``: tokens that end a response beside the tokenizer's own."""

    def thrown_away(token: Discarded) -> DiscardedToken:
        (token_text,) = tokenizer.token_texts([token.token])
        ends = token.token in (tokenizer.eos_id, *end_ids)
        # An end token discards within its own block, which is the response's last one.
        return DiscardedToken(
            token.place, token_text, token.step, token.until, token.confidence, completion.blocks[-1], ends
        )

    return Trace(
        prompt=prompt,
        token_texts=tuple(tokenizer.token_texts(completion.tokens)),
        steps=tuple(completion.steps),
        confidence=tuple(completion.confidence),
        blocks=tuple(completion.blocks),
        text=tokenizer.decode(completion.tokens),
        answer_length=completion.answer_length,
        discarded=tuple(sorted(map(thrown_away, completion.discarded), key=lambda token: token.place)),
    )


def trace_page(traces: Sequence[Trace], title: str) -> str:
    """One self-contained HTML page that replays ``traces`` step by step. Write it as UTF-8.

    It opens at the first step of the first trace, unless the address ends in ``#trace=2&step=5``, counted from 1, or
    ``step=last``. Raises UserError where there is no trace or one contradicts itself.
    """
    if not traces:
        raise UserError("traces: none given; decode at least one prompt")
    for number, trace in enumerate(traces, start=1):
        _check(trace, f"trace {number}")
    return filled(page_sources(), title, [asdict(trace) for trace in traces])


def page_sources() -> dict[str, str]:
    """The texts that the page is made of: ``html``, ``css``, ``tokens`` (how a token is drawn) and ``js``."""
    return {name: Path(__file__).with_name(file).read_text(encoding="utf-8") for name, file in _SOURCES.items()}


def filled(sources: dict[str, str], title: str, data: Any) -> str:
    """``sources["html"]`` with the other sources, ``title`` and ``data``, as JSON, in their places ``{{name}}``."""
    # Only ASCII is left, lone surrogates and control characters are escaped, and no tag can begin or end in it.
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    values = {**sources, "title": html.escape(_printable(title)), "data": text}
    # In one pass: no value is searched for another's place.
    return re.sub(r"\{\{(title|css|tokens|data|js)\}\}", lambda place: values[place[1]], sources["html"])


def _check(trace: Trace, where: str) -> None:
    """Raise UserError where the parts of ``trace`` do not fit together; the page would show something wrong."""
    columns = {"steps": trace.steps, "confidence": trace.confidence, "blocks": trace.blocks}
    for name, column in columns.items():
        if len(column) != len(trace.token_texts):
            raise UserError(f"{where}: {len(column)} {name} for {len(trace.token_texts)} tokens; give one per token")
    if "".join(trace.token_texts) != trace.text:
        raise UserError(f"{where}: token_texts do not join to the text; take them from Tokenizer.token_texts")
    if any(step < 0 for step in trace.steps):
        raise UserError(f"{where}: a step is below 0; count steps from 0")
    if any(token.place < len(trace.token_texts) for token in trace.discarded):
        raise UserError(f"{where}: a discarded token stands in the response; its place is behind the last token")
    if any(not 0 <= token.step < token.until for token in trace.discarded):
        raise UserError(f"{where}: a discarded token was thrown away before it was written")
    # A softmax in single precision may come out a little above 1.
    confidence = (*trace.confidence, *(token.confidence for token in trace.discarded))
    if not all(0 <= probability <= 1.001 for probability in confidence):
        raise UserError(f"{where}: a confidence is not a probability from 0 to 1")


def _printable(text: str) -> str:
    """``text`` without what cannot stand in an HTML file: control characters and lone surrogates become U+FFFD."""
    return re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)
