"""Which files a data path means, and that files of several splits are never read as one."""

from __future__ import annotations

import gzip
import json

import pytest

from megatron_dtrpo.data.rows import open_rows
from megatron_dtrpo.data.source import data_files, left_out, split_name
from megatron_dtrpo.errors import UserError


def touch(folder, *names):
    """Writes files of one row each, which holds the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
            parquet.write_table(pyarrow.table({"name": [path.name]}), path)
        else:
            path.write_text(json.dumps({"name": path.name, "prompt": "2+2="}) + "\n")
    return folder


def names_of(path, split=None):
    return [row["name"] for row in open_rows(path, split)]


def message_of(path, split=None) -> str:
    with pytest.raises(UserError) as caught:
        open_rows(path, split)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


SHARDS = [f"{split}_{kind}-00000-of-00001.parquet" for split in ("train", "test") for kind in ("prefs", "sft")]


@pytest.mark.parametrize("inside", ["", "data"])
def test_a_repository_with_several_splits(tmp_path, inside):
    """UltraFeedback's files: in one folder, or in data/ beside the repository's other files."""
    touch(tmp_path / inside, *SHARDS)
    (tmp_path / "README.md").write_text("hello")
    (tmp_path / "dataset_infos.json").write_text("{}")
    message = message_of(tmp_path)
    for split in ("train_prefs", "train_sft", "test_prefs", "test_sft"):
        assert f"{split}: {split}-00000-of-00001.parquet" in message
    assert "--split train_" in message and "glob" in message
    assert names_of(tmp_path, "train_prefs") == [SHARDS[0]]
    assert names_of(tmp_path, "train_sft+train_prefs") == [SHARDS[1], SHARDS[0]]
    assert names_of(tmp_path / inside / "train_prefs-*") == [SHARDS[0]]
    for other in ("train", "train_pref", "train_prefs[:10%]", ""):
        assert f"has no split {other!r}; it has test_prefs, " in message_of(tmp_path, other)


@pytest.mark.parametrize(
    "names",
    [
        ("train.jsonl", "test.jsonl"),
        ("train.jsonl", "extra.jsonl"),
        ("math-dev.jsonl", "math-test.jsonl"),
        ("train-0.jsonl", "validation-0.jsonl"),
        ("eval.jsonl.gz", "training.jsonl.gz"),
        ("pairs-00000-of-00001.jsonl", "more-00000-of-00001.jsonl"),
    ],
)
def test_files_of_several_splits_are_refused(tmp_path, names):
    touch(tmp_path, *names)
    for path in (tmp_path, tmp_path / "*"):
        message = message_of(path)
        assert "holds files of several splits" in message and all(name in message for name in names)


@pytest.mark.parametrize(
    "names",
    [
        ("a.parquet", "b.parquet"),
        ("part-00000-of-00002.jsonl", "part-00001-of-00002.jsonl"),
        ("train-0.jsonl", "train-1.jsonl"),
        ("latest.jsonl", "retrained.jsonl"),  # the words stand in them, but not alone
    ],
)
def test_files_of_one_split_are_read_in_order_of_name(tmp_path, names):
    touch(tmp_path, *names)
    assert names_of(tmp_path) == names_of(tmp_path / "*") == list(names)


def test_the_split_that_a_name_tells():
    expected = {
        "train_prefs-00000-of-00001.parquet": "train_prefs",
        "train-00000-of-00002-a09b74b3ef9c3b56.parquet": "train",
        "gsm8k-train.arrow": "train",
        "gsm8k-train-00000-of-00002.arrow": "gsm8k-train",
        "val.csv": "validation",
        "my.Dev.jsonl": "validation",
        "evaluation_2.jsonl": "test",
        "trained.jsonl": None,
        "pairs.jsonl": None,
    }
    assert {name: split_name(name) for name in expected} == expected


def test_folders_of_configurations_or_splits(tmp_path):
    touch(tmp_path, "harmless/train.jsonl", "harmless/test.jsonl", "helpful/train.jsonl")
    assert "its folders harmless, helpful do" in message_of(tmp_path)
    assert "several splits" in message_of(tmp_path / "harmless")
    assert names_of(tmp_path / "*" / "train.jsonl") == ["train.jsonl"] * 2
    touch(tmp_path / "other", "train/0.jsonl", "test/0.jsonl")
    assert len(open_rows(tmp_path / "other", "train")) == 1
    assert "several splits" in message_of(tmp_path / "other" / "**" / "*.jsonl")
    assert len(open_rows(tmp_path / "other" / "**" / "*.jsonl", "test")) == 1


def test_files_of_several_kinds_are_refused(tmp_path):
    touch(tmp_path, "a.jsonl", "b.json")
    message = message_of(tmp_path)
    assert "several kinds (.json, .jsonl)" in message and "'*.json'" in message
    assert names_of(tmp_path / "*.json") == ["b.json"]


def test_a_split_of_what_has_none(tmp_path):
    touch(tmp_path, "a.jsonl", "b.jsonl")
    assert "names tell no split" in message_of(tmp_path, "train")
    assert "leave --split out" in message_of(tmp_path / "a.jsonl", "train")
    assert "no file matches" in message_of(tmp_path / "c*")
    assert "no such file" in message_of(tmp_path / "c.jsonl")
    (tmp_path / "empty").mkdir()
    assert "neither" in message_of(tmp_path / "empty")
    with pytest.raises(UserError, match="hf download --repo-type dataset openai/gsm8k"):
        data_files("openai/gsm8k")


def test_saved_splits(tmp_path):
    datasets = pytest.importorskip("datasets")
    of = {split: datasets.Dataset.from_list([{"name": split}]) for split in ("train", "test")}
    folder = tmp_path / "several"
    datasets.DatasetDict(of).save_to_disk(str(folder))
    assert "several splits (train, test); give the folder of one of them" in message_of(folder)
    assert names_of(folder, "test") == names_of(folder / "test") == ["test"]
    assert names_of(folder, "test+train") == ["test", "train"]
    assert "no split 'dev'" in message_of(folder, "dev")
    assert "leave --split out" in message_of(folder / "test", "test")
    one = tmp_path / "one"
    datasets.DatasetDict(train=of["train"]).save_to_disk(str(one))
    assert names_of(one) == ["train"]


def test_a_name_with_the_characters_of_a_glob(tmp_path):
    touch(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert names_of(tmp_path / "a[1].jsonl") == ["a[1].jsonl"]


@pytest.mark.parametrize(
    "names",
    [
        ("trainset.jsonl", "testset.jsonl"),
        ("TrainData.jsonl", "TestData.jsonl"),
        ("pairsTrain.jsonl", "pairsTest.jsonl"),
        ("pairs.jsonl", "pairs_heldout.jsonl"),
        ("pairs.jsonl", "holdout.jsonl"),
    ],
)
def test_splits_in_other_spellings(tmp_path, names):
    assert "holds files of several splits" in message_of(touch(tmp_path, *names))


def test_a_split_is_chosen_by_any_of_its_names(tmp_path):
    touch(tmp_path, "train.jsonl", "dev.jsonl")
    assert names_of(tmp_path, "dev") == names_of(tmp_path, "validation") == ["dev.jsonl"]
    assert "has no split 'test'; it has validation, train" in message_of(tmp_path, "test")


def test_a_file_beside_its_compressed_copy_is_not_read_twice(tmp_path):
    touch(tmp_path, "train.jsonl")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress((tmp_path / "train.jsonl").read_bytes()))
    assert "train.jsonl and train.jsonl.gz are one file, compressed and not; give one of them" in message_of(tmp_path)


@pytest.mark.parametrize(
    "names",
    [
        ("train_prefs.jsonl", "train_sft.jsonl"),
        ("prefs_train.jsonl", "sft_train.jsonl"),
        ("TrainPrefs.jsonl", "TrainGen.jsonl"),
        ("train.jsonl", "train_extra.jsonl"),
        ("train_v1.jsonl", "train_v2.jsonl"),
        ("train_prefs.jsonl.gz", "train_sft.jsonl.gz"),
    ],
)
def test_two_subsets_of_one_split_are_refused(tmp_path, names):
    touch(tmp_path, *names)
    for path in (tmp_path, tmp_path / "*"):
        message = message_of(path)
        assert "holds files of several splits" in message and all(name in message for name in names)
        assert "--split " in message and "glob" in message
    if names[0].endswith("gz"):
        return
    first, second = (name.removesuffix(".jsonl") for name in names)
    if first != "train":
        assert "has no split 'train'; it has" in message_of(tmp_path, "train")
    assert names_of(tmp_path, first) == [names[0]] and names_of(tmp_path, second) == [names[1]]
    assert sorted(names_of(tmp_path, f"{first}+{second}")) == sorted(names)


@pytest.mark.parametrize(
    "names",
    [
        ("part1.jsonl", "part2.jsonl"),
        ("train_1.jsonl", "train_2.jsonl"),
        ("train.jsonl", "train_2.jsonl"),
        ("train_prefs_1.jsonl", "train_prefs_2.jsonl"),
        ("train-part1.jsonl", "train-part2.jsonl"),
        ("train_2024-01-01.jsonl", "train_2024-01-02.jsonl"),
        ("train_a.jsonl", "train_b.jsonl"),
    ],
)
def test_numbered_files_of_one_split_are_read_together(tmp_path, names):
    touch(tmp_path, *names)
    assert names_of(tmp_path) == names_of(tmp_path / "*") == list(names)


def test_a_split_that_is_alone_has_both_names(tmp_path):
    touch(tmp_path, "train_prefs.jsonl", "test_prefs.jsonl")
    assert "several splits" in message_of(tmp_path)
    assert names_of(tmp_path, "train_prefs") == names_of(tmp_path, "train") == ["train_prefs.jsonl"]
    assert names_of(tmp_path, "test") == ["test_prefs.jsonl"]


METADATA = {
    "stats.json": json.dumps({"rows": 5, "by_source": {"a": 3}}, indent=2),
    "dataset_infos.json": "{}",
    "infos.json": json.dumps({"default": {"features": [{"name": "prompt"}], "splits": {"train": 4}}}),
    "config.json": json.dumps({"model_type": "qwen2"}),
    "README.json": json.dumps({"license": "mit", "tags": ["a", "b"]}),
}


@pytest.mark.parametrize("name", METADATA)
@pytest.mark.parametrize("inside", ["", "data"])
def test_a_stray_description_hides_no_data(tmp_path, name, inside):
    """At the root of a repository, beside the data or beside its folder."""
    touch(tmp_path / inside, "a.jsonl", "b.jsonl")
    (tmp_path / name).write_text(METADATA[name])
    assert names_of(tmp_path) == ["a.jsonl", "b.jsonl"]
    (tmp_path / inside / name).write_text(METADATA[name])
    assert names_of(tmp_path) == ["a.jsonl", "b.jsonl"]
    is_usual = name in ("dataset_infos.json", "config.json")  # which everybody has; the others are named in a note
    assert left_out(tmp_path) == ([] if is_usual else [tmp_path / inside / name])
    assert left_out(tmp_path / inside / "a.jsonl") == []


def test_a_description_hides_no_folders_and_rows_are_none(tmp_path):
    touch(tmp_path / "topics", "helpful/a.jsonl")
    (tmp_path / "topics" / "stats.json").write_text(METADATA["stats.json"])
    assert "its folders helpful do" in message_of(tmp_path / "topics")
    touch(tmp_path / "rows", "a.json", "b.jsonl")  # one row each
    assert "several kinds" in message_of(tmp_path / "rows")
    (tmp_path / "array").mkdir()
    (tmp_path / "array" / "a.json").write_text(json.dumps([{"name": 1}, {"name": 2}], indent=2))
    assert names_of(tmp_path / "array") == [1, 2]


def test_a_shard_that_is_missing_is_an_error(tmp_path):
    """A download that was not complete trained on the rest."""
    folder = touch(tmp_path / "hub", *(f"data/train-0000{number}-of-00004.parquet" for number in (0, 2)))
    touch(folder, "data/test-00000-of-00001.parquet")
    line = message_of(folder, "train")
    assert "lacks train-00001-of-00004, train-00003-of-00004; fetch it, or give a glob" in line
    assert len(open_rows(folder, "test")) == 1
    assert len(names_of(folder / "data" / "train-*")) == 2
    hashed = [f"train-0000{number}-of-00002-{sign}.parquet" for number, sign in enumerate(("0a1b2c3d", "ff00aa11"))]
    assert names_of(touch(tmp_path / "hashed", *hashed)) == hashed
    assert "lacks a-00000-of-00005, " in message_of(touch(tmp_path / "one", "a-00004-of-00005.jsonl"))


@pytest.mark.parametrize("inside", [".", "data"])
def test_a_link_to_nothing_is_an_error(tmp_path, inside):
    """The hub's cache holds links."""
    folder = touch(tmp_path / "hub", f"{inside}/a.jsonl")
    (folder / inside / "b.jsonl").symlink_to("../blobs/0a1b")
    (folder / inside / "notes.txt").symlink_to("nowhere")
    for path in (folder, folder / inside / "*.jsonl"):
        with pytest.raises(UserError) as caught:
            open_rows(path)
        assert str(caught.value).startswith(f"{folder / inside / 'b.jsonl'}: is a link to ../blobs/0a1b, which is not")
    (folder / inside / "b.jsonl").unlink()
    (folder / inside / "b.jsonl").symlink_to(folder / inside / "a.jsonl")
    assert len(open_rows(folder)) == 2


def test_copies_and_files_without_rows_are_noted(tmp_path):
    folder = touch(tmp_path / "pairs", "pairs.jsonl", "other.jsonl")
    assert open_rows(folder).notes == ()
    for name in ("pairs (1).jsonl", "{0}.jsonl"):
        (folder / name).write_bytes((folder / "pairs.jsonl").read_bytes())
    for name in ("empty.jsonl", "void.jsonl"):
        (folder / name).write_text("")
    rows = open_rows(folder)
    without, twice = (note.format(count=len(rows)) for note in rows.notes)
    assert without == "warning: empty.jsonl, void.jsonl without rows beside the 4 rows of the others"
    copy = "(as pairs (1).jsonl)"
    assert twice == f"warning: pairs.jsonl {copy}, {{0}}.jsonl {copy} among the 4 rows twice: the same bytes"
