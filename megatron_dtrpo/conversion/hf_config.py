"""Reads a Hugging Face folder's config.json, and asks the family that it names what it says (`families`)."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.errors import UserError, one_line
from megatron_dtrpo.families.config_json import positive
from megatron_dtrpo.families.family import Family
from megatron_dtrpo.families.registry import DEFAULT_BLOCK_SIZE, family_of_config

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def refuse_lfs_pointer(path: Path) -> None:
    """Raises UserError for the few lines that git leaves in place of a large file that was not fetched."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UserError(f"{path}: a Git LFS pointer, not the file: run `git lfs pull` in {path.parent}")


def read_json(path: Path) -> dict:
    """A JSON object from a file of the user's. Raises UserError."""
    refuse_lfs_pointer(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def read_config(folder: str | Path) -> dict:
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / ADAPTER).is_file() and not any(folder.glob("model*.safetensors")):
        raise UserError(
            f"{folder}: an adapter (LoRA), not a model: merge it into its base first and give that folder, or convert "
            "import it with --base CHECKPOINT"
        )
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: not a Hugging Face checkpoint: {CONFIG} is missing")
    return read_json(folder / CONFIG)


def architecture(config: dict, where: str | Path) -> str:
    """The one known architecture that a configuration names. Raises UserError listing the known ones."""
    return family_of_config(config, where).architecture


def model_settings(
    config: dict,
    where: str | Path,
    block_size: int | None = None,
    make_vocab_size_divisible_by: int = ModelSettings.make_vocab_size_divisible_by,
    reads_blocks: bool = True,
) -> ModelSettings:
    """The settings of the same model here. ``block_size`` fills in where the configuration has none; where
    ``reads_blocks`` is False it need not be known.

    Raises:
        UserError: naming the file ``where`` and the key.
    """
    try:
        family = family_of_config(config, where)
        values = {**family.settings(config, where), **family.layers}
        return ModelSettings(
            family=family.name,
            block_size=_block_size(family, config, where, block_size, reads_blocks),
            make_vocab_size_divisible_by=make_vocab_size_divisible_by,
            **values,
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: a value has the wrong type: {error}") from None


def _block_size(family: Family, config: dict, where: str | Path, given: int | None, is_read: bool) -> int:
    key = family.block_size_key
    if key is None:
        if given is not None:
            raise UserError(
                f"{where}: a model of family {family.name} has full attention: it cannot be imported with --block-size "
                f"{given}"
            )
        return FULL
    own = positive(config, key, where) if key in config else family.block_size
    may_change = family.starting_point and own == 1  # an autoregressive one, that is to predict by blocks from here on
    if own is not None and given is not None and own != given and not may_change:
        raise UserError(f"{where}: {key} is {own}: it cannot be imported with --block-size {given}: leave that out")
    if own is None and given is None and is_read and not family.starting_point:
        raise UserError(
            f"{where}: no {key}, and a model of family {family.name} has one: import it with --block-size N"
        )
    return given or own or DEFAULT_BLOCK_SIZE


def assumptions(config: dict, where: str | Path) -> list[str]:
    """What ``model_settings`` filled in and a user may not have meant, a line each."""
    return family_of_config(config, where).assumptions(config, where)
