"""Fixtures of the tests that run whole commands."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Runs in the test's own process are of one process, whatever the environment says, and fetch nothing."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
