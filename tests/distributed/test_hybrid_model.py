"""Runs on megatron-core's HybridModel, where it has one: the numbers and the checkpoints of the GPT model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_dtrpo.checkpoint.iterations import iteration_folder
from megatron_dtrpo.runtime import versions
from tests.distributed.test_invariance import PP2, PREFERENCE, RECOMPUTE, SELECTIVE, SHARDED, TP2
from tests.support.launch import disagreements, uneven_pairs, write_lines

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.slow,
    pytest.mark.skipif(not versions.has_hybrid_model(), reason="this megatron-core has no HybridModel"),
]

HYBRID = {"model_class": "hybrid"}
SETTINGS = {**PREFERENCE, "init_method_std": 0.4, "lr_decay_style": "constant", "min_lr": 0.0}
TP2_SP = {**TP2, "sequence_parallel": True}
LAYOUTS = {
    "one process": (1, {}),
    "TP2 SP": (2, {**TP2_SP, **SHARDED, **SELECTIVE}),
    "PP2 in virtual stages": (2, {**PP2, **RECOMPUTE, "num_virtual_stages_per_pipeline_rank": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    rows = [json.loads(line) for line in uneven_pairs(folder / "pairs.jsonl", 20).read_text().splitlines()]
    # Random weights write noise; what is "right" is a property that about half of all texts have.
    write_lines(folder / "heldout.jsonl", [{**row, "answer": 0} for row in rows[:8]])
    (folder / "odd_text.py").write_text("def odd(row, text):\n    return sum(map(ord, text)) % 2 == 1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        yield folder


@pytest.fixture(scope="module")
def train(folder, server):
    """(name of the run folder, processes, settings) -> metrics."""

    def run(name: str, processes: int = 1, **settings) -> list[dict]:
        files = {"data_path": folder / "pairs.jsonl", "save": folder / name.replace(" ", "_")}
        return server.train({**SETTINGS, **settings, **files}, processes)

    return run


@pytest.fixture(scope="module")
def base(train, folder) -> dict:
    """The setting that starts a run from a checkpoint of the GPT model."""
    train("base", train_iters=1)
    return {"load": folder / "base"}


@pytest.fixture(scope="module")
def evaluated(folder) -> dict:
    return {
        "eval_data_path": folder / "heldout.jsonl",
        "eval_interval": 5,
        "eval_max_new_tokens": 12,
        "eval_verifier": "odd_text:odd",
    }


@pytest.fixture(scope="module")
def expected(train, base, evaluated) -> list[dict]:
    """The GPT model's metrics."""
    return train("gpt", **base, **evaluated)


def evaluations(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "eval.jsonl").read_text().splitlines()]


def keys_of(save: Path) -> set[str]:
    from megatron_dtrpo.checkpoint.torch_dist import read_metadata

    # 0.19 numbers what it keeps besides the tensors by where that came from.
    keys = read_metadata(iteration_folder(save, PREFERENCE["train_iters"])).state_dict_metadata
    return {key for key in keys if not key.startswith("common_state/")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_from_a_gpt_checkpoint_has_the_gpt_models_numbers(train, folder, base, evaluated, expected, name):
    processes, layout = LAYOUTS[name]
    rows = train(name, processes, **HYBRID, **base, **layout, **evaluated)
    assert disagreements(rows, expected) == []
    found = evaluations(folder / name.replace(" ", "_"))
    assert found == [pytest.approx(row, rel=1e-4, abs=1e-4) for row in evaluations(folder / "gpt")]
    assert 0 < found[0]["eval/exact_match"] < 1
    if name == "one process":
        assert keys_of(folder / "one_process") == keys_of(folder / "gpt")


@pytest.mark.parametrize("name, sharded", [("ordinary optimizer", {}), ("distributed optimizer", SHARDED)])
def test_either_model_goes_on_from_the_others_checkpoint(train, base, expected, name, sharded):
    for steps, processes, layout in ((2, 1, {}), (4, 2, {**HYBRID, **TP2_SP}), (5, 1, {})):
        rows = train(name, processes, **base, **sharded, **layout, train_iters=steps)
        assert len(rows) == steps
    assert disagreements(rows, expected) == []
