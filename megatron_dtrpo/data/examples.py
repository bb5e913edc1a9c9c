"""From records to token ids: the one way that training, decoding and evaluation go.

Every text of many records goes to the tokenizer in one call. What only shows once tokenized is checked here; what is
right, yet may surprise the owner of the data, becomes a note.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from megatron_dtrpo.data.chat import MESSAGE_KEYS, Piece, unwritten_roles
from megatron_dtrpo.data.record import Record, TokenRecord
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import UserError

# Notes, as those of `records`.
BEHIND_END = (
    "warning: {count} rows have text behind an end token inside an answer: it is learned, but decoding stops at the "
    "token"
)
OTHER_SPECIAL = (
    "warning: {count} rows have special tokens in an answer that is text, and they are not the end token: they are "
    "learned: {details}"
)
WHITE_SPACE = (
    "warning: {count} rows have a prompt that ends in white space which the tokenizer joins with the answer's first "
    "word: move it to the answer"
)
QUOTED = (
    "warning: {count} rows give the arguments of a call as JSON text, which the chat template writes in quotes: give "
    "an object"
)
END_IN_REPLY = (
    "warning: {count} rows have an end token inside a message that an answer reads, such as a tool's reply: it is read "
    "as the end of that message"
)
UNREAD_KEYS = (
    "warning: {count} rows have messages with keys that the chat template does not write: they are neither read nor "
    "learned: {details}"
)
UNWRITTEN = (
    "warning: {count} rows have messages whose words the chat template leaves out, so that they are neither read nor "
    "learned; use another template or take them out: of the role {details}"
)
HEADLESS = (
    "warning: {count} rows go through a chat template that does not begin the assistant's message when asked to: "
    "answers begin with {details}, which is learned; if the template's file is not complete, fetch it again"
)
_DETAIL = "\0"  # between a note and a detail of it; one line names all details
_NAMED_DETAILS = 8

Turn = tuple[int, int]  # first and last plus one of a response's tokens that the assistant writes


@dataclass(frozen=True)
class Encoded:
    """Token ids of one record. ``turns``: of each response, the parts that the assistant writes, which are learned; it
    reads what lies between two of them, as the reply of a tool. ``steps`` and ``discarded`` as of `TokenRecord`."""

    prompt_text: str
    prompt: list[int]
    responses: tuple[list[int], ...]
    turns: tuple[tuple[Turn, ...], ...]
    steps: tuple[list[int], ...] | None = None
    discarded: tuple[list[tuple[int, int, int, int]], ...] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Texts:
    """A record rendered: the text of its prompt and the pieces of its responses."""

    prompt: str
    responses: list[list[Piece]]
    may_join: bool  # the end of the prompt and the beginning of an answer may be one token
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        """What is tokenized: prompt, pieces and, where it must be compared, prompt and first piece in one."""
        yield self.prompt
        for pieces in self.responses:
            yield from (piece.text for piece in pieces)
            if self.may_join:
                yield self.prompt + pieces[0].text


def unwritten(key: str) -> str:
    return (
        f"warning: {{count}} rows have messages with {key!r}, which the chat template does not write: it is neither "
        "read nor learned; put its text into 'content', or use a template that writes it"
    )


def note_line(note: str, count: int, first: str, details: Sequence[str] = ()) -> str:
    """A note about ``count`` rows, the first of which stands at ``first``."""
    more = [f"{len(details) - _NAMED_DETAILS} more"] * (len(details) > _NAMED_DETAILS)
    named = ", ".join([repr(detail) for detail in details[:_NAMED_DETAILS]] + more)
    return f"{note.format(count=count, details=named)} (first: {first})"


def note_lines(notes: dict[str, list[int]], location: Callable[[int], str]) -> list[str]:
    """Notes about rows, with the rows' numbers; in one line of notes that differ in a detail."""
    found: dict[str, tuple[list[str], set[int]]] = {}
    for note, about in notes.items():
        text, _, detail = note.partition(_DETAIL)
        details, rows = found.setdefault(text, ([], set()))
        details += [detail] * bool(detail)
        rows.update(about)
    return [note_line(text, len(rows), location(min(rows)), details) for text, (details, rows) in found.items()]


