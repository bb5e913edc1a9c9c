"""Fixtures that every test folder may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Data too large for the repository: $MEGATRON_DTRPO_SHARED, or ``shared`` beside it. Absent: skip."""
    directory = Path(os.environ.get("MEGATRON_DTRPO_SHARED") or REPOSITORY.parent / "shared")
    if not (directory / "data").is_dir():
        pytest.skip(f"no shared data in {directory}; set MEGATRON_DTRPO_SHARED")
    return directory
