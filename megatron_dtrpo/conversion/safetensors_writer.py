"""Safetensors shards written front to back, without ever holding one.

A header needs names, dtypes and shapes only, so it goes first and the tensors' rows follow as they come.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_dtrpo.conversion.dtypes import CODES
from megatron_dtrpo.conversion.raw_bytes import write_all
from megatron_dtrpo.conversion.safetensors_reader import INDEX, SINGLE


class Planned(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def split_into_shards(tensors: list[Planned], max_bytes: int) -> list[list[Planned]]:
    """Consecutive tensors of at most ``max_bytes`` together; a larger tensor has a shard of its own."""
    shards: list[list[Planned]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.nbytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """Hugging Face's names."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def write_shard(path: Path, tensors: list[Planned], rows: Iterator[Tensor]) -> None:
    """Writes one file. ``rows`` yields contiguous tensors whose bytes, joined, are those of ``tensors`` in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    with path.open("wb", buffering=0) as stream:
        write_all(stream, len(text).to_bytes(8, "little") + text)
        for part in rows:
            end -= part.nbytes
            write_all(stream, part.view(-1).view(torch.uint8).numpy())
    if end != 0:
        raise AssertionError(f"{path}: {end} bytes were announced and not written")


def write_index(folder: Path, shards: list[list[Planned]]) -> None:
    """The index that several shards need."""
    names = shard_names(len(shards))
    where = {tensor.name: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
    everything = [tensor for shard in shards for tensor in shard]
    metadata = {
        "total_parameters": sum(math.prod(tensor.shape) for tensor in everything),
        "total_size": sum(tensor.nbytes for tensor in everything),
    }
    text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(where.items()))}, indent=2)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")
