"""Which files a data path means: one file, a folder, a glob; and which of them belong to one split.

A split is what `datasets` would call one: the name before ``-00000-of-00001`` of a shard, else a word such as train or
test in the file's name. Where a folder has several files of it whose names differ in more than a number, such as
train_prefs and train_sft, each is a split of its own. Files of several splits are never read together unless the user
names them all.
"""

from __future__ import annotations

import glob
import json
import re
from itertools import chain
from pathlib import Path

from megatron_dtrpo.data.file_sets import require_all_shards, require_no_broken_link
from megatron_dtrpo.data.file_signs import COMPRESSIONS, is_description, kind_of
from megatron_dtrpo.errors import UserError

TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
TABLE_KINDS = (".parquet", ".pq", ".parq", ".arrow", ".feather")
KINDS = "a .jsonl, .json, .csv, .parquet or .arrow file (text also as .gz, .bz2, .xz, .zst)"

# Files that describe a data set and hold none of its rows.
_DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
_SHARD = re.compile(r"(.+?)[-_.]\d{5}-of-\d{5}")
_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation", "heldout", "holdout"),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
# Words that only number the files of one split; single letters do too.
_NUMBERING = ("part", "shard", "chunk", "file", "of")
_WORD = re.compile(r"v\d+|[A-Z]?[a-z]+|[A-Z]+")  # of TrainSet, train_set, TRAIN_v2
_NAMED_FILES = 3  # of one split in a message


def data_files(path: str | Path, split: str | None = None) -> list[Path]:
    """The files that ``path`` means, in order of name; a folder that `save_to_disk` wrote counts as one of them.

    ``split`` chooses among the splits of a folder or glob; ``train+test`` is both. Raises UserError where nothing is
    there, where several splits are and none was chosen, or where files of different kinds are.
    """
    path = Path(path)
    if path.is_dir():
        return _of_folder(path, split)
    if path.exists():
        if split is not None:
            raise UserError(f"{path}: is one file, so that there is no split {split!r} to choose; leave --split out")
        return [path]
    if not glob.has_magic(str(path)):
        raise UserError(f"{path}: no such file; give the path of {KINDS}, of a folder of them, or a glob{_hub(path)}")
    files = sorted(Path(found) for found in glob.glob(str(path), recursive=True))
    require_no_broken_link(files)
    files = [file for file in files if file.is_file()]
    if not files:
        raise UserError(f"{path}: no file matches this glob; put it in quotes and look at its folder")
    return _of_one_kind(path, _of_split(path, files, split))


def stored_files(path: str | Path, split: str | None = None) -> list[Path]:
    """Every file on disk that the rows of ``path`` come from, in a fixed order; raises as `data_files` does."""
    found = data_files(path, split)
    inside = ([file] if file.is_file() else sorted(p for p in file.rglob("*") if p.is_file()) for file in found)
    return list(chain.from_iterable(inside))


def _hub(path: Path) -> str:
    """Advice about a path that may be a name of the Hugging Face hub."""
    if len(path.parts) != 2 or path.is_absolute() or path.suffix:
        return ""
    return f". Nothing is downloaded here: hf download --repo-type dataset {path} --local-dir DIR"


def is_saved_data_set(folder: Path) -> bool:
    """Whether `datasets` wrote ``folder`` with ``save_to_disk``."""
    return (folder / "dataset_info.json").exists() and (folder / "state.json").exists()


def _of_folder(folder: Path, split: str | None) -> list[Path]:
    if (folder / "dataset_dict.json").exists():
        return _of_saved_splits(folder, split)
    if is_saved_data_set(folder):
        if split is not None:
            raise UserError(f"{folder}: is one saved data set without splits; leave --split out")
        return [folder]
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    require_no_broken_link([file for place in places for file in sorted(place.iterdir()) if _is_of_a_kind(file)])
    # A repository of the Hugging Face hub keeps its files in data/, or in a folder for each configuration.
    files = _data_in(folder) or _data_in(folder / "data")
    if not files and not any(_has_data(p) for p in folder.iterdir() if p.is_dir()):
        files = _files_in(folder)  # nothing else is there: reading them reports what is wrong
    if not files:
        return _of_subfolders(folder, split)
    chosen = _of_one_kind(folder, _of_split(folder, files, split))
    require_all_shards(folder, chosen)
    return chosen


def _of_saved_splits(folder: Path, split: str | None) -> list[Path]:
    try:
        names = list(json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"])
    except (OSError, ValueError, KeyError, TypeError):
        names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if split is None and len(names) != 1:
        raise UserError(
            f"{folder}: holds several splits ({', '.join(names)}); give the folder of one of them, or {_advice(names)}"
        )
    return [folder / name for name in _wanted(folder, split or names[0], names)]


def _of_subfolders(folder: Path, split: str | None) -> list[Path]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and _has_data(p))
    if not names:
        raise UserError(f"{folder}: this folder is neither a saved data set nor holds {KINDS}")
    if split in names:
        return _of_folder(folder / split, None)
    raise UserError(
        f"{folder}: holds no data files itself, its folders {', '.join(names)} do; give one of them, or a glob"
    )


