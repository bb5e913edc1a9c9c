"""What reference scores depend on: every option that their estimator reads, and where and how often it draws."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_dtrpo.config.estimators import ESTIMATORS, EstimatorOptions
from megatron_dtrpo.config.settings import Config

OTHER = {"steps_per_block": 3, "num_views": 5, "block_start": "noisy", "seed": 7}


@pytest.mark.parametrize("name", [name for name, row in ESTIMATORS.items() if "preference" in row.objectives])
def test_the_facts_of_a_cache_name_all_that_is_drawn_from(alone, name):
    from megatron_dtrpo.training.reference_cache import score_inputs

    def facts(**changes) -> dict:
        config = Config.from_flat({"estimator": name, "num_views": 1, "block_start": "clean", **changes})
        return score_inputs(config, SimpleNamespace(fingerprint=lambda: "a tokenizer"))

    first = facts()
    read = {*ESTIMATORS[name].options, "num_views", "block_start", "seed"}
    for key, value in OTHER.items():
        changed = {fact for fact, now in facts(**{key: value}).items() if first.get(fact) != now}
        assert changed == ({key} if key in read else set()), key
    assert read <= OTHER.keys(), "give the new option another value in OTHER"
    assert first["estimator"] == name and set(vars(EstimatorOptions())) & first.keys() == set(ESTIMATORS[name].options)
