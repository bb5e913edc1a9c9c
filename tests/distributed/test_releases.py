"""Runs that change their release of megatron-core, or their learning rate, between two starts.

Tests of two releases need a second one: ``MEGATRON_DTRPO_OTHER_CORE`` names the folder where ``megatron`` is, e.g.
``.venv/core-0.19.2/lib/python3.11/site-packages`` as ``tests/other_core.sh`` unpacks it. Without it they skip.
"""

from __future__ import annotations

import functools
import math
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import megatron.core
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_dtrpo.checkpoint.torch_dist import read_metadata
from megatron_dtrpo.conversion.torch_dist_reader import TorchDistReader
from tests.support.launch import TINY_MODEL, ForkServer, disagreements, uneven_pairs

pytestmark = pytest.mark.distributed

OTHER_CORE = os.environ.get("MEGATRON_DTRPO_OTHER_CORE")
needs_other_core = pytest.mark.skipif(not OTHER_CORE, reason="MEGATRON_DTRPO_OTHER_CORE names no megatron-core")
BEFORE, AFTER = 2, 6  # steps before the second start, and in all
LR, OTHER_LR = 1e-3, 4e-4
SETTINGS = {**TINY_MODEL, "num_layers": 2, "seq_length": 1200, "global_batch_size": 8, "num_views": 2}
SETTINGS |= {"lr": LR, "weight_decay": 0.1, "tensorboard": False}
OPTIMIZERS = {"plain": {}, "distributed": {"use_distributed_optimizer": True}}
# What a second start may change.
CHANGED = {"lr": OTHER_LR, "min_lr": 1e-4, "train_iters": AFTER}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("releases")
    uneven_pairs(folder / "pairs.jsonl", 20)
    return folder


def settings(save: Path, optimizer: str, **changes) -> dict:
    fixed = {"data_path": save.parent / "pairs.jsonl", "save": save, "train_iters": BEFORE}
    return {**SETTINGS, **OPTIMIZERS[optimizer], **fixed, **changes}


def copy(run: Path, name: str) -> Path:
    return shutil.copytree(run, run.with_name(name))


def without_rates(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.endswith("_per_second")} for row in rows]


