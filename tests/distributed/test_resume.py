"""A run that is killed, or asked to stop, goes on from its last checkpoint as if nothing had happened."""

from __future__ import annotations

import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.support.launch import (
    TINY_MODEL,
    ForkServer,
    Job,
    Result,
    disagreements,
    latest_iteration,
    read_metrics,
    uneven_pairs,
)

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEPS, INTERVAL = 24, 5
SETTINGS = {
    **TINY_MODEL,
    "seq_length": 1200,
    "global_batch_size": 8,
    "num_views": 2,
    "train_iters": STEPS,
    "save_interval": INTERVAL,
    "lr": 1e-3,
}
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}

# Dies when the folder of iteration 10 is complete but for its name; the guard is for the processes that a save spawns.
KILLED_WHILE_SAVING = """
import os, signal, sys
from megatron_dtrpo.cli import train

def rename(source, target, original=os.rename):
    if str(target).endswith("iter_0000010"):
        os.kill(os.getpid(), signal.SIGKILL)
    original(source, target)

if __name__ == "__main__":
    os.rename = rename
    sys.exit(train.main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    uneven_pairs(folder / "pairs.jsonl", 20)
    return folder


def settings_of(save: Path, **others) -> dict:
    return {**SETTINGS, **others, "data_path": save.parent / "pairs.jsonl", "save": save}


@pytest.fixture(scope="module")
def uninterrupted(folder, server) -> list[dict]:
    return server.train(settings_of(folder / "uninterrupted"))


def start(save: Path, processes: int = 1, command: list[str] | None = None, **others) -> Job:
    return Job(settings_of(save, **others), save.with_name(save.name + ".log"), processes, command)


def run(server: ForkServer, save: Path, **others) -> Result:
    log = save.with_name(save.name + ".log")
    log.unlink(missing_ok=True)
    (status,), output = server.run(settings_of(save, **others), log)
    return Result(status, output)


def done(save: Path, iteration: int) -> bool:
    metrics = save / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= iteration


def interrupt(job: Job, save: Path, iteration: int, signum: signal.Signals) -> Result:
    """Sends ``signum`` to the processes that train, once ``iteration`` steps are done, and waits for the end."""
    job.wait_until(lambda: done(save, iteration))
    for process in job.trainers():
        process.send_signal(signum)
    return job.wait()


def without_rates(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if not key.endswith("_per_second")} for row in rows]


def leave_litter(save: Path) -> None:
    """What a kill at the worst moments leaves: a checkpoint half written, a tracker half written, half a line."""
    partial = save / "iter_0000099.partial"
    partial.mkdir()
    (partial / "__0_0.distcp").write_bytes(b"half")
    (save / "latest_checkpointed_iteration.txt.partial").write_text("9")
    with (save / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 9, "consumed_sam')


@pytest.fixture(scope="module")
def killed(folder, server) -> Path:
    """The run folder of one process that SIGKILL ended two steps after the checkpoint of iteration 5."""
    save = folder / "killed"
    server.kill(settings_of(save), 1, lambda: done(save, INTERVAL + 2), 0.0)
    return save


def resume_copy(server: ForkServer, killed: Path, name: str, processes: int = 1, **others) -> tuple[int, list[dict]]:
    """Restarts a copy of a killed run; returns the iteration that it went on from and all metrics."""
    save = killed.with_name(name)
    shutil.copytree(killed, save)
    leave_litter(save)
    checkpoint = latest_iteration(save)
    return checkpoint, server.train(settings_of(save, **others), processes)


def test_killed_run_goes_on_bit_for_bit(server, killed, uninterrupted):
    checkpoint, rows = resume_copy(server, killed, "resumed")
    assert checkpoint % INTERVAL == 0
    assert f"resuming from iteration {checkpoint}" in killed.with_name("resumed.log").read_text()
    assert without_rates(rows) == without_rates(uninterrupted)  # each iteration once, from the first to the last


def test_killed_run_goes_on_under_tp2_pp2(server, killed, uninterrupted):
    _, rows = resume_copy(server, killed, "resumed_tp2_pp2", 4, **TP2_PP2)
    assert disagreements(rows, uninterrupted) == []


@pytest.fixture(scope="module")
def killed_dp2(folder, server) -> Path:
    """The same run on two data-parallel processes with the distributed optimizer."""
    save = folder / "killed_dp2"
    server.kill(settings_of(save, **SHARDED), 2, lambda: done(save, INTERVAL + 2), 0.0)
    return save


def test_killed_distributed_optimizer_goes_on_bit_for_bit(server, killed_dp2):
    before = read_metrics(killed_dp2)
    checkpoint, rows = resume_copy(server, killed_dp2, "resumed_dp2", 2, **SHARDED)
    assert without_rates(rows[: len(before)]) == without_rates(before)
    assert [row["iteration"] for row in rows] == list(range(1, STEPS + 1))


def test_killed_distributed_optimizer_goes_on_under_tp2(server, killed_dp2, uninterrupted):
    _, rows = resume_copy(server, killed_dp2, "resumed_dp2_as_tp2", 2, **SHARDED, tensor_model_parallel_size=2)
    assert disagreements(rows, uninterrupted) == []


def test_killed_while_saving(server, folder, uninterrupted):
    """The checkpoint that was being written is not there; the one before it is, and is where the run goes on."""
    script = folder / "killed_while_saving.py"
    script.write_text(KILLED_WHILE_SAVING)
    save = folder / "killed_while_saving"
    assert start(save, command=[str(script)]).wait().status == -signal.SIGKILL
    assert len(read_metrics(save)) == 10
    assert (save / "iter_0000010.partial" / "metadata.json").exists() and not (save / "iter_0000010").exists()
    assert latest_iteration(save) == 5

    rows = server.train(settings_of(save))
    assert "resuming from iteration 5" in save.with_name("killed_while_saving.log").read_text()
    assert without_rates(rows) == without_rates(uninterrupted)
    assert latest_iteration(save) == STEPS
    assert sorted(p.name for p in save.glob("iter_*")) == [f"iter_{i:07d}" for i in (5, 10, 15, 20, STEPS)]


def assert_stopped_in_order(result: Result, save: Path) -> None:
    assert result.status == 0, result.output
    rows = read_metrics(save)
    assert len(rows) < STEPS
    assert latest_iteration(save) == rows[-1]["iteration"] == len(rows)
    assert [p.name for p in save.glob("iter_*")] == [f"iter_{len(rows):07d}"]
    assert (save / f"iter_{len(rows):07d}" / "metadata.json").exists()
    assert re.search(rf"^stopped by SIGTERM after iteration {len(rows)}\b", result.output, re.MULTILINE)


def test_sigterm_saves_and_exits_0(server, folder, uninterrupted):
    save = folder / "terminated"
    result = interrupt(start(save, save_interval=100), save, 3, signal.SIGTERM)
    assert_stopped_in_order(result, save)
    rows = server.train(settings_of(save, save_interval=100))
    assert without_rates(rows) == without_rates(uninterrupted)


def test_sigterm_to_every_worker_of_torchrun(folder):
    save = folder / "terminated_tp2"
    result = interrupt(start(save, 2, save_interval=100, tensor_model_parallel_size=2), save, 3, signal.SIGTERM)
    assert_stopped_in_order(result, save)


def test_another_start_is_refused_on_resume(server, killed):
    """The starting point and the seed define the reference policy: a resumed run cannot change them in passing."""
    save = killed.with_name("another_start")
    shutil.copytree(killed, save)
    refused = (
        ({"load": killed}, "started from random weights"),
        ({"seed": 7}, "has seed 1234, not 7"),
        ({"objective": "sft"}, "has objective preference, not sft"),
        ({"seq_length": 400}, "visits another number of examples an epoch"),
    )
    for others, words in refused:
        result = run(server, save, **others)
        assert result.status == 2 and len(result.errors) == 1, result.output
        assert words in result.errors[0]


def test_finished_run_says_so_and_what_changed(server, folder, uninterrupted):
    save = folder / "finished"
    shutil.copytree(folder / "uninterrupted", save)
    result = run(server, save, lr=2e-3, attention_backend="sdpa")
    assert result.status == 0, result.output
    changed = "attention_backend auto -> sdpa, lr 0.001 -> 0.002\n"
    assert f"changed since this run's last start: {changed}" in result.output
    assert f"nothing to do: iteration {STEPS} is reached" in result.output
    assert without_rates(read_metrics(save)) == without_rates(uninterrupted)
