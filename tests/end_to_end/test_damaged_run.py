"""A run folder with one damaged file: every command that reads the file says so in one line, and runs no code of it."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import random
import resource
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_dtrpo.checkpoint.torch_dist import read_metadata
from megatron_dtrpo.cli import convert, generate, train
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from tests.support import conversion_folders as folders
from tests.support.damage import flip_a_bit
from tests.support.launch import flags, latest_iteration, read_metrics, write_lines

pytestmark = pytest.mark.end_to_end

DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    # megatron-core 0.19 writes one file, in which the optimizer, that an export does not read, comes last.
    "truncated": lambda file: os.truncate(file, file.stat().st_size // (16 if file.suffix == ".distcp" else 2)),
    "garbage": lambda file: file.write_bytes(random.Random(0).randbytes(500)),
}
ALL = tuple(DAMAGES)
PRESENT = ("empty", "truncated", "garbage")

# Command -> file that it reads -> the damages that it must refuse. What it does not read must not stop it.
_ITERATION = {f"iter_0000004/{name}": ALL for name in (".metadata", "metadata.json", "common.pt", "__0_0.distcp")}
_TRACKER = {"latest_checkpointed_iteration.txt": ALL, "model_config.yaml": ALL}
_TOKENIZER = {f"tokenizer/{name}": ALL for name in ("tokenizer_metadata.json", "tokenizer_config.json", "vocab.json")}
_TOKENIZER |= {
    "tokenizer/merges.txt": ("missing", "truncated", "garbage"),
    "tokenizer/chat_template.jinja": ("garbage",),
}
_EXPORTED = {
    f"tokenizer/{name}": PRESENT for name in ("tokenizer_metadata.json", "tokenizer_config.json", "vocab.json")
}
_DATA = {f"data_cache/*/{name}": ALL for name in ("ends.int64", "meta.json", "tokens.int32")}
REFUSED = {
    "resume": {**_ITERATION, **_TRACKER, "run_config.yaml": ALL, **_DATA},
    "load": {**_ITERATION, **_TRACKER, **_TOKENIZER},
    "generate": {**_ITERATION, **_TRACKER, **_TOKENIZER},
    "export": {
        "iter_0000004/.metadata": ALL,
        "iter_0000004/metadata.json": ("missing",),
        "iter_0000004/__0_0.distcp": ALL,
        "latest_checkpointed_iteration.txt": ALL,
        "model_config.yaml": PRESENT,
        "huggingface/config.json": ALL,
        "huggingface/generation_config.json": PRESENT,
        "huggingface/source.json": PRESENT,
        **_EXPORTED,
    },
    "inspect": {
        "iter_0000004/.metadata": ALL,
        "iter_0000004/metadata.json": ("missing",),
        **_TRACKER,
        "huggingface/config.json": ALL,
    },
}
# What is read but not needed: any damage, and the command does its work.
BORNE = {"resume": ("metrics.jsonl", "tokenizer/vocab.json"), "load": ("run_config.yaml", "metrics.jsonl")}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint that was imported, with pairs beside it."""
    folder = tmp_path_factory.mktemp("damaged")
    hf = folders.write_folder(folder / "hf", shape={"layers": 1})
    import_checkpoint(hf, folder / "base", ImportOptions(progress=False))
    write_lines(
        folder / "pairs.jsonl", [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "0"} for n in range(6)]
    )
    return folder / "base"


def settings(base: Path, **changes) -> list[str]:
    fixed = {"data_path": base.parent / "pairs.jsonl", "seq_length": 256, "global_batch_size": 4, "lr": 1e-3}
    return flags({**fixed, "save_interval": 2, "lr_decay_style": "constant", **changes})


@pytest.fixture(scope="module")
def good(base) -> Path:
    """A run with the checkpoints of iterations 2 and 4."""
    save = base.parent / "run"
    assert train.main(settings(base, load=base, save=save, train_iters=4)) == 0
    return save


