"""The decoder's state machine, driven by hand: what it asks for and what it makes of the answers."""

from __future__ import annotations

import math
import random

import pytest
import torch

from megatron_dtrpo.config.decoding import RULES, DecodingOptions
from megatron_dtrpo.diffusion.decoding import Decoding

MASK, END = 99, 98


def decoding(prompt_length: int, block_size: int = 4, max_positions: int = 1000, shift: int = 1, **options) -> Decoding:
    options = {"max_new_tokens": 10, "threshold": 0.9, "small_block_size": 2} | options
    return Decoding(
        list(range(prompt_length)),
        DecodingOptions(**options),
        block_size=block_size,
        mask_id=MASK,
        end_ids=frozenset([END]),
        max_positions=max_positions,
        shift=shift,
    )


def give(state: Decoding, *answers: tuple[int, float]) -> None:
    state.update([token for token, _ in answers], torch.tensor([sure for _, sure in answers]))


def test_short_prompt_starts_in_its_own_block():
    state = decoding(1)
    assert state.next_pass()[:4] == (0, [0, MASK, MASK, MASK], [0], 4)
    give(state, (7, 0.3))
    assert state.next_pass()[:4] == (0, [0, 7, MASK, MASK], [1, 2], 4)
    give(state, (8, 0.95), (9, 0.91))  # both above the threshold
    assert state.next_pass()[:4] == (0, [0, 7, 8, 9], [3], 4)  # the clean pass, and the next block's first token
    give(state, (10, 0.2))
    assert state.next_pass()[:4] == (4, [10, MASK, MASK, MASK], [0], 8)
    assert state.steps[1:5] == [0, 1, 1, 2]


def test_full_prompt_blocks_are_cached_first():
    state = decoding(8)
    assert state.next_pass()[:4] == (0, list(range(8)), [7], 8)
    give(state, (20, 0.5))
    assert state.next_pass()[:4] == (8, [20, MASK, MASK, MASK], [0], 12)
    state = decoding(6)
    assert state.next_pass()[:4] == (0, [0, 1, 2, 3], [], 4)  # the straddling block's first token is the prompt's
    state.update([], torch.empty(0))
    assert state.next_pass()[:4] == (4, [4, 5, MASK, MASK], [1, 2], 8)


def test_a_clean_block_that_predicts_nothing_goes_along_with_the_next_block():
    state = decoding(3, shift=0, small_block_size=4)
    assert state.next_pass() == (0, [0, 1, 2, MASK], [3], 4, 0)
    give(state, (7, 0.3))
    assert state.finished_blocks() == [7]  # and it may be stopped here
    assert state.next_pass() == (0, [0, 1, 2, 7, MASK, MASK, MASK, MASK], [4, 5, 6, 7], 8, 4)
    give(state, (8, 0.95), (9, 0.3), (9, 0.3), (9, 0.3))
    assert state.next_pass() == (4, [8, MASK, MASK, MASK], [1, 2, 3], 8, 0)
    assert state.steps[3:5] == [0, 1] and state.passes == 2
    state = decoding(9, shift=0)  # several blocks of a prompt are a pass of their own
    assert state.next_pass() == (0, list(range(8)), [], 8, 0)
    state.update([], torch.empty(0))
    assert state.next_pass() == (8, [8, MASK, MASK, MASK], [1], 12, 0)


def test_the_end_token_ends_and_what_follows_is_masked_again():
    state = decoding(1, small_block_size=4)
    assert state.next_pass()[:4] == (0, [0, MASK, MASK, MASK], [0, 1, 2], 4)
    give(state, (5, 0.1), (END, 0.95), (6, 0.99))
    assert not state.finished
    assert state.next_pass()[:4] == (0, [0, MASK, END, MASK], [0], 4)
    give(state, (5, 0.1))
    assert state.finished
    done = state.completion()
    assert (done.tokens, done.steps, done.blocks, done.ended, done.passes) == ([5, END], [1, 0], [0, 0], True, 2)
    assert done.confidence == pytest.approx([0.1, 0.95])
    assert done.discarded == []  # the step that wrote the end token wrote nothing behind it
    assert done.log_likelihood() == pytest.approx(math.log(0.1) + math.log(0.95))


