"""The weights of a Hugging Face folder, read a few rows at a time.

The folder is checked whole before anything is read: one kind of file (safetensors; a pickle could run code), an index
that agrees with its shards, shards as long as their headers say. Rows are read straight into the caller's buffer.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dtrpo.conversion.dtypes import SAFETENSORS
from megatron_dtrpo.conversion.hf_config import read_json, refuse_lfs_pointer
from megatron_dtrpo.conversion.raw_bytes import read_all
from megatron_dtrpo.errors import UserError, one_line

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")
_LONGEST_HEADER = 100_000_000  # bytes; safetensors' own limit


class Stored(NamedTuple):
    """Where a tensor is: ``offset`` bytes into ``file``."""

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFolder:
    """``tensors``: name -> `Stored`. Raises UserError where the folder is not a complete checkpoint."""

    def __init__(self, folder: str | Path, single: str = SINGLE):
        """``single``: the file that holds all weights where there are no shards."""
        self.folder, self._single = Path(folder), single
        self.tensors: dict[str, Stored] = {}
        self._open: dict[Path, int] = {}
        index = self._index()
        for file in sorted({self.folder / single} if index is None else {self.folder / f for f in index.values()}):
            stored = _read_header(file)
            if index is not None:
                _check_index(index, file, stored, self.folder / INDEX)
            self.tensors.update(stored)

    def _index(self) -> dict[str, str] | None:
        """Tensor -> shard, or None where everything is in one file. transformers looks in this order, too."""
        if (self.folder / self._single).is_file():
            return None
        if not (self.folder / INDEX).is_file():
            pickles = [file.name for pattern in _PICKLES for file in sorted(self.folder.glob(pattern))]
            if pickles:
                raise UserError(f"{self.folder}: only safetensors are read, and {pickles[0]} is not: convert it first")
            raise UserError(f"{self.folder}: no weights: neither {self._single} nor {INDEX} is there")
        index = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index:
            raise UserError(f"{self.folder / INDEX}: it has no weight_map")
        for name, file in index.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(f"{self.folder / INDEX}: {name} is in {file!r}, which is not a shard of this folder")
        return index

    def read_rows(self, name: str, start: int, out: Tensor) -> None:
        """Fills ``out [rows, ...]``, contiguous, with rows from ``start`` on, converted where the dtype differs."""
        stored = self.tensors[name]
        row_bytes = math.prod(stored.shape[1:]) * stored.dtype.itemsize
        buffer = out if out.dtype == stored.dtype else torch.empty(out.shape, dtype=stored.dtype)
        position = stored.offset + start * row_bytes
        if not read_all(self._descriptor(stored.file), position, buffer.view(-1).view(torch.uint8).numpy()):
            raise UserError(f"{stored.file}: truncated: it ends within {name}")
        if buffer is not out:
            out.copy_(buffer)

    def _descriptor(self, file: Path) -> int:
        if file not in self._open:
            self._open[file] = os.open(file, os.O_RDONLY)
        return self._open[file]

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _read_header(file: Path) -> dict[str, Stored]:
    """Every tensor of one file, after checking that the file holds all their bytes and no others."""
    refuse_lfs_pointer(file)
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _LONGEST_HEADER):
                raise UserError(f"{file}: truncated or not safetensors: its header does not fit its {size} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        stored = {name: _stored(file, name, entry, 8 + length) for name, entry in header.items()}
    except FileNotFoundError:
        raise UserError(f"{file}: the index names this shard, but it is missing") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not a safetensors header: {one_line(error)}") from None
    end = 8 + length
    for name, tensor in sorted(stored.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            raise UserError(f"{file}: {name} does not begin where the tensor before it ends")
        end += tensor.nbytes
    if end != size:
        kind = "truncated" if size < end else "longer than its header says"
        raise UserError(f"{file}: {kind}: {size} bytes, its header describes {end}")
    return stored


def _stored(file: Path, name: str, entry: dict, data: int) -> Stored:
    if entry["dtype"] not in SAFETENSORS:
        raise UserError(f"{file}: {name} is of dtype {entry['dtype']}: known are {', '.join(SAFETENSORS)}")
    shape = tuple(int(size) for size in entry["shape"])
    begin, end = entry["data_offsets"]
    stored = Stored(file, data + begin, SAFETENSORS[entry["dtype"]], shape)
    if any(size < 0 for size in shape) or begin < 0 or end - begin != stored.nbytes:
        raise UserError(f"{file}: {name}: its offsets do not fit its shape {list(shape)}")
    return stored


def _check_index(index: dict[str, str], file: Path, stored: dict[str, Stored], where: Path) -> None:
    listed = {name for name, shard in index.items() if shard == file.name}
    for name in sorted(listed - set(stored)):
        raise UserError(f"{where}: {name} should be in {file.name}, which does not have it")
    for name in sorted(set(stored) - listed):
        raise UserError(f"{where}: {name} of {file.name} is missing from the index")
