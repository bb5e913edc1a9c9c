"""Settings of ``objective policy_gradient``: one line for each mistake, before anything is loaded."""

from __future__ import annotations

import pytest

from megatron_dtrpo.config.choices import leave_out_misfits
from megatron_dtrpo.config.rules import validate, validate_precomputing, validate_training
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.online.rollouts import rollout_options
from tests.support.launch import TINY_MODEL

ONLINE = {**TINY_MODEL, "vocab_size": 259, "objective": "policy_gradient", "rewards": ["numeric"], "save": "run"}


def validated(**settings) -> Config:
    config = Config.from_flat({key: value for key, value in (ONLINE | settings).items() if value is not None})
    validate(config, 1)
    return config


def test_defaults():
    objective = validated().objective
    assert (objective.estimator, objective.block_start, objective.num_views) == ("exact_trajectory", "clean", 1)
    assert not objective.has_reference and validated(kl_coefficient=0.1).objective.has_reference
    assert validated(block_size=1).objective.estimator == "exact"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rewards": None}, "^rewards is missing: give --rewards numeric, or module:function of your own$"),
        ({"reward_timeout": 0.0}, "^reward_timeout 0: no reward could be computed: give seconds$"),
        ({"group_size": 1}, "^group_size 1: an answer is compared with the others of its group: give 2 or more$"),
        ({"rollout_temperature": 0.0}, "^rollout_temperature 0: all answers of a group would be the same one"),
        ({"rollout_temperature": 0.7}, "^rollout_temperature 0.7: training replays the probabilities of temperature 1"),
        (
            {"rollout_small_block_size": 3},
            "^rollout_small_block_size 3 does not divide block_size 8: change it or leave",
        ),
        ({"rewards": ["numeric", "numeric"]}, "^rewards has numeric twice"),
        ({"reward_weights": [1.0, 2.0]}, "^reward_weights has 2 weights, rewards 1: give as many of both$"),
        ({"reward_weights": [0.0]}, "^reward_weights are all 0: there is nothing to learn$"),
        ({"updates_per_rollout": 20}, "^updates_per_rollout 20 is more than the 16 rollout_prompts"),
        ({"self_normalize": True}, "^self_normalize with clip ppo: it divides the weights of clip always: give that"),
        ({"self_normalize": True, "clip": "always"}, "^self_normalize with updates_per_rollout 1: every ratio is 1"),
        ({"estimator": "vrpo"}, "^ratio token goes with estimator exact_trajectory, trajectory, exact, not vrpo"),
        ({"estimator": "dtrpo"}, "^estimator dtrpo does not fit objective policy_gradient"),
        ({"length_normalization": True}, "^length_normalization with ratio token: it is for ratio sequence"),
        ({"global_batch_size": 8}, "^global_batch_size with objective policy_gradient: an iteration takes rollout_pro"),
        ({"beta": 0.1}, "^beta belongs to objective preference: leave it out with policy_gradient$"),
        ({"reward_aggregation": "normalize_then_sum", "advantage_std": False}, "leave advantage_std on$"),
        ({"reference_cache": "scores", "kl_coefficient": 0.1}, "^reference_cache holds scores of pairs"),
        (
            {"objective": "preference"},
            "^rewards with objective preference: belongs to objective policy_gradient, or to rounds: leave it out$",
        ),
        (
            {"objective": "sft", "rewards": None, "clip_low": 0.1},
            "^clip_low with objective sft: belongs to objective p",
        ),
        ({"block_start": "noisy"}, "^estimator exact_trajectory with block_start noisy is biased"),
    ],
)
def test_a_mistake_is_one_line(settings, words):
    with pytest.raises(UserError, match=words):
        validated(**settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 8), ({"rollout_small_block_size": 2}, 2), ({"family": "sdar", "add_qkv_bias": False, "block_size": 4}, 4)],
)
def test_sub_blocks_of_rollouts(settings, expected):
    options = rollout_options(validated(**settings, qk_layernorm="family" in settings))
    assert options.small_block_size == expected
    assert (options.sub_block_cache, options.temperature, options.top_p) == (None, 1.0, 1.0)


ROUNDS = {"objective": "preference", "rounds": 2, "load": "sft", "train_iters": 1}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, None),
        ({"rollout_temperature": 0.7, "group_size": 4, "round_prompts": 3, "move_reference": True}, None),
        ({"reference": "other"}, None),
        ({"rounds": 0}, "^rounds is 0: it must be at least 1$"),
        ({"rewards": None}, "^rewards is missing: give --rewards numeric, or module:function of your own$"),
        ({"load": None}, "^rounds: who is to answer the prompts\\? Give --load, a checkpoint$"),
        ({"rollout_temperature": 0.0}, "^rollout_temperature 0: all answers of a group would be the same one"),
        ({"reward_timeout": 0.0}, "^reward_timeout 0: no reward could be computed: give seconds$"),
        ({"group_size": 1}, "^group_size 1: an answer is compared with the others"),
        (
            {"rollout_prompts": 4},
            "^rollout_prompts with objective preference: belongs to objective policy_gradient: le",
        ),
        (
            {"rounds": None, "rewards": None, "round_prompts": 4},
            "^round_prompts with objective pref.*: goes with round",
        ),
        ({"objective": "sft", "rewards": None}, "^rounds with objective sft: belongs to objective preference: leave"),
        ({"objective": "policy_gradient"}, "^rounds with objective policy_gradient: belongs to objective preference"),
        ({"reference_cache": "scores"}, "^reference_cache holds scores of pairs, and rounds make their own: leave it"),
        (
            {"move_reference": True, "loss_type": ["simpo"]},
            "^move_reference: loss_type simpo has no reference: leave it",
        ),
    ],
)
def test_rounds(settings, words):
    def check():
        validate_training(validated(**ROUNDS | settings), 1)

    if words is None:
        check()
    else:
        with pytest.raises(UserError, match=words):
            check()


def test_there_is_nothing_to_precompute_for_rounds():
    with pytest.raises(UserError, match="^rounds make their own pairs: there is nothing to precompute"):
        validate_precomputing(validated(**ROUNDS), 1)


def test_a_file_for_another_objective_beside_the_flag():
    """What the new objective does not read is left out and named."""
    config = Config.from_flat({**ONLINE, "group_size": 4, "objective": "sft"})
    (line,) = leave_out_misfits(config, {"objective"}, "run.yaml")
    assert line.startswith("note: run.yaml: left out: ") and "group_size 4 (belongs to objective policy_grad" in line
    validate(config, 1)
    config = Config.from_flat({**TINY_MODEL, "objective": "policy_gradient", "global_batch_size": 64, "beta": 0.1})
    (line,) = leave_out_misfits(config, {"objective"}, "run.yaml")
    assert "global_batch_size 64 (an iteration takes rollout_prompts x group_size answers)" in line and "beta" in line
