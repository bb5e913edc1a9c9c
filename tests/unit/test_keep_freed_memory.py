"""What a step has freed stays with the process on a CPU, unless the user has set the allocator."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Page faults of filling a tensor of 64 MiB for the second time.
PROGRAM = """
import resource, torch
from megatron_dtrpo.runtime import cpu
cpu.keep_freed_memory()
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None, reason="not glibc")
@pytest.mark.parametrize("chosen, kept", [({}, True), ({"MALLOC_MMAP_THRESHOLD_": "1048576"}, False)])
def test_keep_freed_memory(chosen: dict, kept: bool):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment | chosen, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 1000) == kept
