"""torch's reader of distributed checkpoints, held back from running code and given a look at what it reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint import FileSystemReader


@contextmanager
def no_code_of_pickles() -> Iterator[None]:
    """Inside, torch.load builds tensors and plain values only, whatever its caller or the environment asks for: torch's
    reader of distributed checkpoints would run the code of a pickle inside a .distcp file."""
    wanted = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def before_each_piece(check: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Inside, ``check(reader, file, info)`` sees each piece of a ``.distcp`` file before torch does: the reader, the
    open file, and where in it the piece is (torch's ``_StorageInfo``). It may raise."""
    reader_class: Any = FileSystemReader
    unchecked = reader_class._slice_file

    def checked(reader, file, info):
        check(reader, file, info)
        return unchecked(reader, file, info)

    reader_class._slice_file = checked
    try:
        yield
    finally:
        reader_class._slice_file = unchecked
