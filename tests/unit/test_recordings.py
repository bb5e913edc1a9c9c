"""Rows of token ids and recorded decoding steps: taken as they are, kept beside the tokens, refused where wrong."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from megatron_dtrpo.data.recordings import blocks_in_order, require_steps
from megatron_dtrpo.data.token_store import TokenStore, build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError

TEXT = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
IDS = {"prompt_ids": [5, 256, 7], "chosen_ids": [8, 9, 10], "rejected_ids": [11]}
STEPS = {"chosen_steps": [0, 2, 1], "rejected_steps": [4]}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("ByteLevelTokenizer")


def build(tmp_path, rows, tokenizer, kind="preference") -> TokenStore:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return build_token_store(path, kind, tokenizer, tmp_path / "cache")


def parts(example) -> list[list[int]]:
    return [ids.tolist() for ids in (example.prompt, *example.responses)]


def test_ids_are_taken_as_they_are(tmp_path, tokenizer):
    rows = [TEXT, IDS, {**TEXT, **IDS}, {**IDS, **STEPS}, {**TEXT, "prompt": 3, **IDS, "chosen_steps": None}]
    store = build(tmp_path, rows, tokenizer)
    assert parts(store[0])[1] == tokenizer.encode_response("2")
    for i in (1, 2, 3, 4):
        assert parts(store[i]) == [[5, 256, 7], [8, 9, 10], [11]]  # no end token appended
    assert [store[i].steps is None for i in range(5)] == [True, True, True, False, True]
    assert [steps.tolist() for steps in store[3].steps] == [[0, 2, 1], [4]]
    assert store[3].steps[0].dtype == np.int32


def test_sft_rows_of_ids(tmp_path, tokenizer):
    store = build(tmp_path, [{"prompt_ids": [1], "completion_ids": [2, 3]}], tokenizer, "sft")
    assert parts(store[0]) == [[1], [2, 3]] and store[0].steps is None


def test_steps_are_kept_wherever_they_begin(tmp_path, tokenizer):
    """Rows without steps leave holes in the file of steps; rows with them are found again."""
    rng = np.random.default_rng(0)
    rows, wanted = [], []
    for i in range(40):
        if i % 3 == 0 or i > 36:
            rows.append({**TEXT, "chosen": "x" * (i + 1)})
            wanted.append(None)
            continue
        lengths = rng.integers(1, 9, 3)
        ids = [rng.integers(0, 256, n).tolist() for n in lengths]
        steps = [rng.integers(0, 2**31 - 1, n).tolist() for n in lengths[1:]]
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        rows.append(dict(zip(names, ids, strict=True), chosen_steps=steps[0], rejected_steps=steps[1]))
        wanted.append(steps)
    store = build(tmp_path, rows, tokenizer)
    got = [e.steps and [steps.tolist() for steps in e.steps] for e in (store[i] for i in range(40))]
    assert got == wanted
    assert store.first_without_steps() == 0
    steps_file = store.directory / "steps.int32"
    assert steps_file.stat().st_size == (store.directory / "tokens.int32").stat().st_size
    steps_file.write_bytes(steps_file.read_bytes()[:-4])
    with pytest.raises(UserError, match="damaged"):
        TokenStore(store.directory)


def test_no_file_of_steps_where_there_are_none(tmp_path, tokenizer):
    store = build(tmp_path, [TEXT, IDS], tokenizer)
    assert not (store.directory / "steps.int32").exists()
    assert store.first_without_steps() == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rejected_ids": None}, "prompt_ids without rejected_ids; give prompt_ids, chosen_ids, rejected_ids together"),
        (
            {"prompt_ids": None, "chosen_ids": None, "rejected_ids": None, **STEPS, **TEXT},
            "chosen_steps without prompt_ids; give prompt_ids, chosen_ids, rejected_ids together",
        ),
        ({"chosen_steps": [0, 1, 2]}, "chosen_steps alone; give chosen_steps and rejected_steps together"),
        ({**STEPS, "chosen_steps": [0, 1]}, "chosen_steps: 2 steps for the 3 tokens of chosen_ids; give one per token"),
        ({**STEPS, "rejected_steps": 4}, "rejected_steps: must be a list of integers, not a number"),
        ({**STEPS, "rejected_steps": [-1]}, "rejected_steps[0]: must be an integer from 0 to 2147483646, not -1"),
        ({**STEPS, "chosen_steps": [0, 1.5, 2]}, "chosen_steps[1]: must be an integer from 0 to 2147483646, not 1.5"),
        ({**STEPS, "rejected_steps": [2**31 - 1]}, "rejected_steps[0]: must be an integer from 0 to"),
        ({"chosen_ids": "abc"}, "chosen_ids: must be a list of integers, not text"),
        ({"chosen_ids": []}, "chosen_ids: is an empty list"),
        ({"prompt_ids": []}, "prompt_ids: is an empty list"),
        ({"chosen_ids": [1, True]}, "chosen_ids[1]: must be an integer from 0 to 2147483646, not True"),
        ({"chosen_ids": [1, "2"]}, "chosen_ids[1]: must be an integer from 0 to 2147483646, not text"),
        ({"chosen_ids": [1, 259]}, "chosen_ids[1]: 259 is not in the vocabulary of 259 tokens; give ids of this"),
        ({"rejected_ids": [7, 258]}, "rejected_ids[1]: is the mask token 258"),
        ({"rejected_ids": [8, 9, 10]}, "chosen and rejected are the same"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, tokenizer, change, words):
    row = {name: value for name, value in {**IDS, **change}.items() if value is not None}
    with pytest.raises(UserError, match="^" + re.escape(f"{tmp_path / 'rows.jsonl'}:2: {words}")) as caught:
        build(tmp_path, [TEXT, row], tokenizer)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_content_is_told_apart_from_where_it_lies(tmp_path, tokenizer):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    base = build(tmp_path / "a", [TEXT, {**IDS, **STEPS}], tokenizer).content
    assert build(tmp_path / "b", [TEXT, {**IDS, **STEPS}], tokenizer).content == base
    others = [
        [TEXT, IDS],
        [TEXT, {**IDS, **STEPS, "rejected_steps": [5]}],
        [TEXT, {**IDS, "rejected_ids": [12]}],
        [TEXT, {**IDS, "prompt_ids": [5, 256], "chosen_ids": [7, 8, 9, 10]}],  # cut elsewhere
        [{**IDS, **STEPS}, TEXT],
    ]
    contents = {build(tmp_path / "b", rows, tokenizer).content for rows in others}
    assert len(contents) == len(others) and base not in contents


def test_steps_increase_from_block_to_block():
    assert blocks_in_order(np.array([3, 1, 2, 9, 9, 4, 10]), prompt_length=1, block_size=4)  # 3 1 2 | 9 9 4 10
    assert not blocks_in_order(np.array([3, 1, 2, 9, 9, 4, 10]), prompt_length=0, block_size=4)  # 3 1 2 9 | 9 4 10
    assert blocks_in_order(np.array([5]), prompt_length=3, block_size=4)
    assert not blocks_in_order(np.array([5, 5]), prompt_length=3, block_size=4)
    rng = np.random.default_rng(0)
    for _ in range(300):
        P, R = rng.integers(1, 9), rng.integers(1, 14)
        steps = np.sort(rng.integers(0, 20, R)) if rng.random() < 0.8 else rng.integers(0, 20, R)
        block = (P + np.arange(R)) // 4
        later = block[:, None] > block
        assert blocks_in_order(steps, int(P), 4) == bool((steps[:, None] > steps)[later].all())


def test_the_first_row_that_cannot_be_replayed_is_named(tmp_path, tokenizer):
    good = {**IDS, **STEPS}
    out_of_order = {**good, "chosen_steps": [2, 1, 0]}  # the prompt's 3 tokens leave one place in the first block
    store = build(tmp_path, [good, good, TEXT, IDS], tokenizer)
    with pytest.raises(UserError, match=r"rows.jsonl:3: has no chosen_steps and rejected_steps, which estimator x"):
        require_steps(store, range(4), 4, "estimator x")
    store = build(tmp_path, [good, good, out_of_order], tokenizer)
    assert store.first_without_steps() is None
    require_steps(store, [0, 1], 4, "estimator x")
    with pytest.raises(UserError, match=r"rows.jsonl:3: chosen_steps do not increase from block to block of 4 tokens"):
        require_steps(store, range(3), 4, "estimator x")
    require_steps(store, range(3), 16, "estimator x")
