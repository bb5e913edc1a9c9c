"""Checks the rows of a data file once, before anything is tokenized.

A record is a prompt and its responses as the user wrote them, text or message lists: two responses (chosen, rejected)
for preferences, one (the completion) for supervised fine-tuning, none for a prompt to decode. The fields are TRL's. A
row may instead give exact token ids, ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` or ``completion_ids``, which are
then taken as they are, and with them a recorded decoding: the step at which each response token was unmasked,
``chosen_steps`` and ``rejected_steps``, and what was thrown away behind an end token, ``chosen_discarded`` and
``rejected_discarded``.

Messages of the errors raised here do not say which row they are about; the caller, who knows, puts that in front.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Any

from megatron_dtrpo.data.chat import TEMPLATE_SETTINGS, Messages, TemplateInputs
from megatron_dtrpo.data.messages import kind_of, read_messages, require_encodable, require_text
from megatron_dtrpo.data.share_gpt import read_columns
from megatron_dtrpo.data.shared_text import shared_prompt
from megatron_dtrpo.errors import UserError

_INPUTS = ("tools", "chat_template_kwargs")  # the columns that go to the chat template
# What data sets call a column elsewhere: Orca's pairs, GSM8K, Alpaca.
_OTHER_NAMES = {
    "prompt": ("question", "instruction", "query", "problem", "Prompt", "user_prompt", "context", "input"),
    "completion": ("answer", "response", "output", "solution"),
}
MOST = 2**31 - 2  # of an id or a step, so that they, and steps plus one, are 32-bit integers

# What was done to a row that its owner may not expect: notes, printed once for a file, with the number of rows.
IMPLICIT_TEXT = (
    "note: {count} rows without a prompt: it is what chosen and rejected share, up to the label of the assistant's turn"
)
IMPLICIT_WORDS = (
    "warning: {count} rows without a prompt and without a label of a turn that is known: the prompt is the lines or "
    "words that chosen and rejected share, which may be the beginning of the answer; give a prompt"
)
IMPLICIT_MESSAGES = "note: {count} rows without a prompt of messages: it is the messages that chosen and rejected share"
AFTER_LAST_ANSWER = (
    "warning: {count} rows go on after the assistant's last answer: what follows it is neither learned nor asked; to "
    "have all messages of a row answered, call the column 'prompt'"
)
REPEATED = (
    "warning: {count} rows repeat the prompt at the beginning of every answer, so that it comes twice: take it out of "
    "the answers"
)
INVERTED = "warning: {count} rows give the rejected answer a higher score than the chosen one: are the two exchanged?"
WORDLESS = "warning: {count} rows have a message of the user without words, as an image leaves it that was taken out"
LABEL = "warning: {count} rows have a 'label' that says neither that the completion is good nor bad: it is not read"
NO_PROMPT = "warning: {count} rows begin with the assistant's message: as nothing comes before it, it is not learned"
JSON_TEXT = "warning: {{count}} rows have JSON in {name!r} that holds no messages: it is taken as it stands, as text"
# Columns that belong to a prompt in other people's data (Orca, Alpaca, retrieval) and that no layout reads.
UNREAD = {
    name: f"warning: {{count}} rows have a column {name!r}, which is not read: put its text into the prompt or messages"
    for name in ("system", "system_prompt", "input", "context", "documents", "history")
}


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


def preference_record(row: dict[str, Any]) -> Record | TokenRecord:
    """``prompt``, ``chosen``, ``rejected``; or ``chosen`` and ``rejected`` that begin with the prompt (implicit
    prompt), as text or as conversations; or token ids.

    As in TRL, a text prompt beside two conversations is a label, and the prompt is what the conversations share.
    """
    if _has_ids(row, ("chosen", "rejected")):
        return _token_record(row, ("chosen", "rejected"))
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list) and not isinstance(row.get("prompt"), list):
        return _implicit_messages(row)
    if isinstance(chosen, str) and isinstance(rejected, str) and row.get("prompt") is None:
        return _implicit_text(row)
    _require(row, ("prompt", "chosen", "rejected"))
    return _explicit_record(row, ("chosen", "rejected"))


def sft_record(row: dict[str, Any]) -> Record | TokenRecord:
    """``prompt`` and ``completion``, or ``messages``: the last assistant message answers those before it; or token ids.

    Messages after the last answer are left out: nothing is learned from them. A text prompt beside ``messages`` is a
    label. A row whose ``label`` says that its completion is bad (KTO's data) is an error.
    """
    _refuse_bad_label(row.get("label"))
    if _has_ids(row, ("completion",)):
        return _token_record(row, ("completion",))
    if _is_conversation(row):
        messages, answers = _conversation(row)
        return _answer_record(row, messages, answers[-1], _after_last_answer(messages, answers))
    return _completion_record(row)


def sft_turn_records(row: dict[str, Any]) -> list[Record | TokenRecord]:
    """As `sft_record`, with one record for every assistant message of ``messages``, the conversation before it being
    its prompt: each is learned as it is decoded."""
    if _has_ids(row, ("completion",)) or not _is_conversation(row):
        return [sft_record(row)]
    _refuse_bad_label(row.get("label"))
    messages, answers = _conversation(row)
    notes = (NO_PROMPT,) * (answers[0] == 0) + _after_last_answer(messages, answers)
    records = [_answer_record(row, messages, place) for place in answers if place > 0]
    return [*records[:-1], _answer_record(row, messages, answers[-1], notes)]


def prompt_record(row: dict[str, Any]) -> Record | TokenRecord:
    """The prompt that training on this row has, without responses: of ``prompt_ids``, a preference row, a conversation
    in ``messages`` up to its last answer, or ``prompt``. ``messages`` without an answer are a prompt as they stand.
    Raises UserError where SFT and preferences would each train another prompt."""
    row, packed = read_columns(row)
    return _with_notes(row, packed, _prompt_record(row))


def _prompt_record(row: dict[str, Any]) -> Record | TokenRecord:
    if row.get("prompt_ids") is not None:
        _refuse_inputs(row, "prompt_ids")
        return TokenRecord(_integers(row["prompt_ids"], "prompt_ids"), ())
    readings = {name: _attempt(read, row) for name, applies, read in _PROMPT_COLUMNS if applies(row)}
    records = [each for each in readings.values() if isinstance(each, Record)]
    if not records:
        raise next((each for each in readings.values() if isinstance(each, UserError)), _no_prompt(row))
    if any(_read_words(record) != _read_words(records[0]) for record in records):
        raise UserError(f"{' and '.join(readings)} have different prompts; leave out the columns of one of them")
    return records[0]


def _attempt(read: Callable[[dict[str, Any]], Record], row: dict[str, Any]) -> Record | UserError:
    try:
        return read(row)
    except UserError as error:
        return error


def _no_prompt(row: dict[str, Any]) -> UserError:
    renaming = _renaming(row, ["prompt"]) or _renaming_of_messages(row, "messages")
    return UserError(f"a row needs prompt, messages or prompt_ids; this one has {_present(row)}{renaming}")


def _read_words(record: Record) -> str | Messages:
    """The prompt without the weights of messages, which no template writes."""
    if isinstance(record.prompt, str):
        return record.prompt
    return [{key: value for key, value in message.items() if key != "weight"} for message in record.prompt]


def _pair_prompt(row: dict[str, Any]) -> Record:
    """What `preference_record` takes for the prompt."""
    if not _has_implicit_prompt(row):
        return _explicit_prompt(row)
    ids = ("_ids", "_steps", "_discarded")
    record = preference_record({name: value for name, value in row.items() if not name.endswith(ids)})
    assert isinstance(record, Record)  # without ids
    return replace(record, responses=())


def _conversation_prompt(row: dict[str, Any]) -> Record:
    """What `sft_record` takes for the prompt of ``messages``; all of them where the assistant says nothing."""
    messages = read_messages(row["messages"], "messages")
    if all(message["role"] != "assistant" for message in messages):
        return Record(_question(messages, "messages"), (), _template_inputs(row))
    messages, answers = _conversation(row)
    notes = _after_last_answer(messages, answers)
    return Record(_question(messages[: answers[-1]], "messages"), (), _template_inputs(row), notes)


def _explicit_prompt(row: dict[str, Any]) -> Record:
    return Record(_prompt(row["prompt"]), (), _template_inputs(row))


def _is_pair(row: dict[str, Any]) -> bool:
    asks = row.get("prompt") is not None or _has_implicit_prompt(row)
    return asks and all(row.get(name) is not None for name in ("chosen", "rejected"))


def _asks(row: dict[str, Any]) -> bool:
    """Whether ``prompt`` is what SFT trains, or what a row without answers asks."""
    labels = _is_conversation(row) or (_is_pair(row) and row.get("completion") is None)
    return row.get("prompt") is not None and not labels


READERS: dict[str, Callable[[dict[str, Any]], Record | TokenRecord]] = {
    "preference": preference_record,
    "sft": sft_record,
}


def read_row(kind: str, row: dict[str, Any], assistant_turns: str = "last") -> list[Record | TokenRecord]:
    """The examples that a row of data of this ``kind`` is: one, or with ``assistant_turns="all"`` one for every
    assistant message of a conversation. Raises UserError for a row that cannot be used."""
    row, packed = read_columns(row)
    turns = kind == "sft" and assistant_turns == "all"
    first, *others = sft_turn_records(row) if turns else [READERS[kind](row)]
    first = _with_notes(row, packed, first)
    return [replace(first, notes=first.notes + _COLUMN_NOTES[kind](row)), *others]


def _label_notes(row: dict[str, Any]) -> tuple[str, ...]:
    label = row.get("label")
    return (LABEL,) * (label is not None and _plain_label(label) not in _GOOD_LABELS)


_SCORES = ("score", "rating", "reward", "quality")


def _score_notes(row: dict[str, Any]) -> tuple[str, ...]:
    for name in _SCORES:
        for chosen, rejected in ((f"{name}_chosen", f"{name}_rejected"), (f"chosen_{name}", f"rejected_{name}")):
            scores = row.get(chosen), row.get(rejected)
            if all(isinstance(score, (int, float)) for score in scores) and scores[0] < scores[1]:
                return (INVERTED,)
    return ()


# What columns beside the answers say of them.
_COLUMN_NOTES: dict[str, Callable[[dict[str, Any]], tuple[str, ...]]] = {
    "preference": _score_notes,
    "sft": _label_notes,
}


def _holds_something(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else isinstance(value, list | dict) and bool(value)


def _with_notes(row: dict[str, Any], packed: Sequence[str], record: Record | TokenRecord) -> Record | TokenRecord:
    """``record``, with a note for each of the row's `UNREAD` columns that holds text or objects, and for each that is
    JSON text of no messages. Token ids are whole as given."""
    unread = tuple(note for name, note in UNREAD.items() if _holds_something(row.get(name)))
    notes = unread + tuple(JSON_TEXT.format(name=name) for name in packed)
    if isinstance(record.prompt, list) and isinstance(record, Record):
        wordless = any(m["role"] == "user" and not m["content"].strip() for m in record.prompt)
        notes += (WORDLESS,) * wordless
    return replace(record, notes=record.notes + notes) if notes and isinstance(record, Record) else record


def _has_implicit_prompt(row: dict[str, Any]) -> bool:
    responses = [row.get(name) for name in ("chosen", "rejected")]
    if all(isinstance(response, list) for response in responses):
        return not isinstance(row.get("prompt"), list)
    return all(isinstance(response, str) for response in responses) and row.get("prompt") is None


def _implicit_messages(row: dict[str, Any]) -> Record:
    chosen, rejected = (read_messages(row[name], name) for name in ("chosen", "rejected"))
    # The last message is always an answer, so equal conversations still leave one to compare.
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    if shared == 0:
        raise UserError("chosen and rejected share no first message; give the prompt as a list of messages")
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        role = messages[shared]["role"]
        if role != "assistant":
            raise UserError(
                f"{name}[{shared}]: chosen and rejected part at a message of the role {role!r}; end both after the "
                "first answer that differs"
            )
    prompt = _question(chosen[:shared])
    answers = tuple(_answer(messages[shared:], name) for name, messages in (("chosen", chosen), ("rejected", rejected)))
    return Record(prompt, answers, _template_inputs(row), (IMPLICIT_MESSAGES,))


def _implicit_text(row: dict[str, Any]) -> Record:
    renaming = _renaming(row, ["prompt"]) or _renaming_of_messages(row, "prompt")
    if renaming:  # two answers that happen to begin with the same words hold no prompt
        raise UserError(f"missing field 'prompt'; the row has {_present(row)}{renaming}")
    chosen, rejected = (require_text(row[name], name) for name in ("chosen", "rejected"))
    prompt, has_labels = shared_prompt(chosen, rejected)
    responses = (require_text(chosen[len(prompt) :], "chosen"), require_text(rejected[len(prompt) :], "rejected"))
    return Record(prompt, responses, _template_inputs(row), (IMPLICIT_TEXT if has_labels else IMPLICIT_WORDS,))


def _completion_record(row: dict[str, Any]) -> Record:
    _require(row, ("prompt", "completion"))
    return _explicit_record(row, ("completion",))


_SHORT = 8  # characters of a prompt that an answer may well begin with too


def _explicit_record(row: dict[str, Any], names: tuple[str, ...]) -> Record:
    prompt = _prompt(row["prompt"])
    responses = tuple(_response(row[name], name, prompt) for name in names)
    notes = (REPEATED,) * all(_repeats(response, prompt) for response in responses)
    return Record(prompt, responses, _template_inputs(row), notes)


def _repeats(response: str | Messages, prompt: str | Messages) -> bool:
    if not isinstance(prompt, str) or not isinstance(response, str):
        return False
    return len(prompt.strip()) > _SHORT and response.strip().startswith(prompt.strip())


_GOOD_LABELS = ("true", "1", "1.0", "yes", "good", "chosen", "desirable", "correct")
_BAD_LABELS = ("false", "0", "0.0", "-1", "-1.0", "no", "bad", "rejected", "undesirable", "dispreferred", "incorrect")


def _refuse_bad_label(label: Any) -> None:
    """KTO's data holds completions to avoid beside those to follow."""
    if _plain_label(label) in _BAD_LABELS:
        raise UserError(
            f"label: is {label!r}: the completion is one to avoid, and sft learns what it is given; take the row out"
        )


def _plain_label(label: Any) -> str:
    return str(label).strip().lower()


def _is_conversation(row: dict[str, Any]) -> bool:
    """Whether the row's prompt and answer are in ``messages``. A text prompt beside them is a label."""
    return row.get("messages") is not None and row.get("completion") is None and not isinstance(row.get("prompt"), list)


def _holds_prompt(row: dict[str, Any]) -> bool:
    """Whether ``messages`` say what is asked; also beside a completion alone, as `generate.py` writes it."""
    return _is_conversation(row) or (row.get("messages") is not None and row.get("prompt") is None)


# Columns that say what the prompt is, whether a row has them, and how the objective that trains such a row reads them.
_PROMPT_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], Record]], ...] = (
    ("chosen and rejected", _is_pair, _pair_prompt),
    ("messages", _holds_prompt, _conversation_prompt),
    ("prompt and completion", _asks, _explicit_prompt),
)


