"""Rows that cannot be used: all kinds at once, or left out by name, and never in silence."""

from __future__ import annotations

import json
import random

import pytest

from megatron_dtrpo.data import token_store
from megatron_dtrpo.data.tally import Tally, bad_rows_error, skipped_line
from megatron_dtrpo.data.token_store import TokenStore, build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError

BAD = {  # what a line holds -> what is said of it, by the stage that finds it
    '{"prompt": "p", "chos': "not valid JSON",
    '{"prompt": "p", "chosen": "a"}': "missing field 'rejected'",
    '{"prompt": "p", "chosen": "", "rejected": "b"}': "chosen: is empty",
    '{"prompt": [{"role": "user", "content": "p"}], "chosen": [{"role": "assistant", "content": "a"}], '
    '"rejected": [{"role": "assistant", "content": "b"}]}': "this ByteLevelTokenizer has no chat template",
    '{"prompt_ids": [1], "chosen_ids": [<mask>], "rejected_ids": [2]}': "chosen_ids[0]: is the mask token",
    '{"prompt_ids": [1], "chosen_ids": [99999], "rejected_ids": [2]}': "chosen_ids[0]: 99999 is not in the vocabulary",
    '{"prompt": "p", "chosen": "a", "rejected": "a"}': "chosen and rejected are the same",
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("ByteLevelTokenizer")


@pytest.fixture
def mixed(tmp_path, tokenizer):
    """(a file with bad rows of every kind among good ones, the good ones alone in another)."""
    good = [json.dumps({"prompt": f"{i}", "chosen": "a", "rejected": "b"}) for i in range(30)]
    bad = [line.replace("<mask>", str(tokenizer.mask_id)) for line in BAD for _ in range(2)]
    lines = [(line, True) for line in good] + [(line, False) for line in bad]
    random.Random(0).shuffle(lines)
    (tmp_path / "mixed.jsonl").write_text("".join(line + "\n" for line, _ in lines))
    (tmp_path / "good.jsonl").write_text("".join(line + "\n" for line, is_good in lines if is_good))
    return tmp_path / "mixed.jsonl", tmp_path / "good.jsonl"


def message_of(path, tokenizer, cache, **settings) -> str:
    with pytest.raises(UserError) as caught:
        build_token_store(path, "preference", tokenizer, cache, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def first_lines(path, tokenizer):
    """The number of the first line of each kind of bad row."""
    lines = path.read_text().splitlines()
    return {words: 1 + lines.index(line.replace("<mask>", str(tokenizer.mask_id))) for line, words in BAD.items()}


@pytest.mark.parametrize("batch", [1, 5, 512])
def test_error_names_every_kind_with_its_first_places(tmp_path, tokenizer, mixed, monkeypatch, batch):
    monkeypatch.setattr(token_store, "_BATCH", batch)
    message = message_of(mixed[0], tokenizer, tmp_path / "cache")
    assert message.startswith(f"{2 * len(BAD)} of {30 + 2 * len(BAD)} rows cannot be used")
    assert "--bad-rows skip" in message and message.count("(2 rows, also ") == len(BAD)
    for words, line in first_lines(mixed[0], tokenizer).items():
        assert f"{mixed[0]}:{line}: {words}" in message
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("batch", [1, 5, 512])
def test_skip_is_the_file_without_them(tmp_path, tokenizer, mixed, monkeypatch, batch):
    monkeypatch.setattr(token_store, "_BATCH", batch)
    path, good = mixed
    store = build_token_store(path, "preference", tokenizer, tmp_path / "cache", bad_rows="skip")
    clean = build_token_store(good, "preference", tokenizer, tmp_path / "cache")
    assert len(store) == len(clean) == 30 and store.content == clean.content
    lines = path.read_text().splitlines()
    for index in range(30):
        number = int(store.location(index).removeprefix(f"{path}:"))
        assert json.loads(lines[number - 1]) == store.row(index) == clean.row(index)
        assert tokenizer.decode(store[index].prompt) == store.row(index)["prompt"]
    said = skipped_line(store.bad_rows, store.source_rows)
    assert said.startswith(f"skipped {2 * len(BAD)} of {30 + 2 * len(BAD)} rows")
    for words, line in first_lines(path, tokenizer).items():
        assert f"{path}:{line}: {words}" in said
    assert clean.bad_rows.rows == 0


def test_a_cache_hides_nothing(tmp_path, tokenizer, mixed, monkeypatch):
    path, cache = mixed[0], tmp_path / "cache"
    first = build_token_store(path, "preference", tokenizer, cache, bad_rows="skip")
    monkeypatch.setattr(token_store, "open_rows", lambda *_: pytest.fail("the finished store was not reused"))
    again = build_token_store(path, "preference", tokenizer, cache, bad_rows="skip")
    assert again.directory == first.directory and str(again.bad_rows) == str(first.bad_rows) != ""
    assert str(TokenStore(first.directory).bad_rows) == str(first.bad_rows)
    message = message_of(path, tokenizer, cache)
    assert message == str(bad_rows_error(first.bad_rows, first.source_rows))


def test_nothing_left_is_an_error(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p"}\n' * 4)
    for bad_rows in ("skip", "error"):
        message = message_of(path, tokenizer, tmp_path / "cache", bad_rows=bad_rows)
        assert message.startswith(f"none of 4 rows can be used: {path}:1: missing field 'chosen'")
        assert f"(4 rows, also {path}:2, {path}:3, ...)" in message
    path.write_text('{"prompt": "p"}\n')
    assert message_of(path, tokenizer, tmp_path / "cache", bad_rows="skip").startswith(f"{path}:1: missing field")


def test_kinds_and_places_are_few_however_many_rows_there_are():
    tally = Tally()
    for row in range(1000):
        tally.add(f"a:{row}", f"a:{row}: problem {row // 10} of 'x'; detail {row}")
        tally.add(f"a:{row}", f"kind {'abcdefghijklmnop'[row % 16]} (of {row})")
    assert tally.rows == 2000 and len(tally.lines()) == 17
    assert len(str(tally)) < 1000 and str(tally).endswith("and 9 kinds more")
    assert tally.lines()[0] == "a:0: problem 0 of 'x'; detail 0 (1000 rows, also a:1, a:2, ...)"
    assert Tally(json.loads(json.dumps(tally.as_list()))).lines() == tally.lines()
