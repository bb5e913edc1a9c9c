"""Slots of the cache: what a sequence wrote is found at its place, whoever came and went, and little is copied."""

import random
from types import SimpleNamespace

import pytest

from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.inference.slots import Slots

OPTIONS = DecodingOptions()


class Cache:
    """Whose keys a slot holds."""

    def __init__(self, slots):
        self.slots, self.of, self.moves = slots, [None] * slots, 0

    def move(self, source, target, length):
        self.of[target], self.moves = self.of[source], self.moves + 1


@pytest.fixture
def slots():
    def run(active, cache):
        for place, slot in enumerate(active):
            if slot.decoding.passes:  # else its first pass fills the slot
                assert cache.of[place] == slot.name
            cache.of[place] = slot.name
            slot.decoding.passes += 1

    def start(prompt, options, order, end_ids):
        return SimpleNamespace(tokens=prompt, passes=0, finished=False, finished_blocks=lambda: None)

    return Slots(Cache(8), start, run)


def admit(slots, *names):
    for name in names:
        slots.admit(name, [1], OPTIONS, 0, (0, 0))


def test_a_slot_given_back_and_taken_again_moves_nobody(slots):
    admit(slots, *range(8))
    slots.step()
    slots.release(2)
    slots.release(5)
    admit(slots, 8, 9)
    slots.step()
    assert slots._cache.moves == 0
    assert slots._cache.of == [0, 1, 8, 3, 4, 9, 6, 7]


def test_the_last_ones_take_places_that_stay_free(slots):
    admit(slots, *range(8))
    slots.step()
    for name in (7, 2, 6):
        slots.release(name)
    assert len(slots) == 5 and slots.free == 3 and 6 not in slots and 5 in slots
    slots.step()
    assert slots._cache.moves == 1
    assert slots._cache.of[:5] == [0, 1, 5, 3, 4]


def test_all_are_given_back(slots):
    admit(slots, 0, 1)
    slots.step()
    slots.release(0)
    slots.release(1)
    assert not slots and slots.step() == []
    admit(slots, 2)
    slots.step()
    assert slots._cache.moves == 0


@pytest.mark.parametrize("seed", range(20))
def test_everybody_finds_their_own_keys(slots, seed):
    rng, here, count = random.Random(seed), set(), 0
    for _ in range(200):
        for name in rng.sample(sorted(here), rng.randint(0, len(here))):
            slots.release(name)
            here.remove(name)
            assert name not in slots
        for _ in range(rng.randint(0, slots.free)):
            admit(slots, count)
            here.add(count)
            count += 1
        assert len(slots) == len(here) and all(slots.decoding(name).tokens == [1] for name in here)
        slots.step()
