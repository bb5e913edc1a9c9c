"""The machine that a benchmark runs on, and what a process of it holds in memory."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch


def describe_machine() -> dict[str, str]:
    """What numbers depend on besides the code."""
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,  # with +cpu or +cu130, which package metadata may lack
        **{name: metadata.version(name) for name in ("megatron-core", "transformers")},
        **({"trl": metadata.version("trl")} if find_spec("trl") else {}),
    }


def _processor() -> str:
    """Its model, which Python knows by its architecture only."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def peak_resident_bytes(run: Callable[[], object]) -> int:
    """The most that this process holds while it runs ``run``. Linux only."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    run()
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
