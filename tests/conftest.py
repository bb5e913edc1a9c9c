"""Fixtures that every test folder may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# The longest files of tests, longest first. The two workers of run.sh share whole files, in the order of collection: a
# long one that started last would leave one of them idle.
LONGEST = """
    test_examples_7b test_conversion_commands test_resume test_decoding test_benchmarks test_gpu_check test_real_input
    test_periodic_evaluation test_reference_cache test_overlap test_context_parallel test_stopping test_serve
    test_reference test_evaluate test_invariance test_bad_input test_doctor_command test_failures test_interleaving
    test_generate
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Data too large for the repository: $MEGATRON_DTRPO_SHARED, or ``shared`` beside it. Absent: skip."""
    directory = Path(os.environ.get("MEGATRON_DTRPO_SHARED") or REPOSITORY.parent / "shared")
    if not (directory / "data").is_dir():
        pytest.skip(f"no shared data in {directory}; set MEGATRON_DTRPO_SHARED")
    return directory


@pytest.fixture
def fused(monkeypatch):
    """Makes ``transformer_engine`` the spec of `tests.support.fused_layers`, the stand-ins, and returns that module."""
    from megatron.core.extensions import transformer_engine
    from megatron.core.models.gpt import gpt_layer_specs

    from tests.support import fused_layers

    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", fused_layers.FusedSpecProvider, raising=False)
    monkeypatch.setattr(transformer_engine, "TENorm", fused_layers.FusedNorm)
    return fused_layers
