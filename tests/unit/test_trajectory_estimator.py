"""``trajectory`` and ``exact_trajectory``: recorded decodings, replayed step by step."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from megatron_dtrpo.config.backends import BACKENDS
from megatron_dtrpo.config.estimators import EstimatorOptions
from megatron_dtrpo.data.batches import Decoded, Noising
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.recordings import noisy_copies
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.diffusion.estimators import (
    KEPT,
    NoiseRequest,
    Recording,
    distinct_steps,
    noise_generator,
    trajectory,
)
from megatron_dtrpo.diffusion.layout import concatenate, visible
from megatron_dtrpo.model.attention import plan_attention
from tests.support import oracles

B, MASK = 4, 60
EXACT = Noising("exact_trajectory", EstimatorOptions(), 1, "clean", B, MASK, seed=1)
# (prompt, response) lengths: straddling, on the grid, one block, one token, ending on the grid, room behind the end.
SHAPES = [(5, 11), (8, 9), (3, 1), (4, 1), (6, 2), (9, 7), (5, 13), (6, 8), (4, 6)]


@dataclasses.dataclass
class Recorded:
    """A decoding that a decoder could have made. ``discarded``: place, token, step, until."""

    prompt: list[int]
    response: list[int]
    steps: list[int]
    discarded: list[tuple[int, int, int, int]]

    def decoded(self) -> Decoded:
        return Decoded(torch.tensor(self.steps), torch.tensor(self.discarded, dtype=torch.long).view(-1, 4))

    def document(self, noising: Noising, index: int = 0):
        prompt, response = torch.tensor(self.prompt), torch.tensor(self.response)
        return noising.document(Sample(0, index), prompt, [response], [self.decoded()])


def recorded(prompt_length: int, length: int, seed: int) -> Recorded:
    """A block's first token by itself, then one to three tokens a step; in the last block also tokens that the step
    which writes the response's last token, or another one, throws away."""
    rng = random.Random(seed)
    prompt, response = ([rng.randrange(MASK) for _ in range(n)] for n in (prompt_length, length))
    steps, now = [0] * length, 0
    for block in range(prompt_length // B, (prompt_length + length - 1) // B + 1):
        left = [p for p in range(block * B, block * B + B) if 0 <= p - prompt_length < length]
        if left[0] == block * B:
            steps[left.pop(0) - prompt_length] = now
            now += 1
        while left:
            for _ in range(min(len(left), rng.randint(1, 3))):
                steps[left.pop(rng.randrange(len(left))) - prompt_length] = now
            now += rng.randint(1, 2)  # steps need not be consecutive
    result = Recorded(prompt, response, [2 * step for step in steps], [])
    last = prompt_length + length - 1
    earlier = [s for p, s in enumerate(steps, start=prompt_length) if p // B < last // B or p % B == 0]
    first, end = 2 * max(earlier, default=-1) + 1, 2 * max(steps)
    for p in range(last + 1, last // B * B + B):
        if first < end and rng.random() < 0.7:
            result.discarded.append((p - prompt_length, rng.randrange(MASK), rng.randrange(first, end), end))
    return result


def replay(model, one: Recorded) -> float:
    """Log-likelihood of the tokens that each step wrote, from one forward pass a step over what was there then."""
    P = len(one.prompt)
    written = [(P + i, token, step, KEPT) for i, (token, step) in enumerate(zip(one.response, one.steps, strict=True))]
    written += [(P + place, *rest) for place, *rest in one.discarded]
    total = 0.0
    for now in sorted({step for _, _, step, _ in written}):
        new = {p: token for p, token, step, _ in written if step == now}
        shown = dict(enumerate(one.prompt)) | {p: t for p, t, step, until in written if step < now <= until}
        begin = min(new) // B * B
        length = begin if begin in new else begin + B  # a block's first token: the pass that finished the block before
        tokens = torch.tensor([shown.get(p, MASK) for p in range(length)])
        with torch.no_grad():
            sees = oracles.block_causal(length, B)
            log_probs = torch.log_softmax(oracles.qwen2_logits(model, tokens, torch.arange(length), sees), -1)
        total += sum(log_probs[p - 1, token].item() for p, token in new.items())
    return total


def packed_log_likelihood(model, sequence) -> float:
    where = sequence.coordinates()
    sees = visible(where.at((slice(None), None)), where.at((None, slice(None))))
    with torch.no_grad():
        logits = oracles.qwen2_logits(model, sequence.tokens, sequence.position, sees)
    log_probs = torch.log_softmax(logits, -1)[sequence.target_row, sequence.target_token]
    return (log_probs * sequence.target_weight).sum().item()


@pytest.fixture(scope="module")
def model():
    return oracles.qwen2()


@pytest.mark.parametrize("P, R", SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_exact_trajectory_is_the_decoding(model, P, R, seed):
    """One packed forward pass of all steps, against a forward pass of its own for every step of the decoder."""
    one = recorded(P, R, seed)
    wanted = replay(model, one)
    assert wanted < -1 and packed_log_likelihood(model, one.document(EXACT)) == pytest.approx(wanted, abs=1e-9)
    if one.discarded:
        without = dataclasses.replace(one, discarded=[])
        assert packed_log_likelihood(model, without.document(EXACT)) == pytest.approx(replay(model, without), abs=1e-9)
        assert replay(model, without) != pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("name", ["dtrpo", "vrpo", "mean_field"])
def test_other_estimators_do_not_see_a_recording(name):
    """Behind the end token they see ``[MASK]``, whatever the row has recorded."""
    noising = dataclasses.replace(EXACT, estimator=name)
    for P, R in SHAPES:
        one = recorded(P, R, 1)
        plain = noising.document(Sample(0, 0), torch.tensor(one.prompt), [torch.tensor(one.response)])
        assert torch.equal(one.document(noising).tokens, plain.tokens)


def test_the_shapes_discard():
    assert sum(len(recorded(P, R, seed).discarded) for P, R in SHAPES for seed in (0, 1, 2)) > 5


@pytest.mark.parametrize("P, R", SHAPES)
def test_trajectory_is_exact_on_average(model, P, R):
    """The mean over its draws, each of a block's steps as likely as another, is the exact log-likelihood."""
    one = recorded(P, R, 1)
    noising = Noising("trajectory", EstimatorOptions(), 1, "clean", B, MASK, seed=1)
    values = [packed_log_likelihood(model, one.document(noising, index)) for index in range(150)]
    spread = 5 * np.std(values) / math.sqrt(len(values))
    assert np.mean(values) == pytest.approx(replay(model, one), abs=spread + 1e-9)


@pytest.mark.parametrize("P, R", SHAPES)
def test_a_block_has_as_many_copies_as_it_had_steps(P, R):
    """And no token is laid out that no prediction reads."""
    one = recorded(P, R, 2)
    document = one.document(EXACT)
    steps: dict[int, set[int]] = {}
    for place, step in [*enumerate(one.steps), *((place, step) for place, _, step, _ in one.discarded)]:
        if (P + place) % B:
            steps.setdefault((P + place) // B, set()).add(step)
    noisy = document.view > 0
    copies = Counter(zip(document.position[noisy].tolist(), document.view[noisy].tolist(), strict=True))
    assert set(copies.values()) <= {1}
    per_block = Counter(position // B for position, _ in copies)
    assert per_block == {block: B * len(of_block) for block, of_block in steps.items()}
    assert document.target_row.unique().numel() == len(document.target_row) == R + len(one.discarded)


def test_lengths_are_known_before_anything_is_laid_out(tmp_path):
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    rows, pairs = [], []
    for seed in range(60):
        P, R = random.Random(seed).choice(SHAPES)
        pair = [recorded(P, R, seed), recorded(P, R + 3, seed + 1000)]
        pairs.append([dataclasses.replace(one, prompt=pair[0].prompt) for one in pair])
        row = {"prompt_ids": pair[0].prompt}
        for name, one in zip(("chosen", "rejected"), pair, strict=True):
            names = ("place", "token", "step", "until")
            row |= {f"{name}_ids": one.response, f"{name}_steps": one.steps}
            row[f"{name}_discarded"] = [dict(zip(names, token, strict=True)) for token in one.discarded]
        rows.append(row)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = build_token_store(tmp_path / "rows.jsonl", "preference", tokenizer, tmp_path / "cache")
    assert noisy_copies(store, B, "clean").shape == (60, 2) and store.first_incomplete is None
    own = dataclasses.replace(EXACT, block_start=None, shift=0)
    lengths, of_own = EXACT.packed_lengths(store), own.packed_lengths(store)
    for index, (one, other) in enumerate(pairs):
        prompt, responses = torch.tensor(one.prompt), [torch.tensor(r.response) for r in (one, other)]
        document = EXACT.document(Sample(0, index), prompt, responses, [one.decoded(), other.decoded()])
        assert lengths[index] == len(document)
        document = own.document(Sample(0, index), prompt, responses, [one.decoded(), other.decoded()])
        assert of_own[index] == len(document) >= lengths[index]
        assert [d.tolist() for d in store[index].discarded] == [
            [list(token) for token in sorted(r.discarded)] for r in (one, other)
        ]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [8, 1 << 40])
def test_every_backend_follows_views_with_gaps(backend, width):
    sequence = concatenate([recorded(P, R, seed).document(EXACT) for seed, (P, R) in enumerate(SHAPES)])
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(len(sequence), n, 8, generator=generator).double() for n in (4, 2, 2))
    plan = plan_attention(sequence.coordinates(), B, backend, width=width)
    got = BACKENDS[backend].attend(query, key, value, plan.plan, 0.3)
    sees = oracles.sees_by_description(sequence.document, sequence.branch, sequence.view, sequence.position, B)
    torch.testing.assert_close(got, oracles.dense_attention(query, key, value, sees, 0.3), rtol=0, atol=1e-11)


def test_steps_are_distinct_and_in_order():
    writable = torch.tensor([[False, True, True, True], [True] * 4, [False, False, True, False], [False] * 4])
    written = torch.tensor([[9, 5, 7, 5], [30, 10, 20, 11], [1, 2, 40, 3], [1, 2, 3, 4]])
    steps, count = distinct_steps(writable, written)
    assert [row[:n] for row, n in zip(steps.tolist(), count.tolist(), strict=True)] == [
        [5, 7],
        [10, 11, 20, 30],
        [40],
        [],
    ]


def test_draws_are_uniform_over_the_recorded_steps():
    """Each of a block's T steps is as likely as another; what it wrote is read with weight T / K, and it, with all that
    comes later or was thrown away by then, is masked."""
    n, views = 6000, 2
    written, until = torch.tensor([[4, 6, 6, 9, 4, 6, 6, 6], [KEPT] * 7 + [8]])
    maskable = torch.tensor([False] + [True] * 6 + [False])
    generators = [noise_generator(5, 0, 0, 1, view) for view in (1, 2)]
    recording = Recording(written.repeat(n, 1), until.repeat(n, 1))
    masked, weight = trajectory(NoiseRequest(maskable.repeat(n, 1), generators, EstimatorOptions(), recording))
    seen = Counter()
    for hidden, w in zip(masked.view(-1, 8).tolist(), weight.view(-1, 8).tolist(), strict=True):
        seen[tuple(hidden), tuple(w)] += 1
    expected = set()
    for now in (4, 6, 9):
        hidden = tuple(i > 0 and (s >= now or (i == 7 and now > 8)) for i, s in enumerate(written.tolist()))
        expected.add((hidden, tuple((3 / views) * (i > 0 and s == now) for i, s in enumerate(written.tolist()))))
    assert set(seen) == expected
    each = views * n / 3
    assert sum((count - each) ** 2 / each for count in seen.values()) < 2 + 5 * math.sqrt(4)
    assert not torch.equal(masked[0], masked[1])


@pytest.mark.parametrize("P, R", SHAPES)
def test_documents_hold_moments_of_their_own_decoding(P, R):
    """Both responses of a pair, straddling blocks and all: each noisy block shows what was there at one step."""
    noising = Noising("trajectory", EstimatorOptions(), 3, "clean", B, MASK, seed=1)
    one, other = recorded(P, R, 0), recorded(P, R + 5, 1)
    pair = [one, dataclasses.replace(other, prompt=one.prompt)]
    prompt, responses = torch.tensor(one.prompt), [torch.tensor(r.response) for r in pair]
    for index in range(20):
        document = noising.document(Sample(0, index), prompt, responses, [r.decoded() for r in pair])
        for branch, recording in enumerate(pair, start=1):
            response, when = recording.response, recording.steps
            for view in (1, 2, 3):
                here = (document.branch == branch) & (document.view == view)
                shown = dict(zip(document.position[here].tolist(), document.tokens[here].tolist(), strict=True))
                for first in range(P // B * B, P + len(response), B):
                    own = [p for p in range(max(first, P), min(first + B, P + len(response)))]
                    free = [p for p in own if p % B]
                    hidden = [p for p in free if shown[p] == MASK]
                    assert all(shown[p] == response[p - P] for p in own if p not in hidden)
                    if hidden:
                        since = min(when[p - P] for p in hidden)
                        assert hidden == [p for p in free if when[p - P] >= since]
