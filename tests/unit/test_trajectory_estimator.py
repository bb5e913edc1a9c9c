"""``trajectory``: the sum over all its steps is the log-likelihood of a recorded decoding, replayed step by step."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.data.sampler import Sample
from megatron_dtrpo.diffusion.estimators import (
    EstimatorOptions,
    NoiseRequest,
    at_timestep,
    noise_generator,
    recorded_groups,
    trajectory,
)
from megatron_dtrpo.diffusion.layout import Blocks, lay_out, visible
from tests import oracles

B, MASK = 4, 60
# (prompt, response) lengths: straddling, on the grid, one block, ending on the grid.
SHAPES = [(5, 11), (8, 9), (3, 1), (6, 2), (9, 7)]


def recorded(prompt_length: int, length: int, seed: int, block_start: str = "clean") -> list[int]:
    """Steps that a decoder could have taken: a block's first token by itself, then one to three tokens a step."""
    generator = torch.Generator().manual_seed(seed)
    steps, now = [0] * length, 0
    for block in range(prompt_length // B, (prompt_length + length - 1) // B + 1):
        left = [p for p in range(block * B, block * B + B) if 0 <= p - prompt_length < length]
        if block_start == "clean" and left[0] == block * B:
            steps[left.pop(0) - prompt_length] = now
            now += 1
        while left:
            for _ in range(min(len(left), int(torch.randint(1, 4, (), generator=generator)))):
                place = int(torch.randint(len(left), (), generator=generator))
                steps[left.pop(place) - prompt_length] = now
            now += int(torch.randint(1, 3, (), generator=generator))  # steps need not be consecutive
    return steps


def replay(model, prompt: list[int], response: list[int], steps: list[int], block_start: str) -> float:
    """Log-likelihood of the tokens that each step unmasked, from one forward pass a step over what was there then."""
    P, whole = len(prompt), prompt + response
    total = 0.0
    for step in sorted(set(steps)):
        for block in range(P // B, (len(whole) - 1) // B + 1):
            new = [p for p in range(block * B, block * B + B) if P <= p < len(whole) and steps[p - P] == step]
            if not new:
                continue
            here = [p for p in range(P, len(whole)) if p // B == block]
            shown = {p for p in here if steps[p - P] < step}
            tokens = whole[: block * B]
            for p in range(block * B, block * B + B):
                known = p < P or p in shown
                tokens.append(whole[p] if known else MASK)
            if block_start == "clean" and new == [block * B]:  # from the pass that finished the block before
                tokens = tokens[: block * B]
            position = torch.arange(len(tokens))
            sees = position.unsqueeze(1) // B >= position // B
            with torch.no_grad():
                log_probs = torch.log_softmax(oracles.qwen2_logits(model, torch.tensor(tokens), position, sees), -1)
            total += sum(log_probs[p - 1, whole[p]].item() for p in new)
    return total


def all_steps(maskable, steps) -> tuple[torch.Tensor, torch.Tensor]:
    """One view per timestep, as the estimator has it, each step read once: ``[T, n, B]`` twice."""
    group, count = recorded_groups(maskable, steps)
    views = [at_timestep(maskable, group, torch.full_like(count, t)) for t in range(max(int(count.max()), 1))]
    masked, read = (torch.stack(t) for t in zip(*views, strict=True))
    return masked, read.double()


def packed_log_likelihood(model, prompt, response, masked, weight, block_start) -> float:
    sequence = lay_out(
        torch.tensor(prompt), [torch.tensor(response)], [masked], [weight],
        block_size=B, mask_id=MASK, block_start=block_start,
    )  # fmt: skip
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
@pytest.mark.parametrize("seed", [0, 1])
def test_all_steps_together_are_the_decoding(model, P, R, seed):
    """One packed forward pass of all timesteps, against a forward pass of its own for every step of the decoder."""
    generator = torch.Generator().manual_seed(100 + seed)
    prompt, response = (torch.randint(0, MASK, (n,), generator=generator).tolist() for n in (P, R))
    steps = recorded(P, R, seed)
    blocks = Blocks(P, R, B)
    masked, weight = all_steps(blocks.maskable("clean"), blocks.place(torch.tensor(steps)))
    got = packed_log_likelihood(model, prompt, response, masked, weight, "clean")
    wanted = replay(model, prompt, response, steps, "clean")
    assert wanted < -1 and got == pytest.approx(wanted, abs=1e-9)
    if len(set(steps)) > 2:
        other = [max(steps) - step for step in steps]  # another order is another number
        masked, weight = all_steps(blocks.maskable("clean"), blocks.place(torch.tensor(other)))
        if masked[:, :, 1:].any():
            changed = packed_log_likelihood(model, prompt, response, masked, weight, "clean")
            assert changed != pytest.approx(wanted, abs=1e-3)


def test_groups_are_the_distinct_steps_in_order():
    maskable = torch.tensor([[False, True, True, True], [True] * 4, [False, False, True, False], [False] * 4])
    steps = torch.tensor([[9, 5, 7, 5], [30, 10, 20, 11], [1, 2, 40, 3], [1, 2, 3, 4]])
    group, count = recorded_groups(maskable, steps)
    assert count.tolist() == [2, 4, 1, 0]
    assert [group[b][maskable[b]].tolist() for b in range(3)] == [[0, 1, 0], [3, 0, 2, 1], [0]]


def test_draws_are_uniform_over_the_recorded_steps():
    """Each of a block's T steps is as likely as another; what it unmasks is read with weight T / K, and it, with all
    that comes later, is masked."""
    n, views = 6000, 2
    steps = torch.tensor([4, 6, 6, 9, 4, 6, 6, 6]).repeat(n, 1)
    maskable = torch.tensor([False] + [True] * 7).repeat(n, 1)
    generators = [noise_generator(5, 0, 0, 1, view) for view in (1, 2)]
    masked, weight = trajectory(NoiseRequest(maskable, generators, EstimatorOptions(), steps))
    seen = Counter()
    for hidden, w in zip(masked.view(-1, 8).tolist(), weight.view(-1, 8).tolist(), strict=True):
        seen[tuple(hidden), tuple(w)] += 1
    expected = set()
    for now in (4, 6, 9):
        hidden = tuple(i > 0 and s >= now for i, s in enumerate(steps[0].tolist()))
        expected.add((hidden, tuple((3 / views) * (i > 0 and s == now) for i, s in enumerate(steps[0].tolist()))))
    assert set(seen) == expected
    each = views * n / 3
    assert sum((count - each) ** 2 / each for count in seen.values()) < 2 + 5 * math.sqrt(4)
    assert not torch.equal(masked[0], masked[1])


@pytest.mark.parametrize("P, R", SHAPES)
@pytest.mark.parametrize("block_start", ["clean", "noisy"])
def test_documents_hold_moments_of_their_own_decoding(P, R, block_start):
    """Both responses of a pair, straddling blocks and all: each noisy block shows what was there at one step."""
    noising = Noising("trajectory", EstimatorOptions(), 3, block_start, B, MASK, seed=1)
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, MASK, (P,), generator=generator)
    responses = [torch.randint(0, MASK, (n,), generator=generator) for n in (R, R + 5)]
    steps = [torch.tensor(recorded(P, n, seed, block_start)) for seed, n in enumerate((R, R + 5))]
    for index in range(20):
        document = noising.document(Sample(0, index), prompt, responses, steps)
        for branch, (response, when) in enumerate(zip(responses, steps, strict=True), start=1):
            for view in (1, 2, 3):
                here = (document.branch == branch) & (document.view == view)
                shown = dict(zip(document.position[here].tolist(), document.tokens[here].tolist(), strict=True))
                for first in range(P // B * B, P + len(response), B):
                    own = [p for p in range(max(first, P), min(first + B, P + len(response)))]
                    free = [p for p in own if block_start == "noisy" or p % B]
                    hidden = [p for p in free if shown[p] == MASK]
                    assert all(shown[p] == response[p - P] for p in own if p not in hidden)
                    if free:
                        since = min(int(when[p - P]) for p in hidden)
                        assert hidden == [p for p in free if when[p - P] >= since]
