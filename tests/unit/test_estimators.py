"""The estimators against exact enumeration on blocks of three and four tokens, and the rules that their draws obey."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_dtrpo.config.estimators import ESTIMATORS, EstimatorOptions, total_views
from megatron_dtrpo.diffusion.estimators import KEPT, NoiseRequest, Recording, dtrpo, noise_generator, sft
from megatron_dtrpo.diffusion.layout import Blocks

# Which places of a block of four may be masked: three of them (its first token is read elsewhere), or all four.
SHAPES = {3: [False, True, True, True], 4: [True, True, True, True]}
STEPS = [1, 2, 3, 4, 8]


def generators(count: int = 1, *, seed: int = 0, index: int = 0) -> list[torch.Generator]:
    return [noise_generator(seed, 0, index, 1, view) for view in range(1, count + 1)]


def draw(shape: list[bool], steps: int, blocks: int, views: int = 1, seed: int = 0):
    """dtrpo's draws for many equal blocks: bool ``[K, n, B]``, float64 ``[K, n, B]``."""
    maskable = torch.tensor(shape).repeat(blocks, 1)
    return dtrpo(NoiseRequest(maskable, generators(views, seed=seed), EstimatorOptions(steps_per_block=steps)))


def draws(name: str, maskable, generators, options: EstimatorOptions | None = None):
    """Any estimator's draws; recorded steps are two tokens a step, from the last place to the first."""
    steps = (100 - torch.arange(maskable.shape[1])).expand(maskable.shape) // 2
    recording = Recording(steps, torch.full_like(steps, KEPT))
    return ESTIMATORS[name].draw(NoiseRequest(maskable, generators, options or EstimatorOptions(), recording))


def places(row) -> frozenset[int]:
    return frozenset(i for i, flag in enumerate(row) if flag)


def near_equal_sizes(masked_and_read: set[tuple[int, int]], m: int) -> list[int]:
    """Group sizes in decoding order, recovered from (tokens masked, tokens read) of many draws: the first step masks
    all m tokens, each later one what its predecessor left. Checks that they are near-equal and complete."""
    read_when = dict(masked_and_read)
    assert len(read_when) == len(masked_and_read), "a step's size is not a function of the step"
    sizes, left = [], m
    while left:
        sizes.append(read_when.pop(left))
        left -= sizes[-1]
    assert not read_when, "a step that no decoding order reaches"
    assert sum(sizes) == m and max(sizes) - min(sizes) <= 1
    return sizes


def enumerate_draws(tokens: frozenset[int], sizes: list[int]) -> dict[tuple[frozenset, frozenset], Fraction]:
    """(masked, read) -> probability, over every order of the tokens and every step, each equally likely."""
    orders = list(itertools.permutations(sorted(tokens)))
    outcomes: Counter = Counter()
    for order in orders:
        for step in range(len(sizes)):
            begin = sum(sizes[:step])
            outcome = (frozenset(order[begin:]), frozenset(order[begin : begin + sizes[step]]))
            outcomes[outcome] += Fraction(1, len(orders) * len(sizes))
    assert sum(outcomes.values()) == 1
    return outcomes


def random_table(tokens: frozenset[int], seed: int) -> dict[frozenset[int], dict[int, float]]:
    """log p(token | visible tokens of the block) for every visible set and every token outside it, all unrelated."""
    generator = random.Random(seed)
    ordered = sorted(tokens)
    subsets = [frozenset(s) for n in range(len(ordered) + 1) for s in itertools.combinations(ordered, n)]
    return {visible: {i: -5 * generator.random() for i in ordered if i not in visible} for visible in subsets}


def trajectory_mean(tokens: frozenset[int], sizes: list[int], table) -> float:
    """The sum over the whole trajectory of log-probabilities of newly unmasked tokens, averaged over all orders."""
    total, orders = 0.0, list(itertools.permutations(sorted(tokens)))
    for order in orders:
        visible: frozenset[int] = frozenset()
        position = 0
        for size in sizes:
            group = order[position : position + size]
            total += sum(table[visible][i] for i in group)
            visible |= frozenset(group)
            position += size
        assert visible == tokens
    return total / len(orders)


