"""What a run leaves behind does not depend on how the distributed optimizer's messages overlap with computation.

Under ``overlap_param_gather`` a process holds new values of its own share alone from the optimizer's step to the next
forward pass: whatever reads weights in between has to finish the gather first.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint
from megatron_dtrpo.conversion.torch_dist_reader import TorchDistReader
from tests.support.launch import TINY_MODEL, Job, disagreements, read_metrics, uneven_pairs, write_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, INTERVAL = 4, 2
SETTINGS = {
    **TINY_MODEL,
    "seq_length": 1200,
    "global_batch_size": 8,
    "train_iters": STEPS,
    "save_interval": INTERVAL,
    "lr": 1e-3,
    "clip_grad": 0,  # the gradient's norm is a sum over shares, whose rounding depends on the buckets
    "tensorboard": False,
    "use_distributed_optimizer": True,
}
FLAGS = ("overlap_grad_reduce", "overlap_param_gather", "bf16")
COMBINATIONS = [dict(zip(FLAGS, values, strict=True)) for values in itertools.product((False, True), repeat=3)]
ALL = dict.fromkeys(FLAGS, True)
SMALL_BUCKETS = {"ddp_bucket_size": 3000}  # so that one gather is under way while another is waited for
LAYOUTS = {
    "TP2 x DP2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2 x DP2, virtual stages, mlp only": {
        "pipeline_model_parallel_size": 2,
        "num_virtual_stages_per_pipeline_rank": 2,
        "trainable_modules": ["mlp"],
    },
}
# Trains with the optimizer's state as megatron-core itself saves it: gathered, a tensor of each parameter's shape.
AS_MEGATRON_SAVES = """
import sys
from megatron_dtrpo.cli import train
from megatron_dtrpo.training import optimizer

if __name__ == "__main__":
    optimizer.save_own_share = lambda built: None
    sys.exit(train.main())
"""


def with_small_buckets(settings: dict) -> dict:
    return settings | (SMALL_BUCKETS if settings.get("overlap_grad_reduce") else {})


def name_of(flags: dict) -> str:
    return " ".join(key for key, on in flags.items() if on) or "plain"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("overlap")
    uneven_pairs(folder / "pairs.jsonl", 20)
    return folder


@pytest.fixture(scope="module")
def train(server, folder):
    """(settings, processes) -> the run folder, finished; every run once."""

    def train(settings: dict, processes: int = 2) -> Path:
        settings = with_small_buckets(settings)
        save = folder / hashlib.sha256(repr((processes, settings)).encode()).hexdigest()[:16]
        if not save.exists():
            server.train({**SETTINGS, **settings, "data_path": folder / "pairs.jsonl", "save": save}, processes)
        return save

    return train


def tensors(save: Path, iteration: int = STEPS) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole: weights, and the optimizer's state under ``optimizer.state``."""
    reader = TorchDistReader(save / f"iter_{iteration:07d}")
    return {
        key: reader.rows(key, None, 0, about.size[0], about.properties.dtype).clone()
        for key, about in reader.tensors.items()
        if about.size
    }


