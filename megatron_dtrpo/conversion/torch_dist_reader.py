"""Rows of the tensors in a ``torch_dist`` checkpoint, however training was spread when it was written.

A tensor may be stored in any number of pieces, cut along any axis, alone or (as Megatron-LM does by default) with all
layers of a kind in one tensor with a leading layer axis. Pieces are loaded when their rows are asked for, and kept
while their neighbours are. Nothing in the folder is trusted: pickles may name tensor descriptions and nothing else.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_dtrpo.checkpoint.checksums import DIFFERS, is_as_written
from megatron_dtrpo.checkpoint.iterations import damaged
from megatron_dtrpo.checkpoint.torch_dist import Window, read_metadata
from megatron_dtrpo.errors import UserError, one_line

_CACHE_BYTES = 256 << 20  # of loaded pieces; more only where one tensor is larger


class TorchDistReader:
    """One iteration's folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        metadata = read_metadata(self.folder)
        self.tensors = {k: t for k, t in metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}
        self._storage = {(i.fqn, tuple(i.offset or ())): info for i, info in metadata.storage_data.items()}
        self._open: dict[str, int] = {}
        self._cache: OrderedDict[tuple, Tensor] = OrderedDict()

    def find(self, key: str, layer: int | None) -> tuple[str, bool] | None:
        """The stored key of a tensor and whether it has a leading layer axis, or None."""
        if key in self.tensors:
            return key, False
        joint = None if layer is None else key.replace(f".{layer}.", ".", 1)
        return (joint, True) if joint in self.tensors else None

    def shape(self, key: str, layer: int | None) -> tuple[int, ...] | None:
        """The shape of one tensor, without the layer axis; None where the checkpoint lacks it."""
        found = self.find(key, layer)
        if found is None:
            return None
        size = tuple(self.tensors[found[0]].size)
        return size if not found[1] else (size[1:] if layer < size[0] else None)

    def dtype(self, key: str, layer: int | None) -> torch.dtype:
        return self.tensors[self.find(key, layer)[0]].properties.dtype

    def rows(self, key: str, layer: int | None, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """Rows ``start:start + count`` as ``dtype``, contiguous; a view of the stored piece where that is possible."""
        stored, joint = self.find(key, layer)
        if not joint and self.tensors[stored].properties.dtype == dtype:
            for chunk in self.tensors[stored].chunks:
                first, whole = chunk.offsets[0], tuple(chunk.sizes[1:]) == tuple(self.tensors[stored].size[1:])
                if whole and first <= start and start + count <= first + chunk.sizes[0]:
                    piece = self._piece(stored, joint, tuple(chunk.offsets), tuple(chunk.sizes))
                    return piece[start - first : start - first + count].contiguous()
        out = torch.empty((count, *self.shape(key, layer)[1:]), dtype=dtype)
        self.read_rows(key, layer, start, out)
        return out

    def read_rows(self, key: str, layer: int | None, start: int, out: Tensor) -> None:
        """Fills ``out [rows, ...]`` with rows from ``start`` on, converted where the dtype differs."""
        stored, joint = self.find(key, layer)
        target = out.unsqueeze(0) if joint else out
        begin = [layer, start] if joint else [start]
        begin += [0] * (target.dim() - len(begin))
        missing = target.numel()
        for chunk in self.tensors[stored].chunks:
            theirs, ours = [], []
            for want, wanted, offset, size in zip(begin, target.shape, chunk.offsets, chunk.sizes, strict=True):
                low, high = max(want, offset), min(want + wanted, offset + size)
                theirs.append(slice(low - offset, max(low, high) - offset))
                ours.append(slice(low - want, max(low, high) - want))
            part = target[tuple(ours)]
            if part.numel():
                part.copy_(self._piece(stored, joint, tuple(chunk.offsets), tuple(chunk.sizes))[tuple(theirs)])
                missing -= part.numel()
        if missing:
            raise UserError(f"{self.folder}: {stored} is incomplete: {missing} values of the rows from {start} on")

    def _nbytes(self, key: str, joint: bool) -> int:
        size = self.tensors[key].size[joint:]
        return math.prod(size) * self.tensors[key].properties.dtype.itemsize

    def _piece(self, key: str, joint: bool, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        if (key, offset) in self._cache:
            self._cache.move_to_end((key, offset))
            return self._cache[key, offset]
        info = self._storage.get((key, offset))
        if info is None:
            raise UserError(f"{self.folder}: .metadata does not say where {key} is from {list(offset)} on")
        where = self.folder / info.relative_path
        limit = max(_CACHE_BYTES, self._nbytes(key, joint))  # a tensor cut into columns needs all pieces for any row
        while self._cache and sum(t.nbytes for t in self._cache.values()) + info.length > limit:
            self._cache.popitem(last=False)
        try:
            window: Any = Window(self._descriptor(info.relative_path), info.offset, info.length)
            if not is_as_written(window):
                raise damaged(self.folder, f"{where.name}: {key}: {DIFFERS}")
            window.seek(0)
            piece = torch.load(window, map_location="cpu", weights_only=True)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{where}: {error.strerror or error}") from None
        except Exception as error:  # a truncated or damaged record raises what it likes
            raise UserError(f"{where}: {key} cannot be read: {one_line(error)}") from None
        if not isinstance(piece, Tensor) or tuple(piece.shape) != shape:
            raise UserError(f"{where}: {key} is not what the checkpoint's description says")
        self._cache[key, offset] = piece
        return piece

    def _descriptor(self, name: str) -> int:
        if name not in self._open:
            if Path(name).name != name:
                raise UserError(f"{self.folder}: {name} is not a file of this checkpoint")
            self._open[name] = os.open(self.folder / name, os.O_RDONLY)
        return self._open[name]

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()
        self._cache.clear()

    def __enter__(self) -> TorchDistReader:
        return self

    def __exit__(self, *exception) -> None:
        self.close()
