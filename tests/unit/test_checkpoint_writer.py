"""What a forked writer says of its work comes back, however long it is."""

from __future__ import annotations

import multiprocessing
import queue

import pytest

from megatron_dtrpo.checkpoint.distributed import _Results
from megatron_dtrpo.checkpoint.iterations import complete_iterations


def test_results_of_a_forked_process_come_back():
    results = _Results()
    with pytest.raises(queue.Empty):
        results.get_nowait()
    written = {number: [b"x" * 1000] for number in range(1000)}  # more than a pipe holds
    writer = multiprocessing.get_context("fork").Process(target=results.put, args=(written,))
    writer.start()
    writer.join(20)
    assert writer.exitcode == 0
    assert results.get_nowait() == written


def test_only_complete_folders_count(tmp_path):
    for name, files in {
        "iter_0000010": ["metadata.json", ".metadata"],
        "iter_0000002": ["metadata.json", ".metadata"],
        "iter_0000003": ["metadata.json"],
        "iter_0000004.partial": ["metadata.json", ".metadata"],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("{}")
    assert complete_iterations(tmp_path) == [2, 10]