def test_an_earlier_end_token_replaces_a_later_one():
    state = decoding(1, small_block_size=4)
    state.next_pass()
    give(state, (1, 0.2), (2, 0.3), (END, 0.95))
    state.next_pass()
    give(state, (END, 0.95), (7, 0.1))
    assert state.finished and state.completion().tokens == [END]


def test_what_an_end_token_throws_away_is_recorded():
    """Also where end tokens are thrown away themselves: each token with the step whose pass saw it last."""
    state = decoding(1, block_size=8, small_block_size=8)
    state.next_pass()
    give(state, (1, 0.1), (2, 0.1), (3, 0.1), (4, 0.1), (END, 0.95), (6, 0.92), (7, 0.2))  # 6 is never seen
    assert state.next_pass().tokens == [0, MASK, MASK, MASK, MASK, END, MASK, MASK]
    give(state, (1, 0.2), (2, 0.3), (3, 0.1), (4, 0.95))
    assert state.next_pass().tokens == [0, MASK, MASK, MASK, 4, END, MASK, MASK]
    give(state, (1, 0.1), (END, 0.96), (3, 0.92))  # nor is 3
    assert state.next_pass().tokens == [0, MASK, END, MASK, MASK, MASK, MASK, MASK]
    give(state, (1, 0.5))
    done = state.completion()
    assert (done.tokens, done.steps) == ([1, END], [3, 2])
    assert [token[:4] for token in done.discarded] == [(3, 4, 1, 2), (4, END, 0, 2)]
    assert done.log_likelihood() == pytest.approx(sum(map(math.log, (0.5, 0.96, 0.95, 0.95))))


@pytest.mark.parametrize(("prompt", "limit", "expected"), [(3, 1000, 5), (3, 6, 3), (4, 5, 1), (8, 1000, 5)])
def test_limits(prompt, limit, expected):
    state = decoding(prompt, max_new_tokens=5, max_positions=limit)
    while not state.finished:
        asked = state.next_pass().rows
        give(state, *[(1, 0.5)] * len(asked))
    done = state.completion()
    assert len(done.tokens) == expected and not done.ended


def test_sub_block_passes_need_a_known_first_token_and_a_whole_pass_before():
    state = decoding(4, small_block_size=2, sub_block_cache="dual", threshold=1.0)
    extents = []
    while not state.finished:
        one = state.next_pass()
        extents.append((one.start, len(one.tokens)))
        give(state, *[(1, 0.5)] * len(one.rows))
    assert extents[:6] == [(0, 4), (4, 4), (4, 4), (6, 2), (4, 4), (8, 4)]


def test_any_answers_lead_to_a_whole_response():
    """Steps never fall from block to block, every token is written once, and only the end token ends early."""
    rng = random.Random(0)
    for _ in range(300):
        block = rng.choice((1, 2, 4, 8))
        small = rng.choice([s for s in (1, 2, 4, 8) if block % s == 0])
        rule = rng.choice(list(RULES))
        reads = RULES[rule].reads
        state = decoding(
            rng.randint(1, 20),
            block,
            small_block_size=small,
            max_new_tokens=rng.randint(1, 20),
            rule=rule,
            threshold=rng.random() if "threshold" in reads else None,
            denoising_steps=rng.choice((None, 1, 3, 20)) if "denoising_steps" in reads else None,
            sub_block_cache=rng.choice((None, "prefix", "dual")),
            shift=rng.choice((0, 1)),
        )
        while not state.finished:
            one = state.next_pass()
            assert all(0 <= row < len(one.tokens) for row in one.rows)
            give(state, *[(END if rng.random() < 0.05 else 1, rng.random()) for _ in one.rows])
        done = state.completion()
        assert MASK not in done.tokens and None not in done.steps
        places = [token.place for token in done.discarded]
        assert len(set(places)) == len(places) and all(place >= len(done.tokens) for place in places)
        assert all(token.step < token.until for token in done.discarded)
        assert (END in done.tokens) == done.ended == (done.tokens[-1] == END)
        for a in range(len(done.tokens)):
            for b in range(a + 1, len(done.tokens)):
                if done.blocks[a] < done.blocks[b]:
                    assert done.steps[a] < done.steps[b]
