"""The comparison's statistics against numbers made by hand, and by simulation from the model that they assume."""

from __future__ import annotations

import argparse
import json
import math
import random

import pytest

from tests.support.launch import write_lines

compare = pytest.importorskip("compare_estimators")
online = pytest.importorskip("compare_online")


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


def write_run(folder, evaluations, metrics, **files):
    folder.mkdir(parents=True)
    write_lines(folder / "eval.jsonl", [{"iteration": i, "eval/exact_match": match} for i, match in evaluations])
    write_lines(folder / "metrics.jsonl", metrics)
    for name, content in files.items():
        (folder / name.replace("_yaml", ".yaml").replace("_json", ".json")).write_text(json.dumps(content))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Options of a comparison whose training processes are those of this test: they only cost a second."""
    monkeypatch.setattr(online, "command", lambda *words: 1.0)
    files = dict.fromkeys(("checkpoint", "prompts", "problems", "gradient", "dtrpo"), tmp_path / "file")
    return argparse.Namespace(**files, output=tmp_path, seeds=[1, 2], group_size=4, iterations=2, epochs=1)


def test_price_of_policy_gradient(runs):
    """Groups without spread were decoded too; an iteration of one group makes one step, one of none no step."""
    rows = [(3, 1, 5.0), (1, 4, 6.0), (0, 2, 7.0)]
    metrics = [{"groups/trained": t, "groups/dropped": d, "response/length": length} for t, d, length in rows]
    save = runs.output / "run"
    write_run(save, [(2, 0.5), (0, 0.25), (3, 0.75)], metrics, run_config_yaml={"updates_per_rollout": 2})
    found = online.train_gradient(runs, runs.output, 1)
    assert (found["answers"], found["tokens"], found["steps"]) == (16 + 20 + 8, 80 + 120 + 56, 2 + 1 + 0)
    assert found["curve"] == [(0, 0.25), (200, 0.5), (256, 0.75)]


def test_price_of_rounds(runs):
    for number, tokens, before, after in ((1, 30, 0.2, 0.3), (2, 50, 0.3, 0.5)):
        measured = {"answers": 8, "tokens": tokens, "pairs": number}
        save = runs.output / "run" / f"round-{number}"
        write_run(save, [(0, before), (number, after)], [{}] * number, answers_json=measured)
    found = online.train_rounds(runs, runs.output, 1, 2, [], 2)
    assert found["curve"] == [(0, 0.2), (30, 0.3), (80, 0.5)]
    assert [found[key] for key in ("answers", "tokens", "pairs", "steps", "CPU s")] == [16, 80, 3, 3, 1.0]


def test_table_and_plot_of_the_online_comparison(runs):
    sft = {"right": [0.0, 0.0, 1.0, 0.0]}
    price = {"answers": [1000, 3000], "tokens": [9000, 11000], "steps": [4, 6], "CPU s": [1.0, 2.0]}
    curve = [[(0, 0.25), (9000, 0.75)], [(0, 0.25), (11000, 0.75)]]
    gradient = {"right": [[1.0, 0.0, 1.0, 1.0]] * 2, "pairs": [None, None], "curve": curve, **price}
    rounds = {"right": [[1.0, 0.0, 1.0, 0.0]] * 2, "pairs": [10, 20], "curve": curve, **price}
    results = {online.GRADIENT: gradient, "dTRPO, 1 round": rounds}
    lines = online.table(sft, results).splitlines()
    assert lines[0].count("|") == lines[2].count("|") == lines[3].count("|") == 10
    assert lines[2].startswith("| SFT | 0.250 ± 0.490 | |")
    assert lines[3] == "| policy gradient | 0.750 ± 0.490 | +0.500 ± 0.566 |  | 2.0k | 10.0k |  | 5 | 2 |"
    assert (
        lines[4] == "| dTRPO, 1 round | 0.500 ± 0.566 | +0.250 ± 0.490 | -0.250 ± 0.490 | 2.0k | 10.0k | 15 | 5 | 2 |"
    )
    online.plot(sft, results, runs.output / "plot.png")
    assert 5_000 < (runs.output / "plot.png").stat().st_size < 300_000
