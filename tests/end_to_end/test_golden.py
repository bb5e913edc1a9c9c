"""The runs of tests/golden, made by an earlier version: what it wrote loads, and its numbers come out again.

A refactoring that fails here changed numbers, names or formats. Only a change on purpose may renew the files, by
``python -m tests.golden.make``, and its commit says why.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_dtrpo.config.settings import FIELDS
from tests.golden.recipe import (
    CACHE,
    COMMITTED,
    GOLDEN,
    INITIAL,
    PLACEHOLDER,
    RECORD,
    ROWS,
    SCORES,
    Commands,
    copy_text,
    noise,
    store_name,
    tensor_hashes,
)
from tests.support.launch import ForkServer, disagreements, latest_iteration, read_metrics, write_lines

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]

TOLERANCE = 1e-5  # relative, of float32 sums; kernels of machines differ
RECORDED = json.loads((GOLDEN / RECORD).read_text())


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """The golden runs, at the checkpoints that were kept, in a folder where they may go on."""
    folder = tmp_path_factory.mktemp("golden")
    for kind, rows in ROWS.items():
        shutil.copyfile(GOLDEN / rows, folder / rows)
        copy_text(GOLDEN / kind, folder / kind, PLACEHOLDER, str(folder))
        write_lines(folder / kind / "metrics.jsonl", read_metrics(GOLDEN / kind)[: COMMITTED[kind]])
        store = folder / kind / "data_cache" / "store"
        name = store_name(folder / rows, kind, RECORDED["store_version"], RECORDED["tokenizer"])
        store.rename(store.with_name(name))
    copy_text(GOLDEN / CACHE, folder / CACHE, PLACEHOLDER, str(folder))
    server = ForkServer(folder / "server.log")
    yield Commands(server, folder)
    server.close()


def same_metrics(rows: list[dict], kind: str) -> None:
    assert not disagreements(rows, read_metrics(GOLDEN / kind), TOLERANCE)


def store_of(run: Path) -> tuple[str, dict, int]:
    """The only token store of a run: its name, what it says of itself and its tokens file."""
    stores = sorted((run / "data_cache").iterdir())
    assert len(stores) == 1, (
        "the token store of then was built again: its name changed. Was FORMAT_VERSION raised on purpose? Then give "
        f"store_version in tests/golden/{RECORD} the new number, and say why in the commit"
    )
    (store,) = stores
    return store.name, json.loads((store / "meta.json").read_text()), (store / "tokens.int32").stat().st_ino


def test_noise_and_order_are_the_same_bits():
    assert noise() == RECORDED["noise"]


def test_sft_from_its_seed(commands):
    same_metrics(commands.train("sft", "fresh_sft"), "sft")
    weights = load_file(commands.export("fresh_sft", "initial", 1) / "model.safetensors")
    expected = load_file(GOLDEN / INITIAL)
    assert weights.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(weights[name], values, rtol=1e-5, atol=1e-7, msg=name)
    _, built, _ = store_of(commands.folder / "fresh_sft")
    assert built == store_of(commands.folder / "sft")[1]


def test_preferences_from_the_checkpoint_of_then(commands):
    same_metrics(commands.train("preference", "fresh_preference"), "preference")
    _, built, _ = store_of(commands.folder / "fresh_preference")
    assert built == store_of(commands.folder / "preference")[1]


def test_reference_scores_are_of_the_same_fingerprints(commands):
    """A setting that is newer than the scores had its default then."""
    then = json.loads((GOLDEN / CACHE / "meta.json").read_text())["facts"]
    newer = {key: FIELDS[key].default for key in ("qk_layernorm",)}
    assert commands.reference("scores_of_now") == then | newer


def test_the_checkpoint_scores_as_then(commands):
    expected = [json.loads(line) for line in (GOLDEN / SCORES).read_text().splitlines()]
    rows = commands.score("preference")
    assert [row["source"] for row in rows] == [row["source"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row == {key: v if key == "source" else pytest.approx(v, rel=1e-5, abs=1e-4) for key, v in other.items()}


def test_the_checkpoint_exports_as_then(commands):
    folder = commands.export("preference", "exported", COMMITTED["preference"])
    assert tensor_hashes(load_file(folder / "model.safetensors")) == RECORDED["exported"]
    assert json.loads((folder / "config.json").read_text()) == RECORDED["config"]


# Last: these go on in the copied runs, which the tests above read.
@pytest.mark.parametrize("kind", ["preference", "sft"])
def test_a_run_of_then_goes_on(kind, commands):
    """From its checkpoint, its tokens and, for preferences, precomputed reference scores."""
    run = commands.folder / kind
    before, cache = store_of(run), {"reference_cache": commands.folder / CACHE} if kind == "preference" else {}
    same_metrics(commands.train(kind, kind, **cache), kind)
    assert store_of(run) == before  # accepted, not built again
    assert latest_iteration(run) == len(read_metrics(GOLDEN / kind))
