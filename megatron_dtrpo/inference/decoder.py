"""Decodes many prompts at once, of any lengths, one pass of the whole batch at a time.

A slot that finishes is given to the next prompt at once, so the batch stays full. What is written for a prompt depends
on the prompt, its key and the options only, not on its neighbours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_dtrpo.config.backends import BACKENDS, choose_backend
from megatron_dtrpo.config.blocks import FULL, grain
from megatron_dtrpo.config.decoding import RULES, DecodingOptions
from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.data.tokenizer import NO_MASK, Tokenizer
from megatron_dtrpo.diffusion.decoding import Completion, Decoding, Pass
from megatron_dtrpo.families.registry import family_of
from megatron_dtrpo.inference.cache import (
    KeyValueCache,
    block_attention,
    form,
    prefill_attention,
    whole_attention,
)
from megatron_dtrpo.inference.predictor import Predictor
from megatron_dtrpo.inference.slots import Slot, Slots
from megatron_dtrpo.model.attention import attention_width
from megatron_dtrpo.model.chunks import chunks_of
from megatron_dtrpo.model.gpt import BlockDiffusionModel
from megatron_dtrpo.rounding import round_up
from megatron_dtrpo.runtime.transfer import send_together

PREFILL_TOKENS = 16384  # prompts that are prefilled together; one longer prompt goes alone


@dataclass(frozen=True)
class Vocabulary:
    """Of the tokenizer: ``size`` without padding, the mask's id and those that end a response."""

    size: int
    mask_id: int
    end_ids: frozenset[int]


