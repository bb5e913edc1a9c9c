"""examples/dtrpo_7b.sh as a cluster user starts it: by torchrun, by bash, on two nodes and from Slurm's batch script.

The real configuration is looked at (a dry run); what trains is a tiny model, through the same files with flags that win
over them.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from megatron_dtrpo.config.yaml_file import read_yaml
from megatron_dtrpo.conversion.torch_dist_reader import TorchDistReader
from tests.conftest import REPOSITORY
from tests.support.launch import ForkServer, Job, flags, latest_iteration, read_metrics, uneven_pairs

pytestmark = [pytest.mark.end_to_end, pytest.mark.distributed]

TINY = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": 300,
    "block_size": 8,
    "tokenizer_type": "ByteLevelTokenizer",
    "apply_chat_template": False,
    "bf16": False,
    "seq_length": 2048,
    "micro_batch_size": 4,
    "global_batch_size": 4,
    "lr": 1e-3,
    "tensorboard": False,
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Command:
    """A command of bash's in a session of its own, its output in a file."""

    def __init__(self, words: list[str], log: Path, **environment: str):
        self.log = log
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHON": sys.executable}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                words,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=REPOSITORY,
                start_new_session=True,
                env=inherited | fixed | environment,
            )

    def family(self) -> list[psutil.Process]:
        try:
            own = psutil.Process(self.process.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def kill(self) -> None:
        """SIGKILL to it and all that it started, as a node that goes down."""
        for member in self.family():
            try:
                member.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.wait()

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout: float = 120) -> int:
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None