def _has_data(folder: Path) -> bool:
    return (
        is_saved_data_set(folder) or bool(_data_in(folder)) or any(_has_data(p) for p in folder.iterdir() if p.is_dir())
    )


def _files_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if file.is_file() and _is_of_a_kind(file))


def _is_of_a_kind(file: Path) -> bool:
    known = kind_of(file)[0] in (*TEXT_KINDS, *TABLE_KINDS)
    return known and file.name not in _DESCRIPTIONS and not file.name.startswith(".")


def _data_in(folder: Path) -> list[Path]:
    """The files of ``folder`` that are not descriptions of a data set."""
    return [file for file in _files_in(folder) if not is_description(file)]


def left_out(path: str | Path) -> list[Path]:
    """The descriptions that lie where the files of the folder ``path`` do and are none of them."""
    path = Path(path)
    if not path.is_dir() or is_saved_data_set(path) or (path / "dataset_dict.json").exists():
        return []
    folder = path if _data_in(path) else path / "data"
    return [file for file in _files_in(folder) if is_description(file)] if _data_in(folder) else []


def split_name(name: str) -> str | None:
    """The split that a file's name tells: ``train_prefs-00000-of-00001.parquet`` train_prefs, ``a.dev.csv`` validation,
    ``a.csv`` None."""
    shard = _SHARD.match(name)
    if shard:
        return shard[1]
    words = [re.sub(r"(?<=.)(set|data)$", "", word) for word in _words(name)]
    return next((_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD), None)


def _words(name: str) -> list[str]:
    """The words of a file's name without its kind, in lower case."""
    kind = "".join(kind_of(Path(name)))
    stem = name[: -len(kind)] if kind else name
    return [word.lower() for word in _WORD.findall(stem)]


def _full_name(name: str) -> str:
    """A file's name without what numbers it: ``train_prefs_2.jsonl`` train_prefs, ``train-part1.csv`` train."""
    shard = _SHARD.match(name)
    return shard[1] if shard else "_".join(word for word in _words(name) if len(word) > 1 and word not in _NUMBERING)


def _of_split(path: Path, files: list[Path], split: str | None) -> list[Path]:
    groups = _splits(files)
    names = [name for name in groups if name]
    if split is not None:
        wanted = _wanted(path, split, names, {name: _full_name(groups[name][0].name) for name in names})
        return list(chain.from_iterable(groups[name] for name in wanted))
    if len(groups) == 1:
        return files
    shown = "; ".join(f"{name or 'no split'}: {listed(group)}" for name, group in groups.items())
    raise UserError(f"{path}: holds files of several splits ({shown}); {_advice(names)}, or give a glob of one split's")


def _splits(files: list[Path]) -> dict[str, list[Path]]:
    """``files`` by their split, which has its full name where another one begins with the same word; those whose names
    tell none under ``""``."""
    by_folder = len({file.parent for file in files}) > 1
    names = [split_name(file.name) or (split_name(file.parent.name) if by_folder else None) or "" for file in files]
    full_names = [
        _full_name(file.name) if split_name(file.name) else name for file, name in zip(files, names, strict=True)
    ]
    several = {name for name in names if len({f for n, f in zip(names, full_names, strict=True) if n == name}) > 1}
    groups: dict[str, list[Path]] = {}
    for file, name, full_name in zip(files, names, full_names, strict=True):
        groups.setdefault(full_name if name in several else name, []).append(file)
    return groups


def _advice(names: list[str]) -> str:
    first = next((name for name in names if name.startswith("train")), names[0])
    return f"choose with --split {first} (--eval-split for held-out data)"


def _wanted(path: Path, split: str, names: list[str], full_names: dict[str, str] | None = None) -> list[str]:
    wanted = list(dict.fromkeys(_known_as(name, names, full_names or {}) for name in split.split("+")))
    for name in wanted:
        if name not in names:
            there = f"it has {', '.join(names)}" if names else "its files' names tell no split"
            raise UserError(f"{path}: has no split {name!r}; {there}")
    return wanted


def _known_as(split: str, names: list[str], full_names: dict[str, str]) -> str:
    """``split`` by the name it has among ``names``: dev is validation, TrainPrefs is train_prefs."""
    if split in names:
        return split
    usual = _SPLIT_OF_WORD.get(split)
    if usual in names:
        return usual
    same = [name for name in names if re.fullmatch(r"[\w.-]+", split) and _full_name(split) == full_names.get(name)]
    return same[0] if same else split


def listed(files: list[Path]) -> str:
    """The first names of ``files``."""
    more = [f"{len(files) - _NAMED_FILES} more"] if len(files) > _NAMED_FILES else []
    return ", ".join([file.name for file in files[:_NAMED_FILES]] + more)


def _of_one_kind(path: Path, files: list[Path]) -> list[Path]:
    for file in files:
        plain = file.with_suffix("")
        if file.suffix.lower() in COMPRESSIONS and plain in files:
            raise UserError(f"{path}: {plain.name} and {file.name} are one file, compressed and not; give one of them")
    kinds = sorted({kind_of(file)[0] for file in files})
    if len(kinds) > 1:
        raise UserError(f"{path}: holds files of several kinds ({', '.join(kinds)}); give a glob of one: '*{kinds[0]}'")
    return files
