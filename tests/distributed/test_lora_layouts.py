"""Adapters beside a block-diffusion model: every objective, with dropout, has the numbers of one process under every
layout; and a run goes on under another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dtrpo.checkpoint.iterations import iteration_folder
from megatron_dtrpo.checkpoint.torch_dist import read_metadata
from tests.distributed.test_invariance import PP2, PREFERENCE, RECOMPUTE, SHARDED, TIED, TP2
from tests.distributed.test_online import ONLINE, compared
from tests.support.launch import Layout, disagreements, uneven_pairs, write_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SP, CP2 = {"sequence_parallel": True}, {"context_parallel_size": 2}
OVERLAPPED = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
VIRTUAL = {**PP2, "num_virtual_stages_per_pipeline_rank": 2}
LORA = {"lora_rank": 4, "lora_alpha": 8.0, "lora_dropout": 0.3, "lr": 1e-2, "train_iters": 3}
LORA |= {"lr_decay_style": "constant", "min_lr": 0.0}  # whatever the number of steps
SOME = {"lora_target_modules": ["linear_qkv", "layers.[13].mlp.linear_fc?"], "use_rslora": True}
SFT = {"objective": "sft", "num_views": 1, "steps_per_block": 8, "data_path": "sft.jsonl"}

LAYOUTS = {
    "one process": Layout(1, same_as=None),
    "TP2 SP": Layout(2, {**TP2, **SP, **RECOMPUTE}),
    "CP2": Layout(2, {**CP2, "seq_length": 2048}),
    "DP2, overlapped": Layout(2, {**OVERLAPPED, "seq_length": 1000, "micro_batch_size": 1}),
    "virtual stages": Layout(2, {**VIRTUAL, **RECOMPUTE}),
    "some, tied": Layout(1, {**SOME, **TIED, "load": "tied"}, None),
    "some, tied, PP2": Layout(2, {**SOME, **TIED, **PP2, "load": "tied"}, "some, tied"),
    "sft": Layout(1, SFT, None),
    "sft, TP2": Layout(2, {**SFT, **TP2}, "sft"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    uneven_pairs(folder / "pairs.jsonl", 20)
    rows = [{"prompt": "ab" * n, "completion": "some words " * (n % 5 + 1)} for n in range(1, 12)]
    write_lines(folder / "sft.jsonl", rows)
    write_lines(folder / "prompts.jsonl", [{"prompt": "question " + "abc"[n % 3] * (3 * n)} for n in range(9)])
    return folder


@pytest.fixture(scope="module")
def train(folder, server) -> Callable:
    """Trains beside the weights of a run, which is made first."""
    for name, settings in (("base", {}), ("tied", TIED)):
        run = {**PREFERENCE, **settings, "train_iters": 1, "data_path": folder / "pairs.jsonl", "save": folder / name}
        server.train(run)

    def run(settings: dict, processes: int) -> list[dict]:
        files = {key: folder / settings[key] for key in ("load", "data_path") if key in settings}
        return server.train({**settings, **files}, processes)

    return run


@pytest.fixture(scope="module")
def metrics_of(folder, train) -> Callable[[str], list[dict]]:
    done: dict[str, list[dict]] = {}

    def metrics(name: str) -> list[dict]:
        if name not in done:
            layout = LAYOUTS[name]
            save = folder / "runs" / name.replace(" ", "_").replace(",", "")
            save.parent.mkdir(exist_ok=True)
            shared = {**PREFERENCE, **LORA, "load": "base", "data_path": "pairs.jsonl"}
            done[name] = train({**shared, **layout.settings, "save": save}, layout.processes)
        return done[name]

    return metrics


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.same_as])
def test_metrics_do_not_depend_on_the_layout(metrics_of, name):
    rows = metrics_of(name)
    assert disagreements(rows, metrics_of(LAYOUTS[name].same_as)) == []
    assert all(row["grad_norm"] > 1e-4 for row in rows) and rows[-1]["loss"] != rows[0]["loss"]


def test_at_step_1_policy_and_reference_are_one(metrics_of):
    """Also where the first step drops out a part of what the adapters see."""
    for name in ("one process", "TP2 SP", "CP2", "some, tied, PP2"):
        first, *_, last = metrics_of(name)
        assert first["loss"] == math.log(2) and first["rewards/margins"] == first["rewards/chosen"] == 0.0
        assert last["rewards/margins"] != 0.0


def test_a_checkpoint_holds_adapters_and_goes_on_under_another_layout(folder, metrics_of, train):
    metrics_of("one process")
    shared = {**PREFERENCE, **LORA, **SHARDED, "load": "base", "data_path": "pairs.jsonl", "save": folder / "moves"}
    train({**shared, **TP2, **SP, "train_iters": 2}, 2)
    metadata = read_metadata(iteration_folder(folder / "moves", 2)).state_dict_metadata
    tensors = {key: each for key, each in metadata.items() if hasattr(each, "size")}
    assert tensors and all("_adapter.lora_" in key for key in tensors)
    rows = train({**shared, **PP2}, 2)
    assert disagreements(rows, metrics_of("one process")) == []


def test_policy_gradient_trains_adapters(folder, train):
    lora = {**LORA, "lora_dropout": 0.0, "train_iters": 2}
    shared = {**ONLINE, **lora, "rollout_threshold": 0.006, "load": "base", "data_path": "prompts.jsonl"}
    layouts = {"one": (1, {}), "tp2_sp": (2, {**TP2, **SP})}
    rows = {n: train({**shared, **own, "save": folder / f"online_{n}"}, p) for n, (p, own) in layouts.items()}
    for name, found in rows.items():
        assert disagreements(compared(found), compared(rows["one"])) == [], name
    first, *_, last = rows["one"]
    assert abs(first["kl"]) < 1e-12 and last["kl"] > 1e-7
    assert all(
        row["rollout/logp_gap_max"] < 1e-4 and row["ratio"] == pytest.approx(1, abs=1e-12) for row in rows["one"]
    )
