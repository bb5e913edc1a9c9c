"""In and out again in a scratch folder, and every tensor compared with what it was."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_dtrpo.conversion.dtypes import dtype_name
from megatron_dtrpo.conversion.hf_config import CONFIG, read_json
from megatron_dtrpo.conversion.safetensors_reader import SafetensorsFolder
from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint
from megatron_dtrpo.conversion.to_megatron import CHUNK_BYTES, ImportOptions, ignored, import_checkpoint
from megatron_dtrpo.errors import UserError


class Comparison(NamedTuple):
    """One tensor of both folders. ``difference`` is the largest absolute one where the bytes are not equal."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    equal: bool
    difference: str

    @property
    def line(self) -> str:
        result = "equal" if self.equal else self.difference
        return f"{self.name:<60} {str(list(self.shape)):<18} {self.dtype:<10} {result}"


def roundtrip(hf_path: str | Path, options: ImportOptions, scratch: str | Path | None = None) -> list[Comparison]:
    """Converts to a Megatron checkpoint and back under ``scratch``, which is emptied again."""
    options = dataclasses.replace(options, tokenizer=False, add_mask_token=False)
    if scratch is not None and not Path(scratch).is_dir():
        raise UserError(f"--scratch {scratch}: no such folder")
    with tempfile.TemporaryDirectory(dir=scratch, prefix="roundtrip_") as folder:
        megatron, back = Path(folder) / "megatron", Path(folder) / "huggingface"
        import_checkpoint(hf_path, megatron, options)
        export_checkpoint(megatron, back, ExportOptions(progress=options.progress))
        return compare(hf_path, back)


def compare(folder: str | Path, other: str | Path) -> list[Comparison]:
    """Every tensor of either Hugging Face folder, a bounded number of rows at a time, and the configuration."""
    with SafetensorsFolder(folder) as ours, SafetensorsFolder(other) as theirs:
        names = sorted(name for name in {*ours.tensors, *theirs.tensors} if not ignored(name))
        rows = [_compare_tensor(name, ours, theirs) for name in names]
    same = read_json(Path(folder) / CONFIG) == read_json(Path(other) / CONFIG)
    return [*rows, Comparison(CONFIG, (), "", same, "differs")]


def _compare_tensor(name: str, ours: SafetensorsFolder, theirs: SafetensorsFolder) -> Comparison:
    for folder in (ours, theirs):
        if name not in folder.tensors:
            return Comparison(name, (), "", False, f"missing in {folder.folder}")
    a, b = ours.tensors[name], theirs.tensors[name]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return Comparison(name, a.shape, dtype_name(a.dtype), False, f"is {list(b.shape)} {dtype_name(b.dtype)}")
    step = max(1, CHUNK_BYTES // (math.prod(a.shape[1:]) * a.dtype.itemsize))
    equal, largest = True, 0.0
    for start in range(0, a.shape[0], step):
        mine, other = (torch.empty((min(step, a.shape[0] - start), *a.shape[1:]), dtype=a.dtype) for _ in range(2))
        ours.read_rows(name, start, mine)
        theirs.read_rows(name, start, other)
        if not torch.equal(mine.view(torch.uint8), other.view(torch.uint8)):  # as bytes: NaN equals itself, 0 not -0
            equal = False
            largest = max(largest, float((mine.double() - other.double()).abs().nan_to_num(math.inf).max()))
    return Comparison(name, a.shape, dtype_name(a.dtype), equal, f"largest difference {largest:.3g}")
