"""Rows of public data sets whose form is near to one that is read, and that would be learned wrong without a word."""

from __future__ import annotations

import json

import pytest

from megatron_dtrpo.data.prompts import make_prompt
from megatron_dtrpo.data.rows import open_rows
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError
from tests.support.chat_tokenizer import save_chat_tokenizer

TEXT = {"prompt": "Question: 2+2? Answer:", "completion": " 4", "chosen": " 4", "rejected": " 5"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def text_part(text):
    return {"type": "text", "text": text, "image_url": None}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer("HuggingFaceTokenizer", save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def store_of(tmp_path, tokenizer):
    def build(rows, kind="sft"):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return build_token_store(path, kind, tokenizer, tmp_path / "cache")

    return build


def refused(build) -> str:
    with pytest.raises(UserError) as caught:
        build()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_answers_that_repeat_the_prompt_are_counted(store_of, kind):
    whole = {name: TEXT["prompt"] * (name != "prompt") + text for name, text in TEXT.items()}
    (note,) = store_of([TEXT, whole, whole], kind).notes
    assert note.startswith("warning: 2 rows repeat the prompt at the beginning of every answer") and note.endswith(
        ":2)"
    )
    once = {**TEXT, "rejected": TEXT["prompt"] + " 5"}
    greeting = {"prompt": "Hi", "completion": "Hi there", "chosen": "Hi there", "rejected": "Hi you"}
    assert store_of([once, greeting], kind).notes == ()


@pytest.mark.parametrize("label", ["rejected", "Undesirable", "dispreferred", "incorrect"])
def test_labels_in_words_that_say_bad_are_refused(store_of, label):
    assert "the completion is one to avoid" in refused(lambda: store_of([{**TEXT, "label": label}]))


def test_labels_that_say_nothing_are_counted(store_of):
    good = [{**TEXT, "label": label} for label in (True, 1, 1.0, "yes", "chosen", "Desirable", None)]
    assert store_of(good).notes == ()
    (note,) = store_of([*good, {**TEXT, "label": 0.7}, {**TEXT, "label": "maths"}]).notes
    assert note.startswith("warning: 2 rows have a 'label' that says neither") and note.endswith(":8)")
    assert store_of([{**TEXT, "label": "maths"}], "preference").notes == ()


def test_messages_that_a_completion_stands_for_are_counted(store_of):
    chat = {"messages": [user("2+2?"), assistant("5")]}
    (note,) = store_of([TEXT, {**TEXT, **chat}]).notes
    assert note.startswith("warning: 1 rows have 'messages' beside prompt and completion: the messages are not read")
    assert store_of([{**TEXT, **chat}], "preference").notes == ()


def test_special_tokens_in_text_answers_are_counted(store_of):
    rows = [
        {**TEXT, "completion": " 4<|im_end|>\n", "chosen": " 4<|im_end|>"},
        {**TEXT, "completion": " 4<|endoftext|>", "rejected": " 5<|endoftext|><|im_start|>"},
    ]
    (note,) = store_of(rows).notes
    assert note.startswith("warning: 1 rows have special tokens in an answer that is text")
    assert "learned: '<|endoftext|>' (first: " in note and note.endswith(":2)")
    (note,) = store_of(rows, "preference").notes
    assert "'<|im_start|>'" in note and "'<|endoftext|>'" in note and note.count("warning") == 1
    rendered = {"prompt": "<|im_start|>user\n2?<|im_end|>\n<|im_start|>assistant\n", "completion": "2<|im_end|>\n"}
    assert store_of([rendered]).notes == ()


def test_content_in_parts_of_text(store_of, tokenizer):
    parts = [user([text_part("2+2"), text_part("?")]), assistant([text_part("4")])]
    plain = [user("2+2?"), assistant("4")]
    for row, same in (
        ({"messages": parts}, {"messages": plain}),
        ({"messages": json.dumps(parts)}, {"messages": plain}),
        ({"prompt": parts[:1], "completion": parts[1:]}, {"prompt": plain[:1], "completion": plain[1:]}),
    ):
        found, wanted = store_of([row])[0], store_of([same])[0]
        assert found.prompt.tolist() == wanted.prompt.tolist() == make_prompt(row, "row", tokenizer, 99).ids
        assert found.responses[0].tolist() == wanted.responses[0].tolist()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            [{"type": "image_url", "image_url": {"url": "a.png"}}],
            "a part of the type 'image_url'; models here read text",
        ),
        ([text_part("2?"), {"type": "image"}], "a part of the type 'image'; models here read text only"),
        ([text_part(None)], "a part of the type 'text'"),
        (["2?"], "'content' must be text, not a list; parts of it have a type each"),
        ([{"text": "2?"}], "'content' must be text, not a list; parts of it have a type each"),
        ([], "'content' must be text, not a list"),
        ({"text": "2?"}, "'content' must be text, not an object"),
    ],
)
def test_content_in_other_parts_is_refused(store_of, tokenizer, content, words):
    row = {"messages": [user(content), assistant("2")]}
    assert words in refused(lambda: store_of([row]))
    assert words in refused(lambda: make_prompt(row, "row", tokenizer, 99))


