"""What a run that is started again must leave as it was, and what it may change."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml

from megatron_dtrpo.checkpoint.adapter import AdapterRecord
from megatron_dtrpo.checkpoint.folder import RUN_CONFIG
from megatron_dtrpo.config.rules import fill_objective_defaults, validate
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.training.resume import changes_since, check_data, data_record, return_to_first_start
from megatron_dtrpo.training.setup import take_adapter_settings

FIRST = {"load": "base", "data_path": "pairs.jsonl", "train_iters": 10, "estimator": "dtrpo", "lr": 1e-4}

MODEL = {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 16, "num_attention_heads": 2}


@pytest.fixture
def run(tmp_path):
    """A run folder with a checkpoint of iteration 3 and the record of a start with FIRST."""
    folder = tmp_path / "run"
    (folder / "iter_0000003").mkdir(parents=True)
    for name in ("metadata.json", ".metadata"):
        (folder / "iter_0000003" / name).write_text("{}")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    config = Config.from_flat({**FIRST, "save": str(folder)})
    fill_objective_defaults(config.objective, config.model)
    (folder / RUN_CONFIG).write_text(yaml.safe_dump(config.to_flat()))
    return folder


def again(run, **changes) -> Config:
    config = Config.from_flat({**FIRST, "save": str(run), **changes})
    return_to_first_start(config)
    return config


def test_it_starts_where_it_started(run):
    assert again(run, load=None).run.load == "base"
    assert again(run, load=str(run)).run.load == "base"
    with pytest.raises(UserError, match="this run started from base, not from other"):
        again(run, load="other")


def test_a_setting_that_this_version_lacks_is_named(run):
    with (run / RUN_CONFIG).open("a") as file:
        file.write("grid_ratio: 0.5\n")
    with pytest.raises(UserError, match=f"{RUN_CONFIG}: written by a version with a setting grid_ratio, which"):
        again(run)


def test_its_reference_stays(run):
    record = run / RUN_CONFIG
    first = yaml.safe_load(record.read_text())
    record.write_text(yaml.safe_dump({**first, "reference": "better"}))
    assert again(run).run.reference == again(run, reference="./better").run.reference == "better"
    for other in ("base", "other"):
        with pytest.raises(UserError, match=f"this run's reference is better, not {other}"):
            again(run, reference=other)
    del first["reference"]  # a run of before the setting: its starting point
    record.write_text(yaml.safe_dump(first))
    assert again(run).run.reference is again(run, reference="base").run.reference is None
    with pytest.raises(UserError, match="this run's reference is base, not other"):
        again(run, reference="other")
    record.write_text(yaml.safe_dump({**first, "load": None}))
    with pytest.raises(UserError, match="this run's reference is its random starting weights, not base"):
        again(run, load=None, reference="base")


def test_its_block_size_says_its_estimator(run):
    """Settings are compared before the model is known."""
    first = yaml.safe_load((run / RUN_CONFIG).read_text())
    (run / RUN_CONFIG).write_text(yaml.safe_dump({**first, "block_size": 1, "estimator": "exact"}))
    again(run, estimator=None)
    with pytest.raises(UserError, match="this run has estimator exact, not vrpo"):
        again(run, estimator="vrpo")


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [
        ("seed", 1, 1234),
        ("shuffle", False, True),
        ("objective", "sft", "preference"),
        ("estimator", "vrpo", "dtrpo"),
        ("steps_per_block", 4, 8),
        ("block_start", "noisy", "clean"),
        ("loss_type", ["ipo"], ["sigmoid"]),
        ("loss_type", ["sigmoid", "sft"], ["sigmoid"]),
        ("length_normalization", True, False),
        ("trainable_modules", ["mlp"], None),
        ("bf16", True, False),
    ],
)
def test_what_it_is_stays(run, key, value, first):
    changes = {key: value} if key != "objective" else {key: value, "estimator": None}
    then = "none" if first is None else first
    with pytest.raises(UserError, match=re.escape(f"{run}: this run has {key} {then}, not {value}: give the same,")):
        again(run, **changes)


@pytest.mark.parametrize(
    "weight, now", [(0.0, {}), (0.25, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.25]})]
)
def test_a_record_of_before_the_anchor_was_a_loss(run, weight, now):
    """It had one loss as a text and ``rpo_alpha``."""
    first = yaml.safe_load((run / RUN_CONFIG).read_text())
    for key in ("loss_weights", "length_normalization", "simpo_gamma"):
        del first[key]
    (run / RUN_CONFIG).write_text(yaml.safe_dump({**first, "loss_type": "sigmoid", "rpo_alpha": weight}))
    again(run, **now)
    with pytest.raises(UserError, match="this run has loss_type"):
        again(run, loss_type=["hinge"])


def test_the_rest_may_change_and_is_named(run):
    first = yaml.safe_load((run / RUN_CONFIG).read_text())
    del first["sft_weighting"]  # the run is older than the setting
    # complementary belongs to another estimator, so it pins nothing here.
    config = again(
        run, lr=2e-4, beta=0.1, num_views=4, complementary=False, micro_batch_size=3, reference_cache="scores"
    )
    fill_objective_defaults(config.objective, config.model)
    changes = changes_since(config, first)
    assert changes == ["num_views 1 -> 4", "complementary True -> False", "beta 0.5 -> 0.1", "lr 0.0001 -> 0.0002"]


def test_the_data_stay(run):
    now = data_record("tokens", "tokenizer", 20)
    check_data(run, {"iteration": 3, **now}, now)
    check_data(run, {"iteration": 3}, now)  # of a run that did not record them
    for key, words in (("data", "other data"), ("tokenizer", "another tokenizer"), ("usable_examples", "seq_length")):
        with pytest.raises(UserError, match=words):
            check_data(run, {**now, key: "other"}, now)


OWN = {"steps_per_block": 4, "loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.5], "simpo_gamma": 0.2, "beta": 2.0}


@pytest.mark.parametrize(
    "asked, followed",
    [
        ({}, OWN),
        ({"estimator": "vrpo"}, {**OWN, "steps_per_block": 8}),
        ({"loss_type": ["hinge"]}, {**OWN, "loss_type": ["hinge"], "loss_weights": None, "simpo_gamma": 0.5}),
        ({"loss_type": ["hinge", "sft"]}, {**OWN, "loss_type": ["hinge", "sft"], "simpo_gamma": 0.5}),
        ({"estimator": "dtrpo", "steps_per_block": 3}, {**OWN, "steps_per_block": 3}),
    ],
)
def test_a_score_follows_the_options_that_its_estimator_and_losses_read(run, alone, asked, followed):
    """The run's others are left; what is asked for and not read is a mistake."""
    from megatron_dtrpo.training.setup import follow_run

    record = yaml.safe_load((run / RUN_CONFIG).read_text())
    (run / RUN_CONFIG).write_text(yaml.safe_dump({**record, **OWN}))
    config = Config.from_flat({**MODEL, **asked})
    follow_run(config, set(asked), run)
    assert {key: getattr(config.objective, key) for key in OWN} == followed
    validate(config, 1)
    config = Config.from_flat({**MODEL, "estimator": "vrpo", "steps_per_block": 3})
    follow_run(config, {"estimator", "steps_per_block"}, run)
    with pytest.raises(UserError, match="steps_per_block belongs to estimator dtrpo: leave it out with vrpo"):
        validate(config, 1)


