"""Written aside, then renamed: nothing has its name before it is complete, and nothing that was there is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from megatron_dtrpo.checkpoint import iterations
from megatron_dtrpo.checkpoint.folder import hold_folder
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.files import partial_name, publish_folder, remove_folder, write_atomically, write_json


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, "naïve")
    assert path.read_bytes() == "naïve".encode()
    write_json(path, {"a": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "ü"}
    assert os.listdir(tmp_path) == ["file.txt"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def filled(path, text: str):
    path.mkdir()
    (path / "file").write_text(text)
    return path


def test_a_folder_takes_the_place_of_another(tmp_path):
    path = tmp_path / "folder"
    for text in ("first", "second"):
        publish_folder(filled(partial_name(path), text), path)
        assert (path / "file").read_text() == text and os.listdir(tmp_path) == ["folder"]


def test_a_folder_comes_back_where_the_new_one_cannot_have_its_name(tmp_path):
    path = filled(tmp_path / "folder", "first")
    with pytest.raises(FileNotFoundError):
        publish_folder(partial_name(path), path)
    assert (path / "file").read_text() == "first"


def test_a_removed_folder_is_never_half_of_itself(tmp_path, monkeypatch):
    path = filled(tmp_path / "folder", "first")
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda place, **_: seen.append((place, path.exists())))
    remove_folder(path)
    assert seen == [(partial_name(path), False)]
    remove_folder(path)  # nothing is there
    assert len(seen) == 1


def test_run_folders_are_read_without_torch(tmp_path):
    for number in (2, 10, 30):
        iteration = iterations.iteration_folder(tmp_path, number)
        iteration.mkdir()
        for name in ("metadata.json", ".metadata")[: 1 if number == 30 else 2]:
            (iteration / name).touch()
    (tmp_path / iterations.TRACKER).write_text("10")
    script = (
        "import sys; from megatron_dtrpo.checkpoint import folder, iterations;"
        "print(iterations.complete_iterations(sys.argv[1]), iterations.require_latest(sys.argv[1]));"
        "print([name for name in ('torch', 'megatron', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["[2, 10] 10", "[]"], done.stderr


HOLDER = "import sys, time; from pathlib import Path; from megatron_dtrpo.checkpoint.folder import hold_folder\n"
HOLDER += "with hold_folder(Path(sys.argv[1])): print(flush=True); time.sleep(600)"


def test_a_folder_is_one_processs_until_it_ends(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(UserError, match=r"run: another run is writing there; wait for its end, or give another"):
            with hold_folder(tmp_path / "run"):
                pass
        assert (tmp_path / "run").is_dir()
    finally:
        other.kill()
        other.wait()
    with hold_folder(tmp_path / "run") as held:
        assert held


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    (tmp_path / "mine").mkdir()
    for name, written, stays in (("new", (), False), ("kept", ("file",), True), ("mine", (), True)):
        with hold_folder(tmp_path / name):
            for file in written:
                (tmp_path / name / file).touch()
        assert (tmp_path / name).exists() == stays, name
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/run: the folder cannot be made or read"):
        with hold_folder(tmp_path / "file" / "run"):
            pass


def test_a_folder_of_rounds_names_the_last_one(tmp_path):
    for name in ("round-2", "round-10", "round-x", "round-11"):
        (tmp_path / name).mkdir()
    for name in ("round-2", "round-10", "round-x"):
        (tmp_path / name / iterations.TRACKER).touch()
    with pytest.raises(UserError, match=f"it holds rounds, the last of which is {tmp_path}/round-10"):
        iterations.require_latest(tmp_path)


def test_a_hugging_face_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="latest_checkpointed_iteration.txt is missing"):
        iterations.require_latest(tmp_path)
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match="a Hugging Face folder: turn it into a checkpoint with megatron-dtrpo convert"):
        iterations.require_latest(tmp_path)
