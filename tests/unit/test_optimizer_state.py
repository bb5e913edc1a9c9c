"""A process's share of a parameter, a stretch of its elements, is cut into boxes that a checkpoint can store."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_dtrpo.runtime.optimizer_state import boxes


@pytest.mark.parametrize("shape", [(7,), (1, 5), (5, 1), (4, 6), (3, 2, 4), (2, 1, 3, 2)], ids=str)
def test_boxes_hold_every_element_of_a_stretch_in_order(shape):
    numbers = np.arange(math.prod(shape)).reshape(shape)
    for start in range(numbers.size + 1):
        for stop in range(start, numbers.size + 1):
            found = boxes(shape, start, stop)
            parts = [numbers[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))] for box in found]
            assert [n for part in parts for n in part.flatten()] == list(range(start, stop))
            assert [part.shape for part in parts] == [size for _, size in found]
            assert len(found) <= 2 * len(shape) - 1
