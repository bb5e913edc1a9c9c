"""The folder of a run or an imported model: its files, its architecture and who writes there. Imports no torch.

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
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.config.yaml_file import read_yaml
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.files import write_atomically

MODEL_CONFIG = "model_config.yaml"
TOKENIZER = "tokenizer"
HUGGINGFACE = "huggingface"
RUN_CONFIG = "run_config.yaml"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "eval.jsonl"
DATA_CACHE = "data_cache"


def save_model_config(directory: str | Path, model: ModelSettings) -> None:
    Path(directory).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(directory) / MODEL_CONFIG, yaml.safe_dump(dataclasses.asdict(model), sort_keys=False))


def load_model_config(directory: str | Path) -> ModelSettings:
    path = Path(directory) / MODEL_CONFIG
    if not path.exists():
        foreign = (Path(directory) / "config.json").is_file()
        advice = "; turn the Hugging Face folder into one with megatron-dtrpo convert import" * foreign
        raise UserError(f"{directory}: not a checkpoint folder of this project: {MODEL_CONFIG} is missing{advice}")
    names = {f.name for f in dataclasses.fields(ModelSettings)}
    values = read_yaml(path)
    for key in values:
        if key not in names:
            raise UserError(f"{path}: {key} is not part of an architecture")
    for key in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        if values.get(key) is None:
            raise UserError(f"{path}: damaged: {key} is missing; bring a copy back from where the checkpoint was made")
    return ModelSettings(**values)


def check_same_architecture(
    given: ModelSettings, saved: ModelSettings, directory: str | Path, advice: str = "leave {name} out"
) -> None:
    """Raises UserError naming the first setting in which ``given`` (where set) differs from the checkpoint's.
    ``advice``: in words, with the setting's ``{name}`` and the checkpoint's ``{value}``."""
    for f in dataclasses.fields(ModelSettings):
        mine, theirs = getattr(given, f.name), getattr(saved, f.name)
        if mine is not None and mine != theirs:
            differs = f"{f.name} is {theirs} there, {mine} here: {advice.format(name=f.name, value=theirs)}"
            raise UserError(f"{directory}: checkpoint of another architecture: {differs}")


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
