"""Precomputed reference scores: the live reference's numbers to the last bit, and refused where they are another's."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.launch import TINY_MODEL, ForkServer, disagreements, flags, uneven_pairs, write_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

# Two and a half epochs of 20 pairs: elbo, whose reference has noise of its own, is the hardest to get right.
SETTINGS = {
    **TINY_MODEL,
    "estimator": "elbo",
    "seq_length": 1200,
    "micro_batch_size": 3,
    "global_batch_size": 10,
    "num_views": 2,
    "train_iters": 5,
    "save_interval": 3,
    "lr": 1e-3,
}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
TIED = {"load": None, "untie_embeddings_and_output_weights": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = ForkServer(tmp_path_factory.mktemp("server") / "log")
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, server) -> Path:
    """Pairs and a checkpoint, ``start``, whose biases and norms are no longer what they were initialised to."""
    folder = tmp_path_factory.mktemp("cache")
    data = uneven_pairs(folder / "pairs.jsonl", 20)
    server.train({**SETTINGS, "train_iters": 2, "lr": 0.01, "data_path": data, "save": folder / "start"})
    return folder


def settings_of(folder: Path, **others) -> dict:
    settings = {"load": folder / "start", "data_path": folder / "pairs.jsonl", **SETTINGS, **others}
    return {key: value for key, value in settings.items() if value is not None}


def precompute(server: ForkServer, folder: Path, name: str, processes: int = 1, **settings) -> Path:
    settings = settings_of(folder, **settings, output=folder / name)
    statuses, output = server.run(settings, folder / f"{name}.log", processes, verb="reference")
    assert statuses == [0] * processes, output
    return folder / name


@pytest.fixture(scope="module")
def cache(server, folder) -> Path:
    return precompute(server, folder, "scores")


@pytest.fixture(scope="module")
def train(folder, server):
    """(name, processes, settings) -> the metrics but for the rates; the run folder has that name."""

    def run(name: str, processes: int = 1, **settings) -> list[dict]:
        rows = server.train(settings_of(folder, **settings, save=folder / name), processes)
        return [{key: value for key, value in row.items() if not key.endswith("_per_second")} for row in rows]

    return run


@pytest.fixture(scope="module")
def live(train) -> list[dict]:
    return train("live")


def test_bit_for_bit_the_live_reference(train, live, cache):
    assert train("cached", reference_cache=cache) == live
    assert abs(live[0]["rewards/margins"]) > 1e-3  # the reference's noise is not the policy's


def test_what_is_written(cache):
    scores = np.load(cache / "scores.npy", mmap_mode="r")
    assert scores.shape == (3, 20, 2) and scores.dtype == np.float64
    assert not np.isnan(scores[:2]).any()
    assert (scores[0] != scores[1]).mean() > 0.8  # an epoch has noise of its own; responses of one token have none
    assert np.isnan(scores[2]).all(1).sum() == 10  # the run ends in the middle of the third epoch
    assert sorted(p.name for p in cache.iterdir()) == ["meta.json", "scores.npy"]
    assert not cache.with_name("scores.partial").exists()


@pytest.mark.parametrize("layout", [TP2, CP2], ids=["tp2", "cp2"])
def test_bit_for_bit_under_a_layout_of_its_own(server, folder, train, cache, layout):
    name = next(iter(layout))
    sharded = precompute(server, folder, f"scores_{name}", 2, **layout)
    assert train(f"cached_{name}", 2, **layout, reference_cache=sharded) == train(f"live_{name}", 2, **layout)
    one, two = (json.loads((path / "meta.json").read_text())["facts"] for path in (cache, sharded))
    assert one == two  # the fingerprint of the weights among them


@pytest.mark.parametrize(
    "layout",
    [{**TP2, **PP2}, {"use_distributed_optimizer": True}, {**PP2, "num_virtual_stages_per_pipeline_rank": 2}],
    ids=["TP2 x PP2", "DP2", "virtual stages x DP2"],
)
def test_one_cache_serves_every_layout(train, live, cache, layout):
    processes = 2 * len(layout)
    rows = train("as_" + "_".join(layout), processes, **layout, reference_cache=cache, micro_batch_size=8)
    assert disagreements(rows, live) == []


def test_tied_weights_have_one_fingerprint_under_pipeline_parallelism(server, folder, train):
    cache = precompute(server, folder, "scores_tied", 2, **TIED, **PP2)
    rows = train("tied_cached", **TIED, reference_cache=cache)
    assert disagreements(rows, train("tied_live", **TIED)) == []


@pytest.mark.parametrize("cached", [True, False])
def test_a_resumed_run_goes_on_bit_for_bit(folder, train, live, cache, cached):
    """From its checkpoint of step 3, with the cache or, because nothing depends on it, without."""
    first = "to_be_resumed" if cached else "to_be_resumed_live"
    assert train(first, reference_cache=cache) == live
    save = folder / first
    shutil.rmtree(save / "iter_0000005")
    (save / "latest_checkpointed_iteration.txt").write_text("3")
    assert train(first, **({"reference_cache": cache} if cached else {})) == live
    assert "resuming from iteration 3" in (folder / f"{first}.log").read_text()


def test_vrpo_and_trajectory_too(server, folder, train):
    """With shared noise the first step is a tie, from the cache as well."""
    rng = random.Random(0)
    rows = []
    for _ in range(20):
        row = {"prompt_ids": [rng.randrange(256) for _ in range(rng.randint(1, 30))]}
        for name in ("chosen", "rejected"):
            length = rng.randint(1, 60)
            row[f"{name}_ids"] = [rng.randrange(256) for _ in range(length)]
            row[f"{name}_steps"] = sorted(rng.randrange(40) for _ in range(length))
            for i in range(length):  # a new block is a new step, and its first token one of its own
                if (len(row["prompt_ids"]) + i) % TINY_MODEL["block_size"] == 0:
                    row[f"{name}_steps"][i:] = [step + 1 for step in row[f"{name}_steps"][i:]]
                    row[f"{name}_steps"][i + 1 :] = [step + 1 for step in row[f"{name}_steps"][i + 1 :]]
            row[f"{name}_discarded"] = []
        rows.append(row)
    data = write_lines(folder / "recorded.jsonl", rows)
    for estimator in ("vrpo", "trajectory"):
        settings = {"estimator": estimator, "data_path": data}
        cache = precompute(server, folder, f"scores_{estimator}", **settings)
        rows = train(f"{estimator}_live", **settings)
        assert train(f"{estimator}_cached", **settings, reference_cache=cache) == rows
        assert 0.69314 < rows[0]["loss"] < 0.69316 and rows[0]["rewards/margins"] == 0
        assert all(abs(row["rewards/margins"]) > 1e-3 for row in rows[1:])


# In this process: what a run keeps, and what it refuses.


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_no_copy_of_the_reference_is_kept(folder, cache, alone, monkeypatch):
    from megatron_dtrpo.cli import train as trainer
    from megatron_dtrpo.runtime import initialize

    initialize.enable_device()
    from megatron_dtrpo.training import run as training_loop

    kept = []

    class Watched(training_loop.ReferencePolicy):
        def __init__(self, *models):
            super().__init__(*models)
            kept.append(sum(value.numel() for _, value in self.frozen))

    monkeypatch.setattr(training_loop, "ReferencePolicy", Watched)
    settings = settings_of(folder, train_iters=1)
    assert trainer.main(flags({**settings, "save": folder / "no_copy", "reference_cache": cache})) == 0
    assert kept == []
    assert trainer.main(flags({**settings, "save": folder / "copy"})) == 0
    assert len(kept) == 1 and kept[0] > 10_000


REFUSED = {
    "estimator": ({"estimator": "vrpo"}, "made for estimator elbo, not vrpo"),
    "views": ({"num_views": 3}, "made for num_views 2, not 3"),
    "block start": ({"block_start": "noisy"}, "made for block_start clean, not noisy"),
    "seed": ({"seed": 7}, "made for seed 1234, not 7"),
    "precision": ({"bf16": True}, "made for bf16 False, not True"),
    "block size": ({"load": None, "block_size": 16}, "made for block_size 8, not 16"),
    "model": ({"load": None, "rotary_base": 10.0}, "made for rotary_base 1000000.0, not 10.0"),
    "too few steps": ({"train_iters": 6}, "lacks pairs of step 6 of 6: it covers fewer steps or epochs"),
    "too few epochs": ({"train_iters": 7}, "lacks pairs of step 6 of 7"),
    "tokenizer": ({"mask_token": "<pad>"}, "made for another fingerprint of the tokenizer"),
    "data": ({"data_path": "other.jsonl"}, "made for another fingerprint of the data"),
    "checkpoint": ({"load": "live"}, "made for another fingerprint of the reference checkpoint's weights"),
    "random weights": ({"load": None}, "made for another fingerprint of the reference checkpoint's weights"),
    "nothing there": ({"reference_cache": "pairs.jsonl"}, "meta.json cannot be read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_cache_of_another_run_is_refused(folder, live, cache, alone, capfd, tmp_path, name):
    from megatron_dtrpo.cli import train as trainer

    uneven_pairs(folder / "other.jsonl", 20, seed=1)
    change, reason = REFUSED[name]
    paths = {key: folder / change[key] for key in ("data_path", "load", "reference_cache") if change.get(key)}
    settings = settings_of(folder, **{"reference_cache": cache, **change, **paths})
    capfd.readouterr()
    assert trainer.main(flags({**settings, "save": tmp_path / "run"})) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: reference_cache ") and reason in lines[0], lines
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_fingerprint_sees_one_element_and_its_place(alone):
    import torch

    from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
    from megatron_dtrpo.runtime import initialize

    settings = {key: value for key, value in TINY_MODEL.items() if key != "tokenizer_type"}
    initialize.start(ParallelSettings(), seed=1)
    try:
        from megatron_dtrpo.checkpoint.fingerprint import weights_fingerprint
        from megatron_dtrpo.model.initialization import initialize_weights
        from megatron_dtrpo.model.provider import build_model

        model = build_model(ModelSettings(**settings, kv_channels=8, vocab_size=259), ParallelSettings())
        initialize_weights(model, seed=1)
        seen = {weights_fingerprint(model)}
        assert seen == {weights_fingerprint(model)}
        with torch.no_grad():
            matrix = model.embedding.word_embeddings.weight
            for count, change in enumerate(
                (
                    lambda: matrix[300, 31].mul_(-1),  # the padding of the vocabulary counts too
                    lambda: matrix[:2].copy_(matrix[:2].flip(0).clone()),
                    lambda: matrix[7, :2].copy_(matrix[7, :2].flip(0).clone()),
                    lambda: model.decoder.final_layernorm.weight[3:4].nextafter_(torch.tensor(2.0)),
                ),
                start=2,
            ):
                change()
                seen.add(weights_fingerprint(model))
                assert len(seen) == count
    finally:
        initialize.stop()


def test_the_place_of_the_data_does_not_matter(folder, live, cache, alone, tmp_path):
    from megatron_dtrpo.cli import train as trainer
    from tests.support.launch import read_metrics

    shutil.copy(folder / "pairs.jsonl", tmp_path / "copy.jsonl")
    settings = settings_of(folder, data_path=tmp_path / "copy.jsonl", reference_cache=cache)
    assert trainer.main(flags({**settings, "save": tmp_path / "run", "train_iters": 1})) == 0
    assert read_metrics(tmp_path / "run")[0]["loss"] == live[0]["loss"]


def test_a_damaged_cache_is_refused(cache, tmp_path):
    from megatron_dtrpo.errors import UserError
    from megatron_dtrpo.training.reference_cache import ReferenceCache

    copy = shutil.copytree(cache, tmp_path / "copy")
    scores = (copy / "scores.npy").read_bytes()
    (copy / "scores.npy").write_bytes(scores[:-8])
    with pytest.raises(UserError, match="damaged; run megatron-dtrpo reference"):
        ReferenceCache(copy)
    (copy / "scores.npy").write_bytes(scores)
    (copy / "meta.json").write_text('{"format_version": 1')
    with pytest.raises(UserError, match="damaged"):
        ReferenceCache(copy)
    (copy / "meta.json").unlink()
    with pytest.raises(UserError, match="meta.json cannot be read"):
        ReferenceCache(copy)


def test_the_tool_refuses_what_it_cannot_do(folder, cache, alone, capfd, tmp_path):
    from megatron_dtrpo.cli import reference

    settings = settings_of(folder, output=tmp_path / "scores")
    refused = (
        ({"output": cache}, "exists already"),
        ({"objective": "sft", "estimator": "sft"}, "objective sft has no reference"),
        ({"data_path": tmp_path / "none.jsonl"}, "no such file"),
        ({"num_epochs": 1}, "give exactly one of train_iters and num_epochs"),
    )
    for change, reason in refused:
        capfd.readouterr()
        assert reference.main(flags({**settings, **change})) == 2
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and reason in lines[0], lines
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_are_skipped_on_every_rank_and_counted_once(server, folder, train):
    """Two processes, with a cache and without one, train what they train on the file without the bad rows."""
    good = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    bad = {
        0: {"prompt": "a", "chosen": "b"},
        7: {**good[0], "rejected": good[0]["chosen"]},
        22: {**good[1], "chosen": ""},
    }
    rows = iter(good)
    mixed = [bad[place] if place in bad else next(rows) for place in range(len(good) + len(bad))]
    data = write_lines(folder / "mixed.jsonl", mixed)
    skip = {"data_path": data, "bad_rows": "skip"}
    scores = precompute(server, folder, "scores_skip", 2, **skip)
    without = train("without", 2)
    assert train("live_skip", 2, **skip) == without
    assert train("cached_skip", 2, **skip, reference_cache=scores) == without
    for log in ("scores_skip.log", "live_skip.log", "cached_skip.log"):
        lines = [line for line in (folder / log).read_text().splitlines() if "that cannot be used" in line]
        assert len(lines) == 1 and "skipped 3 of 23 rows" in lines[0], (log, lines)
        for place in bad:
            assert lines[0].count(f"mixed.jsonl:{place + 1}:") == 1