def _conversation(row: dict[str, Any]) -> tuple[Messages, list[int]]:
    """The row's messages, and the places of the assistant's among them; without those of ``weight`` 0 (OpenAI's), which
    are not to be learned."""
    messages = read_messages(row["messages"], "messages")
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise UserError(
            "messages: no message has the role 'assistant'; the last one that has is the completion" + _put(row)
        )
    answers = [place for place in answers if messages[place].get("weight", 1)]
    if not answers:
        raise UserError("messages: every message of the assistant has the weight 0; take the row out")
    if answers[-1] == 0:
        raise UserError("messages: nothing comes before the assistant's message; begin with the user's")
    if answers[-1] < len(messages) - 1 and row.get("answer") is not None:
        raise UserError(
            "messages: go on after the assistant's last answer, and 'answer' may be that of what follows; end them "
            "with it, or give all of them as 'prompt'"
        )
    return messages, answers


def _after_last_answer(messages: Messages, answers: list[int]) -> tuple[str, ...]:
    return (AFTER_LAST_ANSWER,) * (answers[-1] < len(messages) - 1)


def _put(row: dict[str, Any]) -> str:
    """Advice about the answer of a conversation that has none."""
    name = next((name for name in ("answer", *_OTHER_NAMES["completion"]) if isinstance(row.get(name), str)), None)
    return f"; put the text of {name!r} into such a message" if name else ""


