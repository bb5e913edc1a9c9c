"""--reference: another checkpoint than the starting point is the reference, live, cached, sharded, resumed, scored."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.launch import TINY_MODEL, ForkServer, disagreements, flags, uneven_pairs

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Every step sees every pair; steps after the first have the noise of another epoch.
SETTINGS = {
    **TINY_MODEL,
    "seq_length": 1200,
    "micro_batch_size": 6,
    "global_batch_size": 10,
    "num_views": 2,
    "train_iters": 4,
    "save_interval": 2,
    "lr": 1e-3,
}
EVALUATION = {"eval_interval": 10}
TP2 = {"tensor_model_parallel_size": 2}
STAGES = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
MLP = {"trainable_modules": ["mlp"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    uneven_pairs(folder / "pairs.jsonl", 10)
    return folder


@pytest.fixture(scope="module")
def checkpoints(folder, server) -> Path:
    """``base`` and ``other``, which differ in every tensor and in their last iteration, 2 and 3; and a copy of each
    that will train on."""
    for seed, name in enumerate(("base", "other")):
        data = folder / "pairs.jsonl"
        settings = {**SETTINGS, "train_iters": 2 + seed, "lr": 0.01, "seed": seed, "data_path": data}
        server.train({**settings, "save": folder / name})
        shutil.copytree(folder / name, folder / f"moving_{name}")
    return folder


def settings_of(folder: Path, **others) -> dict:
    settings = {"load": folder / "base", "reference": folder / "other", "data_path": folder / "pairs.jsonl"}
    settings |= {**SETTINGS, **others}
    return {key: value for key, value in settings.items() if value is not None}


@pytest.fixture(scope="module")
def train(checkpoints, server):
    """(name, processes, settings) -> the metrics but for the rates; the run folder has that name."""

    def run(name: str, processes: int = 1, **settings) -> list[dict]:
        rows = server.train(settings_of(checkpoints, **settings, save=checkpoints / name), processes)
        return [{key: value for key, value in row.items() if not key.endswith("_per_second")} for row in rows]

    return run


@pytest.fixture(scope="module")
def live(folder, train) -> list[dict]:
    """With an evaluation, on what it trains on, before the first and after the last step."""
    checkpoints = {"load": folder / "moving_base", "reference": folder / "moving_other"}
    return train("live", **EVALUATION, eval_data_path=folder / "pairs.jsonl", **checkpoints)


def score(server: ForkServer, folder: Path, name: str, **words) -> tuple[str, dict[str, float]]:
    """The tool's output, and the mean over pairs of every number."""
    words = {"data": folder / "pairs.jsonl", "output": folder / f"{name}.jsonl", **words}
    statuses, output = server.run(words, folder / f"{name}.log", verb="score")
    assert statuses == [0], output
    rows = [json.loads(line) for line in words["output"].read_text().splitlines()]
    assert len(rows) == 10
    return output, {key: sum(row[key] for row in rows) / 10 for key in rows[0] if key != "source"}


def test_the_first_step_is_the_score_of_two_checkpoints(server, folder, live):
    """The tool loads one checkpoint after the other into a whole model, and shares nothing between them."""
    settings = {"seq_length": 1200, "num_views": 2}
    _, expected = score(server, folder, "two", checkpoint=folder / "base", reference=folder / "other", **settings)
    for key, value in expected.items():
        assert live[0][key] == pytest.approx(value, rel=1e-5), key
    assert abs(live[0]["loss"] - 0.693147) > 1e-2


def test_evaluation_and_score_use_the_runs_reference(server, folder, live):
    """The last evaluation is what the tool says of the run, which it compares with its own reference unasked."""
    first, last = (json.loads(line) for line in (folder / "live" / "eval.jsonl").read_text().splitlines())
    assert first["eval/rewards/margins"] == pytest.approx(live[0]["rewards/margins"], rel=1e-5)
    output, expected = score(server, folder, "run", checkpoint=folder / "live")
    for key, value in expected.items():
        assert last[f"eval/{key}"] == pytest.approx(value, rel=1e-5), key
    assert "rewards/margins" in expected and f"reference            {folder / 'moving_other'}\n" in output
    assert last["eval/loss"] < first["eval/loss"] - 1e-3


def test_noise_of_the_references_own_in_training_and_evaluation(folder, train):
    """Of one batch of all pairs, in epoch 0; the reference is the policy, but for the noise."""
    settings = {"estimator": "elbo", "reference": None, "train_iters": 1, "save_interval": 1}
    (row,) = train("elbo", **settings, **EVALUATION, eval_data_path=folder / "pairs.jsonl")
    first, _ = (json.loads(line) for line in (folder / "elbo" / "eval.jsonl").read_text().splitlines())
    assert first["eval/rewards/margins"] == pytest.approx(row["rewards/margins"], rel=1e-5)
    assert abs(row["rewards/margins"]) > 1e-3


def test_frozen_tensors_of_the_reference_are_its_own(train, live):
    row = train("mlp", **MLP, train_iters=1)[0]
    assert {**row, "grad_norm": live[0]["grad_norm"]} == {**live[0], "lr": row["lr"]}
    assert row["grad_norm"] != live[0]["grad_norm"]


