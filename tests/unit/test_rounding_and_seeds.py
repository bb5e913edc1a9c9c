"""Rounding against fractions, and seeds that may never change: runs are resumed with them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_dtrpo.diffusion.estimators import noise_generator
from megatron_dtrpo.evaluation.likelihood import content_key
from megatron_dtrpo.rounding import ceil_divide, round_up
from megatron_dtrpo.seeds import stable_seed


@given(st.integers(-(2**70), 2**70), st.integers(1, 2**40))
def test_rounding_up(number, step):
    assert ceil_divide(number, step) == math.ceil(Fraction(number, step))
    assert round_up(number, step) == math.ceil(Fraction(number, step)) * step


def test_rounding_up_arrays():
    numbers = np.arange(-9, 30)
    assert ceil_divide(numbers, 4).tolist() == [math.ceil(Fraction(int(n), 4)) for n in numbers]


def test_seeds_are_what_they_were():
    assert stable_seed(b"7/decoder.final_layernorm.weight") == 1732795835517065391
    assert noise_generator(1, 2, 3, 4, -5).initial_seed() == 2962546708934086206
    assert content_key([5, 6, 7]) == 2946638900875145815