@pytest.mark.parametrize("name", ["conversation", "dialogue", "chat"])
def test_messages_under_another_name_are_named(store_of, tokenizer, name):
    """WildChat's are a `conversation`."""
    row = {name: [user("2?"), assistant("2")]}
    advice = f"rename {name!r} to 'messages'"
    assert advice in refused(lambda: store_of([row])) and advice in refused(lambda: store_of([row], "preference"))
    assert advice in refused(lambda: make_prompt(row, "row", tokenizer, 99))
    assert "rename" not in refused(lambda: store_of([{name: "USER: 2?\nASSISTANT: 2"}]))


def test_words_that_answers_share_are_no_prompt_beside_messages(store_of, tokenizer):
    """The question was dropped, and the answers' first words taken for it."""
    row = {"messages": [user("What is the sky?")], "chosen": "The sky is blue.", "rejected": "The sky is green."}
    line = refused(lambda: store_of([row], "preference"))
    assert "missing field 'prompt'" in line and "rename 'messages' to 'prompt'" in line
    assert make_prompt(row, "row", tokenizer, 99).ids == tokenizer.encode_prompt(row["messages"])


@pytest.mark.parametrize(
    ("chosen", "rejected"), [("score_chosen", "score_rejected"), ("chosen_rating", "rejected_rating")]
)
def test_scores_that_prefer_the_rejected_answer_are_counted(store_of, chosen, rejected):
    rows = [{**TEXT, chosen: good, rejected: bad} for good, bad in ((9, 1), (5.0, 5.0), (1, 9), (None, 3), ("1", 9))]
    (note,) = store_of(rows, "preference").notes
    assert note.startswith("warning: 1 rows give the rejected answer a higher score") and note.endswith(":3)")
    assert store_of(rows).notes == ()


def test_a_user_without_words_is_counted(store_of, tokenizer):
    rows = [{"messages": [user(words), assistant("4")]} for words in ("2+2?", " ")]
    (note,) = store_of(rows).notes
    assert note.startswith("warning: 1 rows have a message of the user without words") and note.endswith(":2)")
    assert make_prompt(rows[1], "row", tokenizer, 99).notes and not make_prompt(rows[0], "row", tokenizer, 99).notes


def test_rows_that_were_decoded_are_decoded_again(tokenizer):
    row = {"messages": [user("2+2?"), assistant("4")], "completion": "5", "completion_ids": [9, 9]}
    assert make_prompt(row, "row", tokenizer, 99).ids == tokenizer.encode_prompt(row["messages"][:1])


@pytest.mark.parametrize("form", ["{}\n", "[{}]"])
def test_a_key_that_stands_twice_is_refused(tmp_path, form):
    """The last one was taken, as in CSV no column is."""
    row = '{"prompt": "a", "messages": [{"role": "user", "role": "system"}]}'
    for text, name in ((row, "role"), ('{"prompt": "a", "prompt": "b"}', "prompt")):
        path = tmp_path / "rows.json"
        path.write_text(form.replace("{}", text))
        assert f"{name!r} stands twice in one object" in refused(lambda: open_rows(path)[0])  # noqa: B023
    path.write_text(form.replace("{}", '{"prompt": {"a": 1, "b": {"a": 1}}}'))
    assert open_rows(path)[0] == {"prompt": {"a": 1, "b": {"a": 1}}}
