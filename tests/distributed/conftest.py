"""Fixtures of the tests that run the trainer under many layouts."""

from __future__ import annotations

import pytest

from tests.support.launch import ForkServer


@pytest.fixture(scope="module")
def server(folder):
    """Runs in processes that have the slow imports behind them; ``folder`` is the test file's own fixture."""
    server = ForkServer(folder / "server.log")
    yield server
    server.close()
