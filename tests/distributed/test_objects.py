"""Objects and waits between processes: on a group of their own, whose patience is not the device's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_dtrpo.config.settings import ParallelSettings
from megatron_dtrpo.runtime import initialize
from tests.support.launch import REPOSITORY, Job

pytestmark = [pytest.mark.distributed]


@pytest.mark.slow
def test_two_processes(tmp_path):
    result = Job({}, tmp_path / "log", 2, ["-m", "tests.distributed.objects_worker"]).wait(90)
    assert "rank 0 is done" in result.output and "rank 1 is done" in result.output, result.output
    assert result.status == 0, result.output


@pytest.mark.parametrize("minutes", [None, 7])
def test_distributed_timeout_minutes(minutes):
    settings = ParallelSettings() if minutes is None else ParallelSettings(distributed_timeout_minutes=minutes)
    with initialize.process_groups(settings, 1):
        from megatron.core import parallel_state

        for group in (dist.group.WORLD, parallel_state.get_data_parallel_group()):
            timeout = group._get_backend(torch.device("cpu")).options._timeout
            assert timeout.total_seconds() == 60 * (minutes or 60)


def test_no_object_goes_over_the_default_group():
    """Under NCCL it would cost device memory, and its wait would be the device's."""
    call = re.compile(r"(gather_object|broadcast_object_list|scatter_object_list)\(")
    users = {
        path.relative_to(REPOSITORY)
        for folder in ("megatron_dtrpo", "tools", "examples")
        for path in (REPOSITORY / folder).rglob("*.py")
        if call.search(path.read_text(encoding="utf-8"))
    }
    assert users == {Path("megatron_dtrpo/runtime/objects.py")}
