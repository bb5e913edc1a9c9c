"""A process that fails ends its run: soon, with a status, and with a traceback that says why.

Two data-parallel processes; the server plays torchrun's part: it signals those that are left and kills them after half
a minute. None of them may need that, and no run may wait for it.
"""

from __future__ import annotations

import json
import signal

import pytest

from megatron_dtrpo.checkpoint.torch_dist import read_metadata
from tests.support.damage import flip_a_bit
from tests.support.launch import TINY_MODEL, Job, latest_iteration, uneven_pairs, write_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

STEP = "megatron_dtrpo.training.trainer:Trainer._step"
BATCHES = "megatron_dtrpo.training.trainer:Trainer._build_batches"
ROUND = "megatron_dtrpo.inference.decoder:BlockDecoder._round"
SAVE = "megatron.core.dist_checkpointing:save"
# NCCL's waits for the other processes, gloo's does not.
DESTROY = ["torch.distributed:destroy_process_group", 1, "hang", [0, 1]]

TRACEBACK = "RuntimeError: a fault of this test"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    rows = [json.loads(line) for line in uneven_pairs(folder / "pairs.jsonl", 16).read_text().splitlines()]
    write_lines(folder / "heldout.jsonl", [{**row, "answer": 3} for row in rows[:6]])
    return folder


@pytest.fixture(scope="module")
def settings(folder) -> dict:
    return {
        **TINY_MODEL,
        "data_path": folder / "pairs.jsonl",
        "global_batch_size": 4,
        "train_iters": 6,
        "save_interval": 3,
        "lr": 1e-3,
    }


def evaluated(folder) -> dict:
    return {"eval_data_path": folder / "heldout.jsonl", "eval_interval": 2, "eval_max_new_tokens": 16}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("before", "call", "kept"),
    [(STEP, 5, 3), (BATCHES, 5, 3), (ROUND, 3, None), (SAVE, 2, 3)],
    ids=["in a step", "in the thread that builds batches", "in decoding", "in a save"],
)
def test_a_fault_of_one_process_ends_all(server, folder, settings, tmp_path, before, call, kept, rank):
    files = evaluated(folder) if before == ROUND else {}
    event = [before, call, "fail", [rank]]
    statuses, output = server.run(
        {**settings, **files, "save": tmp_path / "run"}, tmp_path / "log", 2, timeout=120, events=[event, DESTROY]
    )
    assert statuses[rank] == 1 and statuses[1 - rank] not in (0, -signal.SIGKILL), output
    assert f"rank {rank}: Traceback" in output and TRACEBACK in output
    if kept:
        assert latest_iteration(tmp_path / "run") == kept


def test_a_killed_process_ends_all(server, settings, tmp_path):
    event = [STEP, 5, "SIGKILL", [1]]
    statuses, output = server.run(
        {**settings, "save": tmp_path / "run"}, tmp_path / "log", 2, timeout=120, events=[event]
    )
    assert statuses[1] == -signal.SIGKILL and statuses[0] == 1, output
    assert "rank 0: Traceback" in output  # of the collective that nobody answers


@pytest.mark.parametrize(("rank", "others"), [(0, {1, 2}), (1, {1})])
def test_a_mistake_that_one_process_meets(server, settings, tmp_path, rank, others):
    """One line, whoever it is; the others may say that they were left alone."""
    event = [STEP, 2, "refuse", [rank]]
    statuses, output = server.run(
        {**settings, "save": tmp_path / "run"}, tmp_path / "log", 2, timeout=120, events=[event]
    )
    assert statuses[rank] == 2 and statuses[1 - rank] in others, output
    assert output.count("error: a mistake of this test") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_share_of_the_optimizer_ends_all(server, settings, tmp_path, rank):
    """One bit of the values that one process wrote; each process reads another share of the file."""
    run = {**settings, "use_distributed_optimizer": True, "save": tmp_path / "run"}
    assert server.run({**run, "train_iters": 3}, tmp_path / "first", 2)[0] == [0, 0]
    folder = tmp_path / "run" / "iter_0000003"
    key, where = next(
        (index.fqn, info)
        for index, info in read_metadata(folder).storage_data.items()
        if index.fqn.startswith("optimizer.") and info.relative_path.startswith(f"__{rank}_")
    )
    flip_a_bit(folder / where.relative_path, where.offset, where.length, "archive/data/0")
    statuses, output = server.run(run, tmp_path / "log", 2)
    assert statuses == [2, 2] and "Traceback" not in output, output
    error, *others = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"{where.relative_path}: {key}: its checksum says that it is not as it was written" in error
    assert others in ([], [f"error: {folder}: another process ended while this one read it, and says why"])


def test_a_mistake_that_all_meet_is_said_once(server, settings, tmp_path):
    statuses, output = server.run({**settings, "lr": 1e30, "save": tmp_path / "run"}, tmp_path / "log", 2, timeout=120)
    assert statuses == [2, 2] and output.count("error: ") == 1, output
    assert " at iteration " in output and "Traceback" not in output


@pytest.mark.parametrize("rank", [0, 1])
def test_other_verbs_end_too(server, settings, tmp_path, folder, rank):
    run = folder / "base"
    if not run.exists():
        server.train({**settings, "train_iters": 1, "save": run}, 2)
    event = ["megatron_dtrpo.inference.decoder:BlockDecoder._round", 2, "fail", [rank]]
    words = {"checkpoint": run, "prompts": folder / "heldout.jsonl", "output": tmp_path / "out", "max_new_tokens": 9}
    for name in ("generate", "pairs"):
        statuses, output = server.run(words, tmp_path / f"{name}.log", 2, timeout=120, events=[event], verb=name)
        assert statuses[rank] == 1 and statuses[1 - rank] not in (0, -signal.SIGKILL), output
        assert TRACEBACK in output and not (tmp_path / "out").exists()


SCRIPT = """
import os, sys
from megatron_dtrpo.cli import train

if __name__ == "__main__":
    from tests.support.fork_server import ACTIONS, _before
    from megatron_dtrpo.runtime import initialize
    initialize.enable_device()
    if os.environ["RANK"] == "1":
        _before("megatron_dtrpo.training.trainer:Trainer._step", 5, ACTIONS["fail"])
    sys.exit(train.main())
"""


def test_under_torchrun(settings, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    job = Job({**settings, "save": tmp_path / "run"}, tmp_path / "log", 2, [str(script)])
    result = job.wait(120)
    assert result.status == 1 and "rank 1: Traceback" in result.output and TRACEBACK in result.output