@pytest.mark.parametrize("m", [3, 4])
@pytest.mark.parametrize("steps", STEPS)
def test_theorem_1_by_enumeration(m, steps):
    """The drawn (masked, read) sets have the enumerated distribution, and under it the weighted log-probability has
    exactly the trajectory's expected sum, whatever the probabilities are."""
    tokens, T = places(SHAPES[m]), min(steps, m)
    counts: Counter = Counter()
    for seed in range(20):
        masked, weight = draw(SHAPES[m], steps, blocks=400, seed=seed)
        assert float(T) in set(weight.flatten().tolist()) <= {0.0, float(T)}
        for hidden, read in zip(masked[0].tolist(), (weight[0] > 0).tolist(), strict=True):
            counts[places(hidden), places(read)] += 1
    sizes = near_equal_sizes({(len(hidden), len(read)) for hidden, read in counts}, m)
    assert len(sizes) == T

    exact = enumerate_draws(tokens, sizes)
    assert set(counts) == set(exact)
    n = sum(counts.values())
    chi_square = sum((counts[o] - n * float(p)) ** 2 / (n * float(p)) for o, p in exact.items())
    freedom = len(exact) - 1
    assert chi_square <= freedom + 5 * math.sqrt(2 * freedom)

    for table_seed in range(5):
        table = random_table(tokens, table_seed)
        wanted = trajectory_mean(tokens, sizes, table)
        estimate = sum(
            float(p) * sum(T * table[tokens - hidden][i] for i in read) for (hidden, read), p in exact.items()
        )
        assert estimate == pytest.approx(wanted, abs=1e-12)
        # The draws themselves, within five standard errors.
        values = [T * sum(table[tokens - hidden][i] for i in read) for hidden, read in counts.elements()]
        assert np.mean(values) == pytest.approx(wanted, abs=5 * np.std(values) / math.sqrt(n) + 1e-12)


def test_the_chi_square_can_fail():
    # Reading a step with probability proportional to its size, say, instead of uniformly.
    tokens, sizes = frozenset(range(3)), [2, 1]
    exact = enumerate_draws(tokens, sizes)
    wrong = {o: p * Fraction(2 * len(o[1]), 3) for o, p in exact.items()}
    assert sum(wrong.values()) == 1
    n, freedom = 8000, len(exact) - 1
    chi_square = sum((n * float(wrong[o] - p)) ** 2 / (n * float(p)) for o, p in exact.items())
    assert chi_square > freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("steps", [1, 3, 4, 8, 100])
def test_dtrpo_rules_hold_for_every_draw(views, steps):
    blocks = Blocks(prompt_length=13, response_length=200, block_size=8)
    for block_start in ("clean", "noisy"):
        maskable = blocks.maskable(block_start)
        for seed in range(20):
            request = NoiseRequest(maskable, generators(views, seed=seed), EstimatorOptions(steps_per_block=steps))
            masked, weight = dtrpo(request)
            assert masked.shape == weight.shape == (views, *maskable.shape)
            assert masked.dtype == torch.bool and weight.dtype == torch.float64
            assert not (masked & ~maskable).any()
            for k in range(views):
                for b in range(maskable.shape[0]):
                    m = int(maskable[b].sum())
                    T = min(steps, m)
                    read = weight[k, b] > 0
                    assert (read & ~masked[k, b]).sum() == 0  # what a step unmasks is masked in its view
                    assert set(weight[k, b][read].tolist()) == {T / views}
                    assert m // T <= int(read.sum()) <= -(-m // T)


