"""Rows of any schema that a strategy can think of: used or refused in a line, and nothing learned that no row says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
CALLS = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXTS, "arguments": ANYTHING})}
    ),
    max_size=2,
)
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


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer("HuggingFaceTokenizer", save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def _leaves(value) -> list[str]:
    """Every text in a row, keys included, for a template writes calls with theirs."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for pair in value.items() for item in pair for text in _leaves(item)]
    return [text for item in value for text in _leaves(item)] if isinstance(value, list) else []


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
            words = (*texts, "user", "assistant", "system", "tool")
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
    return len(store)


def _fuzz(tmp_path_factory, tokenizer, examples: int, smallest: int, forms: list[str]) -> tuple[int, int]:
    """(rows tried, examples that came of them)."""
    counts = [0, 0]

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(
        st.lists(ROWS, min_size=smallest, max_size=12),
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


@pytest.mark.slow
def test_thousands_of_rows_of_any_schema(tmp_path_factory, tokenizer):
    pytest.importorskip("datasets")
    rows, used = _fuzz(tmp_path_factory, tokenizer, 300, 8, ["jsonl", "json", "parquet"])
    print(f"{rows} rows, {used} examples")
    assert rows > 2000 and used > 200