@pytest.fixture
def run(good, tmp_path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(good, tmp_path / "run")


@pytest.fixture
def command(base, tmp_path) -> Callable[[str, Path], int]:
    """(name, run folder) -> exit status."""
    out = tmp_path / "out"

    def words(*some) -> list[str]:
        return [str(word) for word in some]

    commands = {
        "resume": lambda run: train.main(settings(base, load=base, save=run, train_iters=5)),
        "load": lambda run: train.main(settings(base, load=run, save=out, train_iters=1)),
        "generate": lambda run: generate.main(words("--checkpoint", run, "--prompt", "1+1=", "--max-new-tokens", 8)),
        "export": lambda run: convert.main(words("export", "--megatron-path", run, "--hf-path", out)),
        "inspect": lambda run: convert.main(words("inspect", run)),
    }
    return lambda name, run: commands[name](run)


def require_file(run: Path, file: str) -> None:
    """megatron-core 0.19 has no ``common.pt``: its content is in the ``.distcp`` files, and so is that damage."""
    if file.endswith("common.pt") and not (run / file).exists():
        pytest.skip("this megatron-core writes no common.pt")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def one_line(capfd) -> str:
    printed = capfd.readouterr().err.splitlines()
    errors = [line for line in printed if line.startswith("error: ")]
    assert len(errors) == 1 and not any("Traceback" in line for line in printed), printed
    return errors[0]


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in REFUSED.items() for file in files])
def test_a_damaged_file_is_one_line(good, run, command, capfd, tmp_path, name, file):
    require_file(good, file)
    for damage in REFUSED[name][file]:
        shutil.rmtree(run)
        shutil.copytree(good, run)
        (damaged,) = run.glob(file)
        DAMAGES[damage](damaged)
        before = contents(run)
        capfd.readouterr()
        assert command(name, run) == 2, (damage, capfd.readouterr())
        line = one_line(capfd)
        assert str(run) in line and (damaged.suffix != ".distcp" or damaged.name in line), (damage, line)
        assert contents(run) == before, f"{damage}: the run folder was changed"
        assert not (tmp_path / "out" / "metrics.jsonl").exists() and not list((tmp_path / "out").glob("iter_*")), damage


@pytest.mark.parametrize("name", ["resume", "load", "generate"])
@pytest.mark.parametrize(
    ("part", "begins"),
    [
        ("archive/data.pkl", "decoder.layers.0.mlp"),
        ("archive/data/0", "embedding"),
        ("archive/byteorder", "decoder.layers.0.self_attention.linear_qkv._extra_state"),
    ],
)
def test_damage_inside_a_tensor_names_it(run, command, capfd, name, part, begins):
    """The ends of the file and of each tensor in it are whole."""
    folder = run / "iter_0000004"
    described = read_metadata(folder)
    index, where = next(
        (index, info)
        for index, info in sorted(described.storage_data.items(), key=lambda pair: pair[1].offset)
        if index.fqn.startswith(begins)
    )
    file = folder / where.relative_path
    with zipfile.ZipFile(io.BytesIO(file.read_bytes()[where.offset : where.offset + where.length])) as archive:
        begin = where.offset + archive.getinfo(part).header_offset
    with file.open("r+b") as stream:
        stream.seek(begin + 26)  # the lengths of its name and of what follows it
        stream.write(b"\xff\xff")
    assert command(name, run) == 2
    line = one_line(capfd)
    assert f"{file.name}: {index.fqn}: not what torch.save writes; delete iter_0000004 to go on" in line


@pytest.mark.parametrize("name", ["resume", "load", "generate", "export"])
def test_one_bit_of_a_tensors_values_is_found(run, command, capfd, name):
    folder = run / "iter_0000004"
    index, where = next(
        pair for pair in read_metadata(folder).storage_data.items() if pair[0].fqn == "decoder.final_layernorm.weight"
    )
    flip_a_bit(folder / where.relative_path, where.offset, where.length, "archive/data/0")
    assert command(name, run) == 2
    line = one_line(capfd)
    assert f"{where.relative_path}: {index.fqn}: its checksum says that it is not as it was written" in line
    assert line.endswith("; delete iter_0000004 to go on from iter_0000002")


@pytest.mark.parametrize("name", ["resume", "load", "generate"])
def test_one_bit_of_the_common_state_is_found(run, command, capfd, name):
    """Plain numbers: the step, the schedule."""
    folder = run / "iter_0000004"
    stored = read_metadata(folder).storage_data.items()
    inside = [info for index, info in stored if index.fqn.startswith("common_state/")]
    if inside:
        file, where = folder / inside[0].relative_path, f"{inside[0].relative_path}: common_state/shard_0_1"
        flip_a_bit(file, inside[0].offset, inside[0].length, "archive/data.pkl")
    else:
        file, where = folder / "common.pt", "common.pt"
        flip_a_bit(file, 0, file.stat().st_size, "common/data.pkl")
    assert command(name, run) == 2
    assert f"iter_0000004: damaged: {where}: its checksum says" in one_line(capfd)


def test_only_what_is_read_is_checked(run, command):
    """A policy is decoded without the optimizer's state."""
    folder = run / "iter_0000004"
    where = next(
        info for index, info in read_metadata(folder).storage_data.items() if index.fqn.startswith("optimizer.")
    )
    flip_a_bit(folder / where.relative_path, where.offset, where.length, "archive/data/0")
    assert command("generate", run) == 0
    assert command("resume", run) == 2


