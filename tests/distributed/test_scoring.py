"""megatron-dtrpo score: the same scores under any layout, with the settings of the run that is scored."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest

from megatron_dtrpo.cli import reference as reference_verb
from megatron_dtrpo.cli import score as score_verb
from megatron_dtrpo.config.estimators import ESTIMATORS
from tests.support.launch import TINY_MODEL, flags, uneven_pairs, write_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BETA = 0.3
SETTINGS = {**TINY_MODEL, "global_batch_size": 8, "lr": 1e-3, "lr_decay_style": "constant", "beta": BETA}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    uneven_pairs(folder / "pairs.jsonl", 16)
    return folder


@pytest.fixture(scope="module", autouse=True)
def runs(folder, server):
    """A base and a run on top of it."""
    settings = {**SETTINGS, "data_path": folder / "pairs.jsonl"}
    server.train({**settings, "save": folder / "base", "train_iters": 1, "lr": 1e-9})
    server.train({**settings, "save": folder / "run", "load": folder / "base", "train_iters": 4})


def score(server, folder, checkpoint: str, name: str, processes: int = 1, **settings) -> tuple[str, list[dict]]:
    files = {"checkpoint": folder / checkpoint, "reference": folder / "base", "data": folder / "pairs.jsonl"}
    settings = {**files, "output": folder / f"{name}.jsonl", **settings}
    statuses, output = server.run(settings, folder / f"{name}.log", processes, verb="score")
    assert statuses == [0] * processes, output
    return output, [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_layouts_agree_and_the_runs_beta_is_used(server, folder):
    output, rows = score(server, folder, "run", "alone")
    virtual = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
    layouts = {"tp2": {"tensor_model_parallel_size": 2}, "cp2": {"context_parallel_size": 2}, "virtual": virtual}
    sharded = [score(server, folder, "run", name, 2, **settings)[1] for name, settings in layouts.items()]
    base = {row["source"]: row for row in score(server, folder, "base", "base", beta=BETA)[1]}
    assert len(rows) == 16
    for row, *others in zip(rows, *sharded, strict=True):
        for other in others:
            assert row.keys() == other.keys()
            for key in row:
                assert other[key] == (row[key] if key == "source" else pytest.approx(row[key], rel=1e-4, abs=1e-4))
    right = sum(row["rewards/margins"] > 0 for row in rows) / len(rows)
    assert float(re.search(r"reward accuracy +([\d.]+)", output)[1]) == pytest.approx(right, abs=1e-4)
    # The base is its own reference: every reward is a tie.
    assert all(row["rewards/margins"] == 0 for row in base.values())
    for row in rows:
        gain = row["logps/chosen"] - base[row["source"]]["logps/chosen"]
        assert row["rewards/chosen"] == pytest.approx(BETA * gain, abs=1e-9)


@pytest.fixture
def tool(monkeypatch):
    """(verb, settings): runs its command line in this process."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)

    def run(name: str, settings: dict) -> int:
        return {"score": score_verb, "reference": reference_verb}[name].main(flags(settings))

    return run


def recorded_pairs(path, count: int):
    """Pairs of random ids, decoded from left to right, two tokens a step but for the first of a block."""
    rng = random.Random(3)
    rows = []
    for _ in range(count):
        row = {"prompt_ids": [rng.randrange(256) for _ in range(rng.randint(1, 20))]}
        for name in ("chosen", "rejected"):
            places = range(len(row["prompt_ids"]), len(row["prompt_ids"]) + rng.randint(2, 40))
            row[f"{name}_ids"] = [rng.randrange(256) for _ in places]
            row[f"{name}_steps"] = [2 * p - p % 2 if p % 8 else 2 * p - 1 for p in places]
            row[f"{name}_discarded"] = []
        rows.append(row)
    return write_lines(path, rows)


@pytest.mark.parametrize("estimator", ["dtrpo", "elbo", "vrpo", "mean_field", "trajectory", "exact_trajectory"])
def test_every_estimator_scores(folder, tool, tmp_path, capfd, estimator):
    """The run's rewards are its own scores less those that `megatron-dtrpo reference` finds for the base, pair by pair;
    and the base against itself is a tie, unless its noise is drawn twice."""
    data = recorded_pairs(tmp_path / "recorded.jsonl", 10)
    views = 3 if ESTIMATORS[estimator].is_random else 1
    common = {"estimator": estimator, "num_views": views, "beta": BETA}
    files = {"reference": folder / "base", "data": data}
    rows = {}
    for name in ("run", "base"):
        output = {"checkpoint": folder / name, "output": tmp_path / f"{name}.jsonl"}
        assert tool("score", {**files, **common, **output}) == 0
        rows[name] = [json.loads(line) for line in output["output"].read_text().splitlines()]
        printed = capfd.readouterr().out
        for line in ("reward accuracy", "reward margin"):
            assert re.search(rf"^{line} +-?[\d.]+ \[-?[\d.]+, -?[\d.]+\]$", printed, re.MULTILINE), printed
    scores = tmp_path / "scores"
    settings = {**SETTINGS, **common, "load": folder / "base", "data_path": data, "global_batch_size": 10}
    assert tool("reference", {**settings, "num_epochs": 1, "output": scores}) == 0
    base = np.load(scores / "scores.npy")[0]
    assert len(rows["run"]) == len(base) == 10
    for row, reference in zip(rows["run"], base.tolist(), strict=True):
        for name, score in zip(("chosen", "rejected"), reference, strict=True):
            wanted = BETA * (row[f"logps/{name}"] - score)
            assert row[f"rewards/{name}"] == pytest.approx(wanted, abs=1e-3)
            assert abs(row[f"rewards/{name}"]) > 1e-9
    ties = [row["rewards/margins"] == 0 for row in rows["base"]]
    assert not any(ties) if estimator == "elbo" else all(ties)


@pytest.mark.parametrize("estimator", ["dtrpo", "trajectory", "exact_trajectory"])
def test_what_is_biased_is_refused(folder, tool, tmp_path, capfd, estimator):
    words = {"estimator": estimator, "block_start": "noisy", "num_views": 1}
    capfd.readouterr()
    assert tool("score", {"checkpoint": folder / "run", "data": folder / "pairs.jsonl", **words}) == 2
    training = {**SETTINGS, "num_epochs": 1, "load": folder / "run", "data_path": folder / "pairs.jsonl"}
    assert tool("reference", {**training, **words, "output": tmp_path / "scores"}) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(f"estimator {estimator} with block_start noisy is biased" in line for line in lines)


def test_trajectory_needs_recorded_decodings(folder, tool, capfd):
    files = {"checkpoint": folder / "run", "data": folder / "pairs.jsonl"}
    capfd.readouterr()
    assert tool("score", {**files, "estimator": "trajectory"}) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "pairs.jsonl:1: has no chosen_steps and rejected_steps, which estimator trajectory needs" in line


def test_a_reference_that_was_asked_for_must_be_there(folder, tool, capfd):
    files = {"checkpoint": folder / "run", "data": folder / "pairs.jsonl", "reference": folder / "nowhere"}
    capfd.readouterr()
    assert tool("score", files) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "nowhere: no such folder" in line
