"""tools/gpu_check.py on a CPU: every part runs or says why it is skipped, and none costs the others anything."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]
TOOL = REPOSITORY / "tools" / "gpu_check.py"
PARTS = ["doctor", "flex", "overlap", "fp32", "lora", "online", "layers", "fp8", "memory", "profile", "decoding"]


def test_a_cpu_runs_what_needs_no_gpu(tmp_path):
    """From a checkout, where pytest is not installed."""
    (tmp_path / "pytest.py").write_text("raise ImportError('only tests need pytest')\n")
    folder = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, TOOL, "--output", folder, "--size", "tiny"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((folder / "gpu_check.json").read_text())
    status = {row["part"]: row["status"] for row in record["parts"]}
    assert list(status) == PARTS
    assert {part for part in PARTS if status[part] == "skipped"} == {"fp32", "fp8", "memory"}
    assert all(
        "CUDA" in row["detail"] or "GPU" in row["detail"] for row in record["parts"] if row["status"] == "skipped"
    )
    numbers = {row["part"]: row["numbers"] for row in record["parts"]}
    assert (
        numbers["overlap"]["losses"][0] == pytest.approx(0.6931472, abs=1e-6) and len(numbers["overlap"]["losses"]) == 9
    )
    assert numbers["flex"]["compiled_again"] == 0 and 0 < numbers["flex"]["first"][0]["errors"]["output"] < 0.01
    assert 0 < numbers["layers"]["rows"][0]["log_prob_error"] < 2e-3
    assert min(numbers["decoding"]["speeds"].values()) > 0
    table = (folder / "gpu_check.md").read_text()
    assert table == done.stdout and table.count("\n|") == 2 + len(PARTS)
    assert "aten::" in (folder / "profile" / "profile.txt").read_text()


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL.parent))
    module = importlib.import_module("gpu_check")
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] in ("gpu_check", "gpu_checks")]:
        del sys.modules[name]


def test_a_part_that_hangs_or_crashes_costs_the_others_nothing(tool, tmp_path, monkeypatch, capsys):

    assert list(tool.PARTS) == PARTS
    monkeypatch.setitem(tool.PARTS, "doctor", tool.PARTS["doctor"]._replace(seconds=0.02))
    assert tool.main(["--output", str(tmp_path), "--size", "tiny", "--parts", "doctor", "fp32"]) == 1
    doctor, fp32 = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert doctor["status"] == "failed" and doctor["detail"].startswith("no end within 0 s") and doctor["seconds"] < 5
    assert fp32["status"] == "skipped"
    monkeypatch.setattr(tool.sys, "executable", "/bin/false")
    assert tool.main(["--output", str(tmp_path), "--parts", "flex"]) == 1
    assert "| flex | failed |" in capsys.readouterr().out
    assert "exit status 1" in (tmp_path / "gpu_check.md").read_text()


def test_an_exception_is_a_row_of_the_table(tool, tmp_path, monkeypatch):
    from gpu_checks import commands
    from gpu_checks.common import SIZES

    def broken(size, folder):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")

    monkeypatch.setattr(commands, "fp8", broken)
    tool._run_here("fp8", SIZES["tiny"], tmp_path / "fp8")
    result = json.loads((tmp_path / "fp8" / "result.json").read_text())
    assert result["status"] == "failed"
    assert (
        result["detail"] == "RuntimeError: CUDA error: an illegal memory access was encountered more of it, see fp8/log"
    )


def test_a_command_that_fails_says_its_own_line(tool, tmp_path):
    from gpu_checks.common import CommandFailed, run_python

    with pytest.raises(CommandFailed, match="ended with 2: error: unknown flag --learning-rate"):
        run_python(["-m", "megatron_dtrpo", "train", "--learning-rate", "1"], tmp_path / "log")


def test_no_folder_is_a_mistake(tool, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for words in ([], ["--output", str(tmp_path / "file")]):
        with pytest.raises(SystemExit) as end:
            tool.main(words)
        assert end.value.code == 2 and "--output" in capsys.readouterr().err
