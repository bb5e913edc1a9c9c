"""Validation at the door, what the store holds, and when it is built again."""

from __future__ import annotations

import json
import os
import re

import numpy as np
import pytest

from megatron_dtrpo.data import token_store
from megatron_dtrpo.data.rows import open_rows
from megatron_dtrpo.data.token_store import TokenStore, build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError

PAIRS = [{"prompt": f"{i}+{i}=", "chosen": str(2 * i), "rejected": str(2 * i + 1) * (i % 3 + 1)} for i in range(9)]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("ByteLevelTokenizer")


@pytest.fixture(scope="module")
def chat_tokenizer(shared_dir):
    return build_tokenizer("HuggingFaceTokenizer", shared_dir / "data" / "fast_dllm_v2_7b")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def texts_of(store, tokenizer):
    examples = [store[i] for i in range(len(store))]
    return [[tokenizer.decode(part) for part in (e.prompt, *e.responses)] for e in examples]


@pytest.mark.parametrize("batch", [1, 4, 512])
def test_preference_examples_and_lengths(tmp_path, tokenizer, monkeypatch, batch):
    monkeypatch.setattr(token_store, "_BATCH", batch)
    path = write(tmp_path / "a.jsonl", PAIRS)
    store = build_token_store(path, "preference", tokenizer, tmp_path / "cache")
    assert len(store) == 9
    prompt_lengths, response_lengths = store.lengths
    assert prompt_lengths.dtype == response_lengths.dtype == np.int32 and response_lengths.shape == (9, 2)
    for i, row in enumerate(PAIRS):
        example = store[i]
        assert example.index == i and example.prompt.dtype == np.int32
        assert example.prompt.tolist() == tokenizer.encode_prompt(row["prompt"])
        expected = [tokenizer.encode_response(row[name]) for name in ("chosen", "rejected")]
        assert [ids.tolist() for ids in example.responses] == expected
        assert prompt_lengths[i] == len(example.prompt)
        assert response_lengths[i].tolist() == [len(ids) for ids in expected]
    assert store.location(3) == f"{path}:4"
    with pytest.raises(IndexError):
        store[9]
    with pytest.raises(ValueError, match="read-only"):
        store[0].prompt[0] = 1