class BlockDecoder:
    """Decodes on one model. All model-parallel processes call it with the same arguments."""

    def __init__(
        self,
        model: BlockDiffusionModel | list[BlockDiffusionModel],
        vocabulary: Vocabulary,
        block_size: int,
        max_positions: int,
        attention_backend: str = "auto",
        shift: int = 1,
    ):
        """``model``: this process's stage, or its virtual ones. ``attention_backend``: of the settings; for prompts,
        blocks are always attended by SDPA. ``shift``: of `Family.prediction_shift`."""
        self.chunks, self.vocabulary = chunks_of(model), vocabulary
        self.block_size, self.max_positions, self.shift = block_size, max_positions, shift
        self.config = self.chunks[0].config
        self.device = next(self.chunks[0].parameters()).device
        self.backend = choose_backend(attention_backend, self.device.type)

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        options: DecodingOptions,
        *,
        batch_size: int,
        seed: int = 0,
        keys: Sequence[tuple[int, int]] | None = None,
        finished: Callable[[int, Completion], None] = lambda index, completion: None,
        stop: Callable[[int, list[int]], bool] = lambda index, tokens: False,
    ) -> list[Completion]:
        """The completion of each prompt; of none where there are fewer prompts than data-parallel processes.

        Args:
            prompts: token ids, 1 to max_positions - 1 of them each.
            batch_size: sequences decoded at once.
            keys: (prompt number, sample number) of each prompt; with ``seed`` they decide what is drawn above
                temperature 0. Default: (its place, 0).
            finished: called with place and completion as soon as a prompt is done.
            stop: called with place and the response so far whenever a block of it is finished; True ends it there.
        """
        if not prompts:
            return []
        if keys is None:
            keys = [(index, 0) for index in range(len(prompts))]
        completions: list[Completion | None] = [None] * len(prompts)
        # The longest first: what is left at the end, when the batch can no longer be kept full, is short.
        waiting = sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), -index))
        slots = self.slots(min(batch_size, len(prompts)), self._longest(prompts, options), options)
        was_training = self.chunks[0].training
        self._train(False)
        try:
            while waiting or slots:
                while waiting and slots.free:
                    index = waiting.pop()
                    slots.admit(index, prompts[index], options, seed, keys[index])
                for slot in slots.step():
                    index, decoding = slot.name, slot.decoding
                    finished_blocks = decoding.finished_blocks()
                    if finished_blocks and stop(index, finished_blocks):
                        decoding.stop()
                    if decoding.finished:
                        completions[index] = decoding.completion()
                        finished(index, completions[index])
                        slots.release(index)
        finally:
            self._train(was_training)
        return completions

    def slots(self, count: int, positions: int, options: DecodingOptions) -> Slots:
        """For ``count`` sequences at once, of up to ``positions`` tokens each, prompt and response. ``options``: what
        those of all prompts agree in, that is all but ``max_new_tokens``, ``temperature`` and ``top_p``."""
        predict = Predictor(
            self.chunks,
            vocab_size=self.vocabulary.size,
            mask_id=None if self.vocabulary.mask_id == NO_MASK else self.vocabulary.mask_id,
            order=RULES[options.rule].order,
        )
        cache = KeyValueCache(count, round_up(positions, grain(self.block_size)))
        run = functools.partial(self._round, predict=predict, keeps=bool(options.sub_block_cache))
        return Slots(cache, self._start, run)

    def _train(self, mode: bool) -> None:
        for chunk in self.chunks:
            chunk.train(mode)

    def _start(
        self, prompt: Sequence[int], options: DecodingOptions, order: torch.Generator, end_ids: frozenset[int]
    ) -> Decoding:
        return Decoding(
            prompt,
            options,
            block_size=self.block_size,
            mask_id=self.vocabulary.mask_id,
            end_ids=self.vocabulary.end_ids | end_ids,
            max_positions=self.max_positions,
            shift=self.shift,
            generator=order,
        )

    def _longest(self, prompts: Sequence[Sequence[int]], options: DecodingOptions) -> int:
        return min(max(map(len, prompts)) + options.max_new_tokens, self.max_positions)

    def _round(self, active: Sequence[Slot], cache: KeyValueCache, predict: Predictor, keeps: bool) -> None:
        """One pass of every active sequence; all passes over blocks share a call of the model.
        ``keeps``: a pass over the whole under full attention fills the cache."""
        passes = [slot.decoding.next_pass() for slot in active]
        for numbers in self._groups(passes):
            group = [passes[number] for number in numbers]
            uniform = [
                torch.rand(len(passes[number].rows), generator=active[number].generator, dtype=torch.float64)
                for number in numbers
            ]
            counts = [len(one.rows) for one in group]
            options = [active[number].decoding.options for number in numbers]
            how = [(one.temperature, one.top_p if one.temperature else 1.0) for one in options]
            sampled = functools.partial(predict, sampling=list(zip(counts, how, strict=True)))
            proposals = self._call(group, numbers, cache, sampled, torch.cat(uniform), keeps)
            each = zip(*(part.split(counts) for part in proposals), strict=True)
            for number, (token, confidence, rank) in zip(numbers, each, strict=True):
                active[number].decoding.update(token.tolist(), confidence, rank)

    def _call(
        self,
        group: Sequence[Pass],
        slots: Sequence[int],
        cache: KeyValueCache,
        predict: Callable[..., tuple[Tensor, Tensor, Tensor]],
        uniform: Tensor,
        keeps: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the model proposes for the passes of ``group``, which are in ``slots`` of the cache."""
        lengths = [len(one.tokens) for one in group]
        offsets = torch.tensor([0] + lengths).cumsum(0).tolist()
        tokens, position, rows, slot, slots_here, visible, uniform = send_together(
            [
                torch.tensor([token for one in group for token in one.tokens]),
                torch.cat([torch.arange(one.start, one.start + len(one.tokens)) for one in group]),
                torch.tensor(
                    [offset + row for offset, one in zip(offsets, group, strict=False) for row in one.rows],
                    dtype=torch.long,
                ),
                torch.tensor(slots).repeat_interleave(torch.tensor(lengths)),
                torch.tensor(slots),
                torch.tensor([one.visible for one in group]),
                uniform,
            ],
            self.device,
        )
        width = attention_width(self.config)
        if not self._is_long(group[0]):
            heads = self.config.num_attention_heads // self.config.num_query_groups
            attention = block_attention(cache, group, slots, (slots_here, visible), slot, position, heads)
        elif self.block_size != FULL:
            attention = prefill_attention(cache, slot, position, self.block_size, width, self.backend)
        else:
            ranks = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
            padding = BACKENDS[self.backend].padded(round_up(len(tokens), ranks)) - len(tokens)
            attention = whole_attention(cache if keeps else None, slot, position, padding, width, self.backend)
            tokens, position = (F.pad(each, (0, padding)) for each in (tokens, position))
        return predict(tokens, position, attention, rows, uniform)

    def _is_long(self, one: Pass) -> bool:
        """Whether it attends what it computes itself, and nothing of the cache: several blocks, or all there is."""
        return one.start == 0 and len(one.tokens) > self.block_size and not one.clean

    def _groups(self, passes: Sequence[Pass]) -> Iterator[list[int]]:
        """Which passes share a call: long ones up to a budget, and all over blocks, those of one form side by side."""
        short: list[int] = []
        long: list[int] = []
        total = 0
        for number, one in enumerate(passes):
            length = len(one.tokens)
            if not self._is_long(one):
                short.append(number)
                continue
            if long and total + length > PREFILL_TOKENS:
                yield long
                long, total = [], 0
            long.append(number)
            total += length
        if long:
            yield long
        if short:
            yield sorted(short, key=lambda number: form(passes[number]))


def make_decoder(
    model: BlockDiffusionModel | list[BlockDiffusionModel],
    settings: ModelSettings,
    tokenizer: Tokenizer,
    end_ids: Iterable[int] = (),
    attention_backend: str = "auto",
) -> BlockDecoder:
    """A decoder that stops at the tokenizer's end token and at ``end_ids``. ``model``: of `BlockDecoder`."""
    size = min(tokenizer.vocab_size, settings.vocab_size)
    vocabulary = Vocabulary(size, tokenizer.mask_id, frozenset([tokenizer.eos_id, *end_ids]))
    return BlockDecoder(
        model,
        vocabulary,
        settings.block_size,
        settings.max_position_embeddings,
        attention_backend,
        family_of(settings).prediction_shift,
    )
