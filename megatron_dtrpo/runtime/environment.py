"""A process's environment variables: its place among the others, which its launcher says, and what torch reads when it
is imported, set where the user did not. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def world_size() -> int:
    """Processes in this run, known before anything is started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def defaults(given: Mapping[str, str], cores: int) -> dict[str, str]:
    """Additions to the environment ``given`` of a process that shares ``cores`` with the others of its machine."""
    share = cores // int(given.get("LOCAL_WORLD_SIZE", 1))
    cache = given.get("XDG_CACHE_HOME") or os.path.join(given.get("HOME", "/tmp"), ".cache")
    wanted = {
        # Packed sequences differ in length: memory that can grow is not cut into pieces of the wrong size.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # torch would take up to 32 in each process.
        "TORCHINDUCTOR_COMPILE_THREADS": str(min(16, max(1, share))),
        # Not /tmp: a restart, and on a shared home every node, finds the kernels.
        "TORCHINDUCTOR_CACHE_DIR": str(Path(cache) / "megatron-dtrpo" / "kernels"),
    }
    if "PYTORCH_ALLOC_CONF" in given:  # its name in newer versions of torch
        del wanted["PYTORCH_CUDA_ALLOC_CONF"]
    return {name: value for name, value in wanted.items() if name not in given}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_defaults() -> None:
    """Before torch is imported."""
    os.environ.update(defaults(os.environ, _cores()))


def leave_a_core() -> None:
    """To a process beside this one. torch's threads wait for each other without sleeping: one that has to share its
    core keeps all others waiting. Before torch is imported; torchrun or the user may have said how many there are."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() - 1)))
