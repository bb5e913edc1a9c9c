"""Large tensors of a process on a CPU lie in pages of 2 MiB, unless the user has said otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SWITCH = "THP_MEM_ALLOC_ENABLE"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Page faults of filling a tensor of 64 MiB: 16384 pages of 4 KiB, or 32 of 2 MiB.
PROGRAM = """
import resource
from megatron_dtrpo.config.settings import ParallelSettings
from megatron_dtrpo.runtime import initialize
initialize.start(ParallelSettings(), seed=0)
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
initialize.stop()
"""


@pytest.mark.skipif(not KERNEL.exists() or "[never]" in KERNEL.read_text(), reason="the kernel has no huge pages")
@pytest.mark.parametrize("chosen, huge", [({}, True), ({SWITCH: "0"}, False)], ids=["by default", "switched off"])
def test_huge_pages(chosen: dict, huge: bool):
    if "[always]" in KERNEL.read_text() and not huge:
        pytest.skip("the kernel gives huge pages to all")
    environment = {name: value for name, value in os.environ.items() if name != SWITCH}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment | chosen, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout.split()[-1]) < 8192) == huge