def encode_records(
    records: Sequence[Record | TokenRecord],
    names: Sequence[str],
    tokenizer: Tokenizer,
    apply_chat_template: bool,
    response_multiple: int = 1,
) -> list[Encoded | UserError]:
    """Token ids of each record, or why it cannot be used. ``names`` of its responses, for errors. Responses are filled
    with end tokens to a multiple of ``response_multiple`` tokens, unless their decoding is recorded."""
    rendered = [_attempt(_render, record, tokenizer, apply_chat_template) for record in records]
    ids = iter(tokenizer.encode_batch([text for texts in rendered if isinstance(texts, _Texts) for text in texts]))
    encoded: list[Encoded | UserError] = []
    for record, texts in zip(records, rendered, strict=True):
        if isinstance(texts, UserError):
            encoded.append(texts)
        else:
            if isinstance(record, TokenRecord):
                parts = _given(record, tokenizer)
            else:
                parts = _joined(record, texts, ids, tokenizer)
                if isinstance(record.prompt, str) and not apply_chat_template:
                    parts = replace(parts, notes=(*parts.notes, *_other_specials(parts, tokenizer)))
            checked = _attempt(_checked, parts, names, tokenizer, isinstance(record, TokenRecord))
            is_filled = isinstance(checked, UserError) or checked.steps is not None
            encoded.append(checked if is_filled else _filled(checked, response_multiple, tokenizer.eos_id))
    return encoded


def _filled(example: Encoded, multiple: int, end: int) -> Encoded:
    """With ``end`` tokens behind each response, written by the last turn, to a ``multiple`` of tokens."""
    responses = tuple([*ids, *[end] * (-len(ids) % multiple)] for ids in example.responses)
    turns = tuple(
        (*own[:-1], (own[-1][0], len(ids))) if own else own for own, ids in zip(example.turns, responses, strict=True)
    )
    return replace(example, responses=responses, turns=turns)


def _attempt(function, *arguments):
    try:
        return function(*arguments)
    except UserError as error:
        return error


def _render(record: Record | TokenRecord, tokenizer: Tokenizer, apply_chat_template: bool) -> _Texts | None:
    """None for a record that is token ids already."""
    if isinstance(record, TokenRecord):
        return None
    prompt = tokenizer.render_prompt(record.prompt, apply_chat_template, record.inputs)
    responses = [
        tokenizer.render_response(response, record.prompt, apply_chat_template, record.inputs)
        for response in record.responses
    ]
    is_plain = isinstance(record.prompt, str) and not apply_chat_template
    starts_blank = any(pieces[0].text[:1].isspace() for pieces in responses)
    notes = () if is_plain else _notes_on_messages(record, prompt, responses, tokenizer)
    return _Texts(prompt, responses, prompt[-1:].isspace() and (is_plain or starts_blank), notes)


def _notes_on_messages(
    record: Record, prompt: str, responses: list[list[Piece]], tokenizer: Tokenizer
) -> tuple[str, ...]:
    """What its messages hold that the chat template does not write, or that ends one early; and what it writes that
    they do not hold."""
    before = record.prompt if isinstance(record.prompt, list) else []
    answers = [response for response in record.responses if isinstance(response, list)]
    texts = [prompt + "".join(piece.text for piece in pieces) for pieces in responses]
    keys, roles = set(), set()
    for number, messages in enumerate([*before, *answer] for answer in answers or [[]]):
        keys.update(tokenizer.unwritten_keys(messages, record.inputs))
        roles.update(unwritten_roles(messages, texts[number] if answers else prompt))
    read = [message for answer in answers for message in answer if message["role"] != "assistant"]
    ends = any(tokenizer.eos_token in (message.get("content") or "") for message in read)
    form = tokenizer.template_form()
    headless = [f"{HEADLESS}{_DETAIL}{form.lead}"] if form and not form.asks and form.lead.strip() else []
    return (
        *map(unwritten, sorted(keys & MESSAGE_KEYS)),
        *(f"{UNREAD_KEYS}{_DETAIL}{key}" for key in sorted(keys - MESSAGE_KEYS)),
        *(f"{UNWRITTEN}{_DETAIL}{role}" for role in sorted(roles)),
        *headless,
        *[END_IN_REPLY] * ends,
    )


def _given(record: TokenRecord, tokenizer: Tokenizer) -> Encoded:
    turns = tuple(((0, len(response)),) for response in record.responses)
    text = "" if record.responses else tokenizer.decode(record.prompt)
    return Encoded(text, record.prompt, record.responses, turns, record.steps, record.discarded, record.notes)


