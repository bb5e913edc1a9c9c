"""Files and folders that appear under their names only when they are complete: written aside, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def partial_name(path: Path) -> Path:
    """Where ``path`` is written until it is complete; of an attempt that was killed it is left there."""
    return path.with_name(path.name + ".partial")


def write_atomically(path: Path, text: str) -> None:
    """Writes a file of UTF-8, or replaces it."""
    partial = partial_name(path)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_json(path: Path, content) -> None:
    """Writes a file of indented JSON, or replaces it."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def publish_folder(partial: Path, path: Path) -> None:
    """Gives a complete folder its name. A folder that has the name goes, but not before."""
    if not path.exists():
        os.rename(partial, path)
        return
    # A folder of its own name, made now: nothing that was there before is in the way or lost.
    replaced = Path(tempfile.mkdtemp(prefix=f"{path.name}.replaced.", dir=path.parent))
    os.rename(path, replaced)
    try:
        os.rename(partial, path)
    except OSError:
        os.rename(replaced, path)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


@contextlib.contextmanager
def first_to_finish(path: Path) -> Iterator[Path]:
    """A folder to write in, which gets the name ``path`` at the end. Several processes may do so at once: the first to
    finish wins, and what the others wrote goes. OSError where no folder can be made beside ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".building-{path.name[:8]}-", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folders are private to their user
        try:
            os.rename(partial, path)
        except OSError:
            if not path.exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder and leaves nothing under its name that could be taken for the whole."""
    if not folder.exists():
        return
    partial = partial_name(folder)
    os.replace(folder, partial)
    shutil.rmtree(partial, ignore_errors=True)
