"""Fixtures of the unit tests."""

from __future__ import annotations

import pytest

from megatron_dtrpo.config.settings import ParallelSettings
from megatron_dtrpo.runtime import initialize


@pytest.fixture(scope="module")
def alone():
    """A process group of one and megatron-core's parallel state."""
    initialize.enable_device()
    initialize.start(ParallelSettings(), 1)
    yield
    initialize.stop()
