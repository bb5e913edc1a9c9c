"""What the trainer adds to its environment before torch is imported, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys

from megatron_dtrpo.runtime.environment import defaults
from tests.conftest import REPOSITORY


def test_defaults_are_for_a_share_of_the_machine():
    added = defaults({"HOME": "/home/me", "LOCAL_WORLD_SIZE": "8"}, cores=96)
    assert added == {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "TORCHINDUCTOR_COMPILE_THREADS": "12",
        "TORCHINDUCTOR_CACHE_DIR": "/home/me/.cache/megatron-dtrpo/kernels",
    }
    threads = "TORCHINDUCTOR_COMPILE_THREADS"
    assert defaults({}, cores=96)[threads] == "16" and defaults({"LOCAL_WORLD_SIZE": "8"}, cores=2)[threads] == "1"
    assert defaults({"XDG_CACHE_HOME": "/fast"}, 1)["TORCHINDUCTOR_CACHE_DIR"] == "/fast/megatron-dtrpo/kernels"


def test_the_users_own_values_win():
    mine = dict.fromkeys(defaults({}, 1), "mine")
    assert defaults(mine, 1) == {}
    assert "PYTORCH_CUDA_ALLOC_CONF" not in defaults({"PYTORCH_ALLOC_CONF": "backend:native"}, 1)


def test_they_are_set_before_torch_is_imported():
    check = """
import os, sys
from megatron_dtrpo.cli import train
from megatron_dtrpo.runtime import environment
add = environment.set_defaults
def watched():
    assert "torch" not in sys.modules
    add()
environment.set_defaults = watched
assert train.main(["--dry-run"]) == 2  # no architecture
assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] and "torch" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
