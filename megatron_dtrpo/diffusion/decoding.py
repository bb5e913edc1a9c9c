"""How one response is written: Fast-dLLM v2's decoder as a state machine that knows no model.

A block starts as ``[MASK]`` behind its first token. Its sub-blocks are unmasked from left to right, several tokens a
step, as a rule says (`config.decoding.RULES`). A full block is passed through the model once more, clean: that pass
fills the key/value cache for good, and its last row predicts the next block's first token.

`Decoding.next_pass` says what the model is to compute, `Decoding.update` takes the predictions. Positions are
absolute, the prompt is ``0 .. P-1``; the prediction of position p is read from the row of p - 1. In a model of
prediction shift 0 it is read from the row of p itself: a block's first token is masked as the others are, and the clean
pass fills the cache and predicts nothing. It is then no pass of its own: the next block's first pass takes it along.

Under full attention the whole response is one block, whose sub-blocks begin with its first token; every pass is over
the prompt and all of it. An end token ends nothing there: the model saw what stands behind it, and it is kept.

Once an end token is written, the tokens behind it in the block return to ``[MASK]``, which training sees there
(`layout.lay_out`). The model saw those that earlier steps had written: they are part of the recorded trajectory, as
`Discarded` tokens. docs/decoding.md lists the differences to Fast-dLLM v2's decoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.config.decoding import RULES, DecodingOptions
from megatron_dtrpo.diffusion.sampling import PLACES, SHARES, choose


class Pass(NamedTuple):
    """One sequence's share of a forward pass: ``tokens`` at positions ``start, start + 1, ...``, whole blocks or a part
    of one; predictions are read from ``rows`` of it. Keys and values of positions before ``visible`` are seen; by the
    first ``clean`` tokens, a finished block before the one that is written, only those up to their own last one."""

    start: int
    tokens: Sequence[int]
    rows: Sequence[int]
    visible: int
    clean: int = 0


class Discarded(NamedTuple):
    """A token that decoding wrote and threw away again, because a later step wrote an end token before it.

    ``place``: where it stood in the response, counted from 0; the response is shorter. ``step`` wrote it; ``until``
    wrote the end token, and is the last step whose pass saw it.
    """

    place: int
    token: int
    step: int
    until: int
    confidence: float


class Completion(NamedTuple):
    """A finished response: per token its id, the decoding step that wrote it (from 0; several tokens may share one),
    the confidence with which, and its block. ``passes``: forward passes this sequence took part in, those that fill the
    cache included. ``ended``: by an end token, not by the limit. ``discarded``: the tokens that were thrown away.
    ``answer_length``: tokens up to the first end token, all of them but under full attention. ``stopped``: by its
    caller, see `Decoding.stop`."""

    tokens: list[int]
    steps: list[int]
    confidence: list[float]
    blocks: list[int]
    passes: int
    ended: bool
    discarded: list[Discarded]
    answer_length: int | None = None
    stopped: bool = False

    @property
    def answer(self) -> list[int]:
        """The tokens that are read as text."""
        return self.tokens[: self.answer_length]

    def log_likelihood(self) -> float:
        """The sum of the log-confidences of everything that the decoding wrote, discarded tokens included."""
        confidence = self.confidence + [token.confidence for token in self.discarded]
        return sum(math.log(c) if c > 0 else -math.inf for c in confidence)


# By `config.decoding.CACHES`: (sub-block, block) -> the positions that a pass inside the sub-block computes.
COMPUTED: dict[str, Callable[[range, range], range]] = {
    "prefix": lambda sub_block, block: range(sub_block.start, block.stop),
    "dual": lambda sub_block, block: sub_block,
}


class Decoding:
    """The state of one response."""

    def __init__(
        self,
        prompt: Sequence[int],
        options: DecodingOptions,
        *,
        block_size: int,
        mask_id: int,
        end_ids: frozenset[int],
        max_positions: int,
        shift: int = 1,
        generator: torch.Generator | None = None,
    ):
        """``prompt``: P >= 1 token ids, P < max_positions. No position from ``max_positions`` on is written. ``shift``:
        of `Family.prediction_shift`. ``generator``: of the rule that draws an order; default: a fixed seed."""
        self.shift, self.generator = shift, generator or torch.Generator()
        self.rule = RULES[options.rule]
        self.options, self.mask_id, self.end_ids = options, mask_id, end_ids
        self.prompt_length = len(prompt)
        self.limit = min(self.prompt_length + options.max_new_tokens, max_positions)
        self.is_full = block_size == FULL
        self.block_size = block_size = block_size or self.limit
        self.block = self.prompt_length // block_size * block_size  # where the block being written starts
        self.tokens = list(prompt)
        self.steps: list[int | None] = [None] * len(prompt)
        self.confidence = [0.0] * len(prompt)
        self._append_masks(self.block + block_size - len(prompt))
        self.step = self.passes = 0
        self.end: int | None = None  # position of the first end token written
        self.discarded: list[Discarded] = []
        self.finished = self.stopped = False
        # Where the clean tokens begin that the cache does not hold yet; None: it holds all before the block.
        self._clean_start = 0 if self.block > 0 else None
        self._asked: list[int] = []
        self._sub_block = range(0)  # which positions a noisy pass was last about
        self._sub_step = 0  # of the rule's schedule
        self._order: Tensor | None = None  # of its places, where the rule sorts them without the model
        self._is_kept = False  # whether keys and values of all positions are there from a pass over the whole block

    def next_pass(self) -> Pass:
        """What is to be computed next; only while not `finished`."""
        clean = 0
        if self._is_clean_pass():
            extent, visible = range(self._clean_start, self.block), self.block
            # Its last row predicts the block's first token, if any, unless the prompt holds it.
            self._asked = [self.block] if self.shift and self.block >= self.prompt_length else []
        else:
            extent, visible = self._noisy_extent(), self.block + self.block_size
            if self._clean_start is not None:
                clean, extent = self.block - self._clean_start, range(self._clean_start, extent.stop)
        rows = [position - self.shift - extent.start for position in self._asked]
        return Pass(extent.start, self.tokens[extent.start : extent.stop], rows, visible, clean)

    def _is_clean_pass(self) -> bool:
        """Whether the next pass is over clean tokens alone. One finished block that predicts nothing goes along with
        the first pass over the next one."""
        if self._clean_start is None:
            return False
        return bool(self.shift) or self.block - self._clean_start > self.block_size

    def _noisy_extent(self) -> range:
        """Positions of the next noisy pass; what it asks for is the rest of one sub-block."""
        masked, block = self._masked(), range(self.block, self.block + self.block_size)
        sub_block = self._sub_block_of(masked[0])
        if sub_block != self._sub_block:
            self._enter(sub_block)
        self._asked = [position for position in masked if position in sub_block]
        if self.options.sub_block_cache is None:
            return block
        within = masked[0] - self.shift >= sub_block.start  # the rows that are read lie in the sub-block
        if self._is_kept and within:
            return COMPUTED[self.options.sub_block_cache](sub_block, block)
        if self.is_full and not within:
            self._asked = self._asked[:1]  # Fast-dLLM's for Dream: then all other rows lie in the sub-block
        self._is_kept = True
        return block

    def _sub_block_of(self, position: int) -> range:
        first, size = self.prompt_length if self.is_full else 0, self.options.small_block_size
        start = first + (position - first) // size * size
        return range(start, min(start + size, self.block + self.block_size))

    def _enter(self, sub_block: range) -> None:
        self._sub_block, self._sub_step, self._is_kept = sub_block, 0, False
        places = len(sub_block)
        if order := PLACES.get(self.rule.order):
            self._order = order(places, self.options.denoising_steps or places, self.generator)

    def update(self, tokens: Sequence[int], confidence: Tensor, rank: Tensor | None = None) -> None:
        """Takes the predictions that the last pass was asked for: token ids, confidences ``[len(rows)]`` and what sorts
        them ``[len(rows)]``, the larger the surer; default: their confidences."""
        self.passes += 1
        is_clean, self._clean_start = self._is_clean_pass(), None
        if is_clean:
            accepted = [True] * len(tokens)
        else:
            accepted = self._accepted(confidence, confidence if rank is None else rank).tolist()
        proposals = zip(self._asked, tokens, confidence.tolist(), accepted, strict=True)
        end_ids = frozenset() if self.is_full else self.end_ids
        written = _to_end([one[:3] for one in proposals if one[3]], end_ids)
        for position, token, sure in written:
            self.tokens[position], self.steps[position], self.confidence[position] = token, self.step, sure
        if written and written[-1][1] in end_ids:  # none is asked for behind an earlier end token
            self.end = written[-1][0]
            self._discard_after_end()
        self.step += bool(written)
        if not self._masked():
            self._finish_block()

    def _accepted(self, confidence: Tensor, rank: Tensor) -> Tensor:
        """Which of the proposals the rule writes: bool ``[n]``, at least one."""
        if len(rank) == 1:
            self._sub_step += 1
            return torch.ones(1, dtype=torch.bool)
        if self._order is not None:
            rank = self._order[[position - self._sub_block.start for position in self._asked]]
        share, places = SHARES[self.rule.share], len(self._sub_block)
        steps = self.options.denoising_steps or places
        while not (count := share(rank, places, self._sub_step, steps)):
            self._sub_step += 1
        self._sub_step += 1
        return choose(rank, confidence, count, self.options.threshold)

    def finished_blocks(self) -> list[int] | None:
        """The response so far if the last pass finished a block of it and another one follows; None in between."""
        return None if self._clean_start is None else self.tokens[self.prompt_length : self.block]

    def stop(self) -> None:
        """Ends the response with the blocks that are finished; only where it is `finished_blocks`."""
        self.limit, self.finished, self.stopped = self.block, True, True

    def completion(self) -> Completion:
        stop = self.limit if self.end is None else self.end + 1
        response = slice(self.prompt_length, stop)
        tokens = self.tokens[response]
        ends = [place for place, token in enumerate(tokens) if token in self.end_ids]
        return Completion(
            tokens=tokens,
            steps=self.steps[response],
            confidence=self.confidence[response],
            blocks=[position // self.block_size for position in range(self.prompt_length, stop)],
            passes=self.passes,
            ended=bool(ends),
            discarded=self.discarded,
            answer_length=ends[0] + 1 if ends else len(tokens),
            stopped=self.stopped,
        )

    def _masked(self) -> list[int]:
        """Positions of the block that are still to be written."""
        stop = min(self.block + self.block_size, self.limit, self.limit if self.end is None else self.end)
        start = max(self.block, self.prompt_length)
        return [position for position in range(start, stop) if self.steps[position] is None]

    def _discard_after_end(self) -> None:
        """Returns all behind the end token that this step wrote to ``[MASK]``."""
        for position in range(self.end + 1, len(self.tokens)):
            if (step := self.steps[position]) is not None:
                place, token = position - self.prompt_length, self.tokens[position]
                self.discarded.append(Discarded(place, token, step, self.step, self.confidence[position]))
            self.tokens[position], self.steps[position] = self.mask_id, None

    def _finish_block(self) -> None:
        following = self.block + self.block_size
        if self.end is not None or following >= self.limit:
            self.finished = True
            return
        self._clean_start, self.block = self.block, following
        self._append_masks(self.block_size)

    def _append_masks(self, count: int) -> None:
        self.tokens += [self.mask_id] * count
        self.steps += [None] * count
        self.confidence += [0.0] * count


def _to_end(written: list[tuple[int, int, float]], end_ids: frozenset[int]) -> list[tuple[int, int, float]]:
    """The (position, token, confidence) of one step, positions increasing, up to the first end token: no pass would
    ever see the others, and so they are not written."""
    first = next((number for number, (_, token, _) in enumerate(written) if token in end_ids), len(written))
    return written[: first + 1]
