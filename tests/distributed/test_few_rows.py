"""Fewer rows than data-parallel processes: some of them have nothing to do, and the result is that of one process."""

from __future__ import annotations

import json

import pytest

from tests.support.launch import TINY_MODEL, disagreements, uneven_pairs, write_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("few")
    rows = [json.loads(line) for line in uneven_pairs(folder / "pairs.jsonl", 8).read_text().splitlines()]
    for count in (1, 2):
        write_lines(folder / f"{count}.jsonl", [{**row, "answer": 3} for row in rows[:count]])
    return folder


@pytest.fixture(scope="module")
def settings(folder) -> dict:
    model = {**TINY_MODEL, "init_method_std": 0.4, "tensorboard": False}
    return {**model, "data_path": folder / "pairs.jsonl", "global_batch_size": 6, "train_iters": 2, "lr": 1e-3}


@pytest.fixture(scope="module")
def base(server, folder, settings):
    server.train({**settings, "train_iters": 1, "save": folder / "base"})
    return folder / "base"


def test_decoding_one_prompt(server, folder, base, tmp_path):
    written = []
    for processes in (1, 3):
        output = tmp_path / f"{processes}.jsonl"
        words = {"checkpoint": base, "prompts": folder / "1.jsonl", "max_new_tokens": 9, "output": output}
        log = tmp_path / f"{processes}.log"
        statuses, printed = server.run(words, log, processes, timeout=120, verb="generate")
        assert statuses == [0] * processes, printed
        written.append(output.read_text())
    assert written[0] == written[1] and written[0].count("\n") == 1


def test_pairs_of_one_prompt(server, folder, base, tmp_path):
    """Random weights write nothing right: the end is the same line, about as many responses."""
    words = {"checkpoint": base, "prompts": folder / "1.jsonl", "max_new_tokens": 9, "output": tmp_path / "out"}
    statuses, printed = server.run({**words, "samples": 4}, tmp_path / "log", 3, timeout=120, verb="pairs")
    assert statuses[0] == 2 and "Traceback" not in printed, printed
    assert "error: no prompt has both a right and a wrong response (0 right, 4 wrong in all)" in printed


def test_scoring_one_pair(server, folder, base, tmp_path):
    words = {"checkpoint": base, "reference": base, "data": folder / "1.jsonl"}
    scores = []
    for processes in (1, 3):
        output = tmp_path / f"{processes}.jsonl"
        statuses, log = server.run(
            {**words, "output": output},
            tmp_path / f"{processes}.log",
            processes,
            timeout=120,
            verb="score",
        )
        assert statuses == [0] * processes, log
        scores.append(json.loads(output.read_text()))
    for key, value in scores[0].items():
        assert scores[1][key] == (value if key == "source" else pytest.approx(value, rel=1e-4, abs=1e-6))


@pytest.mark.parametrize(
    ("processes", "layout"),
    [(2, {}), (2, SHARDED), (3, SHARDED), (4, {"pipeline_model_parallel_size": 2, "global_batch_size": 6})],
    ids=["DP2", "DP2, overlapped", "DP3, overlapped", "DP2 x PP2"],
)
def test_evaluation_and_training_on_one_row(server, folder, settings, tmp_path, processes, layout):
    few = {
        **settings,
        "data_path": folder / "1.jsonl",
        "eval_data_path": folder / "1.jsonl",
        "eval_interval": 1,
        "eval_max_new_tokens": 9,
        "lr": 1e-4,  # a loss that is nearly 0 has few digits
    }
    expected = server.train({**few, "save": tmp_path / "alone"})
    rows = server.train({**few, **layout, "save": tmp_path / "run"}, processes, timeout=120)
    assert disagreements(rows, expected) == []
    evaluations, others = (
        [json.loads(line) for line in (tmp_path / name / "eval.jsonl").read_text().splitlines()]
        for name in ("run", "alone")
    )
    assert [row["iteration"] for row in evaluations] == [0, 1, 2]
    for row, other in zip(evaluations, others, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_precomputing_for_one_row(server, folder, settings, tmp_path):
    words = {**settings, "data_path": folder / "1.jsonl", "global_batch_size": 3, "output": tmp_path / "scores"}
    statuses, log = server.run(words, tmp_path / "log", 3, timeout=120, verb="reference")
    assert statuses == [0] * 3 and (tmp_path / "scores" / "scores.npy").exists(), log