def test_a_score_by_dtrpo_reads_a_blocks_first_token_where_it_is_unbiased(run, alone, capsys):
    """Whatever the run did, whose estimator allows either; and it says so."""
    from megatron_dtrpo.training.setup import follow_run

    record = yaml.safe_load((run / RUN_CONFIG).read_text())
    (run / RUN_CONFIG).write_text(yaml.safe_dump({**record, "estimator": "vrpo", "block_start": "noisy"}))
    config = Config.from_flat({**MODEL, "estimator": "dtrpo"})
    follow_run(config, {"estimator"}, run)
    assert f"note: {run}: left out: block_start noisy (estimator dtrpo would be biased)" in capsys.readouterr().err
    validate(config, 1)
    assert config.objective.block_start == "clean"


@pytest.mark.parametrize("asked, reference", [({}, "base"), ({"reference": "better"}, "better")])
def test_a_score_compares_with_the_runs_reference_unless_told_otherwise(run, alone, asked, reference):
    from megatron_dtrpo.training.setup import follow_run

    config = Config.from_flat({**MODEL, **asked})
    follow_run(config, set(asked), run)
    assert config.run.reference == reference


def test_settings_of_an_adapter_are_its_own_and_others_are_refused(run, tmp_path):
    """At the first start and later, a given default among them: nothing that was asked for is ignored."""
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    AdapterRecord(4, 8.0, lora_target_modules=["mlp"], base_fingerprint="f").write(adapter)
    asked = {"load": "base", "load_adapter": str(adapter), "lora_dropout": 0.1}
    begun = Config.from_flat(asked)
    take_adapter_settings(begun, set(asked))
    assert (begun.lora.lora_rank, begun.lora.lora_alpha, begun.lora.lora_dropout) == (4, 8.0, 0.1)
    for key, value in (("lora_alpha", 32.0), ("lora_alpha", 3.0), ("lora_rank", 5)):
        other = Config.from_flat({**asked, key: value})
        with pytest.raises(UserError, match=f"an adapter of {key} .*, not {value}: leave it out"):
            take_adapter_settings(other, {*asked, key})

    first = yaml.safe_load((run / RUN_CONFIG).read_text())
    first |= {**dataclasses.asdict(begun.lora), "load_adapter": str(adapter)}
    (run / RUN_CONFIG).write_text(yaml.safe_dump(first))
    resumed = {key: asked[key] for key in ("load_adapter", "lora_dropout")}
    assert again(run, **resumed).lora == again(run, load_adapter=str(adapter)).lora == begun.lora
    for key, value in (("lora_dropout", 0.2), ("lora_alpha", 3.0), ("use_rslora", True)):
        with pytest.raises(UserError, match=f"this run has {key} .*, not {value}: give the same"):
            again(run, **{**resumed, key: value})
