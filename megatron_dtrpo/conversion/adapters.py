"""Adapters (LoRA): where PEFT's matrices lie in ours, adding them to weights, and which weights they belong to.

PEFT has an adapter for each Hugging Face projection. Ours of a fused layer is made of its parts' (`model.lora`): the
rows of A one above the other, those of B in the order of the layer's rows. Both are row ranges, as every tensor of
`mapping` is, and no value is computed on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint import iterations
from megatron_dtrpo.checkpoint.adapter import AdapterRecord
from megatron_dtrpo.checkpoint.fingerprint import digest_of, rounded_name, sum_of_rounded
from megatron_dtrpo.config.lora import target_names
from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.conversion import mapping
from megatron_dtrpo.conversion.mapping import MegatronTensor, Part, Segment
from megatron_dtrpo.conversion.torch_dist_reader import TorchDistReader
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.model.initialization import common_name

PEFT_PREFIX = "base_model.model."
_ROWS = 4096  # of the base, added up at a time


def peft_name(weight: str, letter: str) -> str:
    """PEFT's name of the matrix A or B beside the Hugging Face tensor ``weight``."""
    return f"{PEFT_PREFIX}{weight.removesuffix('weight')}lora_{letter}.weight"


def sources(tensor: MegatronTensor) -> list[str]:
    """The Hugging Face tensors that a Megatron tensor consists of, each once, in order."""
    return list(dict.fromkeys(segment.source for segment in tensor.segments))


def target_weights(model: ModelSettings, targets: Sequence[str]) -> list[MegatronTensor]:
    """The weights of the linear layers that have an adapter."""
    weights = {tensor.key: tensor for tensor in mapping.megatron_tensors(model, model.vocab_size)}
    return [weights[f"{name}.weight"] for name in target_names(model.num_layers, targets)]


def adapter_tensors(weight: MegatronTensor, rank: int) -> list[MegatronTensor]:
    """A and B of the adapter beside ``weight``, made of PEFT's."""
    rows, columns = weight.shape
    key, names = f"{weight.key.removesuffix('.weight')}_adapter.lora_", sources(weight)
    of_A = tuple(Segment(peft_name(name, "A"), 0, rank) for name in names)
    of_B = tuple(segment._replace(source=peft_name(segment.source, "B")) for segment in weight.segments)
    return [
        MegatronTensor(f"{key}A", weight.layer, (rank * len(names), columns), of_A),
        MegatronTensor(f"{key}B", weight.layer, (rows, rank), of_B),
    ]


def stored_fingerprint(reader: TorchDistReader, model: ModelSettings) -> str:
    """`checkpoint.fingerprint.base_fingerprint` of a checkpoint's weights, without a model."""
    sums = {}
    for tensor in mapping.megatron_tensors(model, model.vocab_size):
        total = 0
        columns = [torch.arange(size) for size in tensor.shape[1:]]
        for start in range(0, tensor.shape[0], _ROWS):
            count = min(_ROWS, tensor.shape[0] - start)
            values = reader.rows(tensor.key, tensor.layer, start, count, torch.float32)
            total += sum_of_rounded(values, [torch.arange(start, start + count), *columns])
        sums[rounded_name(common_name(tensor.key))] = total % 2**64
    return digest_of(sums)


def complete_iteration(folder: Path, iteration: int | None) -> Path:
    """The folder of an iteration, by default the latest. Raises UserError if it is not complete."""
    number = iterations.require_latest(folder) if iteration is None else iteration
    found = iterations.iteration_folder(folder, number)
    if not (found / "metadata.json").is_file():
        raise UserError(f"{folder}: no complete checkpoint of iteration {number}")
    return found


class StoredAdapter:
    """The weights of an adapter in a checkpoint, by PEFT's names; a context manager."""

    def __init__(self, folder: Path, model: ModelSettings, iteration: int | None = None):
        """Raises UserError where ``folder`` holds no adapter of such a model."""
        self.folder, self.record = folder, AdapterRecord.read(folder)
        own = checkpoint_folder.load_model_config(folder)
        checkpoint_folder.check_same_architecture(own, model, folder)
        self.weights = target_weights(model, self.record.lora_target_modules)
        tensors = [each for weight in self.weights for each in adapter_tensors(weight, self.record.lora_rank)]
        self.parts: dict[str, list[Part]] = mapping.huggingface_tensors(tensors)
        self.reader = TorchDistReader(complete_iteration(folder, iteration))
        for tensor in tensors:
            shape = self.reader.shape(tensor.key, tensor.layer)
            if shape != tensor.shape:
                raise UserError(f"{self.reader.folder}: {tensor.key} is {shape and list(shape)}, not {tensor.shape}")
        self._last: tuple[str, Tensor, Tensor] | None = None

    def whole(self, name: str, dtype: torch.dtype) -> Tensor:
        """The matrix that PEFT calls ``name``."""
        parts = self.parts[name]
        return torch.cat([self.reader.rows(p.tensor.key, p.tensor.layer, p.start, p.rows, dtype) for p in parts])

    def changes(self, name: str) -> bool:
        """Whether there is an adapter beside the Hugging Face tensor ``name``."""
        return peft_name(name, "A") in self.parts

    def added(self, name: str, start: int, values: Tensor) -> Tensor:
        """``values``, fp32 rows from ``start`` on of the Hugging Face tensor ``name``, plus what the adapter adds."""
        if self._last is None or self._last[0] != name:
            A, B = (self.whole(peft_name(name, letter), torch.float32) for letter in "AB")
            self._last = name, A, B
        _, A, B = self._last
        return torch.addmm(values, B[start : start + len(values)], A, alpha=self.record.scale)

    def __enter__(self) -> StoredAdapter:
        return self

    def __exit__(self, *exception) -> None:
        self.reader.close()


def common_targets(weights: Iterable[MegatronTensor], model: ModelSettings) -> list[str]:
    """Names of ``lora_target_modules`` for adapters beside ``weights``: short ones where every layer has one."""
    paths = [weight.key.removesuffix(".weight") for weight in weights]
    kinds = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    if len(paths) == len(target_names(model.num_layers, kinds)):
        return kinds
    return paths
