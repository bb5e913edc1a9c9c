"""The comparison's statistics against numbers made by hand, and by simulation from the model that they assume."""

from __future__ import annotations

import math
import random

import pytest

compare = pytest.importorskip("compare_estimators")


def test_rows_of_the_table():
    table = compare.rows(["dtrpo", "mean_field"], ["0", "0.5"])
    assert list(table) == ["chosen alone", "dtrpo", "dtrpo + 0.5", "mean_field", "mean_field + 0.5"]
    assert table["chosen alone"] == ["--estimator", "dtrpo", "--loss-type", "sft"]
    anchor = ["--loss-type", "sigmoid", "sft", "--loss-weights", "1", "0.5"]
    assert table["mean_field + 0.5"] == ["--estimator", "mean_field", "--num-views", "1", *anchor]


def test_interval_of_one_seed_is_over_problems():
    mean, half = compare.interval([[1.0, 0.0, 1.0, 1.0]])
    assert mean == 0.75
    assert half == pytest.approx(1.96 * math.sqrt(0.25 / 4))  # variance (3 * 1/16 + 9/16) / 3


def test_interval_where_only_seeds_differ():
    """Seeds' means 0.2, 0.4, 0.6: variance 0.04, and Student's 97.5% point of two degrees of freedom."""
    mean, half = compare.interval([[0.2] * 5, [0.4] * 5, [0.6] * 5])
    assert (mean, half) == (pytest.approx(0.4), pytest.approx(4.303 * math.sqrt(0.04 / 3)))


def test_interval_where_only_problems_differ():
    mean, half = compare.interval([[1.0, 0.0, 1.0, 1.0]] * 3)
    assert (mean, half) == (0.75, pytest.approx(1.96 * math.sqrt(0.25 / 4)))


def test_interval_by_hand_where_both_and_neither_differ():
    """[[1, 0], [0, 0], [1, 1]]: seeds 1/2, 0, 1 of variance 1/4; problems 2/3, 1/3 of variance 1/18; what is left is
    +1/3, -1/3; -1/6, +1/6; -1/6, +1/6, whose squares sum to 1/3, over 2 degrees of freedom."""
    mean, half = compare.interval([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    problems = max(0.0, (1 / 18) / 2 - (1 / 6) / 6)
    assert mean == pytest.approx(0.5)
    assert half == pytest.approx(math.hypot(4.303 * math.sqrt(0.25 / 3), 1.96 * math.sqrt(problems)))


def test_interval_covers_the_truth():
    """Of seeds and problems drawn anew, with known effects, about 95% of the intervals hold the mean; not all do."""
    rng = random.Random(5)
    covered = 0
    for _ in range(400):
        problems = [rng.gauss(0, 1) for _ in range(20)]
        matrix = []
        for _ in range(3):
            seed = rng.gauss(0, 0.2)
            matrix.append([seed + problem + rng.gauss(0, 0.5) for problem in problems])
        mean, half = compare.interval(matrix)
        covered += abs(mean) <= half
    assert 0.92 <= covered / 400 <= 0.995


def test_difference_is_by_problem_and_seed():
    assert compare.difference([[1.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [1.0, 0.0]]) == [[1.0, 0.0], [0.0, 1.0]]


def test_contrasts_are_to_no_anchor_and_to_the_first_estimator():
    options = compare.parse(
        ["--checkpoint=.", "--pairs=.", "--heldout-pairs=.", "--problems=.", "--output=.", "--config=."]
        + ["--estimators", "dtrpo", "elbo", "--anchors", "0", "0.5"]
    )[0]
    right = {"dtrpo": [[0.0, 0.0]], "dtrpo + 0.5": [[1.0, 1.0]], "elbo": [[1.0, 0.0]], "elbo + 0.5": [[1.0, 1.0]]}
    lines = compare.contrasts(options, {row: {"right": values} for row, values in right.items()}).splitlines()[2:]
    assert lines == [
        "| dtrpo + 0.5 | dtrpo | +1.000 ± 0.000 |",
        "| elbo + 0.5 | elbo | +0.500 ± 0.980 |",
        "| elbo | dtrpo | +0.500 ± 0.980 |",
        "| elbo + 0.5 | dtrpo + 0.5 | +0.000 ± 0.000 |",
    ]


def test_accuracy_counts_a_tie_half():
    assert compare.accuracy({"chosen": [1.0, 0.5, -1.0, 2.0], "rejected": [0.0, 0.5, 0.0, 3.0]}) == 0.375


def test_deviation_is_of_a_pair_and_at_equal_cost():
    """Pairs 1, 3 and 10, 10: deviations sqrt 2 and 0; four times the tokens cost a factor of two."""
    draws = [[1.0, 10.0], [3.0, 10.0]]
    assert compare.deviation(draws, 1.0) == pytest.approx(math.sqrt(2) / 2)
    assert compare.deviation(draws, 4.0) == pytest.approx(math.sqrt(2))


def test_tokens_of_a_pair():
    """300 tokens and 2 pairs a second, then 100 and 2."""
    fast = {"tokens_per_second": 300.0, "pairs_per_second": 2.0}
    slow = {"tokens_per_second": 100.0, "pairs_per_second": 2.0}
    assert compare.tokens_per_pair([fast, slow]) == 100


def test_curve_is_in_nats_and_smoothed():
    """beta 0.5: a reward of 1 is 2 nats; a mean over runs, then over up to five steps."""
    runs = [[{"rewards/chosen": value} for value in values] for values in ([0, 1, 2, 3], [0, 3, 4, 5])]
    assert compare.curve(runs, "chosen", 0.5) == pytest.approx([10 / 3, 4.5, 4.5, 6.0])


def test_a_part_is_made_once(tmp_path):
    calls = []
    for _ in range(2):
        assert compare.once(tmp_path / "part.json", lambda: calls.append(1) or {"value": 1}) == {"value": 1}
    assert calls == [1]
    with pytest.raises(SystemExit):
        compare.once(tmp_path / "other.json", lambda: exit(1))
    assert [path.name for path in tmp_path.iterdir()] == ["part.json"]


def test_one_run_that_fails_is_one_line(tmp_path, capsys):
    with capsys.disabled(), pytest.raises(SystemExit, match=r"error: train ended with status 2; see .*log"):
        compare.command("train", ["--config", tmp_path / "none.yaml"], tmp_path / "log")
    assert "none.yaml" in (tmp_path / "log").read_text()
