"""The order of samples: a permutation each epoch, the same however it is asked for."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.sampler import SampleOrder, epoch_order, select_by_length
from megatron_dtrpo.errors import UserError


def test_epoch_order_is_a_permutation_of_seed_and_epoch():
    orders = {key: epoch_order(100, *key).tolist() for key in ((1, 0), (1, 1), (2, 0), (0, 1))}
    assert all(sorted(order) == list(range(100)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 4
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    assert epoch_order(100, 1, 0).tolist() == orders[(1, 0)]
    assert (np.random.get_state()[1] == before).all()
    assert epoch_order(4, 1, 5, shuffle=False).tolist() == [0, 1, 2, 3]


def test_epoch_order_stays_what_it_was():
    # A run resumed with another version of this project or of NumPy goes on in the same order.
    assert epoch_order(8, seed=1234, epoch=2).tolist() == [6, 5, 4, 1, 3, 0, 7, 2]


def test_first_place_is_uniform():
    counts = np.bincount([epoch_order(5, seed, 0)[0] for seed in range(2000)], minlength=5)
    assert (abs(counts - 400) < 5 * np.sqrt(2000 * 0.2 * 0.8)).all()


def test_take_is_the_same_in_any_portion():
    indices = np.array([3, 5, 8, 9, 11])
    whole = SampleOrder(indices, seed=7).take(0, 17)
    for portion in (1, 2, 5, 6):
        order = SampleOrder(indices, seed=7)
        assert [s for c in range(0, 17, portion) for s in order.take(c, min(portion, 17 - c))] == whole
    assert SampleOrder(indices, seed=7).take(4, 9) == whole[4:13]  # resumed
    assert SampleOrder(indices, seed=7).take(4, 0) == []
    for epoch in range(3):
        assert sorted(s.index for s in whole if s.epoch == epoch) == [3, 5, 8, 9, 11]
    assert [s.epoch for s in whole] == [i // 5 for i in range(17)]
    assert type(whole[0].index) is int


def test_take_without_shuffling():
    order = SampleOrder(np.array([4, 6]), seed=0, shuffle=False)
    assert order.take(1, 3) == [Sample(0, 6), Sample(1, 4), Sample(1, 6)]
    assert len(order) == 2


def test_only_the_current_order_is_kept():
    order = SampleOrder(np.arange(10), seed=0)
    order.take(0, 95)
    assert list(order._orders) == [9]


PROMPTS, RESPONSES = np.array([4, 10, 1]), np.array([[1, 2], [30, 1], [2, 2]])


def store() -> SimpleNamespace:
    lengths = (PROMPTS.astype(np.int32), RESPONSES.astype(np.int32))

    class Store(SimpleNamespace):
        def __len__(self):
            return 3

    return Store(lengths=lengths, source="pairs.jsonl", location=lambda i: f"pairs.jsonl:{i + 1}")


PACKED = PROMPTS + 2 * RESPONSES.sum(axis=1)


def test_select_by_length():
    usable, skipped = select_by_length(store(), PACKED, budget=10)
    assert usable.tolist() == [0, 2] and skipped == 1
    usable, skipped = select_by_length(store(), PACKED, budget=72, on_too_long="error")
    assert usable.tolist() == [0, 1, 2] and skipped == 0


def test_select_by_length_errors():
    with pytest.raises(UserError, match="^pairs.jsonl:2: packs into 72 tokens, the budget is 71"):
        select_by_length(store(), PACKED, budget=71, on_too_long="error")
    with pytest.raises(UserError, match="^pairs.jsonl: no example packs into 8 tokens, the shortest takes 9"):
        select_by_length(store(), PACKED, budget=8)
    with pytest.raises(UserError, match="on_too_long"):
        select_by_length(store(), PACKED, budget=8, on_too_long="cut")
