"""The comparison's data: every held-out answer is right, the pupil has one habit, no problem is in two files."""

from __future__ import annotations

import json

import pytest

import running_totals


def steps(row: dict) -> list[tuple[int, int, int]]:
    """Of a solution: total, term, and what the line says they come to."""
    found = []
    for line in row["completion"].split(";"):
        left, after = line.split("=")
        total, term = left.split("+")
        found.append((int(total), int(term), int(after)))
    return found


def numbers(row: dict) -> list[int]:
    return [int(part) for part in row["prompt"].removesuffix("=").split("+")]


def test_held_out_solutions_are_right_and_chained():
    rows = running_totals.generate(0, 0, 300, 0)["heldout.jsonl"]
    for row in rows:
        total, *terms = numbers(row)
        assert [term for _, term, _ in steps(row)] == terms
        for before, term, after in steps(row):
            assert before == total and after == total + term and 10 <= after <= 99
            total = after
        assert row["answer"] == total == sum(numbers(row))
        assert len(row["completion"]) == 39  # with its end token two and a half blocks of 16


def test_the_pupil_forgets_seven_of_ten_carries_of_large_terms_and_goes_on_from_there():
    carries = forgotten = 0
    for row in running_totals.generate(4000, 0, 0, 0)["sft.jsonl"]:
        total = numbers(row)[0]
        for before, term, after in steps(row):
            assert before == total
            large_carry = term >= 8 and before % 10 + term >= 10
            assert after in ((before + term, before + term - 10) if large_carry else (before + term,))
            carries, forgotten = carries + large_carry, forgotten + (after < before + term)
            total = after
        assert row["answer"] == sum(numbers(row))
    assert 0.67 < forgotten / carries < 0.73


def test_no_problem_is_in_two_files():
    files = running_totals.generate(2000, 1000, 400, 200)
    names = ("sft.jsonl", "problems.jsonl", "heldout.jsonl", "problems_heldout.jsonl")
    assert [len(files[name]) for name in names] == [2000, 1000, 400, 200]
    assert len({row["prompt"] for rows in files.values() for row in rows}) == 3600


def test_problems_hold_no_solution():
    files = running_totals.generate(0, 20, 0, 20)
    for name in ("problems.jsonl", "problems_heldout.jsonl"):
        assert all(set(row) == {"prompt", "answer"} for row in files[name])


def test_every_problem_has_a_number_of_its_own():
    first, last = running_totals.unrank(0), running_totals.unrank(running_totals.PROBLEMS - 1)
    assert first == [10, 1, 1, 1, 1, 1] and last == [39, 9, 9, 9, 9, 9]
    some = range(0, running_totals.PROBLEMS, 101)
    assert len({tuple(running_totals.unrank(index)) for index in some}) == len(some)


def test_command_writes_the_same_files_again(tmp_path, capsys):
    counts = ["--train", "30", "--problems", "20", "--heldout", "10", "--heldout-pairs", "5"]
    assert running_totals.main(["--output", str(tmp_path / "data"), *counts]) == 0
    written = {p.name: [json.loads(line) for line in p.read_text().splitlines()] for p in (tmp_path / "data").iterdir()}
    assert written == running_totals.generate(30, 20, 10, 5) != running_totals.generate(30, 20, 10, 5, seed=1)
    assert "sft.jsonl: 30" in capsys.readouterr().out


@pytest.mark.parametrize("train", [-1, running_totals.PROBLEMS + 1])
def test_impossible_counts_are_one_line(tmp_path, capsys, train):
    words = ["--output", str(tmp_path / "data"), "--train", str(train), "--problems", "0", "--heldout", "0"]
    assert running_totals.main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "data").exists()
