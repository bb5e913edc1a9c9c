"""``elbo``, ``vrpo`` and ``mean_field`` against the evidence lower bound, enumerated over all orders of a small block.

The model is a table: a log-probability for every token and every set of visible tokens, all unrelated.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_dtrpo.config.estimators import ESTIMATORS, EstimatorOptions
from megatron_dtrpo.diffusion.estimators import POLICY, REFERENCE, NoiseRequest, dtrpo, mean_field, noise_generator
from megatron_dtrpo.diffusion.layout import Blocks

# Which places of a block of four may be masked.
SHAPES = {1: [False, False, True, False], 3: [False, True, True, True], 4: [True, True, True, True]}
Table = dict[frozenset[int], dict[int, float]]


def draw(name: str, shape: list[bool], blocks: int, views: int, seed: int = 0, stream: int = POLICY):
    """An estimator's draws for many equal blocks: bool ``[K, n, B]``, float64 ``[K, n, B]``."""
    generators = [noise_generator(seed, 0, 0, 1, stream * view) for view in range(1, views + 1)]
    return ESTIMATORS[name].draw(NoiseRequest(torch.tensor(shape).repeat(blocks, 1), generators))


def places(row) -> frozenset[int]:
    return frozenset(i for i, flag in enumerate(row) if flag)


def random_table(tokens: frozenset[int], seed: int) -> Table:
    generator = random.Random(seed)
    ordered = sorted(tokens)
    subsets = [frozenset(s) for n in range(len(ordered) + 1) for s in itertools.combinations(ordered, n)]
    return {visible: {i: -5 * generator.random() for i in ordered if i not in visible} for visible in subsets}


def exact_elbo(tokens: frozenset[int], table: Table) -> float:
    """The mean over all orders of the log-likelihood of the tokens one after the other."""
    orders = list(itertools.permutations(sorted(tokens)))
    return sum(table[frozenset(order[:i])][order[i]] for order in orders for i in range(len(order))) / len(orders)


def level_probabilities(name: str, m: int, views: int) -> list[list[Fraction]]:
    """Per view the probability of masking 1, .. m tokens: uniform, or what a stratum of the unit interval leaves."""
    if name == "elbo":
        return [[Fraction(1, m)] * m] * views

    def overlap(k: int, n: int) -> Fraction:
        low, high = max(Fraction(k, views), Fraction(n, m)), min(Fraction(k + 1, views), Fraction(n + 1, m))
        return max(high - low, Fraction(0))

    return [[views * overlap(k, n) for n in range(m)] for k in range(views)]


def exact_draws(tokens: frozenset[int], levels: list[Fraction]) -> dict[frozenset[int], Fraction]:
    """Masked set -> probability: every set of a size is equally likely."""
    out = {}
    for size, probability in enumerate(levels, start=1):
        subsets = list(itertools.combinations(sorted(tokens), size))
        out |= {frozenset(s): probability / len(subsets) for s in subsets if probability}
    return out


@pytest.mark.parametrize("name, views", [("elbo", 1), ("elbo", 3), ("vrpo", 1), ("vrpo", 2), ("vrpo", 3), ("vrpo", 8)])
@pytest.mark.parametrize("m", SHAPES)
def test_the_expectation_is_the_elbo(name, views, m):
    """The draws have the enumerated distribution, and under it L is the bound, whatever the probabilities are."""
    tokens, n = places(SHAPES[m]), 4000
    masked, weight = draw(name, SHAPES[m], n, views)
    assert masked.shape == weight.shape == (views, n, 4) and weight.dtype == torch.float64
    exact = [exact_draws(tokens, levels) for levels in level_probabilities(name, m, views)]
    for k in range(views):
        assert sum(exact[k].values()) == 1
        counts = Counter(places(row) for row in masked[k].tolist())
        assert set(counts) == set(exact[k])
        chi_square = sum((counts[s] - n * float(p)) ** 2 / (n * float(p)) for s, p in exact[k].items())
        freedom = len(exact[k]) - 1
        assert chi_square <= freedom + 5 * math.sqrt(2 * freedom)
        size = masked[k].sum(1, keepdim=True).double()
        torch.testing.assert_close(weight[k], masked[k] * m / (size * views), rtol=1e-15, atol=0)
    for seed in range(5):
        table = random_table(tokens, seed)
        expectation = sum(
            float(p) * m / (len(hidden) * views) * sum(table[tokens - hidden][i] for i in hidden)
            for distribution in exact
            for hidden, p in distribution.items()
        )
        assert expectation == pytest.approx(exact_elbo(tokens, table), abs=1e-12)
    # The draws themselves, within five standard errors.
    values = estimates(masked, weight, tokens, table)
    assert values.mean() == pytest.approx(exact_elbo(tokens, table), abs=5 * values.std() / math.sqrt(n) + 1e-12)


