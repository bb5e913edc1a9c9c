"""Adapters as PEFT's folders: ``adapter_config.json`` and ``adapter_model.safetensors``, in and out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint import iterations
from megatron_dtrpo.checkpoint.adapter import AdapterRecord, is_adapter_folder
from megatron_dtrpo.config.lora import DEFAULT_TARGETS
from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.conversion import mapping
from megatron_dtrpo.conversion.adapters import (
    PEFT_PREFIX,
    StoredAdapter,
    adapter_tensors,
    common_targets,
    complete_iteration,
    peft_name,
    sources,
    stored_fingerprint,
    target_weights,
)
from megatron_dtrpo.conversion.hf_config import ADAPTER, read_json
from megatron_dtrpo.conversion.output import output_folder
from megatron_dtrpo.conversion.safetensors_reader import SafetensorsFolder
from megatron_dtrpo.conversion.safetensors_writer import Planned, write_shard
from megatron_dtrpo.conversion.torch_dist_reader import TorchDistReader
from megatron_dtrpo.conversion.torch_dist_writer import TorchDistWriter
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.files import write_atomically

WEIGHTS = "adapter_model.safetensors"
_CONTENT = {"non_homogeneous_layers": True}  # one key per layer, as training writes it

# Keys of adapter_config.json that change what an adapter computes, with the values that do not.
_PLAIN: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
    # The others change the weights that the adapter stands beside.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


def export_peft(adapter: StoredAdapter, model: ModelSettings, hf_path: Path, overwrite: bool, base: str) -> None:
    """Writes the folder ``hf_path``, which ``peft`` loads. ``base``: the model that it is to be put beside."""
    record, parts = adapter.record, adapter.parts
    with output_folder(hf_path, overwrite, adapter.folder) as partial:
        planned = [
            Planned(name, adapter.reader.dtype(own[0].tensor.key, own[0].tensor.layer), mapping.huggingface_shape(own))
            for name, own in sorted(parts.items())
        ]
        write_shard(partial / WEIGHTS, planned, (adapter.whole(each.name, each.dtype) for each in planned))
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": record.lora_rank,
            "lora_alpha": int(record.lora_alpha) if record.lora_alpha.is_integer() else record.lora_alpha,
            "lora_dropout": record.lora_dropout,
            "use_rslora": record.use_rslora,
            "use_dora": False,
            "bias": "none",
            "target_modules": _modules(adapter, model),
            "fan_in_fan_out": False,
            "inference_mode": True,
            "modules_to_save": None,
        }
        (partial / ADAPTER).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _modules(adapter: StoredAdapter, model: ModelSettings) -> list[str]:
    """Names of Hugging Face's modules: short ones where every layer has an adapter, and no other module their names, as
    LLaDA's head has."""
    names = [source.removesuffix(".weight") for weight in adapter.weights for source in sources(weight)]
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    every = mapping.huggingface_tensors(mapping.megatron_tensors(model, model.vocab_size))
    meant = [name for name in every if name.removesuffix(".weight").rpartition(".")[2] in short]
    is_whole = common_targets(adapter.weights, model)[0] in DEFAULT_TARGETS
    return short if is_whole and len(meant) == len(names) else names


def import_peft(hf_path: Path, megatron_path: Path, base: Path, overwrite: bool = False) -> list[str]:
    """Makes an adapter of the weights in ``base`` of a folder that ``peft`` saved. Returns what its user should know, a
    line each. Raises UserError, and leaves nothing."""
    if is_adapter_folder(base):
        raise UserError(f"--base {base}: holds an adapter: give the weights that it belongs to")
    model, where = checkpoint_folder.load_model_config(base), hf_path / ADAPTER
    if not where.is_file():
        raise UserError(
            f"{hf_path}: not a folder that PEFT saved: {ADAPTER} is missing; for a model's own folder leave --base out"
        )
    config = read_json(where)
    for key, plain in _PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise UserError(
                f"{where}: {key} is {config[key]!r}, which adapters here do not have: merge it in PEFT first"
            )
    rank = config.get("r")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{where}: r is {rank!r}: it must be a positive number")
    with SafetensorsFolder(hf_path, WEIGHTS) as weights:
        beside, notes = _weights_beside(weights, model, rank)
        tensors = [each for weight in beside for each in adapter_tensors(weight, rank)]
        with TorchDistReader(complete_iteration(base, None)) as reader:
            fingerprint = stored_fingerprint(reader, model)
        record = AdapterRecord(
            lora_rank=rank,
            lora_alpha=float(config.get("lora_alpha", 8)),
            lora_dropout=float(config.get("lora_dropout") or 0.0),
            lora_target_modules=common_targets(beside, model),
            use_rslora=bool(config.get("use_rslora")),
            base=str(base.resolve()),
            base_fingerprint=fingerprint,
        )
        with output_folder(megatron_path, overwrite, hf_path) as partial:
            checkpoint_folder.save_model_config(partial, model)
            shutil.copytree(base / checkpoint_folder.TOKENIZER, partial / checkpoint_folder.TOKENIZER)
            with TorchDistWriter(iterations.iteration_folder(partial, 0), _CONTENT) as writer:
                for tensor in tensors:
                    _write(writer, tensor, weights)
            record.write(partial)
            write_atomically(partial / iterations.TRACKER, "0")
    return notes


def _weights_beside(weights: SafetensorsFolder, model: ModelSettings, rank: int) -> tuple[list[Any], list[str]]:
    """The weights that have an adapter in the folder, and a line where a fused one has it in part. Raises UserError for
    tensors that are unknown, alone or of another shape."""
    expected: dict[str, tuple[int, ...]] = {}
    beside, partly = [], set()
    for weight in target_weights(model, DEFAULT_TARGETS):
        own = mapping.huggingface_tensors(adapter_tensors(weight, rank))
        expected |= {name: mapping.huggingface_shape(parts) for name, parts in own.items()}
        there = [name for name in sources(weight) if peft_name(name, "A") in weights.tensors]
        if there:
            beside.append(weight)
            partly |= {name.split(".")[-2] for name in sources(weight) if name not in there}
    for name, stored in weights.tensors.items():
        if name not in expected:
            raise UserError(
                f"{stored.file}: unexpected tensor {name}: adapters stand beside the layers' projections only"
            )
        if stored.shape != expected[name]:
            raise UserError(
                f"{stored.file}: {name} has shape {list(stored.shape)}, the model says {list(expected[name])}"
            )
        other = name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A")
        if other not in weights.tensors:
            raise UserError(f"{stored.file}: {name} is there, and {other} is missing")
    if not beside:
        raise UserError(f"{weights.folder / WEIGHTS}: holds no tensor {PEFT_PREFIX}...")
    zero = f"{', '.join(sorted(partly))} have no adapter there: theirs are zero, and training leaves them so"
    return beside, [zero] if partly else []


def _write(writer: TorchDistWriter, tensor, weights: SafetensorsFolder) -> None:
    known = [weights.tensors[s.source].dtype for s in tensor.segments if s.source in weights.tensors]
    out = torch.zeros(tensor.shape, dtype=known[0])
    for row, segment in mapping.segments_between(tensor, 0, tensor.shape[0]):
        if segment.source in weights.tensors:
            weights.read_rows(segment.source, segment.start, out[row : row + segment.rows])
    writer.begin(tensor.key, out.dtype, tensor.shape)
    writer.write(tensor.key, 0, out)
