"""The sequences that a model decodes at once, each in a slot of the cache.

A slot is given to a prompt and given back at any time between two passes. What is written for a prompt depends on the
prompt, its options, seed and key only, not on its neighbours: their options may differ in length and sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.diffusion.decoding import Decoding
from megatron_dtrpo.diffusion.estimators import noise_generator
from megatron_dtrpo.inference.cache import KeyValueCache


@dataclass
class Slot:
    """A prompt that is being decoded; ``name`` is the caller's."""

    name: Any
    decoding: Decoding
    generator: torch.Generator


class Slots:
    """Up to ``cache.slots`` sequences, a pass of all of them at a time. All model-parallel processes make the same
    calls."""

    def __init__(
        self,
        cache: KeyValueCache,
        start: Callable[..., Decoding],
        run: Callable[[Sequence[Slot], KeyValueCache], None],
    ):
        """``start``: (prompt, options, generator, end ids) -> the state of a response. ``run``: one pass of slots, the
        first ones of the cache in this order."""
        self._cache, self._start, self._run = cache, start, run
        self._places: list[Slot | None] = []  # the first ones of the cache; None: it was given back

    def __len__(self) -> int:
        return len(self._active())

    def __contains__(self, name: Hashable) -> bool:
        return any(slot.name == name for slot in self._active())

    @property
    def free(self) -> int:
        return self._cache.slots - len(self)

    def _active(self) -> list[Slot]:
        return [slot for slot in self._places if slot is not None]

    def admit(
        self,
        name: Hashable,
        prompt: Sequence[int],
        options: DecodingOptions,
        seed: int,
        key: tuple[int, int],
        end_ids: frozenset[int] = frozenset(),
    ) -> None:
        """Gives a free slot to ``prompt``. ``seed, key``: of `BlockDecoder.decode`. ``end_ids``: end this response,
        beside those of the vocabulary."""
        tokens, order = (noise_generator(seed, -1, *key, number) for number in (0, 1))
        slot = Slot(name, self._start(prompt, options, order, end_ids), tokens)
        if None in self._places:
            self._places[self._places.index(None)] = slot
        else:
            self._places.append(slot)

    def step(self) -> list[Slot]:
        """One pass. Returns the slots that finished a block or their response in it; the latter are still to be
        released. Each stays what it is until the next call of `step`."""
        self._close_gaps()
        active = self._active()
        self._run(active, self._cache)
        return [slot for slot in active if slot.decoding.finished or slot.decoding.finished_blocks() is not None]

    def release(self, name: Hashable) -> None:
        """Frees the slot of ``name``, whether it is finished or not."""
        self._places[next(place for place, slot in enumerate(self._places) if slot and slot.name == name)] = None

    def _close_gaps(self) -> None:
        """Of what was given back, and not given to another prompt: the last sequences take these places."""
        while None in self._places:
            last = self._places.pop()
            if last is not None:
                gap = self._places.index(None)
                self._places[gap] = last
                self._cache.move(len(self._places), gap, len(last.decoding.tokens))

    def decoding(self, name: Hashable) -> Decoding:
        return next(slot.decoding for slot in self._active() if slot.name == name)
