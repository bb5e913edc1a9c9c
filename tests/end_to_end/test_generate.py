"""`megatron-dtrpo generate` and `pairs`, as a user runs them."""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path

import pytest

from megatron_dtrpo.cli import generate, score, train
from megatron_dtrpo.cli import pairs as pairs_verb
from megatron_dtrpo.data.tokenizer import Tokenizer
from tests.support.launch import TINY_MODEL, Job, flags, read_metrics, uneven_pairs, verb, write_lines

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

POSITIONS = 200
PROMPTS = [
    {"prompt": "Tom has 3 apples. ", "answer": 3, "id": "a"},
    {"prompt_ids": [72, 105, 33, 32, 72, 105, 33], "answer": 4},
    {"prompt": "x", "answer": 5},
    {"prompt": "A prompt that is longer than two blocks of eight. ", "answer": 6},
    {"prompt": "sixteen letters!", "answer": 7},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint of random weights, sure enough of some tokens to write several at once, and a file of prompts."""
    folder = tmp_path_factory.mktemp("generate")
    data = uneven_pairs(folder / "pairs.jsonl", 4)
    model = {**TINY_MODEL, "max_position_embeddings": POSITIONS, "init_method_std": 0.5}
    run = {"seq_length": 2048, "global_batch_size": 4, "train_iters": 1, "lr": 1e-9}
    assert train.main(flags({**model, **run, "data_path": data, "save": folder / "run"})) == 0
    write_lines(folder / "prompts.jsonl", PROMPTS)
    return folder


def run(module, folder: Path, **settings) -> int:
    return module.main(flags({"checkpoint": folder / "run", **settings}))


def decode(folder: Path, name: str, **settings) -> list[dict]:
    settings = {"prompts": folder / "prompts.jsonl", "max_new_tokens": 20, "small_block_size": 4} | settings
    assert run(generate, folder, output=folder / name, **settings) == 0
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def same(rows: list[dict], others: list[dict]) -> bool:
    """Confidences are compared loosely: sums in fp32 depend on what shares a batch."""
    for row, other in zip(rows, others, strict=True):
        if row["completion_confidence"] != pytest.approx(other["completion_confidence"], rel=1e-3):
            return False
    return [_without_confidence(row) for row in rows] == [_without_confidence(row) for row in others]


def _without_confidence(row: dict) -> dict:
    thrown = [{**token, "confidence": None} for token in row["completion_discarded"]]
    return {**row, "completion_confidence": None, "completion_discarded": thrown}


def test_rows_keep_what_they_had_and_gain_a_completion(folder, capfd):
    rows = decode(folder, "out.jsonl", record_trajectory=True, trace=folder / "trace.html")
    assert [{key: row[key] for key in given} for row, given in zip(rows, PROMPTS, strict=True)] == PROMPTS
    for row in rows:
        assert 1 <= len(row["completion_ids"]) <= 20
        assert len(row["completion_steps"]) == len(row["completion_confidence"]) == len(row["completion_ids"])
        assert 1 <= row["completion_passes"] <= 20 + 1 + 3  # its steps, the prompt's pass, a clean pass a full block
        kept = [i for i in row["completion_ids"] if i < 256]
        assert row["completion"] == bytes(kept).decode("utf-8", errors="replace")
    tokens, passes = sum(len(row["completion_ids"]) for row in rows), sum(row["completion_passes"] for row in rows)
    said = capfd.readouterr().err
    assert "tokens per second" in said and f"{tokens / passes:.2f} tokens per forward pass" in said
    assert f"{tokens / 5:.1f} tokens and {passes / 5:.1f} passes a response" in said
    page = (folder / "trace.html").read_text()
    assert "<html" in page and "http://" not in page.replace("http://www.w3.org", "") and "https://" not in page


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_prompts_completion_does_not_depend_on_the_batch_or_the_layout(folder, temperature):
    settings = {"temperature": temperature, "threshold": 0.5, "record_trajectory": True}
    alone = decode(folder, "alone.jsonl", batch_size=1, **settings)
    assert same(decode(folder, "together.jsonl", batch_size=4, **settings), alone)
    if temperature:
        assert not same(decode(folder, "seed.jsonl", seed=7, **settings), alone)
        words = {"checkpoint": folder / "run", "prompts": folder / "prompts.jsonl", "output": folder / "many.jsonl"}
        words |= {"max_new_tokens": 20, "small_block_size": 4, "tensor_model_parallel_size": 2, **settings}
        result = Job(words, folder / "many.log", 4, verb("generate")).wait()  # TP2 x DP2
        assert result.status == 0, result.output
        rows = [json.loads(line) for line in (folder / "many.jsonl").read_text().splitlines()]
        assert same(rows, alone)


def test_one_prompt_prints_its_answer(folder, capfd):
    assert run(generate, folder, prompt="Tom has 3 apples. ", max_new_tokens=20) == 0
    expected = decode(folder, "again.jsonl", small_block_size=8)[0]["completion"]
    assert capfd.readouterr().out.split("\n")[0] == expected.split("\n")[0]


def test_bad_rows_are_skipped_or_all_named(folder, tmp_path, capfd, monkeypatch):
    """Prompts, pairs and scores; a table's rows hold what JSON cannot, and are written all the same."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    when = datetime.date(2024, 1, 1)
    rows = [{"prompt": text, "when": when, "answer": "1"} for text in ("ab", "", "cd", None, "x" * POSITIONS, "")]
    data = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), data)
    write_lines(tmp_path / "test.jsonl", [{"prompt": "e"}])
    problems = [
        f"{data} row 1: prompt: is empty; give some text or take the row out (2 rows, also {data} row 5)",
        f"{data} row 3: a row needs prompt",
        f"{data} row 4: the prompt has {POSITIONS} tokens",
    ]
    asked = {"prompts": tmp_path / "*", "split": "train", "output": tmp_path / "out.jsonl", "max_new_tokens": 8}
    asked |= {"small_block_size": 4, "sub_block_cache": "prefix"}
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half.py").write_text("def verify(row, text):\n    return len(text) % 2 == 0\n")
    for module, more in (
        (generate, {"record_trajectory": True}),
        (pairs_verb, {"verifier": "half:verify", "samples": 20}),
    ):
        assert run(module, folder, **asked, **more) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("error: 4 of 6 rows cannot be used") and all(problem in line for problem in problems)
        assert run(module, folder, bad_rows="skip", **asked, **more) == 0
        said = capfd.readouterr().err
        assert "warning: skipped 4 of 6 rows" in said and all(problem in said for problem in problems)
        assert "warning: --sub-block-cache prefix is an approximation: the recorded decodings replay otherwise" in said
        written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert written and {row["prompt"] for row in written} <= {"ab", "cd"}
        assert {row["when"] for row in written} == {str(when)}
    pairs = write_lines(tmp_path / "pairs.jsonl", [*written, {"prompt": "ab"}])
    scoring = {"data": pairs, "seq_length": 2048}
    assert run(score, folder, **scoring) == 2
    assert f"error: {pairs}:{len(written) + 1}: missing field 'chosen'" in capfd.readouterr().err
    assert run(score, folder, bad_rows="skip", **scoring) == 0
    out = capfd.readouterr().out
    assert f"warning: skipped 1 of {len(written) + 1} rows" in out and f"pairs                {len(written)}\n" in out