def test_sft_examples(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    store = build_token_store(path, "sft", tokenizer, tmp_path / "cache")
    assert store.lengths[1].tolist() == [[2]]
    assert [ids.tolist() for ids in store[0].responses] == [tokenizer.encode_response("2")]


def test_message_lists_give_what_the_tokenizer_gives(tmp_path, chat_tokenizer):
    system, question = {"role": "system", "content": "Be brief."}, user("2+2?")
    rows = [
        {"prompt": [system, question], "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"chosen": [system, question, assistant("4")], "rejected": [system, question, assistant("5")]},
        # A text prompt beside whole conversations is a label.
        {"prompt": "x", "chosen": [system, question, assistant("4")], "rejected": [system, question, assistant("5")]},
    ]
    store = build_token_store(write(tmp_path / "a.jsonl", rows), "preference", chat_tokenizer, tmp_path / "cache")
    for i in range(3):
        assert store[i].prompt.tolist() == chat_tokenizer.encode_prompt([system, question])
        expected = [[*chat_tokenizer.encode(answer), chat_tokenizer.eos_id] for answer in "45"]
        assert [ids.tolist() for ids in store[i].responses] == expected


def test_sft_messages_end_at_the_last_answer(tmp_path, chat_tokenizer):
    turns = [user("2+2?"), assistant("4"), user("3+3?"), assistant("6"), user("thanks")]
    store = build_token_store(
        write(tmp_path / "a.jsonl", [{"messages": turns}]), "sft", chat_tokenizer, tmp_path / "cache"
    )
    assert store[0].prompt.tolist() == chat_tokenizer.encode_prompt(turns[:3])
    assert chat_tokenizer.decode(store[0].responses[0]) == "6"


def test_apply_chat_template_to_text(tmp_path, chat_tokenizer):
    path = write(tmp_path / "a.jsonl", PAIRS[:1])
    store = build_token_store(path, "preference", chat_tokenizer, tmp_path / "cache", apply_chat_template=True)
    assert store[0].prompt.tolist() == chat_tokenizer.encode_prompt([user(PAIRS[0]["prompt"])])
    plain = build_token_store(path, "preference", chat_tokenizer, tmp_path / "cache")
    assert plain[0].prompt.tolist() == chat_tokenizer.encode(PAIRS[0]["prompt"])


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
CHAT_ANSWER = [assistant("a")]
CHAT = {"prompt": [user("p")], "chosen": [assistant("a")], "rejected": [assistant("b")]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": None}, "missing field 'chosen'; the row has prompt, rejected"),
        (
            {"chosen": None, "rejected": None, "completion": "a"},
            "missing field 'chosen'; the row has completion, prompt; one answer, 'completion', is no pair: give "
            "--objective sft",
        ),
        (
            {"chosen": None, "rejected": None, "answer": "4"},
            "missing field 'chosen'; the row has answer, prompt; one answer, 'answer', is no pair: give --objective "
            "sft; of a prompt and what its answer is compared with: --objective policy_gradient",
        ),
        (
            {"prompt": None, "chosen": None, "rejected": None, "messages": [user("p"), assistant("a")]},
            "missing field 'prompt'; the row has messages; one answer, 'messages', is no pair: give --objective sft",
        ),
        ({"prompt": None}, "chosen and rejected share no first word; give the prompt"),
        ({"prompt": None, "chosen": CHAT_ANSWER}, "missing field 'prompt'; the row has chosen, rejected"),
        ({"prompt": 3}, "prompt: must be text or a list of messages, not a number"),
        ({"rejected": 3}, "rejected: must be text or a list of messages, not a number"),
        ({"prompt": " \n"}, "prompt: is empty"),
        ({"chosen": ""}, "chosen: is empty"),
        ({"rejected": " "}, "rejected: is empty"),
        ({"rejected": "a"}, "chosen and rejected are the same"),
        ({"chosen": "\ud83d"}, "chosen: character 0 is half a surrogate pair"),
        ({"chosen": [assistant("a")]}, "chosen: is a list but the prompt is text"),
        ({**CHAT, "chosen": "a"}, "chosen: is text but the prompt is a list"),
        ({**CHAT, "prompt": []}, "prompt: is an empty list"),
        ({**CHAT, "prompt": ["p"]}, "prompt[0]: a message is an object with role and content, not text"),
        ({**CHAT, "prompt": [{"content": "p"}]}, "prompt[0]: 'role' must be text, not missing"),
        ({**CHAT, "prompt": [{"role": "user", "content": ["p"]}]}, "prompt[0]: 'content' must be text, not a list"),
        (
            {**CHAT, "prompt": [{"role": "system", "content": "p"}]},
            "prompt: the prompt ends with a message of the role",
        ),
        (
            {**CHAT, "chosen": [user("p"), assistant("a")]},
            "chosen: must begin with the assistant's message after the prompt, not user, assistant",
        ),
        ({**CHAT, "chosen": [assistant(" ")]}, "chosen: is empty"),
        ({**CHAT, "prompt": None}, "chosen and rejected share no first message"),
        (CHAT, "this ByteLevelTokenizer has no chat template"),
    ],
)
def test_bad_preference_rows_name_file_and_line(tmp_path, tokenizer, change, words):
    row = {name: value for name, value in {**GOOD, **change}.items() if value is not None}
    path = write(tmp_path / "pairs.jsonl", [GOOD, GOOD, row, GOOD])
    with pytest.raises(UserError, match="^" + re.escape(f"{path}:3: {words}")) as caught:
        build_token_store(path, "preference", tokenizer, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "p"}, "missing field 'completion'; the row has prompt"),
        ({}, "missing field 'prompt'; the row has nothing"),
        ({"prompt": "p", "completion": ""}, "completion: is empty"),
        ({"messages": "p"}, "messages: must be a list of messages, not text"),
        ({"messages": [user("p")]}, "messages: no message has the role 'assistant'"),
        ({"messages": [assistant("p")]}, "messages: nothing comes before the assistant's message"),
    ],
)
def test_bad_sft_rows_name_file_and_line(tmp_path, tokenizer, row, words):
    path = write(tmp_path / "sft.jsonl", [{"prompt": "p", "completion": "c"}, row])
    with pytest.raises(UserError, match="^" + re.escape(f"{path}:2: {words}")):
        build_token_store(path, "sft", tokenizer, tmp_path / "cache")