def test_the_comparison_can_fail():
    # Weight 1 on every masked token, say, is not the bound.
    tokens, table = places(SHAPES[3]), random_table(places(SHAPES[3]), 0)
    masked, weight = draw("elbo", SHAPES[3], 4000, 1)
    values = estimates(masked, masked.double(), tokens, table)
    assert abs(values.mean() - exact_elbo(tokens, table)) > 5 * values.std() / math.sqrt(len(values))


def estimates(masked, weight, tokens: frozenset[int], table: Table) -> np.ndarray:
    """``L`` of every block, ``[n]``."""
    total = np.zeros(masked.shape[1])
    for hidden_view, weight_view in zip(masked.tolist(), weight.tolist(), strict=True):
        for b, (hidden, w) in enumerate(zip(hidden_view, weight_view, strict=True)):
            total[b] += sum(w[i] * table[tokens - places(hidden)][i] for i in places(hidden))
    return total


def test_shared_and_stratified_draws_have_less_variance():
    """The ratio's variance falls when policy and reference share their draws, and again when levels are stratified."""
    tokens, n, views = places(SHAPES[4]), 4000, 4
    policy = random_table(tokens, 1)
    rng = random.Random(2)
    reference = {seen: {i: p + 0.3 * rng.random() for i, p in row.items()} for seen, row in policy.items()}

    def ratio(name: str, reference_stream: int) -> np.ndarray:
        noise = draw(name, SHAPES[4], n, views)
        reference_noise = draw(name, SHAPES[4], n, views, stream=reference_stream)
        return estimates(*noise, tokens, policy) - estimates(*reference_noise, tokens, reference)

    elbo, shared, vrpo = ratio("elbo", REFERENCE), ratio("elbo", POLICY), ratio("vrpo", POLICY)
    wanted = exact_elbo(tokens, policy) - exact_elbo(tokens, reference)
    for values in (elbo, shared, vrpo):
        assert values.mean() == pytest.approx(wanted, abs=5 * values.std() / math.sqrt(n))
    assert shared.var() < 0.05 * elbo.var()
    # Stratification by itself, where the level matters: on the policy's own L.
    assert vrpo.var() < shared.var()


def test_only_elbo_draws_anew_for_the_reference():
    assert [name for name, e in ESTIMATORS.items() if e.independent_reference] == ["elbo"]
    n = 20000
    policy, _ = draw("elbo", SHAPES[4], n, 2)
    reference, _ = draw("elbo", SHAPES[4], n, 2, stream=REFERENCE)
    streams = torch.cat([policy.flatten(1), reference.flatten(1)]).double()  # two views each, as if a sample of places
    sizes = torch.cat([policy.sum(2), reference.sum(2)]).double()
    for values in (streams, sizes):
        correlation = torch.corrcoef(values) - torch.eye(4)
        assert correlation.abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("block_start", ["clean", "noisy"])
def test_mean_field_is_dtrpo_in_one_step(block_start):
    for P, R in [(4, 1), (3, 2), (5, 40), (13, 100)]:
        maskable = Blocks(P, R, 8).maskable(block_start)
        request = NoiseRequest(maskable, [noise_generator(3, 0, 0, 1, 1)], EstimatorOptions(steps_per_block=1))
        one_step, all_masked = dtrpo(request), mean_field(request)
        assert torch.equal(all_masked.masked, one_step.masked) and torch.equal(all_masked.weight, one_step.weight)
        assert torch.equal(all_masked.masked[0], maskable) and torch.equal(all_masked.weight[0], maskable.double())