def test_a_checkpoint_without_checksums_loads(base, command, tmp_path):
    """torch writes none where it is told so."""
    torch.serialization.set_crc32_options(False)
    try:
        assert train.main(settings(base, load=base, save=tmp_path / "plain", train_iters=4)) == 0
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("resume", "generate", "export"):
        assert command(name, tmp_path / "plain") == 0, name


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in BORNE.items() for file in files])
def test_what_is_not_needed_stops_nobody(run, command, name, file):
    DAMAGES["garbage"](run / file)
    assert command(name, run) == 0


# --- the way on


@pytest.mark.parametrize("file", ["iter_0000004/.metadata", "iter_0000004/common.pt", "iter_0000004/__0_0.distcp"])
def test_the_advice_works(good, run, command, capfd, file):
    require_file(run, file)
    (run / file).unlink()
    assert command("resume", run) == 2
    assert one_line(capfd).endswith("; delete iter_0000004 to go on from iter_0000002")
    shutil.rmtree(run / "iter_0000004")
    assert command("resume", run) == 0
    printed = capfd.readouterr()
    assert "names iteration 4, which was deleted: iteration 2 is used" in printed.err
    assert "resuming from iteration 2" in printed.out
    assert [row["iteration"] for row in read_metrics(run)] == [1, 2, 3, 4, 5] and latest_iteration(run) == 5
    losses = [[row["loss"] for row in read_metrics(folder)[:4]] for folder in (run, good)]
    assert losses[0] == losses[1], "the same steps again"


def test_nothing_is_left_to_go_on_from(run, command, capfd):
    shutil.rmtree(run / "iter_0000002")
    (run / "iter_0000004" / ".metadata").write_bytes(b"")
    assert command("resume", run) == 2
    assert "no earlier iteration is beside it" in one_line(capfd)
    shutil.rmtree(run / "iter_0000004")
    assert command("resume", run) == 2
    assert one_line(capfd).endswith(f"names iteration 4, but {run / 'iter_0000004'} is missing")


def test_a_checkpoint_that_does_not_fit_is_one_line(base, tmp_path, capfd):
    """A file that may not grow fails as one on a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        status = train.main(settings(base, load=base, save=tmp_path / "run", train_iters=2, tensorboard=False))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    line = one_line(capfd)
    assert status == 2 and "iter_0000002.partial: cannot be written: " in line and "make room" in line
    assert not (tmp_path / "run" / "latest_checkpointed_iteration.txt").exists()


# --- code in pickles


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def plant_in_objects(iteration: Path, value: Planted) -> None:
    """Every object of the checkpoint that is no tensor becomes ``value``; torch unpickles those without restraint."""
    metadata = pickle.loads((iteration / ".metadata").read_bytes())
    torch.save(value, iteration / "__9_0.distcp")
    size = (iteration / "__9_0.distcp").stat().st_size
    objects = {key for key, kind in metadata.state_dict_metadata.items() if isinstance(kind, BytesStorageMetadata)}
    assert objects
    for index, info in metadata.storage_data.items():
        if index.fqn in objects:
            where = {"relative_path": "__9_0.distcp", "offset": 0, "length": size}
            metadata.storage_data[index] = dataclasses.replace(info, **where)
    (iteration / ".metadata").write_bytes(pickle.dumps(metadata))


PLANTS: dict[str, Callable[[Path, Planted], object]] = {
    "common.pt": lambda iteration, value: torch.save({"progress": value}, iteration / "common.pt"),
    "common.pt, a bare pickle": lambda iteration, value: (iteration / "common.pt").write_bytes(pickle.dumps(value)),
    ".metadata": lambda iteration, value: (iteration / ".metadata").write_bytes(pickle.dumps(value)),
    "objects": plant_in_objects,
}


@pytest.mark.parametrize("place", PLANTS)
@pytest.mark.parametrize("force", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_code_in_a_pickle_is_not_run(run, command, capfd, tmp_path, monkeypatch, place, force):
    """Not even where the environment asks torch to."""
    if force:
        monkeypatch.setenv(force, "1")
    proof = tmp_path / "proof"
    PLANTS[place](run / "iter_0000004", Planted(proof))
    for name in REFUSED:
        capfd.readouterr()
        status = command(name, run)
        assert not proof.exists(), f"{name} ran the code"
        assert status in (0, 2)
        if status == 2:
            one_line(capfd)
        if name == "resume":
            assert status == 2
    assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") is None
