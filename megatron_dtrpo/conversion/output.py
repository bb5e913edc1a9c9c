"""A folder that appears under its name only when it is complete.

Everything is written to ``DIR.partial`` and renamed at the end. Whatever stops a conversion removes the partial folder;
a kill leaves it behind, under a name that nothing loads, and the next conversion replaces it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_dtrpo.checkpoint.folder import METRICS_FILE, MODEL_CONFIG
from megatron_dtrpo.checkpoint.iterations import TRACKER
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.files import partial_name, publish_folder

_MARKER = ".conversion-in-progress"
# Patterns of files that together say that a folder is a checkpoint, which --overwrite may replace.
_CHECKPOINTS = (("config.json", "*.safetensors"), ("adapter_config.json", "*.safetensors"), (MODEL_CONFIG, TRACKER))


@contextlib.contextmanager
def output_folder(path: str | Path, overwrite: bool, source: str | Path) -> Iterator[Path]:
    """Yields the folder to write into. Raises UserError if ``path`` may not be written or the disk is full."""
    path = Path(path)
    check_output(path, overwrite, Path(source))
    partial = partial_name(path)
    missing = [parent for parent in partial.parents if not parent.exists()]
    _begin(partial)
    try:
        try:
            yield partial
            (partial / _MARKER).unlink()
            publish_folder(partial, path)
        except OSError as error:
            raise explained(error, path) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            for parent in missing:  # made for this output only
                parent.rmdir()
        raise


def check_output(path: Path, overwrite: bool, source: Path) -> None:
    """Raises UserError unless ``path`` is free, or is a checkpoint other than ``source`` that may be replaced."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise UserError(f"{path} is not a folder: give another one")
    if source.resolve() == path.resolve() or path.resolve() in source.resolve().parents:
        raise UserError(f"{path} holds what is to be converted: give another folder for the result")
    if not any(path.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{path} exists: give --overwrite to replace it, or another folder")
    if (path / METRICS_FILE).exists():
        raise UserError(f"{path} holds a training run: --overwrite replaces converted checkpoints only")
    if not any(all(any(path.glob(pattern)) for pattern in patterns) for patterns in _CHECKPOINTS):
        raise UserError(f"{path} is not a checkpoint: --overwrite does not replace anything else")


def require_space(folder: Path, nbytes: int) -> None:
    """Raises UserError if ``nbytes`` do not fit on the disk of ``folder``, before half of them are written."""
    free = shutil.disk_usage(folder).free
    if nbytes > free:
        raise UserError(f"the disk of {folder.parent} is too full: {nbytes / 1e9:.2f} GB needed, {free / 1e9:.2f} free")


def explained(error: OSError, path: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"the disk is full: nothing of {path} was kept")
    place = error.filename or path
    return UserError(f"{place}: {error.strerror or error}")


def _begin(partial: Path) -> None:
    try:
        if partial.exists():
            if not (partial / _MARKER).exists():
                raise UserError(f"{partial} is in the way and is not an interrupted conversion: move it")
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        (partial / _MARKER).touch()
    except OSError as error:
        raise explained(error, partial) from error
