"""A response that its caller ends early consists of finished blocks."""

from __future__ import annotations

import torch

from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.diffusion.decoding import Decoding
from megatron_dtrpo.evaluation.generation import efficiency

BLOCK, MASK = 4, 99


def test_settled_after_each_block_but_the_last_and_stopped_there():
    options = DecodingOptions(max_new_tokens=10, threshold=0.0, small_block_size=BLOCK)
    state = Decoding([1], options, block_size=BLOCK, mask_id=MASK, end_ids=frozenset(), max_positions=100)
    finished_blocks = []
    for _ in range(3):
        count = len(state.next_pass().rows)
        state.update([7] * count, torch.full((count,), 0.5))
        finished_blocks.append(state.finished_blocks())
    assert finished_blocks == [
        [7] * 3,
        None,
        [7] * 7,
    ]  # the block, the clean pass with the next one's first token, the block
    state.stop()
    assert state.finished
    done = state.completion()
    assert (done.tokens, done.ended, done.blocks) == ([7] * 7, False, [0] * 3 + [1] * 4)
    assert efficiency([done, done._replace(stopped=False)])["completions/clipped_ratio"] == 0.5


def test_nothing_is_settled_while_the_prompt_is_read_or_when_all_is_written():
    options = DecodingOptions(max_new_tokens=3, threshold=0.0, small_block_size=BLOCK)
    state = Decoding([1] * 5, options, block_size=BLOCK, mask_id=MASK, end_ids=frozenset(), max_positions=100)
    assert not state.finished_blocks()
    state.update([], torch.empty(0))
    assert state.finished_blocks() is None
    state.next_pass()
    state.update([7] * 3, torch.full((3,), 0.5))
    assert state.finished and state.finished_blocks() is None
