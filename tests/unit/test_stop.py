"""SIGTERM and SIGUSR1 are noted, by the trainer until its very end, and left alone where nobody asked for that."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from megatron_dtrpo.errors import StopRequest
from megatron_dtrpo.runtime import stop
from tests.support.launch import REPOSITORY, _environment


def send(number: signal.Signals) -> None:
    """To this thread: another one, of a library that an earlier test started, may not block what the process gets."""
    signal.pthread_kill(threading.get_ident(), number)


def test_a_signal_is_asked_for_and_forgotten_at_the_end():
    handlers = [signal.getsignal(number) for number in stop.SIGNALS]
    with stop.listening():
        assert stop.requested() is None
        stop.raise_if_requested()
        send(signal.SIGUSR1)
        assert stop.requested() == "SIGUSR1" and stop.wait(60)
        send(signal.SIGTERM)
        with pytest.raises(StopRequest, match="^SIGUSR1$"):
            stop.raise_if_requested()
    assert stop.requested() is None
    assert [signal.getsignal(number) for number in stop.SIGNALS] == handlers
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()).intersection(stop.SIGNALS)


def test_a_signal_that_came_past_the_mask_counts():
    """As multiprocessing unblocks SIGTERM around its first spawn."""
    with stop.listening():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        send(signal.SIGTERM)
        assert stop.requested() == "SIGTERM"
    assert stop.requested() is None


IN_A_CHILD = "import subprocess, sys; from megatron_dtrpo.runtime import stop; stop.block(); " + (
    "child = subprocess.Popen([sys.executable, '-c', 'import os, signal; os.kill(os.getpid(), signal.SIGUSR1)']); "
    "sys.exit(child.wait())"
)
AT_EXIT = """
import atexit, os, signal, sys
from megatron_dtrpo.cli import main, train
train._train = lambda argv: None
for number in (signal.SIGTERM, signal.SIGUSR1):
    atexit.register(os.kill, os.getpid(), number)
sys.exit(main.main(['train']))
"""


@pytest.mark.parametrize("code", [IN_A_CHILD, AT_EXIT], ids=["in a child process", "at exit"])
def test_programs(code):
    assert subprocess.run([sys.executable, "-c", code], env=_environment(), cwd=REPOSITORY).returncode == 0


def test_the_trainer_listens_before_torch_is_imported():
    code = "import sys; import megatron_dtrpo.cli.train; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=_environment(), cwd=REPOSITORY).returncode == 0


# What the command imports first, after `__main__` itself, sends a signal and asks whether it waits.
ASKS_FOR_THE_MASK = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGUSR1):
    os.kill(os.getpid(), number)
sys.exit(0 if signal.sigpending() == {signal.SIGTERM, signal.SIGUSR1} else 1)
"""


def test_signals_wait_before_the_trainer_imports_anything(tmp_path):
    (tmp_path / "__future__.py").write_text(ASKS_FOR_THE_MASK)
    environment = _environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment['PYTHONPATH']}"
    for options in (["-S"], ["-S", "-u"]):  # as by hand, as torchrun starts it; packages of the site would ask first
        command = [sys.executable, *options, "-m", "megatron_dtrpo", "train", "--help"]
        assert subprocess.run(command, env=environment, cwd=REPOSITORY).returncode == 0


OTHERS = {
    "import": ["-c", "import megatron_dtrpo, signal, sys; sys.exit(bool(signal.pthread_sigmask(0, ())))"],
    "word": [
        "-c",
        "import megatron_dtrpo, signal, sys; sys.exit(bool(signal.pthread_sigmask(0, ())))",
        "train",
    ],
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_programs_are_left_alone(name):
    assert subprocess.run([sys.executable, *OTHERS[name]], env=_environment(), cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize("example", ["dtrpo_7b.sh", "sft_7b.sh"])
def test_examples_end_well_before_python_starts(tmp_path, example):
    """Stopped while bash asks for GPUs; the Python that it would start fails."""
    asked = tmp_path / "asked"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\ntouch {asked}\nsleep 0.3\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**_environment(), "PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHON": "/bin/false"}
    command = ["bash", f"examples/{example}"]
    with subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as shell:
        while not asked.exists() and shell.poll() is None:
            time.sleep(0.005)
        shell.send_signal(signal.SIGUSR1)
        shell.send_signal(signal.SIGTERM)
        said = shell.communicate(timeout=60)[0]
    assert shell.returncode == 0 and said.startswith("stopped by SIGTERM before the first step")


# In place of torch.distributed.run. A worker is an agent's child.
STOPPED_WHILE_IT_IS_IMPORTED = "import os, signal; os.kill(os.getpid(), signal.SIGTERM)\nwhile True: pass"
STOPPED_BESIDE_WORKERS = """
import os, signal, subprocess, sys, time

def listen(signum, frame):
    print("the agent heard it")
    sys.exit(7)

def main():
    signal.signal(signal.SIGTERM, listen)
    worker = "import os, signal; os.kill(os.getpid(), signal.SIGTERM); print('the worker waits', flush=True)"
    subprocess.run([sys.executable, "-c", worker], check=True)
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(600):  # as torchrun watches its workers
        time.sleep(0.1)
"""
STOPPED_WHILE_IT_WAITS = "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(100)"


def launched(folder, agent: str, python: str = sys.executable) -> tuple[int, str]:
    """The status and the words of an example's launcher with another torchrun."""
    package = folder / "torch" / "distributed"
    package.mkdir(parents=True)
    for name, text in (("../__init__.py", ""), ("__init__.py", ""), ("run.py", agent)):
        (package / name).write_text(text)
    environment = {**_environment(), "PYTHON": python}
    environment["PYTHONPATH"] = f"{folder}:{environment['PYTHONPATH']}"
    command = ["bash", "examples/dtrpo_7b.sh"]
    ended = subprocess.run(command, env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    return ended.returncode, ended.stdout


@pytest.mark.parametrize("agent", [STOPPED_WHILE_IT_IS_IMPORTED, STOPPED_WHILE_IT_WAITS], ids=["busy", "waiting"])
def test_examples_end_well_before_torchrun_has_workers(tmp_path, agent):
    status, words = launched(tmp_path, agent)
    assert status == 0 and words.startswith("stopped by SIGTERM before the first step")


def test_torchrun_stops_in_its_own_way_and_a_worker_that_only_just_runs_waits(tmp_path):
    status, words = launched(tmp_path, STOPPED_BESIDE_WORKERS)
    assert status == 7 and words == "the worker waits\nthe agent heard it\n"


def test_examples_end_well_between_bash_and_python(tmp_path):
    if subprocess.run(["env", "--block-signal=TERM", "true"], capture_output=True).returncode:
        pytest.skip("this env cannot block signals")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nkill -TERM $$\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    status, words = launched(tmp_path / "stubs", "import time; time.sleep(60)", str(python))
    assert status == 0 and words.startswith("stopped by SIGTERM before the first step")
