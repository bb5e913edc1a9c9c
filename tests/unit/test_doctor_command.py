"""The doctor's probes of a machine, and its command on this one."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_dtrpo.doctor import machine as probing
from megatron_dtrpo.doctor.checks import examine, version_of
from megatron_dtrpo.doctor.machine import Machine
from megatron_dtrpo.doctor.requirements import Requirements

REPOSITORY = Path(__file__).resolve().parents[2]

# Probes


def test_versions_are_compared_as_numbers():
    assert version_of("2.10.0a0+b4e4ee81d3.nv25.12") == (2, 10, 0)
    assert version_of("2.10.0") > version_of("2.9")
    assert version_of("unknown") == ()


def test_a_probe_that_fails_becomes_a_note(monkeypatch):
    def _shared_memory(machine):
        raise PermissionError("not\nallowed")

    monkeypatch.setattr(probing, "PROBES", (_shared_memory,))
    machine = probing.gather()
    assert machine.failures == {"shared_memory": "not allowed"}
    lines = examine(machine, Requirements())
    assert ("note", "shared memory") in [line[:2] for line in lines]


@pytest.mark.parametrize(("folders", "kind"), [(["optimizers"], "nvidia"), (["apps"], "other")])
def test_the_two_packages_called_apex_are_told_apart(tmp_path, monkeypatch, folders, kind):
    for folder in folders:
        (tmp_path / "apex" / folder).mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    machine = Machine()
    probing._apex(machine)
    assert machine.apex == kind


def test_a_taken_port_is_noticed(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        monkeypatch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        taken = Machine()
        probing._port(taken)
    assert taken.port_free is False


# The command


def doctor(*argv: str, python: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess:
    command = [*python, "-m", "megatron_dtrpo", "doctor", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)


@pytest.mark.end_to_end
@pytest.mark.slow
def test_this_machine_is_examined_and_a_run_that_cannot_work_is_refused(tmp_path):
    (tmp_path / "pairs.jsonl").touch()
    run = ["--config", str(REPOSITORY / "examples" / "dtrpo_tiny.yaml"), "--save", str(tmp_path / "run")]
    ended = doctor(*run, "--data-path", str(tmp_path / "pairs.jsonl"))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "megatron-core" in ended.stdout and ended.stdout.endswith("this run works here\n")
    assert not ended.stderr

    ended = doctor(*run, "--data-path", str(tmp_path / "nothing.jsonl"))
    assert ended.returncode == 1
    assert "missing  data_path" in ended.stdout and not ended.stderr
    assert doctor("--lr", "fast").stderr.startswith("error: argument --lr")
    assert doctor("--nprc", "8").stderr == "error: unknown flag --nprc: the nearest known one is --nproc\n"
    assert doctor("--nproc", "0").stderr == "error: argument --nproc: must be at least 1\n"


@pytest.mark.end_to_end
def test_it_works_where_nothing_is_installed():
    # -S: without site-packages, and so without torch, megatron-core and PyYAML.
    ended = doctor("--config", "run.yaml", python=(sys.executable, "-E", "-s", "-S"))
    assert ended.returncode == 1 and not ended.stderr
    assert "not read: No module named" in ended.stdout
    assert "missing  torch" in ended.stdout