@pytest.mark.parametrize("steps, m", [(3, 8), (5, 7), (8, 32), (5, 31), (1, 6), (32, 32), (64, 31)])
def test_groups_are_near_equal_in_larger_blocks(steps, m):
    masked, weight = draw([True] * m, steps, blocks=2000)
    pairs = set(zip(masked[0].sum(1).tolist(), (weight[0] > 0).sum(1).tolist(), strict=True))
    assert len(near_equal_sizes(pairs, m)) == min(steps, m)


def test_steps_are_uniform_and_independent_between_blocks():
    n = 16000
    masked, _ = draw([True] * 4, 4, blocks=n)
    step = (4 - masked[0].sum(1)).view(-1, 2)
    counts = torch.zeros(4, 4).index_put_((step[:, 0], step[:, 1]), torch.ones(n // 2), accumulate=True)
    expected = n / 2 / 16
    assert ((counts - expected) ** 2 / expected).sum() < 15 + 5 * math.sqrt(30)


# Theorem 2. A schedule says with which probability a step unmasks which tokens, given what is still masked; the policy
# and the reference run the same one. A trajectory's probability is then coefficients times token probabilities.


def fixed_sizes_schedule(sizes: list[int]):
    """Every subset of the step's size is equally likely: dtrpo's uniformly random order."""

    def coefficients(step: int, masked: frozenset[int]) -> dict[frozenset[int], Fraction]:
        groups = [frozenset(g) for g in itertools.combinations(sorted(masked), sizes[step])]
        return {group: Fraction(1, len(groups)) for group in groups}

    return coefficients


def bernoulli_schedule(steps: int):
    """Every masked token is unmasked with probability 1 / (steps left), the diffusion's own reverse process."""

    def coefficients(step: int, masked: frozenset[int]) -> dict[frozenset[int], Fraction]:
        rate = Fraction(1, steps - step)
        out = {}
        for n in range(len(masked) + 1):
            for group in itertools.combinations(sorted(masked), n):
                probability = rate**n * (1 - rate) ** (len(masked) - n)
                if probability:
                    out[frozenset(group)] = probability
        return out

    return coefficients


def trajectories(tokens: frozenset[int], steps: int, coefficients):
    """Every (groups in order, product of the schedule's coefficients) that unmasks all tokens."""
    paths = [((), tokens, Fraction(1))]
    for step in range(steps):
        paths = [
            ((*groups, group), masked - group, product * probability)
            for groups, masked, product in paths
            for group, probability in coefficients(step, masked).items()
        ]
    return [(groups, product) for groups, masked, product in paths if not masked]


def token_factor(groups, tokens: frozenset[int], table) -> Fraction:
    """The product of the probabilities of newly unmasked tokens along a trajectory."""
    product, visible = Fraction(1), frozenset()
    for group in groups:
        for i in group:
            product *= table[visible][i]
        visible |= group
    return product


def random_probabilities(tokens: frozenset[int], seed: int) -> dict[frozenset[int], dict[int, Fraction]]:
    generator = random.Random(seed)
    table = random_table(tokens, seed)
    return {visible: {i: Fraction(generator.randint(1, 99), 100) for i in row} for visible, row in table.items()}


@pytest.mark.parametrize("m", [3, 4])
@pytest.mark.parametrize("steps", [2, 3])
def test_theorem_2_the_ratio_does_not_depend_on_the_schedule(m, steps):
    tokens = places(SHAPES[m])
    policy, reference = random_probabilities(tokens, 1), random_probabilities(tokens, 2)
    masked, weight = draw(SHAPES[m], steps, blocks=500)
    sizes = near_equal_sizes(
        set(zip(masked[0].sum(1).tolist(), (weight[0] > 0).sum(1).tolist(), strict=True)), m
    )  # the package's own schedule
    ratios: list[dict] = []
    for coefficients in (fixed_sizes_schedule(sizes), bernoulli_schedule(steps)):
        ratio_of = {}
        all_paths = trajectories(tokens, steps, coefficients)
        assert sum(product for _, product in all_paths) == 1
        for groups, product in all_paths:
            p = product * token_factor(groups, tokens, policy)
            q = product * token_factor(groups, tokens, reference)
            ratio_of[groups] = p / q
        ratios.append(ratio_of)
    fixed, bernoulli = ratios
    assert set(fixed) < set(bernoulli)
    assert all(bernoulli[groups] == ratio for groups, ratio in fixed.items())  # exactly: they are fractions

    # And the estimator estimates its logarithm: sum of weight * (log p policy - log p reference).
    log_ratio = {
        visible: {i: math.log(policy[visible][i] / reference[visible][i]) for i in row}
        for visible, row in policy.items()
    }
    mean_log_ratio = sum(
        float(product) * math.log(fixed[groups])
        for groups, product in trajectories(tokens, steps, fixed_sizes_schedule(sizes))
    )
    expectation = sum(
        float(p) * steps * sum(log_ratio[tokens - hidden][i] for i in read)
        for (hidden, read), p in enumerate_draws(tokens, sizes).items()
    )
    assert expectation == pytest.approx(mean_log_ratio, abs=1e-12)


# Randomness


def test_the_generator_is_a_function_of_its_five_integers():
    def stream(*key):
        return tuple(torch.rand(4, generator=noise_generator(*key)).tolist())

    keys = set(itertools.product((0, 1, 1234), (0, 1), (0, 1, 2**40), (1, 2), (1, 2)))
    keys |= {tuple(1 if i == j else 0 for i in range(5)) for j in range(5)}
    streams = {key: stream(*key) for key in keys}
    assert len(set(streams.values())) == len(keys)
    torch.manual_seed(99)
    torch.rand(7)
    assert all(stream(*key) == value for key, value in streams.items())


def test_the_generator_stays_what_it_was():
    # Cached reference scores and resumed runs rely on it.
    first = torch.rand(3, generator=noise_generator(1234, 0, 5, 1, 1), dtype=torch.float64)
    expected = [0.7727887450527616, 0.04688419938997612, 0.1786671290159786]
    assert first.tolist() == expected


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_global_random_state_is_neither_read_nor_changed(name):
    maskable = Blocks(5, 40, 8).maskable("clean")
    torch.manual_seed(0)
    first = draws(name, maskable, generators(2))
    torch.manual_seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    second = draws(name, maskable, generators(2))
    assert torch.equal(first.masked, second.masked) and torch.equal(first.weight, second.weight)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


@pytest.mark.parametrize("name", sorted(name for name, e in ESTIMATORS.items() if e.is_random and name != "vrpo"))
def test_a_view_does_not_depend_on_how_many_there_are(name):
    maskable = Blocks(5, 60, 8).maskable("clean")
    options = EstimatorOptions(steps_per_block=3)
    four = draws(name, maskable, generators(4), options)
    each = total_views(name, 1, options)
    assert four.masked.shape[0] == total_views(name, 4, options) == 4 * each
    for count in (1, 2, 3):
        fewer = draws(name, maskable, generators(count), options)
        assert torch.equal(fewer.masked, four.masked[: count * each])
        assert torch.equal(fewer.weight > 0, four.weight[: count * each] > 0)
    assert len({tuple(view.flatten().tolist()) for view in four.masked}) == 4 * each  # and no two views agree


def test_a_stratified_view_is_a_function_of_its_place_among_the_views():
    maskable = Blocks(5, 60, 8).maskable("clean")
    first, again, other = (draws("vrpo", maskable, generators(count)) for count in (3, 3, 4))
    assert torch.equal(first.masked, again.masked)
    assert first.masked.shape[0] == 3 and not torch.equal(first.masked[2], other.masked[2])


def test_a_shorter_view_of_another_response_is_unrelated():
    maskable = Blocks(5, 60, 8).maskable("clean")
    options = EstimatorOptions(steps_per_block=3)
    seen = set()
    for key in [(0, 0, 0, 1, 1), (1, 0, 0, 1, 1), (0, 1, 0, 1, 1), (0, 0, 1, 1, 1), (0, 0, 0, 2, 1), (0, 0, 0, 1, 2)]:
        seen.add(tuple(dtrpo(NoiseRequest(maskable, [noise_generator(*key)], options)).masked.flatten().tolist()))
    assert len(seen) == 6


# Block structure


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("P, R", [(4, 1), (4, 5), (3, 2), (8, 9), (5, 40)])
def test_first_tokens_of_blocks_stay_visible_where_they_are_read_from_the_clean_pass(name, P, R):
    blocks = Blocks(P, R, 4)
    for seed in range(30):
        noise = draws(name, blocks.maskable("clean"), generators(2, seed=seed))
        assert not noise.masked[:, :, 0].any() and not noise.weight[:, :, 0].any()
        assert not (noise.masked & ~blocks.is_response()).any()
        assert torch.isfinite(noise.weight).all()


@pytest.mark.parametrize("name", sorted(name for name, e in ESTIMATORS.items() if "noisy" in e.block_starts))
def test_first_tokens_are_masked_like_any_other_where_they_are_read_from_the_noisy_view(name):
    maskable = Blocks(4, 4000, 4).maskable("noisy")
    noise = draws(name, maskable, generators(), EstimatorOptions(steps_per_block=4))
    rate = noise.masked[0].double().mean(0)
    assert (rate - rate.mean()).abs().max() < 5 * math.sqrt(0.25 / 1000)
    assert rate.min() > 0.3


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_blocks_without_maskable_tokens(name):
    maskable = Blocks(4, 5, 4).maskable("clean")  # blocks of 3 and of 0 maskable tokens
    assert maskable.sum(1).tolist() == [3, 0]
    both = draws(name, maskable, generators(2), EstimatorOptions(steps_per_block=2))
    assert torch.isfinite(both.weight).all()
    if ESTIMATORS[name].autoregressive:
        assert both.masked.shape == both.weight.shape == (0, 2, 4)  # no view at all
        return
    assert not both.masked[:, 1].any() and not both.weight[:, 1].any()
    assert both.weight[:, 0].any()
    none = draws(name, Blocks(4, 1, 4).maskable("clean"), generators(1))
    assert not none.masked.any() and not none.weight.any()


# Fine-tuning


@pytest.mark.parametrize("block_start", ["clean", "noisy"])
def test_complementary_views_part_the_maskable_tokens(block_start):
    maskable = Blocks(5, 100, 8).maskable(block_start)
    masked, weight = sft(NoiseRequest(maskable, generators(3), EstimatorOptions(complementary=True)))
    assert masked.shape[0] == 6
    assert torch.equal(weight, masked.double() / 3)
    for first, second in zip(masked[::2], masked[1::2], strict=True):
        assert not (first & second).any()
        assert torch.equal(first | second, maskable)
    single, weight = sft(NoiseRequest(maskable, generators(3), EstimatorOptions(complementary=False)))
    assert torch.equal(single, masked[::2])
    torch.testing.assert_close(weight, single.double() / (3 * (1 + 1e-3) / 2))


def test_sft_masks_a_uniform_number_of_a_blocks_tokens():
    """t is drawn per block: the number masked out of m is then uniform on 0..m (binomial, were t drawn per token)."""
    n, m = 18000, 8
    masked, _ = sft(NoiseRequest(torch.ones(n, m, dtype=torch.bool), generators(), EstimatorOptions(min_timestep=0.0)))
    counts = torch.bincount(masked[0].sum(1), minlength=m + 1).double()
    expected = n / (m + 1)
    assert ((counts - expected) ** 2 / expected).sum() < m + 5 * math.sqrt(2 * m)
    rate = masked[0].double().mean(0)
    assert (rate - 0.5).abs().max() < 5 * math.sqrt(0.25 / n)


def test_sft_least_timestep():
    masked, _ = sft(
        NoiseRequest(torch.ones(500, 8, dtype=torch.bool), generators(), EstimatorOptions(min_timestep=1.0))
    )
    assert masked[0].all() and not masked[1].any()