def _answer_record(row: dict[str, Any], messages: Messages, place: int, notes: tuple[str, ...] = ()) -> Record:
    prompt, response = _question(messages[:place], "messages"), _answer([messages[place]], "messages")
    return Record(prompt, (response,), _template_inputs(row), notes)


def _template_inputs(row: dict[str, Any]) -> TemplateInputs:
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


def _has_ids(row: dict[str, Any], names: tuple[str, ...]) -> bool:
    fields = [f"{name}_ids" for name in ("prompt", *names)]
    fields += [f"{name}_{what}" for name in names for what in ("steps", "discarded")]
    return any(row.get(field) is not None for field in fields)


def _token_record(row: dict[str, Any], names: tuple[str, ...]) -> TokenRecord:
    ids = [f"{name}_ids" for name in ("prompt", *names)]
    steps, discarded = ([f"{name}_{what}" for name in names] for what in ("steps", "discarded"))
    given = [field for field in ids + steps + discarded if row.get(field) is not None]
    _refuse_inputs(row, given[0])
    missing = [field for field in ids if field not in given]
    if missing:
        raise UserError(f"{given[0]} without {missing[0]}; give {', '.join(ids)} together")
    prompt, *responses = (_integers(row[field], field) for field in ids)
    if not _together(steps, given):
        if _together(discarded, given):
            raise UserError(f"{discarded[0]} without {steps[0]}: give both")
        return TokenRecord(prompt, tuple(responses))
    recorded = tuple(_integers(row[field], field) for field in steps)
    for field, of, response, each in zip(steps, ids[1:], responses, recorded, strict=True):
        if len(each) != len(response):
            raise UserError(f"{field}: {len(each)} steps for the {len(response)} tokens of {of}; give one per token")
    if not _together(discarded, given):
        return TokenRecord(prompt, tuple(responses), recorded)
    thrown = tuple(_discarded(row[field], field, each) for field, each in zip(discarded, recorded, strict=True))
    return TokenRecord(prompt, tuple(responses), recorded, thrown)