def test_pairs_are_right_and_wrong_answers_with_their_trajectories(folder, tmp_path, monkeypatch, capfd):
    (tmp_path / "even_verifier.py").write_text(
        "def even(row, text):\n    if row.get('answer') == 5:\n        raise RuntimeError('cannot judge')\n"
        "    return len(text) % 2 == 0\n"
    )
    monkeypatch.chdir(tmp_path)
    settings = {"prompts": folder / "prompts.jsonl", "output": tmp_path / "pairs.jsonl", "samples": 6}
    settings |= {"max_new_tokens": 24, "verifier": "even_verifier:even"}
    decoded, decode = [], Tokenizer.decode
    with monkeypatch.context() as patch:
        patch.setattr(Tokenizer, "decode", lambda self, ids: decoded.append(tuple(ids)) or decode(self, ids))
        assert run(pairs_verb, folder, pairs_per_prompt=2, **settings) == 0
    out = capfd.readouterr()
    judged = int(out.out.split("different responses")[1].split()[0])
    answers = [ids for ids in decoded if ids != tuple(PROMPTS[1]["prompt_ids"])]
    assert len(answers) == judged + 6, "the text that was judged is the text that is written"
    assert "prompts.jsonl:3: the verifier raised RuntimeError: cannot judge" in out.err
    assert "6 responses could not be judged" in out.err
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert pairs and all(pair["answer"] != 5 for pair in pairs)
    for pair in pairs:
        assert len(pair["chosen"]) % 2 == 0 and len(pair["rejected"]) % 2 == 1
        for name in ("chosen", "rejected"):
            assert len(pair[f"{name}_ids"]) == len(pair[f"{name}_steps"])
        assert pair["chosen_ids"][-1] == 256  # the end token
    # What was written trains, recorded decoding steps and all.
    for estimator in ("trajectory", "exact_trajectory"):
        model = {"load": folder / "run", "estimator": estimator, "data_path": tmp_path / "pairs.jsonl"}
        training = {"train_iters": 2, "lr": 1e-3, "global_batch_size": 2, "save": tmp_path / estimator}
        assert train.main(flags({**model, **training})) == 0
        rows = read_metrics(tmp_path / estimator)
        assert 0.69314 < rows[0]["loss"] < 0.69316 and abs(rows[1]["loss"] - rows[0]["loss"]) > 1e-6


