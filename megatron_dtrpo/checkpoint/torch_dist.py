"""Files of a ``torch_dist`` checkpoint, read without running any code in them: its ``.metadata``, and stretches of its
``.distcp`` files."""

from __future__ import annotations

import enum
import io
import os
import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

from megatron_dtrpo.errors import UserError, one_line

# Modules of plain dataclasses and enums that describe a checkpoint.
_DESCRIPTIONS = (
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
)
_PLAIN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}


def _member(kind: type, name: str) -> enum.Enum:
    """What Python 3.11.0 to 3.11.3 write as ``getattr``, with which they pickle the members of enumerations."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum) and name in kind.__members__):
        raise UserError("it reads an attribute, which is no part of a tensor's description")
    return kind[name]


class _DescriptionUnpickler(pickle.Unpickler):
    """Builds tensor descriptions and refuses everything else."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("builtins", "getattr"):
            return _member
        if "." not in name:
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            if (module, name) in _PLAIN:
                return super().find_class(module, name)
            if module in _DESCRIPTIONS:
                found = super().find_class(module, name)
                if isinstance(found, type) and found.__module__ == module:
                    return found
        raise UserError(f"it names {module}.{name}, which is no part of a tensor's description")


def read_metadata(folder: Path) -> Metadata:
    path = folder / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _DescriptionUnpickler(stream).load()
    except UserError as error:
        raise UserError(f"{path}: not trusted: {error}") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: {folder} is not a torch_dist checkpoint") from None
    except Exception as error:  # a damaged pickle raises what it likes
        raise UserError(f"{path}: damaged: {one_line(error)}") from None
    if not isinstance(metadata, Metadata):
        raise UserError(f"{path}: not the description of a checkpoint")
    return metadata


class Window(io.RawIOBase):
    """A stretch of a file that reads like a file of its own."""

    def __init__(self, descriptor: int, offset: int, length: int):
        self.descriptor, self.offset, self.length, self.position = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.length}[whence]
        return self.position

    def readinto(self, buffer) -> int:
        left = max(0, self.length - self.position)
        with memoryview(buffer) as whole, whole.cast("B") as octets, octets[:left] as view:
            count = os.preadv(self.descriptor, [view], self.offset + self.position) if view else 0
        self.position += count
        return count
