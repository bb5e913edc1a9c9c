"""Imported once, trained and exported under every layout."""

from __future__ import annotations

import pytest

from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from tests.support import conversion_folders as folders
from tests.support import launch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

LAYOUTS = {"tp1": (1, 1), "tp2": (2, 1), "tp4": (4, 1), "pp2": (1, 2), "tp2_pp2": (2, 2)}
# Adam's first step is a gradient's sign, whatever its size: a large epsilon keeps rounding from deciding it.
SETTINGS = dict(
    train_iters=1,
    seq_length=1024,
    micro_batch_size=2,
    global_batch_size=4,
    clip_grad=0.0,
    adam_eps=0.1,
    tensorboard=False,
    progress=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


def imported(root, tied: bool):
    source = folders.write_folder(root / "hf", tied=tied)
    import_checkpoint(source, root / "megatron", ImportOptions(progress=False))
    launch.uneven_pairs(root / "pairs.jsonl", 8)
    return folders.read_weights(source)


def train_and_export(server, root, name: str, layout: str, **settings):
    tp, pp = LAYOUTS[layout]
    server.train(
        {
            **SETTINGS,
            **settings,
            "load": root / "megatron",
            "save": root / name,
            "data_path": root / "pairs.jsonl",
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
        },
        processes=tp * pp,
    )
    export_checkpoint(root / name, root / f"{name}_hf", ExportOptions(progress=False))
    return folders.read_weights(root / f"{name}_hf")


@pytest.mark.parametrize("tied, layouts", [(False, LAYOUTS), (True, ("tp1", "tp2_pp2"))], ids=["untied", "tied"])
def test_exports_after_one_step_agree(server, tmp_path, tied, layouts):
    before = imported(tmp_path, tied)
    after = {layout: train_and_export(server, tmp_path, layout, layout, lr=1e-3) for layout in layouts}
    for name, weight in before.items():
        first = after["tp1"][name]
        assert (first - weight).abs().max() > 1e-5, f"{name} was not trained"
        for layout, other in after.items():
            difference = (other[name] - first).abs().max()
            assert difference <= 1e-6, f"{name} under {layout}: {difference}"
    assert all(other.keys() == before.keys() for other in after.values())


def test_loaded_and_saved_without_learning_nothing_changes(server, tmp_path):
    imported(tmp_path, tied=False)
    train_and_export(server, tmp_path, "still", "tp2_pp2", lr=0.0)
    folders.assert_same_weights(tmp_path / "hf", tmp_path / "still_hf")
