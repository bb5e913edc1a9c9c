"""The folder of a run or an imported model: its files, and which of its iterations are complete. Imports no torch.

DIR/model_config.yaml                     the architecture (ModelSettings)
DIR/tokenizer/                            the tokenizer's own files
DIR/huggingface/                          of an imported model: what export restores (config.json ...)
DIR/latest_checkpointed_iteration.txt     written last
DIR/iter_0000010/                         weights, optimizer, scheduler, progress; reshards on load
DIR/run_config.yaml                       of a run: the settings of its first start
DIR/metrics.jsonl, DIR/eval.jsonl         of a run: what was measured
DIR/data_cache/                           of a run: its tokenized data
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.config.yaml_file import read_yaml
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.files import write_atomically
from megatron_dtrpo.runtime import environment

MODEL_CONFIG = "model_config.yaml"
TOKENIZER = "tokenizer"
HUGGINGFACE = "huggingface"
TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG = "run_config.yaml"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "eval.jsonl"
DATA_CACHE = "data_cache"

_ITERATION = "iter_"
_ALWAYS_THERE = ("metadata.json", ".metadata")  # of an iteration: megatron-core writes them last


def iteration_folder(directory: str | Path, iteration: int) -> Path:
    return Path(directory) / f"{_ITERATION}{iteration:07d}"


def latest_iteration(directory: str | Path) -> int | None:
    """The iteration that the tracker file of ``directory`` names, or None where there is no such file. Where its folder
    was deleted, it is the latest that is left.

    Raises:
        UserError: if the tracker or that iteration is damaged.
    """
    tracker, known = Path(directory) / TRACKER, complete_iterations(directory)
    if not tracker.exists():
        if known:
            raise UserError(
                f"{directory}: no checkpoint to load: {TRACKER} is missing; write {known[-1]} into it, the "
                "latest of the iterations beside it"
            )
        return None
    try:
        text = tracker.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        text = "something else"
    if not text.isdecimal():
        advice = f"; write {known[-1]} into it, the latest of the iterations beside it" if known else ""
        raise UserError(f"{tracker}: expected an iteration number, found {text!r}{advice}")
    iteration = int(text)
    folder = iteration_folder(directory, iteration)
    if not folder.exists():
        earlier = [number for number in known if number < iteration]
        if not earlier:
            raise UserError(f"{tracker} names iteration {text}, but {folder} is missing")
        _say_once(f"warning: {tracker} names iteration {text}, which was deleted: iteration {earlier[-1]} is used")
        return earlier[-1]
    for name in _ALWAYS_THERE:
        if not (folder / name).is_file():
            raise damaged(folder, f"{tracker.name} names it, but {name} is missing")
    return iteration


def damaged(folder: Path, detail: str) -> UserError:
    """The error for an iteration's ``folder`` that cannot be read, with the way on if there is one."""
    here = int(folder.name.removeprefix(_ITERATION))
    earlier = [iteration for iteration in complete_iterations(folder.parent) if iteration < here]
    if earlier:
        advice = f"delete {folder.name} to go on from {iteration_folder('', earlier[-1])}"
    else:
        advice = "no earlier iteration is beside it: bring a copy back, or write it again"
    return UserError(f"{folder}: damaged: {detail}; {advice}")


@functools.cache
def _say_once(message: str) -> None:
    if environment.rank() == 0:
        print(message, file=sys.stderr, flush=True)


def require_latest(directory: str | Path) -> int:
    """The last complete iteration; raises UserError if there is none."""
    iteration = latest_iteration(directory)
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: no such folder, so no checkpoint to load")
    foreign = any((Path(directory) / name).is_file() for name in ("config.json", "adapter_config.json"))
    if iteration is None and foreign:
        advice = "turn it into a checkpoint with megatron-dtrpo convert import"
        raise UserError(f"{directory}: a Hugging Face folder: {advice}")
    if iteration is None:
        raise UserError(f"{directory}: no checkpoint to load: {TRACKER} is missing")
    return iteration


def complete_iterations(directory: str | Path) -> list[int]:
    """Iterations in ``directory`` whose folders are complete, the oldest first."""
    folders = {folder.name.removeprefix(_ITERATION): folder for folder in Path(directory).glob(f"{_ITERATION}*")}
    return sorted(
        int(number)
        for number, folder in folders.items()
        if number.isdecimal() and all((folder / name).is_file() for name in _ALWAYS_THERE)
    )


def save_model_config(directory: str | Path, model: ModelSettings) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(directory) / MODEL_CONFIG, yaml.safe_dump(dataclasses.asdict(model), sort_keys=False))


def load_model_config(directory: str | Path) -> ModelSettings:
    path = Path(directory) / MODEL_CONFIG
    if not path.exists():
        raise UserError(f"{directory}: not a checkpoint folder of this project: {MODEL_CONFIG} is missing")
    names = {f.name for f in dataclasses.fields(ModelSettings)}
    values = read_yaml(path)
    for key in values:
        if key not in names:
            raise UserError(f"{path}: {key} is not part of an architecture")
    for key in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        if values.get(key) is None:
            raise UserError(f"{path}: damaged: {key} is missing; bring a copy back from where the checkpoint was made")
    return ModelSettings(**values)


def check_same_architecture(given: ModelSettings, saved: ModelSettings, directory: str | Path) -> None:
    """Raises UserError naming the first setting in which ``given`` (where set) differs from the checkpoint's."""
    for f in dataclasses.fields(ModelSettings):
        mine, theirs = getattr(given, f.name), getattr(saved, f.name)
        if mine is not None and mine != theirs:
            raise UserError(f"{directory}: checkpoint of another architecture: {f.name} is {theirs} there, {mine} here")


@contextmanager
def hold_folder(folder: Path) -> Iterator[bool]:
    """Inside, no other process holds ``folder``, which is made where it is missing. The lock ends with the process and
    those that it forked, however they end.

    Yields:
        Whether the folder is held: not every network file system has locks.

    Raises:
        UserError: if another process holds it, or it cannot be made.
    """
    made = not folder.is_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be made or read ({error.strerror})") from None
    try:
        held = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{folder}: another run is writing there; wait for its end, or give another folder"
                ) from None
            held = False
        yield held
    finally:
        os.close(descriptor)
        if made:
            with suppress(OSError):
                folder.rmdir()  # where nothing was written