def test_right_answers_without_an_end_make_no_pair_and_are_counted(folder, tmp_path, monkeypatch, capfd):
    # An answer of one token is an end token or has none: without a text it is wrong.
    right = "text != '' and sum(map(ord, text)) % 2 == 0"
    (tmp_path / "half_right.py").write_text(f"def half(row, text):\n    return {right}\n")
    monkeypatch.chdir(tmp_path)
    settings = {"prompts": folder / "prompts.jsonl", "output": tmp_path / "out.jsonl", "samples": 6}
    assert run(pairs_verb, folder, max_new_tokens=1, verifier="half_right:half", **settings) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    words = re.search(
        r"\((\d+) right, of which (\d+) have no end token and make no pair, (\d+) wrong in all\): ", error
    )
    assert words and words[1] == words[2] and "raise --max-new-tokens, --samples or --temperature" in error
    assert run(pairs_verb, folder, max_new_tokens=24, verifier="half_right:half", **settings) == 0
    told = capfd.readouterr().out
    assert re.search(
        r"different responses  \d+ \(\d+ right, of which \d+ have no end token and make no pair, \d+ wr", told
    )


def test_the_exact_likelihood_of_a_pair_is_the_decoders_own(folder, tmp_path, monkeypatch, capfd):
    """Through both command lines: what the decoder believed of all that it wrote, thrown away tokens included, is what
    training's forward pass computes."""
    (tmp_path / "parity.py").write_text("def short(row, text):\n    return len(text.encode()) % 2 == 0\n")
    monkeypatch.chdir(tmp_path)
    settings = {"prompts": folder / "prompts.jsonl", "output": tmp_path / "pairs.jsonl", "samples": 40, "seed": 3}
    settings |= {"max_new_tokens": 60, "verifier": "parity:short", "threshold": 0.1, "pairs_per_prompt": 20}
    assert run(pairs_verb, folder, **settings) == 0
    words = {"data": tmp_path / "pairs.jsonl", "output": tmp_path / "scores.jsonl", "estimator": "exact_trajectory"}
    assert run(score, folder, **words) == 0
    pairs, scores = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pairs", "scores")
    )
    assert len(pairs) == len(scores) > 10
    (line,) = (line for line in capfd.readouterr().out.splitlines() if line.startswith("from the decoder's"))
    assert float(line.split()[3]) < 1e-4 and line.endswith(f"of {2 * len(pairs)} recorded log-likelihoods")
    for pair, row in zip(pairs, scores, strict=True):
        for name in ("chosen", "rejected"):
            assert row[f"logps/{name}"] == pytest.approx(pair[f"{name}_log_likelihood"], abs=1e-4)
    thrown = [len(pair["chosen_discarded"]) + len(pair["rejected_discarded"]) for pair in pairs]
    assert sum(thrown) > 3
    # A recording of before they were kept is told apart, and what takes no recording still reads it.
    write_lines(tmp_path / "old.jsonl", [{k: v for k, v in p.items() if "discarded" not in k} for p in pairs])
    capfd.readouterr()
    assert run(score, folder, **words | {"data": tmp_path / "old.jsonl"}) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "old.jsonl:1: has no chosen_discarded and rejected_discarded" in line
    words |= {"data": tmp_path / "old.jsonl", "estimator": "dtrpo"}
    assert run(score, folder, **words) == 0


