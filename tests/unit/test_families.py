"""The registry of model families: what its rows say, that nothing heavy is needed to read them, and the recipe of
docs/extending.md, whose code is run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
import types

import pytest
import torch
import yaml

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.conversion.inspection import inspect
from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.parameters import SHAPES
from megatron_dtrpo.families.registry import FAMILIES, families, family_of_config, same_predictions
from tests.conftest import REPOSITORY
from tests.support import conversion_folders as folders

QUIET = dict(progress=False)
IMPORTS = """
import importlib, pkgutil, sys
import megatron_dtrpo.families as package

for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
assert len([name for name in sys.modules if name.startswith(package.__name__ + ".")]) >= 5
ours = {name for name in sys.modules if name.startswith("megatron_dtrpo.")} - {"megatron_dtrpo.errors"}
heavy = {"torch", "megatron", "megatron.core", "transformers", "numpy", "yaml"} & set(sys.modules)
print(sorted({name for name in ours if not name.startswith(package.__name__)} | heavy))
"""


def test_reading_families_needs_neither_torch_nor_settings():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]", done


@pytest.mark.parametrize("family", families(), ids=FAMILIES)
def test_a_row_agrees_with_itself(family):
    name = family.name
    for parameter, rule in family.parameters.items():
        sources = rule.sources(3)
        assert len(sources) == len(SHAPES[parameter].rows), parameter
        assert ("*" in parameter) == ("*" in rule.pattern) == all(".3." in source for source in sources), parameter
    model = ModelSettings(
        family=name,
        num_layers=2,
        hidden_size=48,
        ffn_hidden_size=80,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=8 if name == "llada" else 12,  # its config.json knows no other width
        vocab_size=99,
        block_size=0 if family.is_full else 4,
        rotary_base=123.0,
        norm_epsilon=1e-3,
        init_method_std=0.5,
        max_position_embeddings=77,
        untie_embeddings_and_output_weights=False,
        **family.layers,
    )
    assert family.mismatch(model) is None
    for key, value in family.layers.items():
        other = dataclasses.replace(model, **{key: not value})
        assert family.mismatch(other).startswith(f"{key} is {str(not value).lower()}, in family {name} it is")
    config = family.new_config(model)
    again = family_of_config(config, "config.json")
    read = again.settings(config, "config.json")
    assert read == {key: getattr(model, key) for key in read} and len(read) + len(family.layers) >= 13
    assert family.is_full or config[family.block_size_key] == 4
    wrong = dataclasses.replace(model, block_size=4 - model.block_size)
    assert family.mismatch(wrong).startswith(f"block_size is {wrong.block_size}, ")
    assert same_predictions(again, family) and again.layers == family.layers


def test_a_row_has_the_name_that_it_is_found_by():
    assert [family.name for family in families()] == list(FAMILIES)


def _block_size(family) -> str:
    if family.is_full:
        return "the whole sequence"
    if family.block_size is not None:
        return f"{family.block_size_key}`, else {family.block_size}"
    return f"{family.block_size_key}`, else `--block-size" + ("`, else 32" if family.starting_point else "")


def test_the_table_of_models_is_the_registry():
    lines = (REPOSITORY / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    first = lines.index("| family | architecture in config.json | block size | shift | attention | mask token |") + 2
    table = itertools.takewhile(bool, lines[first:])
    rows = [[cell.strip().strip("`") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]
    expected = [
        [
            family.name,
            family.architecture,
            _block_size(family),
            str(family.prediction_shift),
            family.attention,
            family.mask_token.replace("|", "\\|"),
        ]
        for family in families()
    ]
    assert rows == expected


@pytest.mark.parametrize("architecture, name", [(folders.FAST_DLLM, "fast_dllm_v2"), (folders.QWEN2, "qwen2")])
def test_an_import_records_its_family_and_older_checkpoints_have_none(tmp_path, architecture, name):
    source = folders.write_folder(tmp_path / "hf", architecture)
    assert import_checkpoint(source, tmp_path / "megatron", ImportOptions(**QUIET)).family == name
    path = tmp_path / "megatron" / checkpoint_folder.MODEL_CONFIG
    values = yaml.safe_load(path.read_text())
    assert values.pop("family") == name
    path.write_text(yaml.safe_dump(values))
    assert checkpoint_folder.load_model_config(tmp_path / "megatron").family == "fast_dllm_v2"
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET))
    folders.assert_same_weights(source, tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    path.write_text(yaml.safe_dump({**values, "family": "gpt9"}))
    with pytest.raises(UserError, match="family is 'gpt9': choose one of fast_dllm_v2, qwen2"):
        checkpoint_folder.load_model_config(tmp_path / "megatron")


@pytest.fixture
def pebble(monkeypatch):
    """The family of docs/extending.md, registered."""
    page = (REPOSITORY / "docs" / "extending.md").read_text(encoding="utf-8")
    section = page[page.index("### A family with names of its own") :]
    module = types.ModuleType("pebble")
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], vars(module))
    monkeypatch.setitem(sys.modules, "pebble", module)
    monkeypatch.setitem(FAMILIES, "pebble", "pebble:PEBBLE")
    return vars(module)["PEBBLE"]


OTHER_NAMES = {
    "model.embed_tokens": "net.tokens",
    "model.layers": "net.blocks",
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
    "self_attn.q_proj": "query",
    "self_attn.k_proj": "key",
    "self_attn.v_proj": "value",
    "self_attn.o_proj": "out",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "model.norm": "net.norm",
    "lm_head": "net.head",
}


def renamed(name: str) -> str:
    for ours, theirs in OTHER_NAMES.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_recipe_for_a_family(tmp_path, pebble, tied):
    """Its checkpoint is a Qwen2's without biases under other names, so that a Qwen2's import tells what comes out."""
    twin = folders.write_folder(tmp_path / "twin", folders.QWEN2, torch.bfloat16, tied)
    weights = {renamed(name): value for name, value in folders.read_weights(twin).items() if "bias" not in name}
    source = tmp_path / "hf"
    source.mkdir()
    folders.write_tokenizer(source, mask=False)
    config = {**folders.config(folders.QWEN2, tied, torch.bfloat16), "architectures": ["PebbleForDiffusion"]}
    (source / "config.json").write_text(json.dumps({**config, "model_type": "pebble"}))
    folders.write_weights(source, weights, shards=2)

    options = ImportOptions(add_mask_token=True, block_size=4, **QUIET)
    model = import_checkpoint(source, tmp_path / "megatron", options)
    assert (model.family, model.add_qkv_bias, model.block_size) == ("pebble", False, 4)
    import_checkpoint(twin, tmp_path / "twin_megatron", ImportOptions(**QUIET))
    expected = folders.read_megatron(tmp_path / "twin_megatron")
    found = folders.read_megatron(tmp_path / "megatron")
    assert found.keys() == {name for name in expected if not name.endswith("bias")}
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    described = inspect(tmp_path / "megatron")
    assert described["mask token"] == "<hole> (259)" and described["architecture"] == "PebbleForDiffusion"
    assert described["parameters"] == f"{sum(value.numel() for value in weights.values()):,}"

    export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET))
    folders.assert_same_weights(source, tmp_path / "back")
    exported = json.loads((tmp_path / "back" / "config.json").read_text())
    assert exported == {**json.loads((source / "config.json").read_text()), "block_length": 4}

    # As a run from random weights: no config.json came with it.
    for file in (tmp_path / "megatron" / checkpoint_folder.HUGGINGFACE).iterdir():
        file.unlink()
    (tmp_path / "megatron" / checkpoint_folder.HUGGINGFACE).rmdir()
    export_checkpoint(tmp_path / "megatron", tmp_path / "new", ExportOptions(**QUIET))
    folders.assert_same_weights(source, tmp_path / "new")
    again = import_checkpoint(tmp_path / "new", tmp_path / "again", ImportOptions(**QUIET))
    assert dataclasses.replace(again, init_method_std=model.init_method_std) == model


def test_a_family_refuses_settings_and_names_that_are_not_its_own(tmp_path, pebble):
    source = folders.write_folder(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "megatron", ImportOptions(**QUIET))
    path = tmp_path / "megatron" / checkpoint_folder.MODEL_CONFIG
    model = checkpoint_folder.load_model_config(tmp_path / "megatron")
    checkpoint_folder.save_model_config(path.parent, dataclasses.replace(model, family="pebble"))
    with pytest.raises(UserError, match="add_qkv_bias is true, in family pebble it is false, so it cannot be exported"):
        export_checkpoint(path.parent, tmp_path / "back", ExportOptions(**QUIET))
    checkpoint_folder.save_model_config(path.parent, dataclasses.replace(model, family="pebble", add_qkv_bias=False))
    with pytest.raises(UserError, match="family is fast_dllm_v2 there, pebble in"):
        export_checkpoint(path.parent, tmp_path / "back", ExportOptions(**QUIET))
