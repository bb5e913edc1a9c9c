"""Rows of token ids and recorded decoding steps: taken as they are, kept beside the tokens, refused where wrong."""

from __future__ import annotations

import contextlib
import json
import re

import numpy as np
import pytest

from megatron_dtrpo.data.recordings import blocks_in_order, require_recordings, require_steps
from megatron_dtrpo.data.token_store import TokenStore, build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError

TEXT = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}
IDS = {"prompt_ids": [5, 256, 7], "chosen_ids": [8, 9, 10], "rejected_ids": [11]}
STEPS = {"chosen_steps": [0, 2, 1], "rejected_steps": [4]}
THROWN = {"place": 3, "token": 12, "step": 0, "until": 1}
DISCARDED = {"chosen_discarded": [THROWN], "rejected_discarded": []}
WHOLE = {**IDS, **STEPS, **DISCARDED}


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


def test_discarded_tokens_are_kept_beside_the_response(tmp_path, tokenizer):
    """In order of place, whatever else a row's objects hold; None where nothing was recorded."""
    two = [{**THROWN, "place": 5, "step": 1, "until": 2, "confidence": 0.3}, {**THROWN, "step": 0, "until": 2}]
    rows = [
        TEXT,
        WHOLE,
        {**WHOLE, "chosen_discarded": [], "rejected_discarded": []},
        {**WHOLE, "chosen_discarded": two},
    ]
    store = build(tmp_path, rows, tokenizer)
    got = [e.discarded and [d.tolist() for d in e.discarded] for e in (store[i] for i in range(4))]
    assert got == [None, [[[3, 12, 0, 1]], []], [[], []], [[[3, 12, 0, 2], [5, 12, 1, 2]], []]]
    assert parts(store[1]) == parts(store[2])  # the response ends at its end token
    assert store.first_incomplete is None
    assert build(tmp_path, [TEXT, WHOLE, {**IDS, **STEPS}], tokenizer).first_incomplete == 2
    assert build(tmp_path, [IDS, TEXT], tokenizer).first_incomplete is None


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
        ({**DISCARDED}, "chosen_discarded without chosen_steps: give both"),
        ({**STEPS, "chosen_discarded": []}, "chosen_discarded alone; give chosen_discarded and rejected_discarded"),
        (
            {**WHOLE, "chosen_discarded": [3]},
            "chosen_discarded: must be a list of objects with place, token, step, until",
        ),
        ({**WHOLE, "chosen_discarded": [{"place": 3}]}, "chosen_discarded[0]: token must be an integer from 0 to"),
        (
            {**WHOLE, "chosen_discarded": [{**THROWN, "place": 2}]},
            "chosen_discarded: place 2 holds a token already; the",
        ),
        ({**WHOLE, "chosen_discarded": [THROWN, THROWN]}, "chosen_discarded: place 3 holds a token already"),
        (
            {**WHOLE, "chosen_discarded": [{**THROWN, "until": 0}]},
            "chosen_discarded: place 3: until 0 must be the step",
        ),
        (
            {**WHOLE, "chosen_discarded": [{**THROWN, "until": 7}]},
            "chosen_discarded: place 3: until 7 must be the step",
        ),
        (
            {**WHOLE, "chosen_discarded": [{**THROWN, "token": 258}]},
            "chosen_discarded: token 258 at place 3 is not one",
        ),
        (
            {**WHOLE, "chosen_discarded": [{**THROWN, "token": 999}]},
            "chosen_discarded: token 999 at place 3 is not one",
        ),
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
        [TEXT, WHOLE],
        [TEXT, {**WHOLE, "chosen_discarded": [{**THROWN, "token": 13}]}],
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
    """Three tokens of a prompt leave one place in the first block of four."""
    store = build(tmp_path, [WHOLE, WHOLE, TEXT, IDS], tokenizer)
    with pytest.raises(UserError, match=r"rows.jsonl:3: has no chosen_steps and rejected_steps, which estimator x"):
        require_recordings(store, "estimator x")
    store = build(tmp_path, [WHOLE, {**IDS, **STEPS}], tokenizer)
    with pytest.raises(UserError, match=r"rows.jsonl:2: has no chosen_discarded and rejected_discarded, the tokens"):
        require_recordings(store, "estimator x")
    good = {**WHOLE, "chosen_steps": [0, 1, 2], "chosen_discarded": []}
    for steps, thrown, problem in (
        ([2, 1, 0], [], "chosen_steps do not increase from block to block of 4 tokens"),
        ([0, 2, 1], [], "chosen_steps do not begin with the first token in a block of 4 tokens"),
        ([0, 1, 1], [], "chosen_steps do not begin with the first token in a block of 4 tokens"),
        ([0, 1, 3], [{**THROWN, "place": 5, "step": 2, "until": 3}], "chosen_discarded holds tokens of another block"),
        ([0, 1, 3], [{**THROWN, "step": 1, "until": 3}], "chosen_discarded holds tokens of another block"),
    ):
        bad = {**good, "chosen_steps": steps, "chosen_discarded": thrown}
        store = build(tmp_path, [good, good, bad], tokenizer)
        require_recordings(store, "estimator x")
        require_steps(store, [0, 1], 4, "clean")
        with pytest.raises(UserError, match=rf"rows.jsonl:3: {problem}"):
            require_steps(store, range(3), 4, "clean")
        # With prediction shift 0 a block's first token is written with the others, or behind them.
        own = problem.startswith("chosen_steps do not begin") or (thrown and thrown[0]["step"] == 1)
        with contextlib.nullcontext() if own else pytest.raises(UserError, match=problem):
            require_steps(store, range(3), 4, None)
    store = build(
        tmp_path,
        [{**good, "chosen_steps": [0, 1, 3], "chosen_discarded": [{**THROWN, "step": 2, "until": 3}]}],
        tokenizer,
    )
    require_steps(store, [0], 4, "clean")
    require_steps(store, [0], 16, "clean")
