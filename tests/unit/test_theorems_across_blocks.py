"""Theorems 1 and 2 with a model that reads across blocks: a small random transformer in float64, token shift 1.

Where a block's first token is read only shows with such a model: its prediction comes from the row before it, which
belongs to another block. The oracle decodes: a forward pass of its own for every step, over what is there in that step.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_dtrpo.config.estimators import ESTIMATORS, EstimatorOptions
from megatron_dtrpo.diffusion.estimators import KEPT, NoiseRequest, Recording, noise_generator
from megatron_dtrpo.diffusion.layout import Blocks, lay_out, visible
from tests.support import oracles

B, MASK = 3, 60
# The prompt ends inside block 1; blocks 2 and 3 begin with a token of the response, block 3 holds that one only.
PROMPT, RESPONSE = [7, 21, 3, 44], [5, 17, 33, 2, 58, 11]
P, WHOLE = len(PROMPT), PROMPT + RESPONSE
RESPONSE_BLOCKS = {1: (4, 5), 2: (6, 7, 8), 3: (9,)}
DRAWS = 3000


@pytest.fixture(scope="module")
def models():
    """Policy and reference, whose predictions of a block's first token depend on more than the token before it."""
    return [oracles.qwen2(seed=seed) for seed in (0, 1)]


def step_log_prob(model, block: int, shown: frozenset[int], new: frozenset[int], shift: int = 1) -> float:
    """Log-probability of the tokens ``new`` that a decoding step writes in ``block``, whose positions ``shown`` are
    written already and whose earlier blocks are full. A block's first token is read from the full block before."""
    tokens = [WHOLE[p] if p < max(P, block * B) or p in shown else MASK for p in range(block * B + B)]
    log_probs = forward(model, tokens)
    return sum(log_probs[p - shift, WHOLE[p]].item() for p in new)


def forward(model, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        sees = oracles.block_causal(len(tokens), B)
        logits = oracles.qwen2_logits(model, torch.tensor(tokens), torch.arange(len(tokens)), sees)
    return torch.log_softmax(logits, -1)


def free(block: int, block_start: str | None) -> tuple[int, ...]:
    return tuple(p for p in RESPONSE_BLOCKS[block] if block_start != "clean" or p % B)


def group_sizes(tokens: int, steps: int) -> list[int]:
    """Near-equal, as the estimator cuts ``tokens`` ranks into ``min(steps, tokens)`` groups."""
    steps = min(tokens, steps)
    return [sum(1 for rank in range(tokens) if rank * steps // tokens == group) for group in range(steps)]


def orders(block: int, block_start: str, steps: int) -> list[list[frozenset[int]]]:
    """Every order in which a block's tokens can be unmasked, all equally likely: groups of positions, step by step."""
    found = []
    for order in itertools.permutations(free(block, block_start)):
        cuts = list(itertools.accumulate(group_sizes(len(order), steps), initial=0))
        found.append([frozenset(order[a:b]) for a, b in itertools.pairwise(cuts)])
    return found


def decoding_log_prob(model, block: int, groups: list[frozenset[int]], shift: int = 1) -> float:
    """Of one block: its first token as a step of its own where ``groups`` leave it out, then group by group."""
    written = sum((list(group) for group in groups), [])
    first = frozenset(RESPONSE_BLOCKS[block]) - set(written)
    total, shown = 0.0, frozenset()
    for group in ([first] if first else []) + groups:
        total += step_log_prob(model, block, shown, group, shift)
        shown |= group
    return total


def expected_decoding(model, block_start: str | None, steps: int) -> float:
    """The log-probability of the response's decoding, averaged over all orders."""
    total, shift = 0.0, int(block_start is not None)
    for block in RESPONSE_BLOCKS:
        values = [decoding_log_prob(model, block, groups, shift) for groups in orders(block, block_start, steps)]
        total += sum(values) / len(values)
    return total


class Estimate:
    """``L`` of the response by the package's layout and predicate, for noise given position by position.
    ``block_start`` None: of a model with prediction shift 0."""

    def __init__(self, model, block_start: str | None):
        self.model, self.block_start, self.known = model, block_start, {}

    def __call__(self, masked: torch.Tensor, weight: torch.Tensor) -> float:
        """``[K, n, B]`` each."""
        key = (tuple(masked.flatten().tolist()), tuple(weight.flatten().tolist()))
        if key not in self.known:
            self.known[key] = self._compute(masked, weight)
        return self.known[key]

    def _compute(self, masked, weight) -> float:
        sequence = lay_out(
            torch.tensor(PROMPT),
            [torch.tensor(RESPONSE)],
            [masked],
            [weight],
            block_size=B,
            mask_id=MASK,
            block_start=self.block_start,
            shift=int(self.block_start is not None),
        )
        where = sequence.coordinates()
        sees = visible(where.at((slice(None), None)), where.at((None, slice(None))))
        with torch.no_grad():
            logits = oracles.qwen2_logits(self.model, sequence.tokens, sequence.position, sees)
        log_probs = torch.log_softmax(logits, -1)[sequence.target_row, sequence.target_token]
        return (log_probs * sequence.target_weight).sum().item()


def noise_of(hidden: set[int], weights: dict[int, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """One view from positions, ``[1, n, B]`` each."""
    blocks = Blocks(P, len(RESPONSE), B)
    grid = [blocks.start + i for i in range(blocks.count * B)]
    masked = torch.tensor([p in hidden for p in grid]).view(1, blocks.count, B)
    return masked, torch.tensor([float(weights.get(p, 0.0)) for p in grid]).double().view(1, blocks.count, B)


Draw = tuple[frozenset[int], dict[int, Fraction], Fraction]  # masked positions, weights, probability


def dtrpo_draws(block: int, block_start: str, steps: int) -> list[Draw]:
    draws = []
    every = orders(block, block_start, steps)
    for groups in every:
        for t, group in enumerate(groups):
            hidden = frozenset().union(*groups[t:])
            draws.append((hidden, {p: Fraction(len(groups)) for p in group}, Fraction(1, len(every) * len(groups))))
    return draws or [(frozenset(), {}, Fraction(1))]


def elbo_draws(block: int, block_start: str, steps: int) -> list[Draw]:
    places = free(block, block_start)
    draws = []
    for level in range(1, len(places) + 1):
        subsets = list(itertools.combinations(places, level))
        for subset in subsets:
            weight = Fraction(len(places), level)
            draws.append((frozenset(subset), {p: weight for p in subset}, Fraction(1, len(places) * len(subsets))))
    return draws or [(frozenset(), {}, Fraction(1))]


def mean_field_draws(block: int, block_start: str, steps: int) -> list[Draw]:
    places = free(block, block_start)
    return [(frozenset(places), {p: Fraction(1) for p in places}, Fraction(1))]


def joint_draws(of_block, block_start: str, steps: int) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Blocks are drawn independently of one another."""
    found = []
    for combination in itertools.product(*(of_block(block, block_start, steps) for block in RESPONSE_BLOCKS)):
        hidden = set().union(*(draw[0] for draw in combination))
        weights = {p: float(w) for draw in combination for p, w in draw[1].items()}
        found.append((*noise_of(hidden, weights), float(math.prod(draw[2] for draw in combination))))
    assert sum(probability for *_, probability in found) == pytest.approx(1, abs=1e-12)
    return found


def expectation(estimate: Estimate, of_block, steps: int) -> float:
    return sum(p * estimate(masked, weight) for masked, weight, p in joint_draws(of_block, estimate.block_start, steps))


def drawn(name: str, block_start: str, steps: int, views: int = 1):
    """The package's own draws."""
    maskable = Blocks(P, len(RESPONSE), B).maskable(block_start)
    options = EstimatorOptions(steps_per_block=steps)
    for seed in range(DRAWS):
        generators = [noise_generator(seed, 0, 0, 1, view) for view in range(1, views + 1)]
        yield ESTIMATORS[name].draw(NoiseRequest(maskable, generators, options))


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_theorem_1_of_dtrpo(models, steps):
    """Exactly, over all that can be drawn; and the package's draws are those, as often as they should be."""
    estimate = Estimate(models[0], "clean")
    wanted = expected_decoding(models[0], "clean", steps)
    assert expectation(estimate, dtrpo_draws, steps) == pytest.approx(wanted, abs=1e-10)
    expected = Counter()
    for masked, weight, probability in joint_draws(dtrpo_draws, "clean", steps):
        expected[tuple(masked.flatten().tolist()), tuple(weight.flatten().tolist())] += probability
    seen = Counter(
        (tuple(masked.flatten().tolist()), tuple(weight.flatten().tolist()))
        for masked, weight in drawn("dtrpo", "clean", steps)
    )
    assert set(seen) == set(expected)
    chi_square = sum((seen[o] - DRAWS * p) ** 2 / (DRAWS * p) for o, p in expected.items())
    assert chi_square <= len(expected) + 5 * math.sqrt(2 * len(expected))


def recorded_steps() -> dict[int, int]:
    return {4: 1, 5: 0, 6: 2, 7: 4, 8: 3, 9: 5}


def test_theorem_1_of_trajectory(models):
    """A recorded decoding: one order of each block, one of its steps drawn."""
    steps = recorded_steps()
    recorded = {block: [frozenset([p]) for p in sorted(free(block, "clean"), key=steps.get)] for block in (1, 2, 3)}
    wanted = sum(decoding_log_prob(models[0], block, groups) for block, groups in recorded.items())
    estimate = Estimate(models[0], "clean")
    blocks = Blocks(P, len(RESPONSE), B)
    placed = blocks.place(torch.tensor([steps[P + i] for i in range(len(RESPONSE))]))
    kept, values = torch.full_like(placed, KEPT), []
    for seed in range(200):
        generators = [noise_generator(seed, 0, 0, 1, 1)]
        request = NoiseRequest(blocks.maskable("clean"), generators, recording=Recording(placed, kept))
        values.append(estimate(*ESTIMATORS["trajectory"].draw(request)))
    outcomes = set(values)  # two steps in block 1, two in block 2: four equally likely outcomes
    assert len(outcomes) == 4 and sum(outcomes) / 4 == pytest.approx(wanted, abs=1e-10)
    assert estimate(*ESTIMATORS["exact_trajectory"].draw(request)) == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize(("of_block", "steps"), [(dtrpo_draws, 1), (dtrpo_draws, 2), (elbo_draws, 8)])
def test_tokens_at_their_own_rows_have_no_block_start(models, of_block, steps):
    """With prediction shift 0 a block's first token is masked as any other, and nothing is biased."""
    wanted = expected_decoding(models[0], None, steps)
    assert expectation(Estimate(models[0], None), of_block, steps) == pytest.approx(wanted, abs=1e-10)
    assert abs(wanted - expected_decoding(models[0], "noisy", steps)) > 0.1


@pytest.mark.parametrize("block_start", ["clean", "noisy"])
def test_what_is_refused_is_biased(models, block_start):
    """``noisy`` reads a block's first token from a block that is itself half masked: no decoding does, whichever order
    its tokens are unmasked in, the first token among the others or ahead of them."""
    for steps in (2, 8):
        got = expectation(Estimate(models[0], "noisy"), dtrpo_draws, steps)
        assert abs(got - expected_decoding(models[0], block_start, steps)) > 0.1
    refused = {name for name, one in ESTIMATORS.items() if "noisy" not in one.block_starts and not one.autoregressive}
    assert refused == {"dtrpo", "trajectory", "exact_trajectory"}


@pytest.mark.parametrize(("name", "views"), [("elbo", 1), ("vrpo", 1), ("vrpo", 2)])
def test_the_bound_with_clean_starts(models, name, views):
    """The evidence lower bound is the decoding's log-probability one token at a time, averaged over all orders."""
    wanted = expected_decoding(models[0], "clean", 8)
    estimate = Estimate(models[0], "clean")
    assert expectation(estimate, elbo_draws, 8) == pytest.approx(wanted, abs=1e-10)
    values = [estimate(*noise) for noise in drawn(name, "clean", 8, views)]
    assert np.mean(values) == pytest.approx(wanted, abs=5 * np.std(values) / math.sqrt(DRAWS))


def remasked_first(model, block: int, hidden: frozenset[int]) -> float:
    """Log-probability of a block's first token where ``hidden`` of the block before it is masked once more."""
    tokens = [MASK if p in hidden else WHOLE[p] for p in range(block * B)]
    return forward(model, tokens)[-1, WHOLE[block * B]].item()


def bound_with_noisy_starts(model, of_block) -> float:
    """What `docs/method.md` says ``noisy`` estimates: a block's first token is predicted from the block before as that
    block's own noise re-masks it, whatever is visible of its own block; all others as ever."""
    total = 0.0
    for block, places in RESPONSE_BLOCKS.items():
        for hidden, weights, probability in of_block(block, "noisy", 8):
            for p, weight in weights.items():
                if p % B:
                    shown = frozenset(places) - hidden
                    total += float(probability * weight) * step_log_prob(model, block, shown, frozenset([p]))
        if places[0] % B == 0:
            before = of_block(block - 1, "noisy", 8)
            total += sum(float(draw[2]) * remasked_first(model, block, draw[0]) for draw in before)
    return total


@pytest.mark.parametrize("of_block", [elbo_draws, mean_field_draws])
def test_the_bound_with_noisy_starts(models, of_block):
    wanted = bound_with_noisy_starts(models[0], of_block)
    estimate = Estimate(models[0], "noisy")
    assert expectation(estimate, of_block, 8) == pytest.approx(wanted, abs=1e-10)
    assert abs(wanted - expected_decoding(models[0], "clean", 8)) > 0.1  # and not the decoder's policy
    names = ("elbo", "vrpo") if of_block is elbo_draws else ("mean_field",)
    for name in names:
        values = [estimate(*noise) for noise in itertools.islice(drawn(name, "noisy", 8), 1000)]
        assert np.mean(values) == pytest.approx(wanted, abs=5 * np.std(values) / math.sqrt(1000) + 1e-9)


# Theorem 2: a schedule's coefficients cancel in the ratio of policy and reference.


def one_at_a_time(masked: frozenset[int]) -> dict[frozenset[int], float]:
    """Every masked token is as likely as another to be the next."""
    return {frozenset([p]): 1 / len(masked) for p in masked}


def any_subset(masked: frozenset[int]) -> dict[frozenset[int], float]:
    """Every token is unmasked with probability 1/2, or all of them."""
    subsets = [frozenset(c) for n in range(1, len(masked) + 1) for c in itertools.combinations(sorted(masked), n)]
    return {s: 0.5 ** len(masked) + (0.5 ** len(masked) if s == masked else 0) for s in subsets}


def trajectories(masked: frozenset[int], schedule) -> list[tuple[tuple[frozenset[int], ...], float]]:
    if not masked:
        return [((), 1.0)]
    return [
        ((group, *rest), probability * later)
        for group, probability in schedule(masked).items()
        for rest, later in trajectories(masked - group, schedule)
    ]


def test_theorem_2(models):
    ratios, mean = {}, {}
    for schedule in (one_at_a_time, any_subset):
        mean[schedule] = 0.0
        for block in RESPONSE_BLOCKS:
            paths = trajectories(frozenset(free(block, "clean")), schedule)
            assert sum(p for _, p in paths) == pytest.approx(1, abs=1e-12)
            for groups, probability in paths:
                policy, reference = (math.log(probability) + decoding_log_prob(m, block, list(groups)) for m in models)
                known = ratios.setdefault((block, groups), policy - reference)
                assert policy - reference == pytest.approx(known, abs=1e-12)
                mean[schedule] += probability * (policy - reference)
    estimates = [expectation(Estimate(model, "clean"), dtrpo_draws, 8) for model in models]
    assert estimates[0] - estimates[1] == pytest.approx(mean[one_at_a_time], abs=1e-10)
    assert abs(estimates[0] - estimates[1]) > 0.1
