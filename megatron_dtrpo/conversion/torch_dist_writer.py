"""A ``torch_dist`` checkpoint written one piece at a time, without a model and without process groups.

torch's own writer keeps every tensor of a file until the file is closed, and megatron-core's wants a process group and
all tensors up front. The format is simple enough to write directly: each piece is a ``torch.save`` record in a
``.distcp`` file, and ``.metadata`` says of each piece which part of which tensor it is and where.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_dtrpo.conversion.raw_bytes import write_all

# What megatron-core's loader looks for in metadata.json.
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_FILE_BYTES = 5_000_000_000  # a new .distcp file after this many


class TorchDistWriter:
    """Use as a context manager; the checkpoint is complete when it exits without an exception."""

    def __init__(self, folder: Path, content_metadata: dict):
        self.folder, self.content_metadata = folder, content_metadata
        self.tensors: dict[str, Any] = {}  # TensorStorageMetadata or BytesStorageMetadata
        self.storage: dict[MetadataIndex, _StorageInfo] = {}
        self.stream: io.FileIO | None = None
        self.files = 0

    def begin(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Announces a tensor, whose pieces follow."""
        self.tensors[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])

    def write(self, key: str, start: int, part: Tensor) -> None:
        """Writes the rows from ``start`` on of the tensor ``key``; ``part [rows, ...]`` has storage of its own."""
        offsets = torch.Size([start] + [0] * (part.dim() - 1))
        buffer = io.BytesIO()
        torch.save(part, buffer)
        self.tensors[key].chunks.append(ChunkStorageMetadata(offsets, part.shape))
        self._append(MetadataIndex(key, offsets), buffer)

    def write_empty_object(self, key: str) -> None:
        """The state of a module that has none, as megatron-core writes it."""
        buffer = io.BytesIO()
        torch.save([None], buffer)
        key = f"{key}._extra_state/shard_0_1"
        self.tensors[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), buffer)

    def _append(self, index: MetadataIndex, buffer: io.BytesIO) -> None:
        if self.stream is None or self.stream.tell() >= _FILE_BYTES:
            self._close()
            self.stream = (self.folder / f"__0_{self.files}.distcp").open("wb", buffering=0)
            self.files += 1
        with buffer.getbuffer() as data:
            self.storage[index] = _StorageInfo(Path(self.stream.name).name, self.stream.tell(), len(data))
            write_all(self.stream, data)

    def _close(self) -> None:
        if self.stream is not None:
            self.stream.close()
            self.stream = None

    def __enter__(self) -> TorchDistWriter:
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, kind, *exception) -> None:
        self._close()
        if kind is not None:
            return
        torch.save({"content_metadata": self.content_metadata}, self.folder / "common.pt")
        metadata = Metadata(self.tensors, storage_data=self.storage, storage_meta=StorageMeta())
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))
        (self.folder / "metadata.json").write_text(json.dumps(_BACKENDS))  # last: its presence means complete
