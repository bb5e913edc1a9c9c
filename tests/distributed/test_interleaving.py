"""Pipeline stages cut into virtual ones: the numbers of one process, and checkpoints that anyone can go on from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.test_context_parallel import CP2, OVERLAPPED
from tests.distributed.test_invariance import MLP_ONLY, PP2, PREFERENCE, RECOMPUTE, SHARDED, TIED, TP2, Layout
from tests.support.launch import disagreements, layout_metrics, uneven_pairs

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

VIRTUAL = {**PP2, "num_virtual_stages_per_pipeline_rank": 2}
SOME_TIED = {**TIED, "trainable_modules": ["mlp", "word_embeddings"]}
CONSTANT = {"lr_decay_style": "constant", "min_lr": 0.0}  # whatever the number of steps

LAYOUTS = {
    "one process": Layout(1, same_as=None),
    "two virtual stages": Layout(2, VIRTUAL),
    "one example per micro-batch": Layout(2, {**VIRTUAL, **RECOMPUTE, "micro_batch_size": 1}),
    "TP2 SP": Layout(4, {**VIRTUAL, **TP2, "sequence_parallel": True}),
    "DP2, overlapped": Layout(4, {**VIRTUAL, **OVERLAPPED, "seq_length": 1000}),
    "MLP only": Layout(1, MLP_ONLY, None),
    "MLP only, virtual": Layout(2, {**MLP_ONLY, **VIRTUAL, **RECOMPUTE}, "MLP only"),
    "some tied": Layout(1, SOME_TIED, None),
    "some tied, virtual": Layout(2, {**SOME_TIED, **VIRTUAL}, "some tied"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interleaving")
    uneven_pairs(folder / "pairs.jsonl", 20)
    return folder


@pytest.fixture(scope="module")
def train(folder, server):
    """(name of the run folder, processes, settings) -> metrics."""

    def run(name: str, processes: int = 1, **settings) -> list[dict]:
        files = {"data_path": folder / "pairs.jsonl", "save": folder / name.replace(" ", "_").replace(",", "")}
        return server.train({**PREFERENCE, **settings, **files}, processes)

    return run


@pytest.fixture(scope="module")
def metrics_of(folder, server):
    return layout_metrics(server.train, folder, LAYOUTS, **PREFERENCE)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.same_as])
def test_metrics_do_not_depend_on_virtual_stages(metrics_of, name):
    assert disagreements(metrics_of(name), metrics_of(LAYOUTS[name].same_as)) == []


@pytest.fixture(scope="module")
def uninterrupted(train) -> list[dict]:
    return train("uninterrupted", **CONSTANT)


@pytest.mark.parametrize(
    "name, sharded, starts",
    [
        ("ordinary optimizer", {}, [(2, 4, {**VIRTUAL, **CP2}), (5, 1, {})]),
        ("distributed optimizer", SHARDED, [(2, 2, VIRTUAL), (4, 1, {}), (5, 4, {**VIRTUAL, **CP2})]),
    ],
)
def test_a_run_goes_on_with_and_without_virtual_stages(train, uninterrupted, name, sharded, starts):
    for steps, processes, layout in starts:
        rows = train(name, processes, **CONSTANT, **sharded, **layout, train_iters=steps)
        assert len(rows) == steps
    assert disagreements(rows, uninterrupted) == []
