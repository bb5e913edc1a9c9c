"""Columns that are text and hold JSON, as CSV and other tables give messages."""

from __future__ import annotations

import csv
import json

import pytest

from megatron_dtrpo.data.prompts import make_prompt
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError
from tests.support.chat_tokenizer import save_chat_tokenizer

QUESTION, YES, NO = (
    [{"role": role, "content": text}] for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5"))
)
OBJECTS = [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer("HuggingFaceTokenizer", save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(params=["csv", "jsonl"])
def store_of(request, tmp_path, tokenizer):
    def build(row: dict, kind: str):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.{request.param}"
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
        with path.open("w", newline="", encoding="utf-8") as file:
            if request.param == "csv":
                writer = csv.DictWriter(file, texts)
                writer.writeheader()
                writer.writerow(texts)
            else:
                file.write(json.dumps(texts) + "\n")
        return build_token_store(path, kind, tokenizer, tmp_path / "cache")

    return build


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", {"messages": [*QUESTION, *YES]}),
        ("sft", {"prompt": QUESTION, "completion": YES}),
        ("preference", {"prompt": QUESTION, "chosen": YES, "rejected": NO}),
        ("preference", {"prompt": "a label", "chosen": [*QUESTION, *YES], "rejected": [*QUESTION, *NO]}),
        ("preference", {"chosen": [*QUESTION, *YES], "rejected": [*QUESTION, *NO]}),
    ],
)
@pytest.mark.parametrize("order", [["role", "content"], ["content", "role"], ["id", "content", "role"]])
def test_messages_as_text_are_messages(store_of, tokenizer, kind, row, order):
    def ordered(value):
        return [{key: message.get(key, 7) for key in order} for message in value] if isinstance(value, list) else value

    row = {name: ordered(value) for name, value in row.items()}
    (example,) = list(store_of(row, kind))
    assert example.prompt.tolist() == tokenizer.encode_prompt(QUESTION)
    assert [tokenizer.decode(response) for response in example.responses] == ["4", "5"][: len(example.responses)]
    as_text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    assert make_prompt(as_text, "row", tokenizer, 99).ids == example.prompt.tolist()


@pytest.mark.parametrize(
    ("kind", "row", "words"),
    [
        ("sft", {"prompt": OBJECTS, "completion": "4"}, "prompt: is JSON text of objects that are no messages"),
        ("sft", {"prompt": {"a": OBJECTS[0]}, "completion": "4"}, "prompt: is JSON text of objects that are no mess"),
        ("sft", {"messages": OBJECTS}, "messages[0]: 'role' must be text, not missing"),
        ("sft", {"messages": {"role": "user"}}, "messages: must be a list of messages, not an object"),
        ("sft", {"messages": ["Hi", "Hello"]}, "messages[0]: a message is an object with role and content, not text"),
        ("sft", {"messages": "Hi"}, "messages: must be a list of messages, not text"),
        ("sft", {"prompt": QUESTION[0], "completion": "4"}, "prompt: is JSON text of one message"),
        ("sft", {"prompt": "2+2?", "completion": YES}, "completion: is a list but the prompt is text"),
        ("sft", {"prompt": QUESTION, "completion": OBJECTS}, "completion: is text but the prompt is a list"),
        ("sft", {"prompt": str(QUESTION), "completion": str(YES)}, "is a list that is not JSON"),
        ("sft", {"prompt": str([{"content": "a", "role": "user"}]), "completion": "4"}, "is a list that is not JSON"),
        ("sft", {"prompt": '[{"role": "user", "content": "cut', "completion": "4"}, "is a list that is not JSON"),
        (
            "preference",
            {"chosen": OBJECTS, "rejected": OBJECTS[:1]},
            "chosen: is JSON text of objects that are no mess",
        ),
        (
            "preference",
            {"chosen": [{"role": "user"}], "rejected": YES},
            "chosen[0]: 'content' must be text, not missing",
        ),
    ],
)
def test_objects_that_are_no_messages_are_refused(store_of, tokenizer, kind, row, words):
    with pytest.raises(UserError) as caught:
        store_of(row, kind)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    if words.startswith("prompt: is JSON"):
        with pytest.raises(UserError, match=words):
            make_prompt({name: json.dumps(value) for name, value in row.items()}, "row", tokenizer, 99)


@pytest.mark.parametrize(
    ("row", "noted"),
    [
        ({"prompt": "[INST] 2+2? [/INST]", "completion": "[4]"}, None),
        ({"prompt": "[1, 2] sorted:", "completion": "[ok] yes"}, None),
        ({"prompt": "{x} is", "completion": "[{] a brace"}, None),
        ({"prompt": "List them:", "completion": OBJECTS}, "completion"),
        ({"prompt": "List them:", "completion": [{"name": "a", "value": 1}]}, "completion"),
        ({"prompt": "As JSON:", "completion": {"a": 1}}, "completion"),
        ({"prompt": ["a", "b"], "completion": "ab"}, "prompt"),
        ({"prompt": {"a": 1}, "completion": "one"}, "prompt"),
        ({"prompt": "A word:", "completion": '"4"'}, None),
    ],
)
def test_other_text_stays_text(store_of, tokenizer, row, noted):
    store = store_of(row, "sft")
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    assert tokenizer.decode(store[0].prompt) == texts["prompt"]
    assert tokenizer.decode(store[0].responses[0]) == texts["completion"]
    notes = [f"warning: 1 rows have JSON in {noted!r} that holds no messages" in note for note in store.notes]
    assert notes == [True] * (noted is not None)
