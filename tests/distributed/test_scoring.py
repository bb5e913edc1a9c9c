"""tools/score_preferences.py: the same scores under any layout, with the settings of the run that is scored."""

from __future__ import annotations

import json
import re

import pytest

from tests.launch import TINY_MODEL, Job, train, uneven_pairs

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BETA = 0.3
SETTINGS = {**TINY_MODEL, "global_batch_size": 8, "lr": 1e-3, "lr_decay_style": "constant", "beta": BETA}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scoring")
    data = uneven_pairs(folder / "pairs.jsonl", 16)
    train({**SETTINGS, "data_path": data, "save": folder / "base", "train_iters": 1, "lr": 1e-9})
    train({**SETTINGS, "data_path": data, "save": folder / "run", "load": folder / "base", "train_iters": 4})
    return folder


def score(folder, checkpoint: str, name: str, processes: int = 1, **settings) -> tuple[str, list[dict]]:
    files = {"checkpoint": folder / checkpoint, "reference": folder / "base", "data": folder / "pairs.jsonl"}
    settings = {**files, "output": folder / f"{name}.jsonl", **settings}
    result = Job(settings, folder / f"{name}.log", processes, ["tools/score_preferences.py"]).wait()
    assert result.status == 0, result.output
    return result.output, [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_layouts_agree_and_the_runs_beta_is_used(folder):
    output, rows = score(folder, "run", "alone")
    _, sharded = score(folder, "run", "tp2", 2, tensor_model_parallel_size=2)
    base = {row["source"]: row for row in score(folder, "base", "base", beta=BETA)[1]}
    assert len(rows) == 16
    for row, other in zip(rows, sharded, strict=True):
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
