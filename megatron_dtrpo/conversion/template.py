"""The small files of a Hugging Face folder, kept beside the Megatron checkpoint so that export can restore them.

    DIR/huggingface/config.json               as it will be exported: the original keys, and what --add-mask-token adds
    DIR/huggingface/generation_config.json
    DIR/huggingface/source.json               dtypes of the weights, and whether a tied head was stored twice

A training run copies its starting point's.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_dtrpo.checkpoint.folder import HUGGINGFACE, MODEL_CONFIG
from megatron_dtrpo.conversion.dtypes import dtype_name, dtype_named
from megatron_dtrpo.conversion.hf_config import CONFIG, read_json
from megatron_dtrpo.errors import UserError

FOLDER = HUGGINGFACE
GENERATION_CONFIG = "generation_config.json"
_SOURCE = "source.json"
_DTYPE_KEYS = ("dtype", "torch_dtype")  # transformers 5, transformers 4


@dataclass
class Source:
    """How weights were stored: most in ``dtype``, the others as ``exceptions`` (name -> dtype) say."""

    dtype: torch.dtype
    exceptions: dict[str, torch.dtype] = field(default_factory=dict)
    head_stored_though_tied: bool = False

    @classmethod
    def of(cls, dtypes: dict[str, torch.dtype], head_stored_though_tied: bool) -> Source:
        counts = list(dtypes.values())
        common = max(set(counts), key=counts.count)
        others = {name: dtype for name, dtype in dtypes.items() if dtype != common}
        return cls(common, others, head_stored_though_tied)

    def dtype_of(self, name: str) -> torch.dtype:
        return self.exceptions.get(name, self.dtype)


def save_template(folder: Path, config: dict, source_folder: Path, source: Source) -> None:
    """Writes ``folder`` from the Hugging Face folder; ``config`` is its configuration, perhaps changed."""
    folder.mkdir(parents=True)
    if config == read_json(source_folder / CONFIG):
        shutil.copyfile(source_folder / CONFIG, folder / CONFIG)
    else:
        write_config(folder, config)
    if (source_folder / GENERATION_CONFIG).is_file():
        shutil.copyfile(source_folder / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    record = {
        "dtype": dtype_name(source.dtype),
        "exceptions": {name: dtype_name(dtype) for name, dtype in source.exceptions.items()},
        "head_stored_though_tied": source.head_stored_though_tied,
    }
    (folder / _SOURCE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_config(folder: Path, config: dict) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_source(template: Path) -> Source:
    path = template / _SOURCE
    record = read_json(path)
    try:
        exceptions = {name: dtype_named(dtype, path) for name, dtype in record["exceptions"].items()}
        return Source(dtype_named(record["dtype"], path), exceptions, record["head_stored_though_tied"])
    except (KeyError, AttributeError):
        raise UserError(f"{path}: not what import wrote: import the checkpoint again") from None


def config_dtype(config: dict) -> str | None:
    """The dtype that a configuration names, if any."""
    return next((config[key] for key in _DTYPE_KEYS if config.get(key) is not None), None)


def with_dtype(config: dict, dtype: torch.dtype) -> dict:
    """``config`` saying ``dtype``, under the key that it uses."""
    keys = [key for key in _DTYPE_KEYS if key in config] or ["torch_dtype"]
    return {**config, **{key: dtype_name(dtype) for key in keys}}


def find_template(checkpoint: Path) -> Path | None:
    """The template of a checkpoint folder, None if what it holds was not imported."""
    folder = checkpoint / FOLDER
    if (folder / CONFIG).is_file():
        return folder
    if folder.is_dir() and (checkpoint / MODEL_CONFIG).is_file():
        raise UserError(f"{folder}: damaged: {CONFIG} is missing: bring it back from the imported folder")
    return None
