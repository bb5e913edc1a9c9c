"""Where conversion writes: nothing is replaced unasked, nothing half-made keeps a name that loads, no code is run."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest

from megatron_dtrpo.conversion import output, to_huggingface
from megatron_dtrpo.conversion.torch_dist_writer import TorchDistWriter
from tests.support import conversion_folders as folders
from tests.support.conversion_folders import import_refused, refused, run_tool
from tools import convert_checkpoint

good, source, good_megatron = folders.good, folders.source, folders.good_megatron


def test_a_rope_theta_that_is_filled_in_is_said(source, capsys):
    words = ("import", "--hf-path", source, "--megatron-path")
    assert "note:" not in run_tool(capsys, *words, source.parent / "as_it_is")[1]
    config = folders.config()
    del config["rope_theta"]
    (source / "config.json").write_text(json.dumps(config))
    status, printed = run_tool(capsys, *words, source.parent / "out")
    notes = [line for line in printed.splitlines() if line.startswith("note:")]
    assert status == 0 and len(notes) == 1 and "no rope_theta: taken as 10000" in notes[0], printed


def test_existing_output(source, capsys):
    out = source.parent / "out"
    words = ("import", "--hf-path", source, "--megatron-path", out)
    out.mkdir()
    (out / "thesis.tex").touch()
    refused(capsys, "--overwrite", *words)
    refused(capsys, "is not a checkpoint", *words, "--overwrite")
    (out / "thesis.tex").rename(out / "model_config.yaml")
    (out / "latest_checkpointed_iteration.txt").touch()
    assert run_tool(capsys, *words, "--overwrite")[0] == 0
    refused(capsys, "--overwrite", *words)
    back = ("export", "--megatron-path", out, "--hf-path")
    refused(capsys, "holds what is to be converted", *back, out, "--overwrite")
    refused(capsys, "--overwrite", *back, source)
    assert run_tool(capsys, *back, source, "--overwrite")[0] == 0
    assert sorted(p.name for p in source.parent.iterdir()) == ["hf", "out"]


def test_an_interrupted_conversion_is_replaced_and_nothing_else(source, capsys):
    partial = source.parent / "out.partial"
    words = ("import", "--hf-path", source, "--megatron-path", source.parent / "out")
    partial.mkdir()
    refused(capsys, "in the way", *words)
    (partial / ".conversion-in-progress").touch()
    (partial / "half_a_file").touch()
    assert run_tool(capsys, *words)[0] == 0
    assert not partial.exists() and not (source.parent / "out" / "half_a_file").exists()
    assert not (source.parent / "out" / ".conversion-in-progress").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interruption_leaves_nothing(source, capsys, monkeypatch, stop):
    def interrupted(self, key):
        raise stop

    monkeypatch.setattr(TorchDistWriter, "write_empty_object", interrupted)
    words = ["import", "--hf-path", str(source), "--megatron-path", str(source.parent / "out")]
    if stop is SystemExit:
        with pytest.raises(SystemExit):
            convert_checkpoint.main(words)
    else:
        assert convert_checkpoint.main(words) == 130
    assert [p.name for p in source.parent.iterdir()] == ["hf"]


def test_disk_known_to_be_too_small(source, capsys, monkeypatch, good_megatron):
    usage = shutil.disk_usage("/")._replace(free=100_000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    import_refused(capsys, source, "too full: 0.00 GB needed")
    refused(capsys, "too full", "export", "--megatron-path", good_megatron, "--hf-path", source.parent / "out")
    assert [p.name for p in source.parent.iterdir()] == ["hf"]


def test_disk_that_fills_up_on_the_way(source, capsys, monkeypatch, good_megatron):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(TorchDistWriter, "write_empty_object", full)
    import_refused(capsys, source, "the disk is full")
    words = ("import", "--hf-path", source, "--megatron-path", source.parent / "not" / "yet" / "there")
    refused(capsys, "the disk is full", *words)
    monkeypatch.setattr(to_huggingface, "write_index", full)
    words = ("export", "--megatron-path", good_megatron, "--hf-path", source.parent / "out")
    refused(capsys, "the disk is full", *words, "--max-shard-size", "50KB")
    assert [p.name for p in source.parent.iterdir()] == ["hf"]


def test_a_file_that_cannot_grow_ends_in_one_line(source):
    """The whole process: Python 3.12 ended with SIGSEGV after its line where a view of a buffer was left in a frame."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    code = limit + "from megatron_dtrpo.cli.main import main; raise SystemExit(main())"
    words = ["convert", "import", "--hf-path", source, "--megatron-path", source.parent / "out"]
    ended = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=240)
    assert (ended.returncode, ended.stderr) == (2, f"error: {source.parent / 'out'}: File too large\n")


def test_no_code_of_a_folder_runs(source, capsys, monkeypatch, good_megatron, tmp_path):
    trap = tmp_path / "sprung"
    code = f"open({str(trap)!r}, 'w')\n"
    auto_map = {kind: "modeling.X" for kind in ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")}
    (source / "config.json").write_text(json.dumps({**folders.config(), "auto_map": auto_map}))
    for name in ("modeling.py", "configuration.py", "tokenization.py", "__init__.py"):
        (source / name).write_text(code)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["tokenization.X", "tokenization.X"]}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked whether to run the folder's code"))
    out, back = tmp_path / "out", tmp_path / "back"
    assert run_tool(capsys, "import", "--hf-path", source, "--megatron-path", out)[0] == 0
    words = ("export", "--megatron-path", out, "--hf-path", back, "--hf-reference", source)
    assert run_tool(capsys, *words)[0] == 0
    assert run_tool(capsys, "inspect", source)[0] == 0
    assert not trap.exists()
    assert (back / "modeling.py").read_text() == code

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trap),)

    metadata = out / "iter_0000000" / ".metadata"
    metadata.write_bytes(pickle.dumps(Evil()))
    refused(capsys, "not trusted: it names posix.mkdir", *words, "--overwrite")
    assert not trap.exists()
