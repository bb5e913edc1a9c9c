"""The quickstart's data: every answer is right, no problem is in two files, and the same call makes the same files."""

from __future__ import annotations

import json

import pytest

import arithmetic


def numbers(prompt: str) -> list[int]:
    return [int(part) for part in prompt.removesuffix("=").split("+")]


def worked(row: dict) -> tuple[list[int], int]:
    """A solution's intermediate sum and last number, and what it says they come to."""
    left, right = row["completion"].split("=")
    return [int(part) for part in left.split("+")], int(right)


def test_held_out_solutions_are_right():
    for row in arithmetic.generate(0, 0, 300)["heldout.jsonl"]:
        first, second, third = numbers(row["prompt"])
        assert worked(row) == ([first + second, third], first + second + third)
        assert row["answer"] == first + second + third


def test_the_pupil_forgets_every_other_carry_and_makes_no_other_mistake():
    carries = forgotten = 0
    for row in arithmetic.generate(4000, 0, 0)["sft.jsonl"]:
        first, second, third = numbers(row["prompt"])
        (between, repeated), last = worked(row)
        assert repeated == third and row["answer"] == first + second + third
        for left, right, result in ((first, second, between), (between, third, last)):
            carry = left % 10 + right % 10 >= 10
            assert result in ((left + right, left + right - 10) if carry else (left + right,))
            carries, forgotten = carries + carry, forgotten + (result < left + right)
    assert 0.46 < forgotten / carries < 0.54


def test_no_problem_is_in_two_files():
    files = arithmetic.generate(2000, 1000, 500)
    prompts = [row["prompt"] for rows in files.values() for row in rows]
    assert [len(files[name]) for name in ("sft.jsonl", "problems.jsonl", "heldout.jsonl")] == [2000, 1000, 500]
    assert len(set(prompts)) == len(prompts) == 3500


def test_problems_hold_no_solution():
    assert all(set(row) == {"prompt", "answer"} for row in arithmetic.generate(0, 50, 0)["problems.jsonl"])


def test_held_out_problems_do_not_depend_on_how_many_others_there_are():
    few, many = arithmetic.generate(10, 10, 40), arithmetic.generate(5000, 700, 40)
    assert few["heldout.jsonl"] == many["heldout.jsonl"]
    assert arithmetic.generate(10, 10, 40, seed=1)["heldout.jsonl"] != few["heldout.jsonl"]


def test_all_problems_can_be_asked_for():
    files = arithmetic.generate(arithmetic.PROBLEMS - 10, 5, 5)
    assert sum(map(len, files.values())) == arithmetic.PROBLEMS


def test_command_writes_the_files(tmp_path, capsys):
    words = ["--output", str(tmp_path / "data"), "--train", "30", "--problems", "20", "--heldout", "10"]
    assert arithmetic.main(words) == 0
    written = {p.name: [json.loads(line) for line in p.read_text().splitlines()] for p in (tmp_path / "data").iterdir()}
    assert written == arithmetic.generate(30, 20, 10)
    assert "sft.jsonl: 30" in capsys.readouterr().out


@pytest.mark.parametrize("counts", [(-1, 0, 0), (arithmetic.PROBLEMS, 1, 0)])
def test_impossible_counts_are_one_line(tmp_path, capsys, counts):
    words = [
        word for name, n in zip(("train", "problems", "heldout"), counts, strict=True) for word in (f"--{name}", str(n))
    ]
    assert arithmetic.main(["--output", str(tmp_path / "data"), *words]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "data").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    words = ["--output", str(tmp_path / "file" / "data"), "--train", "1", "--problems", "1", "--heldout", "1"]
    assert arithmetic.main(words) == 2
    assert capsys.readouterr().err.startswith("error: --output")