def test_what_only_tokens_show_is_refused_too(tmp_path, chat_tokenizer):
    for change, words in (
        ({"prompt": "a |<MASK>| b"}, "prompt: contains the mask token"),
        ({"rejected": "|<MASK>|"}, "rejected: contains the mask token"),
        ({"chosen": "<|im_end|>"}, "chosen: is empty once tokenized"),
        ({"chosen": "b<|im_end|>\n"}, "chosen and rejected are the same"),
    ):
        path = write(tmp_path / "pairs.jsonl", [GOOD, {**GOOD, **change}])
        with pytest.raises(UserError, match="^" + re.escape(f"{path}:2: {words}")):
            build_token_store(path, "preference", chat_tokenizer, tmp_path / "cache")


def test_malformed_line_and_missing_file(tmp_path, tokenizer):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(GOOD) + "\n{oops\n")
    with pytest.raises(UserError, match="^" + re.escape(f"{path}:2: not valid JSON")):
        build_token_store(path, "preference", tokenizer, tmp_path / "cache")
    with pytest.raises(UserError, match="no such file"):
        build_token_store(tmp_path / "none.jsonl", "preference", tokenizer, tmp_path / "cache")
    with pytest.raises(UserError, match="kind: unknown 'dpo'"):
        build_token_store(path, "dpo", tokenizer, tmp_path / "cache")


def test_parquet_rows_are_named(tmp_path, tokenizer):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "pairs.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([GOOD, {**GOOD, "chosen": None}]), path)
    with pytest.raises(UserError, match="^" + re.escape(f"{path} row 1: missing field 'chosen'")):
        build_token_store(path, "preference", tokenizer, tmp_path / "cache")


def test_built_once_and_again_when_anything_changes(tmp_path, tokenizer, monkeypatch):
    path, cache = write(tmp_path / "a.jsonl", PAIRS), tmp_path / "cache"
    first = build_token_store(path, "preference", tokenizer, cache)
    with monkeypatch.context() as patch:
        patch.setattr(token_store, "open_rows", lambda *_: pytest.fail("the finished store was not reused"))
        again = build_token_store(path, "preference", tokenizer, cache)
    assert again.directory == first.directory and texts_of(again, tokenizer) == texts_of(first, tokenizer)

    both = write(tmp_path / "b.jsonl", [{**row, "completion": "c"} for row in PAIRS])
    assert len(build_token_store(both, "preference", tokenizer, cache)[0].responses) == 2
    assert len(build_token_store(both, "sft", tokenizer, cache)[0].responses) == 1

    other_mask = build_tokenizer("ByteLevelTokenizer", mask_token="<pad>")
    assert build_token_store(path, "preference", other_mask, cache).directory != first.directory
    os.utime(path, ns=(0, 0))
    assert build_token_store(path, "preference", tokenizer, cache).directory != first.directory
    write(path, PAIRS[:2])
    assert len(build_token_store(path, "preference", tokenizer, cache)) == 2
    assert not [p for p in cache.iterdir() if p.name.startswith(".")]