def differing(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> list[str]:
    assert some.keys() == others.keys()
    return [key for key in some if not torch.equal(some[key], others[key])]


def stale(saved: dict[str, torch.Tensor]) -> list[str]:
    """Weights that are not the optimizer's main weights, rounded."""
    prefix = "optimizer.state.param."
    main = {key.removeprefix(prefix): value for key, value in saved.items() if key.startswith(prefix)}
    assert main
    return [key for key, value in main.items() if not torch.equal(saved[key], value.to(saved[key].dtype))]


def resumed_from_the_middle(train, server, save: Path, settings: dict, processes: int) -> Path:
    """A copy of a run that lost what came after its first checkpoint, run to the end again."""
    again = save.with_name(save.name + "_again")
    shutil.copytree(save, again)
    shutil.rmtree(again / f"iter_{STEPS:07d}")
    (again / "latest_checkpointed_iteration.txt").write_text(str(INTERVAL))
    settings = with_small_buckets(settings)
    server.train({**SETTINGS, **settings, "data_path": save.parent / "pairs.jsonl", "save": again}, processes)
    return again


@pytest.mark.parametrize("flags", COMBINATIONS, ids=name_of)
def test_saved_weights_are_those_of_the_optimizer(train, flags):
    save = train(flags)
    assert stale(tensors(save, INTERVAL)) == []
    assert stale(tensors(save)) == []


@pytest.mark.parametrize("flags", COMBINATIONS, ids=name_of)
def test_overlap_changes_nothing(train, flags):
    plain = {"overlap_grad_reduce": False, "overlap_param_gather": False, "bf16": flags["bf16"]}
    assert differing(tensors(train(flags)), tensors(train(plain))) == []


def test_the_export_is_the_same(train, tmp_path):
    exported = []
    for name, flags in {"plain": {"bf16": True}, "overlapped": ALL}.items():
        export_checkpoint(train(flags), tmp_path / name, ExportOptions(progress=False))
        exported.append(load_file(tmp_path / name / "model.safetensors"))
    assert differing(*exported) == []


@pytest.mark.parametrize("flags", COMBINATIONS, ids=name_of)
def test_resume_is_exact(train, server, flags):
    save = train(flags)
    assert differing(tensors(resumed_from_the_middle(train, server, save, flags, 2)), tensors(save)) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_under_other_layouts(train, server, layout):
    settings = {**LAYOUTS[layout], **ALL}
    save = train(settings, 4)
    assert stale(tensors(save)) == []
    assert differing(tensors(resumed_from_the_middle(train, server, save, settings, 4)), tensors(save)) == []


def test_what_is_evaluated_is_what_the_step_made(train, folder):
    """Held-out losses and decoded answers after the first step, with the gather overlapped and without."""
    rows = [json.loads(line) for line in uneven_pairs(folder / "heldout.jsonl", 4, seed=1).read_text().splitlines()]
    heldout = write_lines(folder / "heldout.jsonl", [{**row, "answer": 7} for row in rows])
    settings = {
        "eval_interval": 1,
        "eval_data_path": heldout,
        "eval_max_new_tokens": 10,
        "train_iters": 2,
        "bf16": True,
    }
    plain, overlapped = (train({**settings, **flags}) / "eval.jsonl" for flags in ({}, ALL))
    assert overlapped.read_text() == plain.read_text()


def test_a_checkpoint_in_megatrons_own_form_goes_on(train, server, folder):
    """Checkpoints from before each process saved its own share: written by one process, read by two."""
    script, save = folder / "as_megatron_saves.py", folder / "as_megatron_saves"
    script.write_text(AS_MEGATRON_SAVES)
    settings = {**SETTINGS, "lr_decay_style": "constant", "data_path": folder / "pairs.jsonl", "save": save}
    result = Job({**settings, "train_iters": INTERVAL}, folder / "as_megatron.log", command=[str(script)]).wait()
    assert result.status == 0, result.output
    rows = server.train(settings, 2)
    assert disagreements(rows, read_metrics(train({"lr_decay_style": "constant"}))) == []


def without_rates(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.endswith("_per_second")}


def said(save: Path) -> list[str]:
    """The lines of a run about its checkpoints."""
    log = save.with_name(save.name + ".log").read_text()
    return [line for line in log.splitlines() if line.startswith(("saved ", "deleted ")) and "iter_" in line]


def test_an_asynchronous_checkpoint_is_the_same_and_old_ones_go(train, folder):
    """The run trains on while a checkpoint is written; the last one and its tracker are there at the end."""
    often = {**ALL, "save_interval": 1}
    save = train({**often, "async_save": True, "keep_last": 2})
    assert differing(tensors(save, 3), tensors(train(often), 3)) == []
    assert differing(tensors(save), tensors(train(often))) == []
    assert (save / "latest_checkpointed_iteration.txt").read_text() == str(STEPS)
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000003", "iter_0000004"]
    deleted = [f"deleted {save / 'iter_0000001'}: keep_last is 2", f"deleted {save / 'iter_0000002'}: keep_last is 2"]
    saved = [f"saved {save / f'iter_{number:07d}'}" for number in range(1, STEPS + 1)]
    assert said(save) == [*saved[:3], deleted[0], saved[3], deleted[1]]


def after_step(save: Path, step: int) -> Callable[[], bool]:
    metrics = save / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_text().count("\n") >= step


def while_saving(save: Path, step: int) -> Callable[[], bool]:
    """When a checkpoint after ``step`` is being written, and not only left over."""
    begun, trained = time.time(), after_step(save, step)
    return lambda: trained() and any(folder.stat().st_ctime > begun for folder in save.glob("iter_*.partial"))


def test_ten_kills_change_nothing(server, folder):
    """Thirty steps on four processes, killed ten times: at random steps, and while a checkpoint is being written."""
    settings = {
        **SETTINGS,
        **with_small_buckets(ALL),
        "num_layers": 2,
        "clip_grad": 1,
        "train_iters": 30,
        "save_interval": 3,
        "keep_last": 2,
        "data_path": folder / "pairs.jsonl",
    }
    undisturbed, save = folder / "undisturbed", folder / "killed"
    expected = server.train({**settings, "save_interval": 30, "save": undisturbed}, 4, timeout=240)

    rng = random.Random(14)
    for number, step in enumerate(sorted(rng.sample(range(1, 29), 10))):
        moment = while_saving(save, step) if number % 3 == 0 else after_step(save, step)
        server.kill({**settings, "save": save, "async_save": number % 2 == 1}, 4, moment, rng.uniform(0, 0.3))
    rows = server.train({**settings, "save": save}, 4, timeout=240)

    assert [without_rates(row) for row in rows] == [without_rates(row) for row in expected]
    assert differing(tensors(save, 30), tensors(undisturbed, 30)) == []
