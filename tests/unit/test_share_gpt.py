"""ShareGPT's conversations are those of `messages`, in every column that holds messages."""

from __future__ import annotations

import json

import pytest

from megatron_dtrpo.data.prompts import read_prompts
from megatron_dtrpo.data.rows import open_rows
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError
from tests.support.chat_tokenizer import save_chat_tokenizer
from tests.support.launch import write_lines


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer("HuggingFaceTokenizer", save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def share(*turns):
    return [{"from": who, "value": text} for who, text in turns]


def usual(*turns):
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles.get(who, who), "content": text} for who, text in turns]


ASKED = (("system", "Be brief."), ("human", "2+2?"))
GOOD, BAD = ("gpt", "4"), ("gpt", "5")
THANKS = (("human", "And 3+3?"), ("gpt", "6"))

# kind, a row of ShareGPT's, the row that it says the same as
ROWS = {
    "conversations": ("sft", {"conversations": share(*ASKED, GOOD)}, {"messages": usual(*ASKED, GOOD)}),
    "turns": ("sft", {"conversations": share(*ASKED, GOOD, *THANKS)}, {"messages": usual(*ASKED, GOOD, *THANKS)}),
    "with an id": ("sft", {"id": "a_0", "conversations": share(*ASKED, GOOD)}, {"messages": usual(*ASKED, GOOD)}),
    "messages": ("sft", {"messages": share(*ASKED, GOOD)}, {"messages": usual(*ASKED, GOOD)}),
    "roles already": ("sft", {"conversations": usual(*ASKED, GOOD)}, {"messages": usual(*ASKED, GOOD)}),
    "completion": (
        "sft",
        {"prompt": share(*ASKED), "completion": share(GOOD)},
        {"prompt": usual(*ASKED), "completion": usual(GOOD)},
    ),
    "implicit": (
        "preference",
        {"chosen": share(*ASKED, GOOD), "rejected": share(*ASKED, BAD)},
        {"chosen": usual(*ASKED, GOOD), "rejected": usual(*ASKED, BAD)},
    ),
    "explicit": (
        "preference",
        {"prompt": share(*ASKED), "chosen": share(GOOD), "rejected": share(BAD)},
        {"prompt": usual(*ASKED), "chosen": usual(GOOD), "rejected": usual(BAD)},
    ),
    # LLaMA-Factory's preferences: the question in conversations, one message each in chosen and rejected.
    "conversations as the prompt": (
        "preference",
        {"conversations": share(*ASKED), "chosen": share(GOOD)[0], "rejected": share(BAD)[0]},
        {"prompt": usual(*ASKED), "chosen": usual(GOOD), "rejected": usual(BAD)},
    ),
}


def packed(row):
    return {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}


def texts(path, kind, tokenizer, cache, **settings):
    store = build_token_store(path, kind, tokenizer, cache, **settings)
    return [
        [tokenizer.decode(ids) for ids in (e.prompt, *e.responses)] for e in map(store.__getitem__, range(len(store)))
    ]


@pytest.mark.parametrize("form", [dict, packed], ids=["lists", "JSON text"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_the_same(tmp_path, tokenizer, name, form):
    kind, row, same = ROWS[name]
    ours, theirs = write_lines(tmp_path / "a.jsonl", [form(row)]), write_lines(tmp_path / "b.jsonl", [same])
    for turns in ("last", "all"):
        expected = texts(theirs, kind, tokenizer, tmp_path / "cache", assistant_turns=turns)
        assert texts(ours, kind, tokenizer, tmp_path / "cache", assistant_turns=turns) == expected
    (mine,), (other,) = (read_prompts(path, tokenizer, 1000) for path in (ours, theirs))
    assert mine.ids == other.ids and mine.asked == other.asked


def test_a_table_of_them(tmp_path, tokenizer):
    datasets = pytest.importorskip("datasets")
    rows = [ROWS["conversations"][1], ROWS["turns"][1]]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "a.parquet"))
    expected = texts(
        write_lines(tmp_path / "b.jsonl", [ROWS["conversations"][2], ROWS["turns"][2]]),
        "sft",
        tokenizer,
        tmp_path / "c",
    )
    assert texts(tmp_path / "a.parquet", "sft", tokenizer, tmp_path / "c") == expected


@pytest.mark.parametrize(
    "kind, row, words",
    [
        ("sft", {"conversations": share(*ASKED, ("alien", "x"), GOOD)}, "'alien'"),
        ("sft", {"conversations": [{"from": "human", "value": 3}]}, "'content' must be text, not a number"),
        ("sft", {"conversations": [{"from": "human"}]}, "'content' must be text, not missing"),
        ("sft", {"conversations": share(("human", "2?"))}, "no message has the role 'assistant'"),
        ("sft", {"conversations": ["hello", "you"]}, "missing field 'prompt'; the row has conversations"),
        (
            "sft",
            {"messages": [{"from": "human", "role": "user", "value": "a", "content": "b"}]},
            "both 'from' and 'role'",
        ),
    ],
)
def test_refused(tmp_path, tokenizer, kind, row, words):
    path = write_lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError) as caught:
        build_token_store(path, kind, tokenizer, tmp_path / "cache")
    assert words in str(caught.value) and str(caught.value).startswith(f"{path}:1: ")


def test_conversations_beside_messages_are_left_alone(tmp_path, tokenizer):
    row = {"messages": usual(*ASKED, GOOD), "conversations": share(("human", "other"), ("gpt", "text"))}
    path = write_lines(tmp_path / "a.jsonl", [row])
    assert list(open_rows(path)) == [row]
    assert texts(path, "sft", tokenizer, tmp_path / "cache")[0][1].startswith("4")


@pytest.mark.parametrize(
    "row, words",
    [
        (
            {"prompt": usual(("human", "2?")), "messages": usual(("human", "2?"), GOOD), "answer": "4"},
            "if the messages hold the answer: take prompt out",
        ),
        ({"messages": usual(("human", "2?")), "answer": "4"}, "put the text of 'answer' into such a message"),
    ],
)
def test_an_answer_beside_messages_is_not_renamed(tmp_path, tokenizer, row, words):
    path = write_lines(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError) as caught:
        build_token_store(path, "sft", tokenizer, tmp_path / "cache")
    assert words in str(caught.value) and "rename" not in str(caught.value)
