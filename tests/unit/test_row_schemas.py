"""Rows of any schema that a strategy can think of: used or refused in a line, and nothing learned that no row says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dtrpo.data.fields import require_columns
from megatron_dtrpo.data.prompts import make_prompt
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError
from tests.support.chat_tokenizer import save_chat_tokenizer

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

TEXTS = st.one_of(
    st.sampled_from(["", " ", "2+2=", "4", "4 ", "a b", "a c", *("\n\nHuman: a\n\nAssistant: " + x for x in "bc")]),
    st.sampled_from(["<|im_end|>", "a<|im_end|>b", "[MASK]", "<|im_start|>user\n", "\u4e2d\ufeff", "2024-01-01", "NA"]),
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.text(st.characters(), max_size=3),  # half surrogate pairs too
)
NUMBERS = st.one_of(
    st.integers(-2, 300), st.sampled_from([2**31, 2**63, -(2**70), 1e300, 0.5, float("nan"), True, False])
)
ANYTHING = st.recursive(
    st.one_of(st.none(), TEXTS, NUMBERS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)
CALL = st.fixed_dictionaries(
    {"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXTS, "arguments": ANYTHING})}
)
CALLS = st.lists(CALL, max_size=2)
ROLES = st.one_of(st.sampled_from(["system", "user", "assistant", "assistant", "tool"]), ANYTHING)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": TEXTS}),
    st.fixed_dictionaries({"role": ROLES, "content": TEXTS}, optional={"tool_calls": CALLS, "name": ANYTHING}),
    st.fixed_dictionaries({}, optional={"role": ROLES, "content": ANYTHING, "tool_calls": st.one_of(CALLS, ANYTHING)}),
)


def _message(role, text):
    return {"role": role, "content": text}


USER, ASSISTANT = (st.builds(_message, st.just(role), TEXTS) for role in ("user", "assistant"))
QUESTION, ANSWER = st.tuples(USER).map(list), st.tuples(ASSISTANT).map(list)
CONVERSATION = st.one_of(
    st.tuples(USER, ASSISTANT).map(list),
    st.tuples(USER, ASSISTANT, USER, ASSISTANT).map(list),
    st.tuples(USER).map(list),
    st.tuples(ASSISTANT).map(list),
    st.lists(MESSAGE, max_size=4),
)
GOOD_IDS = st.lists(st.integers(1, 200), min_size=1, max_size=4)
IDS = st.lists(st.one_of(st.integers(0, 255), NUMBERS), max_size=5)
COLUMNS = {
    **dict.fromkeys(("prompt", "chosen", "rejected", "completion"), st.one_of(TEXTS, CONVERSATION, ANYTHING)),
    "messages": st.one_of(CONVERSATION, ANYTHING),
    **{f"{name}_ids": IDS for name in ("prompt", "chosen", "rejected", "completion")},
    **{f"{name}_steps": IDS for name in ("chosen", "rejected")},
    **dict.fromkeys(("tools", "chat_template_kwargs", "label", "answer", "question", "system"), ANYTHING),
}


def _row(*names: str):
    return st.fixed_dictionaries({name: COLUMNS[name] for name in names})


def _of(kind, *names: str):
    return st.fixed_dictionaries(dict.fromkeys(names, kind))


ROWS = st.one_of(
    _of(TEXTS, "prompt", "chosen", "rejected"),
    _of(TEXTS, "chosen", "rejected"),
    _of(CONVERSATION, "chosen", "rejected"),
    st.tuples(_of(TEXTS, "prompt"), _of(CONVERSATION, "chosen", "rejected")).map(lambda two: two[0] | two[1]),
    st.tuples(_of(QUESTION, "prompt"), _of(ANSWER, "chosen", "rejected", "completion")).map(
        lambda two: two[0] | two[1]
    ),
    _row("prompt", "completion", "label"),
    _row("messages", "tools", "answer"),
    _of(GOOD_IDS, "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids"),
    _row("prompt_ids", "chosen_ids", "rejected_ids", "chosen_steps", "rejected_steps"),
    st.fixed_dictionaries({}, optional=COLUMNS),
    st.dictionaries(st.text(max_size=4), ANYTHING, max_size=3),
)

# Conversations whose messages say more than their words, as lists and as the JSON text that tables hold.
TOOL = st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXTS})})
EXTRAS = {
    "reasoning_content": st.one_of(TEXTS, ANYTHING),
    "thinking": TEXTS,
    "name": TEXTS,
    "weight": st.sampled_from([0, 1, 1, None, 0.5, "0"]),
    "images": st.one_of(st.none(), st.just(["a.png"])),
    "tool_calls": st.one_of(CALLS, CALLS.map(json.dumps), ANYTHING),
    "id": ANYTHING,
}


def _says(role: str, **more):
    """A message of ``role`` that in two of three cases has nothing unusual about it."""
    words = st.sampled_from(["2+2?", "4", "5", "a b<|im_end|>c"])
    plain = {"role": st.just(role), "content": st.one_of(words, words, words, TEXTS)}
    rare = st.fixed_dictionaries(plain, optional={**EXTRAS, **more})
    return st.one_of(st.fixed_dictionaries(plain), st.fixed_dictionaries({**plain, **more}), rare)


ASKS, TOOL_SAYS = _says("user"), _says("tool")
SAYS, CALLS_TOOLS = _says("assistant"), _says("assistant", tool_calls=st.lists(CALL, min_size=1, max_size=2))
BEGUN = st.sampled_from(["<think>\n", "So ", "<think>a</think>", "So<|im_end|>"]).map(
    lambda t: _message("assistant", t)
)
SHARE_GPT = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "system"]), "value": TEXTS})
ASKED = st.one_of(
    st.tuples(ASKS).map(list),
    st.tuples(_says("system"), ASKS).map(list),
    st.tuples(ASKS, SAYS, ASKS).map(list),
    st.tuples(ASKS, CALLS_TOOLS, TOOL_SAYS).map(list),
    st.tuples(ASKS, BEGUN).map(list),
    st.lists(SHARE_GPT, max_size=2),
    st.lists(st.one_of(MESSAGE, ANYTHING), max_size=3),
)
ANSWERED = st.one_of(
    st.tuples(SAYS).map(list),
    st.tuples(CALLS_TOOLS).map(list),
    st.tuples(CALLS_TOOLS, TOOL_SAYS, SAYS).map(list),
    st.lists(st.one_of(MESSAGE, SHARE_GPT), max_size=3),
)
TOOLS = st.one_of(st.none(), st.lists(TOOL, max_size=2), st.lists(TOOL, max_size=2).map(json.dumps), ANYTHING)
VARIABLES = st.sampled_from([None, None, {}, {"shout": True}, {"shout": "<|im_end|>"}, {"no_such": 1}, [1], "{"])


@st.composite
def conversations(draw):
    """A row of one of the layouts that hold messages, with each column as a list or as its JSON text."""
    asked, good, bad = draw(ASKED), draw(ANSWERED), draw(ANSWERED)
    layout = draw(st.sampled_from(["explicit", "messages", "whole", "label"]))
    row = {"prompt": asked, "completion": good, "chosen": good, "rejected": bad}
    if layout != "explicit":
        row = {"messages": asked + good, "chosen": asked + good, "rejected": asked + bad}
    if layout == "label":
        row["prompt"] = draw(TEXTS)
    packed = draw(st.sampled_from([(), (), (), tuple(row), ("prompt",), ("chosen", "messages")]))
    row = {name: json.dumps(value) if name in packed else value for name, value in row.items()}
    if draw(st.booleans()):
        row |= {"tools": draw(TOOLS), "chat_template_kwargs": draw(VARIABLES)}
    return row | draw(st.sampled_from([{}, {}, {"prompt_ids": [5, 6]}, {"system": "Be brief."}, {"label": False}]))


MESSAGES_TEMPLATE = (
    "{% if shout %}LOUD{% endif %}{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATE_WORDS = ("user", "assistant", "system", "tool", "<call>", "</call>", "<think>", "</think>", "LOUD")


@pytest.fixture(scope="module")
def messages_tokenizer(tmp_path_factory):
    folder = save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (folder / "chat_template.jinja").write_text(MESSAGES_TEMPLATE, encoding="utf-8")
    return build_tokenizer("HuggingFaceTokenizer", folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer("HuggingFaceTokenizer", save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def _leaves(value) -> list[str]:
    """Every text in a row, keys included, for a template writes calls with theirs; objects and lists as JSON and as
    Python print them; and what a text is as JSON."""
    if isinstance(value, str):
        try:
            inside = json.loads(value) if value.startswith(("[", "{")) else None
        except ValueError:
            inside = None
        return [value, *_leaves(inside)] if isinstance(inside, (dict, list)) else [value]
    if not isinstance(value, (dict, list)):
        return [str(value)]
    items = [item for pair in value.items() for item in pair] if isinstance(value, dict) else value
    printed = [json.dumps(value, ensure_ascii=False), str(value)]
    return [*printed, *(text for item in items for text in _leaves(item))]


def _letters(text: str) -> str:
    """``text`` without what the template writes between messages."""
    for word in ("<|im_start|>", "<|im_end|>", "[MASK]"):
        text = text.replace(word, "")
    return "".join(text.split())


def _is_said(decoded: str, row: dict) -> bool:
    """Whether ``decoded`` is, white space and roles apart, texts of ``row`` end to end."""
    rest, texts = _letters(decoded), sorted({_letters(text) for text in _leaves(row)} - {""}, key=len, reverse=True)
    if any(rest in text for text in texts):
        return True
    reached = {0}
    for start in range(len(rest)):
        if start in reached:
            words = (*texts, *TEMPLATE_WORDS)
            reached |= {start + len(word) for word in words if rest.startswith(word, start)}
    return len(rest) in reached


def _write(path: Path, rows: list[dict], form: str) -> Path | None:
    """``rows`` in a file of this form, or None where the form cannot hold them."""
    if form in ("jsonl", "json"):
        texts = [json.dumps(row) for row in rows]
        text = "".join(text + "\n" for text in texts) if form == "jsonl" else f"[{', '.join(texts)}]"
        path.write_text(text, encoding="utf-8")
        return path
    datasets = pytest.importorskip("datasets")
    try:
        datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(str(path))
    except Exception:  # whatever that library says of rows that it cannot write
        return None
    return path


def _check(tmp_path: Path, rows: list[dict], kind: str, form: str, tokenizer) -> int:
    """Builds a store of ``rows`` and checks every example against its row; returns how many there are."""
    path = _write(tmp_path / f"rows.{form}", rows, form)
    if path is None:
        return 0
    cache = tmp_path / "cache"
    try:
        store = build_token_store(path, kind, tokenizer, cache, bad_rows="skip")
    except UserError as error:
        message = str(error)
        assert "\n" not in message and str(path) in message, message
        return 0
    assert len(store) + store.bad_rows.rows == store.source_rows == len(rows)
    for index in range(len(store)):
        example, row = store[index], store.row(index)
        number = int(store.location(index).replace(" row ", ":").rpartition(":")[2]) - (form == "jsonl")
        if form != "parquet":  # which knows no row of other keys, and no NaN
            assert json.dumps(row) == json.dumps(rows[number])
        if row.get("prompt_ids") is not None:
            assert example.prompt.tolist() == row["prompt_ids"]
            continue
        for part in (example.prompt, *example.responses):
            assert _is_said(tokenizer.decode(part), row), (tokenizer.decode(part), row)
        try:
            decoded = make_prompt(row, "row", tokenizer, 10**6).ids
        except UserError as error:
            assert "have different prompts" in str(error), (
                error,
                row,
            )  # the other objective's columns hold another one
        else:
            assert decoded == example.prompt.tolist(), row
    return len(store)


def _fuzz(tmp_path_factory, tokenizer, examples: int, smallest: int, forms: list[str], schemas=ROWS) -> tuple[int, int]:
    """(rows tried, examples that came of them)."""
    counts = [0, 0]

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[hypothesis.Phase.generate],  # making a failure small takes minutes
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        st.lists(schemas, min_size=smallest, max_size=12),
        st.sampled_from(["preference", "sft"]),
        st.sampled_from(forms),
    )
    def check(rows, kind, form):
        counts[0] += len(rows)
        counts[1] += _check(tmp_path_factory.mktemp("fuzz"), rows, kind, form, tokenizer)

    check()
    return counts[0], counts[1]


def test_rows_of_any_schema(tmp_path_factory, tokenizer):
    rows, used = _fuzz(tmp_path_factory, tokenizer, 60, 1, ["jsonl", "json"])
    assert rows > 100 and used > 10


def test_a_thousand_conversations_of_any_schema(tmp_path_factory, messages_tokenizer):
    rows, used = _fuzz(tmp_path_factory, messages_tokenizer, 130, 8, ["jsonl", "json"], conversations())
    print(f"{rows} rows, {used} examples")
    assert rows >= 1000 and used > 100


@pytest.mark.slow
def test_thousands_of_rows_of_any_schema(tmp_path_factory, tokenizer):
    pytest.importorskip("datasets")
    rows, used = _fuzz(tmp_path_factory, tokenizer, 300, 8, ["jsonl", "json", "parquet"])
    print(f"{rows} rows, {used} examples")
    assert rows > 2000 and used > 200


def test_the_name_of_a_column_breaks_no_line():
    with pytest.raises(UserError, match=r"missing field 'prompt'; the row has 'a\\nb', plain$"):
        require_columns({"a\nb": 1, "plain": 2}, ("prompt",))
