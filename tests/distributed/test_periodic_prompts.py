"""What periodic evaluation decodes: the prompts that are trained, of every kind of row with an answer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from tests.support.chat_tokenizer import save_chat_tokenizer
from tests.support.launch import TINY_MODEL, ForkServer, write_lines

pytestmark = pytest.mark.distributed


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def conversation(number: int) -> list[dict]:
    return [user("hello"), assistant("good day"), user(f"{number}+{number}"), assistant(str(2 * number))]


PREFERENCES = [  # what the row says is the prompt is a label in the first, and nothing at all in the second
    {"prompt": "a label", "chosen": conversation(1), "rejected": [*conversation(1)[:3], assistant("9")], "answer": 2},
    {"chosen": "the sum is 2", "rejected": "the sum is 3", "answer": 2},
    {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
    {
        "prompt": [user("1+1"), assistant("that is")],
        "chosen": [assistant(" 2")],
        "rejected": [assistant(" 3")],
        "answer": 2,
    },
]
SFT = [{"messages": conversation(number), "answer": 2 * number} for number in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    save_chat_tokenizer(folder / "tokenizer")
    (folder / "odd_text.py").write_text("def odd(row, text):\n    return sum(map(ord, text)) % 2 == 1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        yield folder


@pytest.mark.parametrize(
    ("kind", "rows", "turns"), [("preference", PREFERENCES, "last"), ("sft", SFT, "last"), ("sft", SFT, "all")]
)
def test_prompts_are_the_trained_ones(folder, tmp_path, kind, rows, turns):
    from megatron_dtrpo.evaluation.periodic import PeriodicEvaluation

    tokenizer = build_tokenizer("HuggingFaceTokenizer", folder / "tokenizer")
    path = write_lines(tmp_path / "rows.jsonl", rows)
    store = build_token_store(path, kind, tokenizer, tmp_path / "cache", assistant_turns=turns)
    evaluation = PeriodicEvaluation.__new__(PeriodicEvaluation)
    evaluation.data, evaluation.tokenizer = SimpleNamespace(store=store), tokenizer
    evaluation.indices = list(range(len(store)))[::-1]
    problems = sorted(evaluation._problems(), key=lambda problem: problem.location)
    assert [problem.row for problem in problems] == [row for row in rows if "answer" in row]
    last = {store.row_number(index): index for index in range(len(store))}
    expected = [store[last[number]].prompt.tolist() for number, row in enumerate(rows) if "answer" in row]
    assert [problem.ids for problem in problems] == expected


def test_a_run_decodes_rows_with_an_answer_and_says_where_there_are_none(folder, tmp_path):
    settings = {
        **TINY_MODEL,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": folder / "tokenizer",
        "objective": "sft",
        "data_path": write_lines(tmp_path / "train.jsonl", SFT),
        "assistant_turns": "all",
        "eval_interval": 2,
        "eval_max_new_tokens": 8,
        "eval_verifier": "odd_text:odd",
        "global_batch_size": 4,
        "train_iters": 2,
    }
    server = ForkServer(tmp_path / "server.log")
    try:
        for name, rows in (("answers", SFT), ("none", [{"messages": row["messages"]} for row in SFT])):
            heldout = write_lines(tmp_path / f"{name}.jsonl", rows)
            server.train({**settings, "eval_data_path": heldout, "save": tmp_path / name})
            lines = [json.loads(line) for line in (tmp_path / name / "eval.jsonl").read_text().splitlines()]
            assert [("eval/exact_match" in line) for line in lines] == [name == "answers"] * 2
            output = (tmp_path / f"{name}.log").read_text()
            assert "note: 4 rows are 8 examples, one for each of the assistant's messages" in output
            said = f"note: none of the 8 examples of {heldout} has an answer: nothing is decoded"
            assert (said in output) == (name == "none"), output
    finally:
        server.close()
