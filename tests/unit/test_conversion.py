"""Conversion against safetensors' own reader and writer, and against an independent statement of the layout."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint import iterations
from megatron_dtrpo.conversion import to_huggingface as export_module
from megatron_dtrpo.conversion import to_megatron as import_module
from megatron_dtrpo.conversion.hf_config import model_settings
from megatron_dtrpo.conversion.inspection import inspect
from megatron_dtrpo.conversion.roundtrip import compare, roundtrip
from megatron_dtrpo.conversion.template import config_dtype
from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint, parse_size
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from megatron_dtrpo.data.tokenizer import load_tokenizer
from megatron_dtrpo.errors import UserError
from tests.support import conversion_folders as folders

QUIET = dict(progress=False)
WEIGHTS_ONLY = ImportOptions(progress=False, tokenizer=False)


def there_and_back(source, tmp_path, options=WEIGHTS_ONLY, **export):
    import_checkpoint(source, tmp_path / "megatron", options)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET, **export))
    return tmp_path / "back"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shards", [1, 3])
def test_bit_exact(tmp_path, dtype, tied, shards):
    source = folders.write_folder(tmp_path / "hf", dtype=dtype, tied=tied, shards=shards)
    back = there_and_back(source, tmp_path, max_shard_bytes=10**9 if shards == 1 else 30_000)
    folders.assert_same_weights(source, back)
    assert ((back / "model.safetensors").exists(), len(list(back.glob("*.safetensors"))) > 1) == (
        shards == 1,
        shards > 1,
    )
    for name in ("config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_rows_in_small_pieces_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(import_module, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(export_module, "CHUNK_BYTES", 700)
    source = folders.write_folder(tmp_path / "hf", dtype=torch.bfloat16, shards=2)
    folders.assert_same_weights(source, there_and_back(source, tmp_path))


def test_megatron_tensors_are_what_the_oracle_says(tmp_path):
    source = folders.write_folder(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "megatron", WEIGHTS_ONLY)
    folders.assert_same_model(tmp_path / "megatron", source)


def test_padding_reaches_any_tensor_parallel_size(tmp_path):
    source = folders.write_folder(tmp_path / "hf")
    options = ImportOptions(progress=False, tokenizer=False, make_vocab_size_divisible_by=96)
    model = import_checkpoint(source, tmp_path / "megatron", options)
    assert (model.vocab_size, model.padded_vocab_size) == (272, 288)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET))
    folders.assert_same_weights(source, tmp_path / "back")


def test_dtypes_are_converted_when_asked(tmp_path):
    source = folders.write_folder(tmp_path / "hf")
    options = ImportOptions(progress=False, tokenizer=False, params_dtype=torch.bfloat16)
    import_checkpoint(source, tmp_path / "megatron", options)
    for name, dtype in (("as_source", None), ("half", torch.float16)):
        export_checkpoint(tmp_path / "megatron", tmp_path / name, ExportOptions(dtype=dtype, **QUIET))
        weights = folders.read_weights(tmp_path / name)
        for key, value in folders.read_weights(source).items():
            assert torch.equal(weights[key], value.bfloat16().to(dtype or torch.float32)), key
        named = config_dtype(json.loads((tmp_path / name / "config.json").read_text()))
        assert named == ("float32" if dtype is None else "float16")


def test_mixed_dtypes_are_restored(tmp_path):
    source = folders.write_folder(tmp_path / "hf", dtype=torch.bfloat16)
    weights = folders.read_weights(source)
    for name in ("model.layers.1.self_attn.v_proj.weight", "model.norm.weight"):
        weights[name] = torch.randn(weights[name].shape)
    folders.write_weights(source, weights)
    folders.assert_same_weights(source, there_and_back(source, tmp_path))


def test_tied_head_that_is_stored_all_the_same(tmp_path):
    source = folders.write_folder(tmp_path / "hf", tied=True)
    weights = folders.read_weights(source)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    folders.write_weights(source, weights)
    folders.assert_same_weights(source, there_and_back(source, tmp_path))
    weights["lm_head.weight"][3, 3] += 1
    folders.write_weights(source, weights)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        import_checkpoint(source, tmp_path / "other", WEIGHTS_ONLY)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5000.0},
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
        {"rope_theta": 5000, "rope_scaling": None, "rope_parameters": {"rope_theta": 5000.0}},
        {"rope_theta": None, "rope_parameters": {"full_attention": {"rope_theta": 5000.0, "rope_type": "default"}}},
    ],
)
def test_rotary_base_of_either_transformers(rope):
    assert model_settings(folders.config(**rope), "config.json").rotary_base == 5000.0


def test_block_size(tmp_path):
    assert model_settings(folders.config(), "c").block_size == 8
    qwen2 = folders.config(folders.QWEN2)
    assert [model_settings(qwen2, "c", block_size=b).block_size for b in (None, 16)] == [32, 16]
    with pytest.raises(UserError, match="bd_size"):
        model_settings(folders.config(), "c", block_size=16)


@pytest.mark.parametrize("vocabulary, grown", [(272, 272), (259, 260)], ids=["room", "no_room"])
@pytest.mark.parametrize("tokenizer_json", [False, True])
def test_add_mask_token(tmp_path, vocabulary, grown, tokenizer_json):
    shape = {"vocabulary": vocabulary}
    source = folders.write_folder(tmp_path / "hf", folders.QWEN2, mask=False, shape=shape, tied=True)
    if tokenizer_json:
        transformers = pytest.importorskip("transformers")
        transformers.AutoTokenizer.from_pretrained(source).save_pretrained(source)
        assert (source / "tokenizer.json").exists()
        (source / "vocab.json").unlink()
    with pytest.raises(UserError, match="--add-mask-token"):
        import_checkpoint(source, tmp_path / "without", ImportOptions(**QUIET))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]

    model = import_checkpoint(source, tmp_path / "megatron", ImportOptions(add_mask_token=True, block_size=4, **QUIET))
    tokenizer = load_tokenizer(tmp_path / "megatron" / checkpoint_folder.TOKENIZER)
    assert (tokenizer.mask_token, tokenizer.mask_id, model.vocab_size) == (folders.MASK, 259, grown)
    assert tokenizer.encode("a|<MASK>|b") == [97, 259, 98]

    export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET))
    theirs, ours = folders.read_weights(source), folders.read_weights(tmp_path / "back")
    embedding = ours["model.embed_tokens.weight"]
    assert len(embedding) == grown
    assert torch.equal(embedding[:vocabulary], theirs.pop("model.embed_tokens.weight"))
    torch.testing.assert_close(
        embedding[vocabulary:].sum(0) * vocabulary / max(1, grown - vocabulary),
        embedding[:vocabulary].sum(0) * (grown > vocabulary),
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["vocab_size"], config["bd_size"]) == (grown, 4)
    again = import_checkpoint(tmp_path / "back", tmp_path / "again", ImportOptions(**QUIET))
    assert again == model


def test_reads_one_key_for_all_layers(tmp_path):
    """As Megatron-LM writes by default: every kind of layer tensor is one tensor with a layer axis, in pieces."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    source = folders.write_folder(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "megatron", WEIGHTS_ONLY)
    folder = iterations.iteration_folder(tmp_path / "megatron", 0)
    tensors = folders.read_megatron(tmp_path / "megatron")
    joint: dict[str, list] = {}
    for key, value in tensors.items():
        joint.setdefault(key if ".layers." not in key else "decoder.layers." + key.split(".", 3)[3], []).append(value)
    state = {key: values[0] if ".layers." not in key else torch.stack(values) for key, values in joint.items()}
    for file in folder.glob("*.distcp"):
        file.unlink()
    save(state, storage_writer=FileSystemWriter(folder, single_file_per_rank=False), no_dist=True)
    assert inspect(tmp_path / "megatron")["dtype"] == "float32"
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET))
    folders.assert_same_weights(source, tmp_path / "back")


