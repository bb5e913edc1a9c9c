"""The row of the paper's benchmarks: which numbers of the harness are in it, and what a second run leaves as it is."""

from __future__ import annotations

import pytest

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.evaluation.table import COLUMNS, NOTHING, cells_of, unread, with_row

RESULTS = {
    "results": {
        "gsm8k": {"exact_match,strict-match": 0.5, "exact_match,flexible-extract": 0.8125, "alias": "gsm8k"},
        "minerva_math": {"exact_match,none": 0.4, "alias": "minerva_math"},
        "minerva_math_algebra": {"exact_match,none": 0.9},
        "humaneval_plus": {"pass@1,create_test": 0.0},
        "ifeval": {"prompt_level_strict_acc,none": 0.61, "inst_level_strict_acc,none": 0.7},
        "mmlu": {"acc,none": 0.3},
    },
    "efficiency": {"completions/tokens_per_pass": 2.345},
}


def test_numbers_of_the_harness_by_column():
    found = {"GSM8K": "81.2", "MATH": "40.0", "HumanEval+": "0.0", "IFEval": "61.0", "tokens per pass": "2.35"}
    found["tokens per pass"] = cells_of(RESULTS)["tokens per pass"]
    assert cells_of(RESULTS) == found and found["tokens per pass"] in ("2.35", "2.34")
    assert cells_of({"results": {}}) == {}
    other = {"results": {"mmlu": {"acc,none": 0.3}, "gsm8k": {"exact_match,none": 0.4}}}
    assert cells_of({**RESULTS, **other}) == {}  # tokens per pass are those of the row's tasks
    (line,) = unread({**RESULTS, **other})
    assert line.startswith("gsm8k has no exact_match,flexible-extract or ") and "GSM8K" in line
    assert unread(RESULTS) == []


def test_a_part_or_other_problems_fill_no_column():
    score = {"exact_match,flexible-extract": 0.5, "exact_match,none": 0.5, "prompt_level_strict_acc,none": 0.5}
    for name in ("minerva_math_algebra", "gsm8k_platinum", "gsm8k_platinum_cot", "ifeval_es"):
        assert cells_of({"results": {name: score}}) == {}, name
    assert cells_of({"results": {"gsm8k_cot": score, "gsm8k_platinum": score}}) == {"GSM8K": "50.0"}


def test_columns_are_the_papers():
    assert COLUMNS[1:-1] == tuple(
        "GPQA,GSM8K,MATH,LiveCodeBench v6,MBPP+,HumanEval+,IFEval,Arena-Hard v2,MT-Bench".split(",")
    )


def test_a_second_run_fills_its_own_cells_only():
    once = with_row("", "run", cells_of(RESULTS))
    by_hand = once.replace(f"61.0 | {NOTHING} | {NOTHING}", "61.0 | 33.3 | 7.1")
    other = with_row(by_hand, "base|x", {"GPQA": "25.0"})
    twice = with_row(other, "run", {"GPQA": "30.1", "GSM8K": "82.0"})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in twice.splitlines()]
    assert [row[0] for row in rows] == ["model", "---", "run", "base/x"] and {len(row) for row in rows} == {11}
    row = dict(zip(COLUMNS, rows[2], strict=True))
    assert (row["GPQA"], row["GSM8K"], row["MATH"], row["Arena-Hard v2"], row["MT-Bench"]) == (
        "30.1",
        "82.0",
        "40.0",
        "33.3",
        "7.1",
    )
    assert rows[3][1:3] == ["25.0", NOTHING]


@pytest.mark.parametrize("text", ["# a page\n", "| model | x |\n|---|---|\n"])
def test_another_table_is_left_alone(text):
    with pytest.raises(UserError, match="table.md: its first line is not that of this table"):
        with_row(text, "run", {}, "table.md")