ERRORS = {
    "no such checkpoint": ({"prompt": "a", "checkpoint": "nowhere"}, "no checkpoint to load"),
    "prompt too long": ({"prompt": "y" * POSITIONS}, f"--prompt: the prompt has {POSITIONS} tokens"),
    "row too long": ({"rows": [{"prompt": "a"}, {"prompt": "y" * 500}]}, "rows.jsonl:2: the prompt has 500 tokens"),
    "unknown stop token": ({"prompt": "a", "stop_token": "<|nothing|>"}, "stop token '<|nothing|>'"),
    "empty file": ({"rows": []}, "rows.jsonl: holds no rows"),
    "row without a prompt": ({"rows": [{"text": "a"}]}, "rows.jsonl:1: a row needs prompt, messages or prompt_ids"),
    "empty prompt": ({"rows": [{"prompt": ""}]}, "rows.jsonl:1: prompt: is empty"),
    "ids out of range": ({"rows": [{"prompt_ids": [5000]}]}, "rows.jsonl:1: prompt_ids"),
    "mask in the prompt": ({"rows": [{"prompt_ids": [3, 258]}]}, "prompt_ids[1]: is the mask token"),
    "messages without a template": ({"rows": [{"messages": [{"role": "user", "content": "a"}]}]}, "no chat template"),
    "both kinds of prompt": ({"prompt": "a", "rows": [{"prompt": "a"}]}, "either --prompt TEXT or --prompts FILE"),
    "no prompt": ({}, "either --prompt TEXT or --prompts FILE"),
    "threshold": ({"prompt": "a", "threshold": 1.5}, "--threshold 1.5"),
    "sub-block": ({"prompt": "a", "small_block_size": 3}, "must divide the model's block_size 8"),
    "steps of another rule": (
        {"prompt": "a", "denoising_steps": 4},
        "--denoising-steps 4: --rule threshold does not read it; static",
    ),
    "new tokens": ({"prompt": "a", "max_new_tokens": 0}, "--max-new-tokens 0"),
    "top-p of no draw": ({"prompt": "a", "top_p": 0.5}, "--top-p 0.5: at temperature 0 nothing is drawn: give --temp"),
    "nowhere to record": ({"prompt": "a", "record_trajectory": True}, "--record-trajectory writes columns of --output"),
    "unknown flag": ({"prompt": "a", "treshold": 0.5}, "nearest known one is --threshold"),
    "trace folder": ({"prompt": "a", "trace": "no/folder/x.html"}, "its folder does not exist"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_one_line(folder, tmp_path, capfd, name):
    settings, message = ERRORS[name]
    settings = dict(settings)
    rows = settings.pop("rows", None)
    if rows is not None:
        write_lines(tmp_path / "rows.jsonl", rows)
        settings |= {"prompts": tmp_path / "rows.jsonl", "output": tmp_path / "out.jsonl"}
    before = sorted(tmp_path.iterdir())
    capfd.readouterr()
    assert run(generate, folder, **settings) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], lines
    assert sorted(tmp_path.iterdir()) == before


def test_an_adapter_is_named(tmp_path, capfd):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert generate.main(flags({"checkpoint": tmp_path, "prompt": "1+1="})) == 2
    assert "an adapter (LoRA), not a model: merge it into its base first" in capfd.readouterr().err


def test_prompts_that_nothing_can_judge_are_an_error_before_they_are_decoded(folder, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(
        "megatron_dtrpo.evaluation.session.Source.open", lambda self: pytest.fail("the model was built")
    )
    file = write_lines(tmp_path / "bare.jsonl", [{"prompt": "1+1="}, {"prompt": "2+2="}])
    words = (
        f"--verifier numeric: none of the 2 prompts can be judged: {file}:1: the row has no 'answer' to compare with"
    )
    assert run(pairs_verb, folder, prompts=file, output=tmp_path / "pairs.jsonl") == 2
    assert words in capfd.readouterr().err
    assert run(generate, folder, prompts=file, output=tmp_path / "answers.jsonl", verifier="numeric") == 2
    assert words in capfd.readouterr().err


def test_pairs_without_a_right_answer_are_an_error(folder, tmp_path, capfd):
    settings = {"prompts": folder / "prompts.jsonl", "output": tmp_path / "pairs.jsonl", "samples": 2}
    assert run(pairs_verb, folder, max_new_tokens=4, **settings) == 2
    assert "no prompt has both a right and a wrong response" in capfd.readouterr().err
    assert not (tmp_path / "pairs.jsonl").exists()