def test_a_folder_of_megatron_lm_needs_the_reference_only(tmp_path):
    source = folders.write_folder(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "megatron", WEIGHTS_ONLY)
    for name in ("model_config.yaml", "huggingface/config.json"):
        (tmp_path / "megatron" / name).unlink()
    with pytest.raises(UserError, match="model_config.yaml"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET))
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(hf_reference=source, **QUIET))
    folders.assert_same_weights(source, tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_a_run_folder_exports_with_its_starting_points_files(tmp_path):
    source = folders.write_folder(tmp_path / "hf")
    import_checkpoint(source, tmp_path / "megatron", WEIGHTS_ONLY)
    run = tmp_path / "run"
    (tmp_path / "megatron" / "iter_0000000").rename(tmp_path / "moved")
    checkpoint_folder.save_model_config(run, checkpoint_folder.load_model_config(tmp_path / "megatron"))
    shutil.copytree(
        tmp_path / "megatron" / checkpoint_folder.HUGGINGFACE, run / checkpoint_folder.HUGGINGFACE
    )  # as training does
    (tmp_path / "moved").rename(run / "iter_0000007")
    (run / "latest_checkpointed_iteration.txt").write_text("7")
    export_checkpoint(run, tmp_path / "back", ExportOptions(iteration=7, **QUIET))
    assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    with pytest.raises(UserError, match="iteration 6"):
        export_checkpoint(run, tmp_path / "six", ExportOptions(iteration=6, **QUIET))


def test_roundtrip_and_its_table(tmp_path):
    source = folders.write_folder(tmp_path / "hf", folders.QWEN2, mask=False)
    rows = roundtrip(source, ImportOptions(**QUIET), tmp_path)
    assert all(row.equal for row in rows) and len(rows) == len(folders.read_weights(source)) + 1
    rows = roundtrip(source, ImportOptions(params_dtype=torch.bfloat16, **QUIET), tmp_path)
    norm = next(row for row in rows if row.name == "model.norm.weight")
    weight = folders.read_weights(source)["model.norm.weight"]
    assert norm.difference == f"largest difference {(weight - weight.bfloat16()).abs().max():.3g}"
    assert "model.norm.weight" in norm.line and "[56]" in norm.line and "float32" in norm.line
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_compare_sees_every_kind_of_difference(tmp_path):
    one = folders.write_folder(tmp_path / "one")
    two = folders.write_folder(tmp_path / "two", rms_norm_eps=1e-5)
    weights = folders.read_weights(two)
    del weights["lm_head.weight"]
    weights["model.norm.weight"] = weights["model.norm.weight"][:10].clone()
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    weights["model.layers.1.mlp.up_proj.weight"] *= -1
    folders.write_weights(two, weights)
    different = {row.name: row.difference for row in compare(one, two) if not row.equal}
    assert sorted(different) == [
        "config.json",
        "lm_head.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.norm.weight",
    ]
    assert different["model.layers.0.mlp.up_proj.weight"] == "largest difference inf"


def test_inspect(tmp_path):
    source = folders.write_folder(tmp_path / "hf", dtype=torch.bfloat16, tied=True, shards=2)
    import_checkpoint(source, tmp_path / "megatron", ImportOptions(**QUIET))
    parameters = f"{sum(w.numel() for w in folders.read_weights(source).values()):,}"
    for folder, iteration in ((source, "none"), (tmp_path / "megatron", "0")):
        found = inspect(folder)
        assert found["architecture"] == folders.FAST_DLLM
        assert (found["parameters"], found["dtype"], found["block size"]) == (parameters, "bfloat16", "8")
        assert (found["mask token"], found["iteration"]) == ("|<MASK>| (259)", iteration)
    with pytest.raises(UserError, match="neither"):
        inspect(tmp_path)


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5 GiB", 3 * 2**29), ("300mb", 3 * 10**8), ("77", 77)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "5 bananas"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="--max-shard-size"):
        parse_size(text)