def _refuse_inputs(row: dict[str, Any], field: str) -> None:
    """Token ids are whole as given. Beside the messages that they were made of, as `megatron-dtrpo pairs` writes them,
    ``tools`` are in them already. Raises UserError where a row has such columns and nothing that they belong to."""
    names = _template_inputs(row).names()
    if names and not isinstance(row.get("prompt"), list):
        raise UserError(f"{names}: {field} are taken as they are, no chat template writes into them; take {names} out")


def _together(fields: list[str], given: list[str]) -> bool:
    """Whether all of ``fields`` are ``given``, or none; raises UserError where some are."""
    found = [field for field in fields if field in given]
    if found and found != fields:
        raise UserError(f"{found[0]} alone; give {' and '.join(fields)} together")
    return bool(found)


DISCARDED = ("place", "token", "step", "until")


def _discarded(value: Any, name: str, steps: list[int]) -> list[tuple[int, int, int, int]]:
    """Discarded tokens of a response that ``steps`` wrote, ordered by place."""
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise UserError(f"{name}: must be a list of objects with {', '.join(DISCARDED)}")
    found = []
    for number, item in enumerate(value):
        for key in DISCARDED:
            if type(item.get(key)) is not int or not 0 <= item[key] <= MOST:
                raise UserError(f"{name}[{number}]: {key} must be an integer from 0 to {MOST}, not {item.get(key)!r}")
        found.append(tuple(item[key] for key in DISCARDED))
    found.sort()
    for number, (place, _, step, until) in enumerate(found):
        if place < len(steps) or (number and place == found[number - 1][0]):
            raise UserError(f"{name}: place {place} holds a token already; the response has {len(steps)}")
        before = {*steps, *(other[2] for other in found[:number])}
        if not step < until or until not in before:
            raise UserError(
                f"{name}: place {place}: until {until} must be the step, after step {step}, that wrote an "
                "end token before it"
            )
    return found


