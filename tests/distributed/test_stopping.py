"""SIGTERM and SIGUSR1 at any moment: one line, status 0, nothing half-written, and the run goes on as if undisturbed.

A signal reaches the processes at different moments, or some of them only: whoever has it, all stop, at the same place.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from megatron_dtrpo.checkpoint.folder import hold_folder
from megatron_dtrpo.runtime import versions
from tests.support.launch import TINY_MODEL, Job, latest_iteration, read_metrics, uneven_pairs, write_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

FIRST = "before the first step; start the same command again"
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    rows = [json.loads(line) for line in uneven_pairs(folder / "pairs.jsonl", 16).read_text().splitlines()]
    write_lines(folder / "heldout.jsonl", [{**row, "answer": 3} for row in rows[:4]])
    return folder


@pytest.fixture(scope="module")
def settings(folder) -> dict:
    return {
        **TINY_MODEL,
        "init_method_std": 0.4,
        "data_path": folder / "pairs.jsonl",
        "eval_data_path": folder / "heldout.jsonl",
        "eval_interval": 2,
        "eval_max_new_tokens": 40,
        "eval_threshold": 1.0,
        "global_batch_size": 4,
        "train_iters": STEPS,
        "save_interval": 3,
        "lr": 1e-3,
    }


def lines(save: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in (save / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.endswith("_per_second")} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(server, folder, settings):
    save = folder / "undisturbed"
    server.train({**settings, "save": save}, 2)
    return save


JOIN = "megatron_dtrpo.runtime.objects:open_channel"
TOKENIZE = "megatron_dtrpo.data.token_store:_record_batches"
BUILD = "megatron_dtrpo.training.engine:Engine.starting"
STEP = "megatron_dtrpo.training.trainer:Trainer._step"
OBJECTIVE = "megatron_dtrpo.evaluation.periodic:PeriodicEvaluation._objective"
ROUND = "megatron_dtrpo.inference.decoder:BlockDecoder._round"
SAVE = "megatron.core.dist_checkpointing:save"

MOMENTS = {
    "while joining, one": (JOIN, 1, [1], None),
    "while tokenizing": (TOKENIZE, 2, [0], None),
    "while the model is built, all": (BUILD, 1, [0, 1], None),
    "in the first evaluation": (OBJECTIVE, 1, [1], None),
    "in the first decoding, one": (ROUND, 1, [1], None),
    "in step 2, all": (STEP, 2, [0, 1], 2),
    "in the evaluation after it": (OBJECTIVE, 2, [0], 2),
    "in a save, all": (SAVE, 1, [0, 1], 4),
    "in a save, one": (SAVE, 1, [1], 4),
}


@pytest.mark.parametrize(("before", "call", "ranks", "reached"), MOMENTS.values(), ids=MOMENTS)
def test_every_moment(server, settings, undisturbed, tmp_path, before, call, ranks, reached):
    number = "SIGTERM" if call == 1 else "SIGUSR1"
    save = tmp_path / "run"
    statuses, output = server.run(
        {**settings, "save": save}, tmp_path / "log", 2, timeout=120, events=[[before, call, number, ranks]]
    )
    assert statuses == [0, 0], output
    (line,) = [line for line in output.splitlines() if line.startswith("stopped by ")]
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob(".building-*"))
    if reached is None:
        assert line in (f"stopped by {number} {FIRST}", f"stopped by a signal to another process {FIRST}")
        assert not list(save.glob("iter_*"))
        return
    assert line.endswith(f"after iteration {reached}; the checkpoint is complete")
    assert latest_iteration(save) == reached == len(read_metrics(save))
    server.train({**settings, "save": save}, 2)
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert lines(save, name) == lines(undisturbed, name)


def blocks(process, number: signal.Signals) -> bool:
    """Whether the process has come so far as to block the signal."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
    return bool(mask >> (number - 1) & 1)


# A trainer whose import of torch waits for the file: signals come before, however slow the machine is.
LATE_TORCH = """
import os, sys, time

class Wait:
    def find_spec(name, path=None, target=None):
        while name == "torch" and not os.path.exists({go!r}):
            time.sleep(0.01)

if "megatron_dtrpo" in sys.orig_argv and "torch.distributed.run" not in sys.orig_argv:
    sys.meta_path.insert(0, Wait)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_while_importing(settings, tmp_path, number, monkeypatch):
    """Under torchrun, to each process before torch is imported."""
    save = tmp_path / "run"
    (tmp_path / "sitecustomize.py").write_text(LATE_TORCH.format(go=str(tmp_path / "go")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    job = Job({**settings, "save": save}, tmp_path / "log", 2)
    job.wait_until(lambda: len(job.trainers()) == 2)
    for process in job.trainers():
        job.wait_until(lambda process=process: blocks(process, number))
        process.send_signal(number)
        assert not any("libtorch_cpu" in m.path for m in process.memory_maps()), "torch is imported already"
    (tmp_path / "go").touch()
    result = job.wait(60)
    assert result.status == 0, result.output
    assert result.output.count(f"stopped by {number.name} {FIRST}") == 1 and not list(save.glob("*"))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["save", "async-save"])
def test_processes_that_a_save_starts_outlive_the_signal(server, settings, tmp_path, asynchronous):
    """Launchers signal whole process groups. A checkpoint's writers are among them: they finish, and are no request."""
    if not asynchronous and versions.save_options():
        pytest.skip("from 0.19 on a save that is waited for is written by threads of the run itself")
    write = "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.write_preloaded_data"
    events = [[write, 1, number, [0, 1]] for number in ("SIGTERM", "SIGUSR1")]
    save = tmp_path / "run"
    statuses, output = server.run(
        {**settings, "async_save": asynchronous, "save": save}, tmp_path / "log", 2, timeout=120, events=events
    )
    assert statuses == [0, 0] and "stopped by" not in output, output
    assert latest_iteration(save) == STEPS and len(list(save.glob("iter_*"))) == 2


def test_a_second_run_in_one_folder_is_refused(server, settings, tmp_path):
    with hold_folder(tmp_path / "run"):
        statuses, output = server.run({**settings, "save": tmp_path / "run"}, tmp_path / "log", 2, timeout=120)
        assert statuses == [2, 2]
        assert output.count("run: another run is writing there; wait for its end, or give another folder") == 1, output
        assert not list((tmp_path / "run").iterdir())