def tensors(run: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint, the optimizer's state included."""
    with TorchDistReader(run / f"iter_{iteration:07d}") as reader:
        return {
            key: reader.rows(key, None, 0, stored.size[0], stored.properties.dtype).clone()
            for key, stored in reader.tensors.items()
        }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def contents(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def command(server: ForkServer, verb: str, log: Path, *words) -> tuple[int, list[str]]:
    """The exit status, and the lines that begin with ``error:``."""
    (status,), output = server.run({}, log, verb=verb, arguments=[str(word) for word in words])
    return status, [line for line in output.splitlines() if line.startswith("error:")]


# One release, the one that is installed


@pytest.fixture(scope="module")
def runs(server, folder) -> dict[str, Path]:
    """A run with each optimizer, after its first start."""
    for optimizer in OPTIMIZERS:
        server.train(settings(folder / optimizer, optimizer))
    return {optimizer: folder / optimizer for optimizer in OPTIMIZERS}


@pytest.fixture(scope="module")
def resume(server, runs) -> Callable[[str], list[dict]]:
    """Its metrics after a second start with another learning rate."""

    @functools.cache
    def metrics(optimizer: str) -> list[dict]:
        return server.train(settings(copy(runs[optimizer], f"{optimizer} on"), optimizer, **CHANGED))

    return metrics


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_follows_another_learning_rate(folder, resume, optimizer):
    lowest, rows = CHANGED["min_lr"], resume(optimizer)
    expected = [
        lowest + (OTHER_LR - lowest) * (1 + math.cos(math.pi * step / AFTER)) / 2 for step in range(BEFORE, AFTER)
    ]
    assert [row["lr"] for row in rows[BEFORE:]] == pytest.approx(expected)
    assert disagreements(rows, resume("plain")) == []
    assert "Warning" not in (folder / f"{optimizer} on.log").read_text()


def keep_plain_values_as_0_19_does(run: Path) -> None:
    """Makes the description of a checkpoint what it is where ``common.pt`` is inside the ``.distcp`` files."""
    (iteration,) = run.glob("iter_*")
    described = read_metadata(iteration)
    described.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
    (iteration / ".metadata").write_bytes(pickle.dumps(described))
    (iteration / "common.pt").unlink()


@pytest.mark.skipif(megatron.core.__version__ >= "0.19", reason="this megatron-core reads that form")
def test_every_command_names_a_checkpoint_of_a_newer_release(server, folder, runs):
    run = copy(runs["plain"], "of a newer release")
    keep_plain_values_as_0_19_does(run)
    assert_is_refused_in_one_line(server, run, folder)


def assert_is_refused_in_one_line(server: ForkServer, run: Path, folder: Path) -> None:
    """By whatever loads the checkpoint of ``run`` into a model, and nothing in it changes."""
    before, log = contents(run), folder / f"{run.name}.refused"
    resume = settings(run, "plain", train_iters=AFTER)
    load = settings(folder / f"{run.name} loaded", "plain", load=run)
    found = [server.run(job, log.with_suffix(f".{number}")) for number, job in enumerate((resume, load))]
    answers = [(status, [line for line in output.splitlines() if "error" in line]) for (status,), output in found]
    answers.append(command(server, "generate", log, "--checkpoint", run, "--prompt", "a", "--max-new-tokens", 8))
    for status, errors in answers:
        assert status == 2 and len(errors) == 1, errors
        assert re.search(r"iter_\d+: written by megatron-core 0\.19 or newer, and this is 0\.1[678]", errors[0])
    assert contents(run) == before


# Two releases


def release(core: Path) -> tuple[int, ...]:
    text = (core / "megatron/core/package_info.py").read_text()
    return tuple(int(re.search(rf"^{part} = (\d+)", text, re.M)[1]) for part in ("MAJOR", "MINOR", "PATCH"))


@pytest.fixture(scope="module")
def two(server, folder):
    """``older`` and ``newer``: a server of each release."""
    installed = Path(megatron.core.__file__).parents[2]
    other = ForkServer(folder / "other.log", OTHER_CORE)
    cores = sorted([(release(installed), 0, server), (release(Path(OTHER_CORE)), 1, other)])
    yield {name: core[-1] for name, core in zip(("older", "newer"), cores, strict=True)}
    other.close()


@pytest.fixture(scope="module")
def saved(two, folder) -> dict[str, Path]:
    """The run with the plain optimizer, by each release."""
    for name, server in two.items():
        server.train(settings(folder / name, "plain"))
    return {name: folder / name for name in two}


@needs_other_core
@pytest.mark.parametrize("changes", [{"train_iters": AFTER}, CHANGED], ids=["same rate", "another rate"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_newer_release_goes_on_bit_for_bit(two, folder, optimizer, changes):
    """Every number of the metrics file and every bit of weights and optimizer, one process and two."""
    processes = 1 if optimizer == "plain" else 2
    run = folder / f"{optimizer} {len(changes)}"
    two["older"].train(settings(run, optimizer), processes)
    rows, weights = {}, {}
    for name, server in two.items():
        end = copy(run, f"{run.name} by {name}")
        rows[name] = without_rates(server.train(settings(end, optimizer, **changes), processes))
        weights[name] = tensors(end, AFTER)
    assert len(rows["older"]) == AFTER and rows["newer"] == rows["older"]
    assert_equal(weights["newer"], weights["older"])


@needs_other_core
def test_both_releases_train_bit_for_bit_alike(saved):
    assert_equal(tensors(saved["newer"], BEFORE), tensors(saved["older"], BEFORE))


@needs_other_core
def test_an_older_release_names_the_newer_one(two, saved, folder):
    """From 0.19 on; before, both read each other's checkpoints."""
    if (saved["newer"] / f"iter_{BEFORE:07d}" / "common.pt").exists():
        two["older"].train(settings(copy(saved["newer"], "back"), "plain", train_iters=AFTER))
    else:
        assert_is_refused_in_one_line(two["older"], saved["newer"], folder)


@needs_other_core
@pytest.mark.parametrize(("first", "second"), [("older", "newer"), ("newer", "older")])
def test_the_converter_carries_a_run_over(two, saved, folder, first, second):
    """Exported and imported by either release, whoever wrote it: the same files, and the same losses from there."""
    run, losses = saved[first], []
    for name, server in two.items():
        hf, base = folder / f"{first} by {name} hf", folder / f"{first} by {name}"
        exported = ("export", "--megatron-path", run, "--hf-path", hf)
        assert command(server, "convert", folder / "convert.log", *exported) == (0, [])
        imported = ("import", "--hf-path", hf, "--megatron-path", base, "--block-size", TINY_MODEL["block_size"])
        assert command(two[second], "convert", folder / "convert.log", *imported) == (0, [])
        assert contents(hf) == contents(folder / f"{first} by older hf")
    for server, start in ((two[first], run), (two["older"], base), (two["newer"], base)):
        save = folder / f"{first} from {len(losses)}"
        losses.append(without_rates(server.train(settings(save, "plain", load=start))))
    assert losses[1] == losses[2] == losses[0]