def _integers(value: Any, name: str) -> list[int]:
    if not isinstance(value, list):
        raise UserError(f"{name}: must be a list of integers, not {kind_of(value)}")
    if not value:
        raise UserError(f"{name}: is an empty list; give at least one token or take the row out")
    for place, item in enumerate(value):
        if type(item) is not int or not 0 <= item <= MOST:
            shown = item if isinstance(item, (int, float)) else kind_of(item)
            raise UserError(f"{name}[{place}]: must be an integer from 0 to {MOST}, not {shown}")
    return value


def _require(row: dict[str, Any], names: tuple[str, ...]) -> None:
    missing = [name for name in names if row.get(name) is None]
    if missing == ["completion"] and isinstance(row["prompt"], list) and row.get("messages") is not None:
        raise UserError(
            "missing field 'completion' beside a prompt of messages; if the messages hold the answer: take prompt out"
        )
    if missing:
        renaming = _renaming(row, missing) or ("prompt" in missing and _renaming_of_messages(row, "messages")) or ""
        is_kto = "chosen" in missing and row.get("label") is not None
        no_pair = "; a completion and its label (KTO) are no pair" if is_kto else ""
        raise UserError(f"missing field {missing[0]!r}; the row has {_present(row)}{no_pair}{renaming}")


def _renaming(row: dict[str, Any], missing: Sequence[str]) -> str:
    """Columns to rename, where columns of the row are likely the ``missing`` ones."""
    found = [(next((o for o in _OTHER_NAMES.get(name, ()) if row.get(o) is not None), None), name) for name in missing]
    renamed = ", ".join(f"{other!r} to {name!r}" for other, name in found if other is not None)
    return f"; rename {renamed}" if renamed else ""


