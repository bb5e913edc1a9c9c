"""What conversion refuses: one line, status 2, and nothing left behind. The command is run as its script runs it."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from megatron_dtrpo.errors import UserError
from tests.support import conversion_folders as folders
from tests.support.conversion_folders import import_refused, refused, run_tool

INDEX = "model.safetensors.index.json"
VALUE = "model.layers.2.self_attn.v_proj.weight"


good, source, good_megatron = folders.good, folders.source, folders.good_megatron


def shard_of(source, name: str):
    return source / json.loads((source / INDEX).read_text())["weight_map"][name]


def edit_index(source, change) -> None:
    index = json.loads((source / INDEX).read_text())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


def replace_weights(source, change) -> None:
    weights = folders.read_weights(source)
    change(weights)
    for file in [*source.glob("*.safetensors"), source / INDEX]:
        file.unlink()
    folders.write_weights(source, weights, shards=3)


@pytest.mark.parametrize("cut", [1, 1000, "header", 4])
def test_truncated_shard(source, capsys, cut):
    file = shard_of(source, VALUE)
    size = {"header": 50, 4: 4}.get(cut) or file.stat().st_size - cut
    os.truncate(file, size)
    import_refused(capsys, source, f"{file}: truncated")


def test_shard_that_is_too_long(source, capsys):
    with shard_of(source, VALUE).open("ab") as stream:
        stream.write(b"\0\0\0\0")
    import_refused(capsys, source, "longer than its header says")


def test_garbage_instead_of_a_shard(source, capsys):
    shard_of(source, VALUE).write_bytes((20).to_bytes(8, "little") + b"certainly not JSON, no" * 3)
    import_refused(capsys, source, "not a safetensors header")


def test_missing_shard(source, capsys):
    file = shard_of(source, VALUE)
    file.unlink()
    import_refused(capsys, source, f"{file}: the index names this shard")


def test_tensor_missing_from_the_index(source, capsys):
    edit_index(source, lambda index: index.pop(VALUE))
    import_refused(capsys, source, f"{VALUE} of {shard_of(source, 'lm_head.weight').name[:5]}")


def test_index_names_a_tensor_that_its_shard_lacks(source, capsys):
    edit_index(source, lambda index: index.update({"model.layers.9.bias": index[VALUE]}))
    import_refused(capsys, source, "model.layers.9.bias should be in")


@pytest.mark.parametrize("file", ["../hf/model-00001-of-00003.safetensors", "/etc/passwd", 7])
def test_index_that_leaves_the_folder(source, capsys, file):
    edit_index(source, lambda index: index.update({VALUE: file}))
    import_refused(capsys, source, "not a shard of this folder")


def test_missing_tensor(source, capsys):
    replace_weights(source, lambda weights: weights.pop(VALUE))
    import_refused(capsys, source, f"tensor {VALUE} is missing")


def test_unexpected_tensor(source, capsys):
    replace_weights(source, lambda weights: weights.update({"model.layers.4.extra": torch.zeros(2)}))
    import_refused(capsys, source, "unexpected tensor model.layers.4.extra")


def test_wrong_shape(source, capsys):
    replace_weights(source, lambda weights: weights.update({VALUE: torch.zeros(8, 57)}))
    import_refused(capsys, source, f"{VALUE} has shape [8, 57], config.json says [8, 56]")


def test_integer_weights(source, capsys):
    replace_weights(source, lambda weights: weights.update({VALUE: torch.zeros(8, 56, dtype=torch.int8)}))
    import_refused(capsys, source, f"{VALUE} is of dtype I8")


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_values_that_are_not_finite(source, capsys, value):
    replace_weights(source, lambda weights: weights[VALUE].select(0, 5).select(0, 3).fill_(value))
    import_refused(capsys, source, f"{VALUE} has values that are not finite", "--check-finite")
    assert run_tool(capsys, "import", "--hf-path", source, "--megatron-path", source.parent / "out")[0] == 0
    back = source.parent / "back"
    words = ("export", "--megatron-path", source.parent / "out", "--hf-path", back)
    refused(capsys, f"{VALUE} has values that are not finite", *words, "--check-finite")
    assert not back.exists()
    assert run_tool(capsys, *words)[0] == 0
    folders.assert_same_weights(source, back)


def test_pickles_are_refused(source, capsys):
    for file in [*source.glob("*.safetensors"), source / INDEX]:
        file.unlink()
    import_refused(capsys, source, "no weights")
    torch.save({}, source / "pytorch_model.bin")
    import_refused(capsys, source, "only safetensors are read, and pytorch_model.bin is not")


@pytest.mark.parametrize(
    "names, words",
    [
        (
            ["MixtralForCausalLM"],
            "architectures: unknown architecture MixtralForCausalLM: known are Fast_dLLM_QwenForCausalLM, Qwen2F",
        ),
        ([], "unknown architecture (none): known are Fast_dLLM_QwenForCausalLM"),
        (None, "unknown architecture (none): known are Fast_dLLM_QwenForCausalLM"),
        (
            ["LlamaForCausalLM", "Qwen2ForCausalLM"],
            "architectures has several, LlamaForCausalLM, Qwen2ForCausalLM: leave",
        ),
    ],
)
def test_unknown_architecture(source, capsys, names, words):
    (source / "config.json").write_text(json.dumps({**folders.config(), "architectures": names}))
    import_refused(capsys, source, words)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "sliding_window": 64},
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}},
        {"quantization_config": {"bits": 4}},
        {"num_key_value_heads": None},
        {"num_key_value_heads": 5},
        {"hidden_size": "56"},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
    ],
)
def test_what_the_model_does_not_compute(source, capsys, changes):
    (source / "config.json").write_text(json.dumps(folders.config(**changes)))
    import_refused(capsys, source, list(changes)[0])


def test_no_tokenizer(source, capsys):
    (source / "vocab.json").unlink()
    import_refused(capsys, source, "no tokenizer")


def test_folders_that_are_not_there(source, capsys):
    refused(capsys, "no such folder", "import", "--hf-path", source / "no", "--megatron-path", source.parent / "out")
    refused(capsys, "model_config.yaml", "export", "--megatron-path", source, "--hf-path", source.parent / "out")
    words = ("export", "--megatron-path", source, "--hf-path", source.parent / "out", "--hf-reference", "no/where")
    refused(capsys, "--hf-reference no/where", *words)
    refused(capsys, "no such folder", "roundtrip", "--hf-path", source / "no")
    refused(capsys, "neither", "inspect", source.parent)
    refused(capsys, "--hf-path", "import", "--megatron-path", "x")
    refused(capsys, "invalid choice", "import", "--hf-path", source, "--megatron-path", "x", "--params-dtype", "int8")


def test_damaged_megatron_checkpoint(capsys, good_megatron, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(good_megatron, broken)
    words = ("export", "--megatron-path", broken, "--hf-path", tmp_path / "out")
    (data,) = (broken / "iter_0000000").glob("*.distcp")
    os.truncate(data, data.stat().st_size // 2)
    refused(capsys, "cannot be read", *words)
    refused(capsys, "no complete checkpoint of iteration 3", *words, "--iteration", "3")
    (broken / "iter_0000000" / ".metadata").write_bytes(b"no pickle")
    refused(capsys, "damaged", *words)
    (broken / "latest_checkpointed_iteration.txt").unlink()
    refused(capsys, "no checkpoint to load", *words)
    assert [p.name for p in tmp_path.iterdir()] == ["broken"]


def test_reference_of_another_model(capsys, good_megatron, tmp_path):
    other = folders.write_folder(tmp_path / "other", rms_norm_eps=1e-5)
    run_folder = tmp_path / "run"
    shutil.copytree(good_megatron, run_folder)
    shutil.rmtree(run_folder / "huggingface")
    words = ("export", "--megatron-path", run_folder, "--hf-path", tmp_path / "out", "--hf-reference", other)
    refused(capsys, "norm_epsilon is 1e-05 there, 1e-06 in", *words)
    assert not (tmp_path / "out").exists()


def test_a_model_trained_here_is_exported_as_qwen2(capsys, good_megatron, tmp_path):
    run_folder = tmp_path / "run"
    shutil.copytree(good_megatron, run_folder)
    shutil.rmtree(run_folder / "huggingface")
    status, printed = run_tool(capsys, "export", "--megatron-path", run_folder, "--hf-path", tmp_path / "out")
    assert status == 0, printed
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["bd_size"]) == ([folders.QWEN2], 8)
    again = import_checkpoint(tmp_path / "out", tmp_path / "again", ImportOptions(progress=False))
    assert again.block_size == 8


def test_save_file_is_the_oracle(tmp_path):
    """Our reader takes what safetensors writes for empty, scalar-like and odd-sized tensors."""
    from megatron_dtrpo.conversion.safetensors_reader import SafetensorsFolder

    weights = {"a": torch.arange(5.0).bfloat16(), "b": torch.zeros(0, 3), "c": torch.randn(3, 1), "d": torch.ones(1)}
    save_file(weights, tmp_path / "model.safetensors")
    with SafetensorsFolder(tmp_path) as folder:
        for name, weight in weights.items():
            out = torch.empty_like(weight)
            folder.read_rows(name, 0, out)
            assert torch.equal(out, weight)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bd_size", "32"),
        ("bd_size", 0),
        ("head_dim", -2),
        ("head_dim", "2"),
        ("architectures", 5),
        ("rms_norm_eps", None),
        ("layer_types", 3),
        ("rope_theta", "big"),
    ],
)
def test_configuration_values_of_the_wrong_kind(tmp_path, key, value):
    source = folders.write_folder(tmp_path / "hf")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(UserError) as error:
        import_checkpoint(source, tmp_path / "megatron", ImportOptions(progress=False, tokenizer=False))
    assert "\n" not in str(error.value) and str(source) in str(error.value)
    assert not (tmp_path / "megatron").exists()


def test_overwrite_keeps_its_hands_off_what_is_not_its_own(tmp_path):
    source, target = folders.write_folder(tmp_path / "hf"), tmp_path / "megatron"
    options = ImportOptions(progress=False, tokenizer=False, overwrite=True)
    neighbour = tmp_path / "megatron.replaced"
    neighbour.mkdir()
    (neighbour / "notes.txt").write_text("precious")
    target.mkdir()  # an empty folder is free
    import_checkpoint(source, target, ImportOptions(progress=False, tokenizer=False))
    import_checkpoint(source, target, options)
    assert (neighbour / "notes.txt").read_text() == "precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "megatron", "megatron.replaced"]
    (target / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="holds a training run"):
        import_checkpoint(source, target, options)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(UserError, match="is not a checkpoint"):
        import_checkpoint(source, other, options)


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12345\n"
)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", INDEX, "config.json", "vocab.json", "merges.txt"])
def test_git_lfs_pointers(source, capsys, name):
    (source / name).write_text(POINTER)
    import_refused(capsys, source, f"{source / name}: a Git LFS pointer, not the file: run `git lfs pull` in {source}")


def test_git_lfs_pointer_as_the_only_file(tmp_path, capsys):
    source = folders.write_folder(tmp_path / "hf")
    for name in ("model.safetensors", "tokenizer.json"):
        content = (source / name).read_bytes() if (source / name).exists() else None
        (source / name).write_text(POINTER)
        import_refused(capsys, source, f"{source / name}: a Git LFS pointer")
        (source / name).unlink() if content is None else (source / name).write_bytes(content)


def test_adapters_are_named(source, capsys):
    for file in [*source.glob("*.safetensors"), source / INDEX]:
        file.unlink()
    (source / "adapter_config.json").write_text("{}")
    save_file({"a.lora_A.weight": torch.zeros(2)}, source / "adapter_model.safetensors")
    import_refused(capsys, source, f"{source}: an adapter (LoRA), not a model: merge it into its base first")
    (source / "config.json").unlink()
    import_refused(capsys, source, "merge it into its base first")


@pytest.mark.parametrize("shape", [{}, {"dtype": torch.float64}])
def test_rotary_frequencies_of_old_checkpoints_are_left_out(source, good_megatron, capsys, shape):
    frequencies = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(1, **shape) for n in range(4)}
    replace_weights(source, lambda weights: weights.update(frequencies))
    out = source.parent / "out"
    status, printed = run_tool(capsys, "import", "--hf-path", source, "--megatron-path", out)
    assert status == 0 and "note: " in printed and "4 tensors rotary_emb.inv_freq are left out" in printed, printed
    ours, theirs = folders.read_megatron(out), folders.read_megatron(good_megatron)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_untied_configuration_without_a_head(source, capsys):
    replace_weights(source, lambda weights: weights.pop("lm_head.weight"))
    import_refused(capsys, source, "tensor lm_head.weight is missing", "--check-finite")
    import_refused(capsys, source, "if the model is tied, set tie_word_embeddings to true")
    (source / "config.json").write_text(json.dumps(folders.config(tie_word_embeddings=True)))
    assert run_tool(capsys, "import", "--hf-path", source, "--megatron-path", source.parent / "out")[0] == 0