@pytest.mark.parametrize("layout", [TP2, STAGES], ids=["tp2", "virtual stages"])
def test_layouts_agree(train, live, layout):
    assert disagreements(train(next(iter(layout)), 2, **layout), live) == []


def test_cached_is_live_bit_for_bit(server, folder, train, live):
    words = settings_of(folder, output=folder / "scores")
    statuses, output = server.run(words, folder / "scores.log", verb="reference")
    assert statuses == [0], output
    assert train("cached", reference_cache=folder / "scores") == live


def test_a_resumed_run_keeps_it(folder, train, live, server, alone, capfd):
    """Also where starting point and reference have trained on since, in training and in scoring; and says so where the
    iteration that it had is gone."""
    _, before = score(server, folder, "before", checkpoint=folder / "live")
    for seed, name in enumerate(("moving_base", "moving_other")):
        moved = {**SETTINGS, "train_iters": 3 + seed, "lr": 0.01, "data_path": folder / "pairs.jsonl", "seed": seed}
        server.train({**moved, "save": folder / name})
    assert score(server, folder, "after", checkpoint=folder / "live")[1] == before
    save = shutil.copytree(folder / "live", folder / "resumed")
    shutil.rmtree(save / "iter_0000004")
    (save / "latest_checkpointed_iteration.txt").write_text("2")
    assert train("resumed", reference=None, load=None) == live
    assert "resuming from iteration 2" in (folder / "resumed.log").read_text()

    mine, gone = folder / "moving_other", "its iteration {}, which is not there any more"
    again = {"load": None, "reference": None, "save": save}
    assert f"reference is {mine}, not {folder / 'other'}" in refusal(capfd, settings_of(folder, save=save, load=None))
    shutil.rmtree(mine / "iter_0000003")
    assert f"{mine}: this run's reference is {gone.format(3)}" in refusal(capfd, settings_of(folder, **again))
    shutil.rmtree(folder / "moving_base" / "iter_0000002")
    assert f"{folder / 'moving_base'}: this run started from {gone.format(2)}" in refusal(
        capfd, settings_of(folder, **again)
    )
    shutil.rmtree(mine)
    output, scores = score(server, folder, "without", checkpoint=folder / "live")
    assert f"warning: {folder / 'live'}: its reference {mine} is not there: no rewards; give --reference DIR" in output
    assert scores.keys() == {"logps/chosen", "logps/rejected"}


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def refusal(capfd, settings: dict) -> str:
    """The one line with which a run in this process refuses ``settings``."""
    from megatron_dtrpo.cli import train as trainer

    capfd.readouterr()
    assert trainer.main(flags(settings)) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_a_dry_run_counts_the_copy(checkpoints, alone, capfd):
    from megatron_dtrpo.cli import train as trainer

    settings = settings_of(checkpoints, dry_run=True)
    capfd.readouterr()
    assert trainer.main(flags(settings)) == 0
    output = capfd.readouterr().out
    assert f"reference: {checkpoints / 'other'}: a copy of its weights is kept" in output and "reference copy" in output
    other = refusal(capfd, {**settings_of(checkpoints, load=None, vocab_size=259, block_size=16), "dry_run": True})
    assert "checkpoint of another architecture: block_size is 8 there, 16 here: give another ref" in other


REFUSED = {
    "sft": ({"objective": "sft", "num_views": 1}, "reference: objective sft has no reference: leave it out"),
    "simpo": ({"loss_type": ["simpo"]}, "reference: loss_type simpo has no reference: leave it out"),
    "architecture": ({"load": None, "block_size": 16}, "other: checkpoint of another architecture: block_size is 8"),
    "tokenizer": ({"mask_token": "<pad>"}, "other: has another tokenizer than this run"),
    "no folder": ({"reference": "nowhere"}, "nowhere: no such folder"),
    "no checkpoint": ({"reference": "pairs"}, "pairs: no checkpoint to load"),
    "a cache of another": ({"reference_cache": "cache"}, "made for another fingerprint of the reference checkpoint's"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line(server, checkpoints, alone, capfd, tmp_path, name):
    change, reason = REFUSED[name]
    (checkpoints / "pairs").mkdir(exist_ok=True)
    if name == "a cache of another":
        words = settings_of(checkpoints, reference=None, output=checkpoints / "cache")
        statuses, output = server.run(words, checkpoints / "cache.log", verb="reference")
        assert statuses == [0], output
    paths = {key: checkpoints / change[key] for key in ("reference", "reference_cache") if key in change}
    line = refusal(capfd, settings_of(checkpoints, **{**change, **paths}, save=tmp_path / "run"))
    assert reason in line, line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_end_token_of_the_runs_choice_holds_for_the_reference_too(checkpoints):
    from megatron_dtrpo.config.settings import Config
    from megatron_dtrpo.training.setup import open_tokenizer, prepare

    settings = {key: value for key, value in settings_of(checkpoints).items() if key in ("load", "reference")}
    settings = {key: str(value) for key, value in settings.items()} | {"data_path": "pairs.jsonl"}
    config = Config.from_flat({**settings, "eos_token": "<pad>"})
    tokenizer, _ = prepare(config, set(settings), training=False)
    assert tokenizer.eos_id == open_tokenizer(config).eos_id == 257