def _joined(record: Record, texts: _Texts, ids: Iterator[list[int]], tokenizer: Tokenizer) -> Encoded:
    """Takes the texts' ids from ``ids`` and joins the pieces of each response."""
    prompt, responses, turns = next(ids), [], []
    notes = record.notes + texts.notes + (QUOTED,) * _quotes_arguments(record, texts)
    for pieces in texts.responses:
        response: list[int] = []
        learned: list[Turn] = []
        for piece in pieces:
            begin = len(response)
            response = response + next(ids)
            if piece is pieces[-1]:
                response = tokenizer.close(response)
            if piece.is_learned:
                learned.append((begin, len(response)))
        if texts.may_join:
            together = next(ids)
            if together != (prompt + response)[: len(together)] and WHITE_SPACE not in notes:
                notes = (*notes, WHITE_SPACE)
        responses.append(response)
        turns.append(tuple(learned))
    return Encoded(texts.prompt, prompt, tuple(responses), tuple(turns), notes=notes)


def _quotes_arguments(record: Record, texts: _Texts) -> bool:
    """Whether arguments that are JSON text are text in quotes once rendered, which no model is asked to write."""
    messages = [m for part in (record.prompt, *record.responses) if isinstance(part, list) for m in part]
    functions = [call.get("function", call) for m in messages for call in m.get("tool_calls", ())]
    arguments = [f.get("arguments") for f in functions if isinstance(f, dict)]
    quoted = [json.dumps(a, ensure_ascii=False) for a in arguments if isinstance(a, str)]
    return any(each in text for each in quoted for text in texts)


def _other_specials(parts: Encoded, tokenizer: Tokenizer) -> list[str]:
    """Notes on special tokens in answers, such as the end token of another model."""
    names = tokenizer.special_names
    found = {token for ids in parts.responses for token in ids if token in names} - {tokenizer.eos_id}
    return [f"{OTHER_SPECIAL}{_DETAIL}{names[token]}" for token in sorted(found)]


def _checked(parts: Encoded, names: Sequence[str], tokenizer: Tokenizer, given: bool) -> Encoded:
    ids = (parts.prompt, *parts.responses)
    check = _check_given if given else _check_tokenized
    for name, tokens in zip(("prompt", *names), ids, strict=False):
        check(name, tokens, tokenizer)
    for name, discarded in zip(names, parts.discarded or (), strict=False):
        _check_discarded(name, discarded, tokenizer)
    if len(parts.responses) == 2 and parts.responses[0] == parts.responses[1]:
        raise UserError("chosen and rejected are the same; take the row out, it prefers nothing")
    for response, turns in zip(parts.responses, parts.turns, strict=True):
        if any(tokenizer.eos_id in _without_filling(response[begin:end], tokenizer.eos_id) for begin, end in turns):
            return replace(parts, notes=(*parts.notes, BEHIND_END))
    return parts


def _without_filling(ids: list[int], end: int) -> list[int]:
    """``ids`` without the ``end`` tokens that they end with."""
    length = len(ids)
    while length and ids[length - 1] == end:
        length -= 1
    return ids[:length]


def _check_tokenized(name: str, ids: list[int], tokenizer: Tokenizer) -> None:
    """Refuse what only shows once tokenized."""
    if tokenizer.mask_id in ids:
        raise UserError(f"{name}: contains the mask token {tokenizer.mask_token!r}; remove it from the text")
    if len(ids) < (1 if name == "prompt" else 2):  # a response's end token does not count
        raise UserError(f"{name}: is empty once tokenized; give some text or take the row out")


def _check_given(name: str, ids: list[int], tokenizer: Tokenizer) -> None:
    """Refuse ids that are not text in this vocabulary."""
    if tokenizer.mask_id in ids:
        place = ids.index(tokenizer.mask_id)
        raise UserError(f"{name}_ids[{place}]: is the mask token {tokenizer.mask_id}; only text has ids here")
    if max(ids) >= tokenizer.vocab_size:
        place = ids.index(max(ids))
        raise UserError(
            f"{name}_ids[{place}]: {ids[place]} is not in the vocabulary of {tokenizer.vocab_size} tokens; "
            "give ids of this tokenizer"
        )


def _check_discarded(name: str, discarded: list[tuple[int, int, int, int]], tokenizer: Tokenizer) -> None:
    for place, token, *_ in discarded:
        if token >= tokenizer.vocab_size or token == tokenizer.mask_id:
            raise UserError(f"{name}_discarded: token {token} at place {place} is not one that decoding writes")
