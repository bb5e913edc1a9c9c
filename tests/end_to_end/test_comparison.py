"""examples/compare_estimators.sh as a user starts it, small: the table and the plots."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import running_totals
import train_tokenizer
from tests.conftest import REPOSITORY
from tests.support.launch import write_lines

pytestmark = pytest.mark.end_to_end

SIZES = {"TRAIN": "64", "PROBLEMS": "12", "HELDOUT": "6", "HELDOUT_PAIRS": "4", "SFT_ITERS": "2"}
TINY = ["--seeds", "1", "--estimators", "dtrpo", "--anchors", "0.5", "--draws", "2"]
TRAINER = ["--train-iters", "2", "--lr-warmup-iters", "0", "--micro-batch-size", "4", "--global-batch-size", "4"]


def recorded_pairs(tokenizer, problems: list[dict]) -> list[dict]:
    """The right answer and the habit's, as if each block had been decoded token by token from left to right."""

    def response(name: str, text: str) -> dict:
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        return {name: text, f"{name}_ids": ids, f"{name}_steps": list(range(len(ids))), f"{name}_discarded": []}

    rows = []
    for problem in problems:
        numbers = [int(part) for part in problem["prompt"].removesuffix("=").split("+")]
        right = running_totals.record(numbers)["completion"]
        row = problem | {"prompt_ids": tokenizer.encode(problem["prompt"])}
        rows.append(row | response("chosen", right) | response("rejected", right[:-1] + "?"))
    return rows


def compare(folder) -> str:
    words = ["bash", "examples/compare_estimators.sh", str(folder), *TINY, *TRAINER]
    environment = os.environ | SIZES | {"PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY)}
    with (folder / "log").open("w") as log:
        status = subprocess.run(words, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, timeout=300).returncode
    output = (folder / "log").read_text()
    assert status == 0, output
    return output


def test_the_whole_script(tmp_path):
    """An untrained model has no right answers to make pairs of: they are here before, and the script keeps them."""
    counts = ["--train", "64", "--problems", "12", "--heldout", "6", "--heldout-pairs", "4"]
    assert running_totals.main(["--output", str(tmp_path / "data"), *counts]) == 0
    words = ["--input", str(tmp_path / "data" / "sft.jsonl"), "--output", str(tmp_path / "tokenizer")]
    assert train_tokenizer.main([*words, "--vocab-size", "258"]) == 0
    tokenizer = train_tokenizer.PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    for problems, pairs in (("problems", "pairs"), ("problems_heldout", "pairs_heldout")):
        asked = [json.loads(line) for line in (tmp_path / "data" / f"{problems}.jsonl").read_text().splitlines()]
        write_lines(tmp_path / f"{pairs}.jsonl", recorded_pairs(tokenizer, asked))

    output = compare(tmp_path)
    rows = (tmp_path / "rows" / "comparison.md").read_text().split("\n\n")[0].splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows] == [
        "row",
        "---|---|---|---|---|---|---|---|---|---",
        "SFT",
        "chosen alone",
        "dtrpo + 0.5",
    ]
    assert all(row.count("|") == 11 for row in rows)
    assert output.count("exact match 0.") == 2
    for figure in ("comparison.png", "displacement.png"):
        assert 5_000 < (tmp_path / "rows" / figure).stat().st_size < 300_000
    numbers = json.loads((tmp_path / "rows" / "comparison.json").read_text())
    assert all(value > 0 for value in numbers["deviation"].values())
    assert [len(right) for right in numbers["rows"]["dtrpo + 0.5"]["right"]] == [6]
