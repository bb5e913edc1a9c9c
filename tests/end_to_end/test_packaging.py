"""What `pip install .` puts into an environment, and the types of what it puts there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.support.launch import REPOSITORY

pytestmark = pytest.mark.end_to_end


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, so that nothing is left in the checkout."""
    pytest.importorskip("setuptools", reason="pip install setuptools")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    package = REPOSITORY / "megatron_dtrpo"
    shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    words = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder / "out", folder]
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = (folder / "out").iterdir()
    return file


def test_everything_of_the_package_is_installed(wheel):
    files = [path for path in (REPOSITORY / "megatron_dtrpo").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    names = {path.relative_to(REPOSITORY).as_posix() for path in files}
    assert {name.rsplit(".", 1)[-1] for name in names} >= {"py", "html", "css", "js", "typed"}
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.startswith("megatron_dtrpo/")} == names
        (about,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    lines = about.splitlines()
    assert "Name: megatron-dtrpo" in lines and "License-Expression: Apache-2.0" in lines
    assert "# megatron-dtrpo" in about.partition("\n\n")[2], "the readme is its description"
    needed = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert not any("pyarrow" in line or "sentencepiece" in line for line in needed)


def test_it_works_outside_of_the_checkout(wheel, tmp_path):
    words = ["install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel]
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    code = (
        "from megatron_dtrpo.inference.trace import Trace, trace_page\n"
        "page = trace_page([Trace('p', ('a',), (0,), (0.5,), (0,), 'a')], 'title')\n"
        "import megatron_dtrpo; print(megatron_dtrpo.__file__, '<html' in page)"
    )
    # -P: not from the folder that it is started in; the site comes before an editable installation.
    words = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{code}"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site")) and done.stdout.endswith("True\n")

    # The command that pip made, with the modules that it installed.
    shutil.copy(REPOSITORY / "examples" / "dtrpo_7b.yaml", tmp_path)
    command = tmp_path / "site" / "bin" / "megatron-dtrpo"
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    for words, wanted in (
        (["--version"], "megatron-dtrpo 0."),
        (["plan", "--config", "dtrpo_7b.yaml", "--gpus", "8", "--top", "1"], "8 GPUs of 80 GiB"),
        (["train", "--config", "dtrpo_7b.yaml", "--dry-run", "--world-size", "8"], "dry run of 8 processes"),
    ):
        done = subprocess.run(
            [command, *words], capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment
        )
        assert done.returncode == 0 and done.stdout.startswith(wanted), done.stdout + done.stderr


def test_types():
    """`mypy`, as configured in pyproject.toml."""
    try:
        metadata.version("mypy")
    except metadata.PackageNotFoundError:
        pytest.skip("no mypy: pip install mypy")
    words = [sys.executable, "-m", "mypy", "--no-error-summary"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr
