"""The proposals of a decoding step, against the distribution written out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_dtrpo.diffusion.sampling import MEASURES, _nucleus, choose, most_probable, propose


def nucleus(logits: list[float], temperature: float, top_p: float) -> dict[int, float]:
    """Fast-dLLM v2's rule: down the sorted probabilities a token stays while the sum before it is at most top_p."""
    exponential = [math.exp(x / temperature) for x in logits]
    probability = {i: e / sum(exponential) for i, e in enumerate(exponential)}
    kept, before = {}, 0.0
    for i in sorted(probability, key=lambda i: -probability[i]):
        if not kept or before <= top_p:
            kept[i] = probability[i]
        before += probability[i]
    total = sum(kept.values())
    return {i: p / total for i, p in kept.items()}


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.4, 0.9, 1.0])
def test_draws_follow_the_cut_distribution(temperature, top_p):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    expected = nucleus(logits.tolist(), temperature, top_p)
    grid = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    nothing = torch.zeros(12, dtype=torch.bool)
    token, confidence, _ = propose(logits.repeat(len(grid), 1), nothing, grid, temperature, top_p)
    share = torch.bincount(token, minlength=12).double() / len(grid)
    for i in range(12):
        assert share[i] == pytest.approx(expected.get(i, 0.0), abs=2e-4)
    for t, c in zip(token[::997].tolist(), confidence[::997].tolist(), strict=True):
        assert c == pytest.approx(expected[t], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.95, 0.9999])
@pytest.mark.parametrize("size", [7, 32, 33, 300, 2500, 20000])
def test_the_nucleus_is_that_of_a_whole_stable_sort(size, top_p, dtype):
    """Sharp predictions and flat ones, with and without many equals, in one call."""
    logits = torch.randn(40, size, generator=torch.Generator().manual_seed(3), dtype=dtype)
    logits *= torch.logspace(-3, 1.5, 40, dtype=dtype).unsqueeze(1)
    logits[::2] = logits[::2].round()
    logits[5], logits[6, 1:] = 0, -torch.inf
    probability = torch.softmax(logits, -1)
    for row, found in zip(probability, _nucleus(probability, top_p), strict=True):
        order = row.sort(descending=True, stable=True).indices
        before = row[order].cumsum(0) - row[order]
        stays = torch.zeros(size, dtype=torch.bool)
        stays[order[(before <= top_p) | (torch.arange(size) == 0)]] = True
        assert torch.equal(found > 0, stays & (row > 0))
        assert torch.allclose(found, torch.where(stays, row, 0) / row[stays].sum(), rtol=1e-6, atol=0)


def test_extreme_draws_stay_inside_and_forbidden_tokens_are_never_drawn():
    logits = torch.randn(400, 9, generator=torch.Generator().manual_seed(2))
    forbidden = torch.arange(9) == 4
    uniform = torch.cat([torch.zeros(200), torch.full((200,), 1 - 1e-16)]).double()
    token, confidence, _ = propose(logits, forbidden, uniform, 1.0, 0.7)
    assert (token != 4).all() and (confidence > 0).all()
    for row, t in zip(logits.tolist(), token.tolist(), strict=True):
        assert t in nucleus([-1e9 if i == 4 else x for i, x in enumerate(row)], 1.0, 0.7)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.6)])
def test_sampled_confidence_counts_forbidden_tokens_in_the_normaliser(temperature, top_p):
    """At temperature 1 and top_p 1 it is the probability that training knows."""
    logits, forbidden = torch.tensor([[1.0, 3.0, 2.0, 0.5]]).repeat(99, 1), torch.tensor([False, True, False, False])
    token, confidence, _ = propose(logits, forbidden, (torch.arange(99) + 0.5) / 99, temperature, top_p)
    exponential = [math.exp(x / temperature) for x in (1.0, 3.0, 2.0, 0.5)]
    allowed = nucleus([1.0, -1e9, 2.0, 0.5], temperature, top_p)
    assert set(token.tolist()) == {t for t, p in allowed.items() if p > 0}
    for t, c in zip(token.tolist(), confidence.tolist(), strict=True):
        assert c == pytest.approx(allowed[t] * (1 - exponential[1] / sum(exponential)), rel=1e-5)
        if top_p == 1:
            assert c == pytest.approx(exponential[t] / sum(exponential), rel=1e-5)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("name", MEASURES)
def test_measures_combine_over_shards_of_the_vocabulary(name, shards):
    """Forbidden tokens count in the normaliser and nowhere else; padding nowhere, a whole shard of it neither."""
    logits = 4 * torch.randn(7, 12, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    logits[:, 8:] = -torch.inf
    forbidden = (torch.arange(12) == 2) | (torch.arange(12) >= 8)
    expected = []
    for row in logits[:, :8].exp().tolist():
        p = sorted(x / sum(row) for i, x in enumerate(row) if i != 2)
        expected.append(p[-1] - p[-2] if name == "margin" else sum(x * math.log(x) for x in p))
    parts, normalisers = [], []
    for here, unwanted in zip(logits.chunk(shards, 1), forbidden.chunk(shards), strict=True):
        normalisers.append(here.logsumexp(1))
        own = (here - normalisers[-1].unsqueeze(1)).masked_fill(unwanted, -torch.inf).exp()
        parts.append(MEASURES[name].parts(own))
    share = torch.softmax(torch.stack(normalisers), 0)
    assert MEASURES[name].joined(torch.stack(parts), share).tolist() == pytest.approx(expected, abs=1e-12)
    _, _, rank = propose(logits, forbidden, torch.zeros(7, dtype=torch.float64), 1.0, 1.0, MEASURES[name])
    assert rank.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_measure_is_of_the_tempered_and_cut_distribution():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.5]])
    kept = sorted(nucleus(logits[0].tolist(), 2.0, 0.6).values())
    for name, expected in (
        ("margin", kept[-1] - kept[-2]),
        ("entropy", sum(p * math.log(p) for p in kept)),
    ):
        _, _, rank = propose(logits, torch.zeros(4).bool(), torch.zeros(1), 2.0, 0.6, MEASURES[name])
        assert rank.item() == pytest.approx(expected, rel=1e-5)


def test_greedy_confidence_counts_forbidden_tokens_in_the_normaliser():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    token, best, normaliser = most_probable(logits, torch.tensor([False, True, False]))
    assert token.item() == 2
    assert (best - normaliser).exp().item() == pytest.approx(math.exp(2) / sum(map(math.exp, (1, 2, 3))))


@pytest.mark.parametrize(
    ("confidence", "threshold", "expected"),
    [
        ([0.2, 0.95, 0.91], 0.9, [False, True, True]),
        ([0.2, 0.5, 0.3], 0.9, [False, True, False]),  # always the surest
        ([0.9, 0.9], 0.9, [True, False]),  # strictly above; a tie goes to the first
        ([0.1, 0.2, 0.3], 0.0, [True, True, True]),
        ([1.0, 1.0], 1.0, [True, False]),
    ],
)
def test_what_is_accepted(confidence, threshold, expected):
    confidence = torch.tensor(confidence)
    assert choose(confidence, confidence, 1, threshold).tolist() == expected