def test_each_split_of_a_folder_has_a_store_of_its_own(tmp_path, tokenizer):
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "train.jsonl", PAIRS), write(folder / "test.jsonl", PAIRS[:2])
    with pytest.raises(UserError, match="holds files of several splits"):
        build_token_store(folder, "preference", tokenizer, tmp_path / "cache")
    store = build_token_store(folder, "preference", tokenizer, tmp_path / "cache", split="test")
    assert len(store) == 2 and store.location(1) == f"{folder / 'test.jsonl'}:2"
    assert len(build_token_store(folder, "preference", tokenizer, tmp_path / "cache", split="train")) == 9
    both = build_token_store(folder, "preference", tokenizer, tmp_path / "cache", split="train+test")
    assert len(both) == 11 and TokenStore(both.directory).location(9) == f"{folder / 'test.jsonl'}:1"


def test_an_interrupted_build_leaves_nothing_finished(tmp_path, tokenizer, monkeypatch):
    path, cache = write(tmp_path / "a.jsonl", PAIRS), tmp_path / "cache"

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(token_store, "encode_records", interrupt)
        with pytest.raises(KeyboardInterrupt):
            build_token_store(path, "preference", tokenizer, cache)
    assert list(cache.iterdir()) == []
    assert len(build_token_store(path, "preference", tokenizer, cache)) == 9


def test_the_slower_of_two_builders_takes_the_finished_store(tmp_path, tokenizer, monkeypatch):
    path, cache = write(tmp_path / "a.jsonl", PAIRS), tmp_path / "cache"
    write_files = token_store._write

    def overtaken(*arguments):
        with monkeypatch.context() as patch:
            patch.setattr(token_store, "_write", write_files)
            build_token_store(path, "preference", tokenizer, cache)
        return write_files(*arguments)

    monkeypatch.setattr(token_store, "_write", overtaken)
    assert len(build_token_store(path, "preference", tokenizer, cache)) == 9
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("key", ["kind", "source", "content", "bad_rows", "rows", "notes", "crc32", "examples"])
def test_a_store_whose_description_lost_a_key_is_refused(tmp_path, tokenizer, key):
    """One bit of the description is enough for another name."""
    data = write(tmp_path / "a.jsonl", PAIRS)
    folder = build_token_store(data, "preference", tokenizer, tmp_path / "cache").directory
    meta = json.loads((folder / "meta.json").read_text())
    damages = [{**{k: v for k, v in meta.items() if k != key}, "x": meta[key]}]
    damages += [{**meta, "kind": "prefergnce"}, {**meta, "examples": "1"}]
    for damage in damages:
        (folder / "meta.json").write_text(json.dumps(damage))
        with pytest.raises(UserError, match="delete the folder and run again"):
            build_token_store(data, "preference", tokenizer, tmp_path / "cache")


def test_a_damaged_store_is_refused(tmp_path, tokenizer):
    store = build_token_store(write(tmp_path / "a.jsonl", PAIRS), "preference", tokenizer, tmp_path / "cache")
    tokens = store.directory / "tokens.int32"
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged; delete the folder"):
        TokenStore(store.directory)
    (store.directory / "meta.json").unlink()
    with pytest.raises(UserError, match="not a finished token store"):
        TokenStore(store.directory)


def test_progress_bar_only_when_asked(tmp_path, tokenizer, capsys):
    path = write(tmp_path / "a.jsonl", PAIRS)
    build_token_store(path, "preference", tokenizer, tmp_path / "one")
    assert capsys.readouterr().err == ""
    build_token_store(path, "preference", tokenizer, tmp_path / "two", progress=True)
    assert "9/9" in capsys.readouterr().err


@pytest.mark.slow
def test_real_preference_data(shared_dir, tmp_path, chat_tokenizer):
    path = shared_dir / "data" / "gsm8k_preferences.jsonl"
    store = build_token_store(path, "preference", chat_tokenizer, tmp_path)
    rows = open_rows(path)
    assert len(store) == len(rows) == 3500
    for i in (0, 511, 512, 3499):
        chosen, rejected = (chat_tokenizer.decode(ids) for ids in store[i].responses)
        assert (chosen, rejected) == (rows[i]["chosen"], rows[i]["rejected"])
        assert store[i].responses[0][-1] == chat_tokenizer.eos_id