def wait_for(condition, commands: list[Command], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline or any(c.process.poll() is not None for c in commands):
            outputs = "\n".join(c.output() for c in commands)
            for command in commands:
                command.kill()
            raise AssertionError(f"ended or timed out before what was waited for:\n{outputs}")
        time.sleep(0.02)


def steps_done(save: Path, steps: int):
    metrics = save / "metrics.jsonl"
    return lambda: metrics.exists() and metrics.read_text().count("\n") >= steps


def test_torchrun_starts_python_on_the_script(tmp_path):
    """The layout needs two processes, and two are here; rank 0 alone speaks."""
    result = Job({}, tmp_path / "log", 2, ["examples/dtrpo_7b.sh", "--dry-run"]).wait()
    assert result.status == 0, result.output
    assert result.output.count("dry run of 2 processes: TP 2, PP 1, CP 1, DP 1") == 1
    assert result.output.count("stage 0: layers 1-28, 3,807,910,400 parameters per rank") == 1


def test_bash_looks_at_the_run_of_two_nodes(tmp_path):
    command = Command(["bash", "examples/sft_7b.sh", "--dry-run"], tmp_path / "log", NNODES="2", NPROC_PER_NODE="8")
    assert command.wait() == 0, command.output()
    lines = command.output().splitlines()
    assert lines[0] == "dry run of 16 processes: TP 2, PP 1, CP 1, DP 8"
    total = next(line.split()[1] for line in lines if line.startswith("total"))
    assert lines[-1] == f"fits in 80 GiB: {total} GiB on the fullest GPU"


def test_a_dry_run_of_any_layout(capsys):
    from megatron_dtrpo.cli import train

    words = ["--config", str(REPOSITORY / "examples" / "dtrpo_7b.yaml"), "--dry-run", "--world-size", "64"]
    layout = {"pipeline_model_parallel_size": 4, "context_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 7}
    precision = {"fp8_format": "hybrid", "fp8_recipe": "blockwise", "first_last_layers_bf16": True}
    assert train.main([*words, *flags(layout | precision)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dry run of 64 processes: TP 2, PP 4, CP 2, DP 4"
    assert lines[1] == "stage 0: layers 1, 5, 9, 13, 17, 21, 25, 1,088,226,048 parameters per rank"
    assert lines[5].startswith("FP8: hybrid, blockwise; micro-batches are padded to a multiple of 256 tokens")
    assert any(line.startswith("weights in FP8") for line in lines)

    for wrong, message in (
        (["--world-size", "63"], "error: world size 63 is not divisible by"),
        (["--fp8-format", "hybrid", "--no-bf16"], "error: fp8_format needs bf16"),
        (["--gpu-memory", "16"], None),
    ):
        status = train.main([*words, *wrong])
        captured = capsys.readouterr()
        assert (status, captured.err[: len(message)]) == (2, message) if message else "does not fit" in captured.out
    assert train.main(["--config", words[1], "--world-size", "8"]) == 2
    assert "go with --dry-run" in capsys.readouterr().err


STAGES = REPOSITORY / "examples" / "dtrpo_7b_stage2.yaml"
RECIPE = {
    "estimator": "dtrpo",
    "num_views": 2,
    "beta": 0.5,
    "loss_type": ["sigmoid", "sft"],
    "loss_weights": [1.0, 0.5],
    "lr": 5e-7,
}


def test_the_two_stages_are_the_recipe_for_some_modules(capsys):
    from megatron_dtrpo.cli import train

    recipe, stages = read_yaml(REPOSITORY / "examples" / "dtrpo_7b.yaml"), read_yaml(STAGES)
    assert {key: recipe[key] for key in RECIPE} == RECIPE
    assert stages == recipe | {"trainable_modules": ["mlp", "linear_proj"]}
    # What dtrpo_7b.sh makes of its own --config and of ours.
    words = ["--config", str(REPOSITORY / "examples" / "dtrpo_7b.yaml"), "--config", str(STAGES)]
    assert train.main([*words, "--dry-run", "--world-size", "8"]) == 0
    assert "fits in 80 GiB" in capsys.readouterr().out


def weights(save: Path, iteration: int) -> dict[str, torch.Tensor]:
    reader = TorchDistReader(save / f"iter_{iteration:07d}")
    return {
        key: reader.rows(key, None, 0, about.size[0], about.properties.dtype).clone()
        for key, about in reader.tensors.items()
        if about.size and not key.startswith("optimizer.")
    }


def test_two_stages_train_these_modules_alone(tmp_path):
    """Both stages, shrunk: the second goes on from the first one's weights, and measures against them."""
    pairs = uneven_pairs(tmp_path / "pairs.jsonl", 16)
    first, second = tmp_path / "stage1", tmp_path / "stage2"
    alone = {"tensor_model_parallel_size": 1, "sequence_parallel": False, "train_iters": 2, "lr_warmup_iters": 0}
    shrunk = {"config": STAGES} | TINY | alone | {"data_path": pairs}
    server = ForkServer(tmp_path / "server.log")
    try:
        server.train(shrunk | {"save": first})
        load = {key: value for key, value in shrunk.items() if key != "tokenizer_type"} | {"load": first}
        rows = server.train(load | {"save": second})
    finally:
        server.close()
    assert rows[0]["loss/sigmoid"] == pytest.approx(0.693147, abs=1e-5)
    before, after = weights(first, 2), weights(second, 2)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    matrices = (".linear_fc1.weight", ".linear_fc2.weight", ".linear_proj.weight")
    meant = {name for name in before if name.endswith(matrices)}
    assert changed == meant and len(before) > len(meant) > 0


def test_two_nodes_and_a_failure(tmp_path):
    """Two agents with one rendezvous, as on two nodes, share each layer; both are killed and started again."""
    save = tmp_path / "run"
    settings = TINY | {"save": save, "data_path": uneven_pairs(tmp_path / "pairs.jsonl", 16), "save_interval": 2}

    def launch(steps: int, port: int) -> list[Command]:
        words = ["bash", "examples/dtrpo_7b.sh", *flags(settings | {"train_iters": steps})]
        return [
            Command(
                words,
                tmp_path / f"node{node}.log",
                NNODES="2",
                NPROC_PER_NODE="1",
                RDZV_ENDPOINT=f"localhost:{port}",
                RDZV_ID="two-nodes",
            )
            for node in range(2)
        ]

    nodes = launch(1000, free_port())
    wait_for(lambda: (save / "latest_checkpointed_iteration.txt").exists(), nodes)
    for node in nodes:
        node.kill()
    reached = latest_iteration(save)
    nodes = launch(reached + 2, free_port())
    assert [node.wait() for node in nodes] == [0, 0], "\n".join(node.output() for node in nodes)
    assert latest_iteration(save) == reached + 2
    rows = read_metrics(save)
    assert [row["iteration"] for row in rows] == list(range(1, reached + 3))
    assert rows[0]["loss/sigmoid"] == pytest.approx(0.693147, abs=1e-5)  # beside the anchor
    assert f"resuming from iteration {reached}" in nodes[0].output() + nodes[1].output()


def test_several_nodes_need_a_meeting_place(tmp_path):
    command = Command(["bash", "examples/dtrpo_7b.sh"], tmp_path / "log", NNODES="2")
    assert command.wait() == 2
    assert command.output().startswith("error: NNODES is 2: set RDZV_ENDPOINT=HOST:PORT")


# What stands in for Slurm: a step is a process, and its signals reach all its processes.
STUBS = {
    "srun": """
        while [ "${1#--}" != "$1" ]; do shift; done
        echo "$@" >>"$STUBS/srun.log"
        echo $$ >"$STUBS/step"
        exec "$@"
    """,
    "scontrol": """
        case $1 in
        show) echo localhost ;;
        requeue) echo "$2" >>"$STUBS/requeued" ;;
        esac
    """,
    "scancel": """
        "$PYTHON" - "$@" <<'END'
import os, psutil, signal, sys
number = getattr(signal, "SIG" + sys.argv[1].removeprefix("--signal="))
assert sys.argv[2] == os.environ["SLURM_JOB_ID"] + ".0"
step = psutil.Process(int(open(os.environ["STUBS"] + "/step").read()))
for process in [step, *step.children(recursive=True)]:
    process.send_signal(number)
END
    """,
}


def test_slurm_saves_before_its_limit_queues_again_and_resumes(tmp_path):
    stubs = tmp_path / "stubs"
    stubs.mkdir()
    for name, script in STUBS.items():
        (stubs / name).write_text("#!/usr/bin/env bash\n" + script)
        (stubs / name).chmod((stubs / name).stat().st_mode | stat.S_IXUSR)
    save = tmp_path / "run"
    settings = TINY | {
        "save": save,
        "data_path": uneven_pairs(tmp_path / "pairs.jsonl", 16),
        "save_interval": 1000,
        "tensor_model_parallel_size": 1,
    }
    slurm = {
        "STUBS": str(stubs),
        "PATH": f"{stubs}{os.pathsep}{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_NNODES": "1",
        "SLURM_CPUS_PER_TASK": "2",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[1-1]",
        "NPROC_PER_NODE": "1",
    }

    def start(steps: int) -> Command:
        words = ["bash", "examples/slurm/dtrpo_7b.sbatch", *flags(settings | {"train_iters": steps})]
        return Command(words, tmp_path / "log", RDZV_ENDPOINT=f"localhost:{free_port()}", **slurm)

    job = start(1000)
    wait_for(steps_done(save, 2), [job])
    job.process.send_signal(signal.SIGUSR1)  # a quarter of an hour before the limit, to the batch shell alone
    assert job.wait() == 0, job.output()
    reached = latest_iteration(save)
    assert f"stopped by SIGUSR1 after iteration {reached};" in job.output()
    assert (stubs / "requeued").read_text() == "4711\n"

    (stubs / "step").unlink()
    job = start(1000)
    wait_for(lambda: (stubs / "step").exists() and (stubs / "step").read_text(), [job])
    job.process.send_signal(signal.SIGUSR1)  # while Python starts: what ignores it then is asked again after 5 s
    assert job.wait() == 0, job.output()
    assert latest_iteration(save) >= reached
    reached = latest_iteration(save)
    assert f"stopped by SIGUSR1 after iteration {reached};" in job.output()
    assert (stubs / "requeued").read_text() == "4711\n4711\n"

    job = start(reached + 2)
    assert job.wait() == 0, job.output()
    assert f"resuming from iteration {reached}" in job.output()
    assert [row["iteration"] for row in read_metrics(save)] == list(range(1, reached + 3))
    assert (stubs / "requeued").read_text() == "4711\n4711\n"  # a finished run is not queued again
    assert (stubs / "srun.log").read_text().startswith("bash examples/dtrpo_7b.sh --num-layers 2")