_DIALOGUES = ("messages", "conversation", "dialog", "dialogue", "chat")


def _renaming_of_messages(row: dict[str, Any], name: str) -> str:
    """Columns to rename, where a column of the row holds messages and the ``name`` of them is another."""
    found = [key for key in _DIALOGUES if isinstance(row.get(key), list) and row[key] and isinstance(row[key][0], dict)]
    return f"; rename {found[0]!r} to {name!r}" if found and found[0] != name else ""


def _present(row: dict[str, Any]) -> str:
    return ", ".join(sorted(name for name, value in row.items() if value is not None)) or "nothing"


def _prompt(value: Any) -> str | Messages:
    """A prompt that the row gives apart from its responses; it may end with the beginning of the assistant's answer."""
    if isinstance(value, str):
        return require_text(value, "prompt")
    if not isinstance(value, list):
        raise UserError(f"prompt: must be text or a list of messages, not {kind_of(value)}")
    messages = read_messages(value, "prompt")
    last = messages[-1]
    if last["role"] == "assistant" and last.get("tool_calls"):
        raise UserError("prompt: ends with calls of tools that have no reply; add the tool's message")
    return messages if last["role"] == "assistant" else _question(messages, "prompt")


def _question(messages: Messages, name: str = "prompt") -> Messages:
    """Messages that the assistant is to answer."""
    role = messages[-1]["role"]
    if role == "assistant":
        raise UserError(f"{name}: two messages of the assistant in a row; join them")
    if role == "system":
        raise UserError(f"{name}: the prompt ends with a message of the role 'system'; end it with the user's")
    return messages


def _response(value: Any, name: str, prompt: str | Messages) -> str | Messages:
    if not isinstance(value, (str, list)):
        raise UserError(f"{name}: must be text or a list of messages, not {kind_of(value)}")
    if isinstance(value, str) != isinstance(prompt, str):
        raise UserError(f"{name}: is {kind_of(value)} but the prompt is {kind_of(prompt)}; give both in one form")
    return require_text(value, name) if isinstance(value, str) else _answer(read_messages(value, name), name)


def _answer(messages: Messages, name: str) -> Messages:
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
