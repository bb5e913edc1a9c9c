"""Describes a checkpoint of either kind from its small files: no weights are read."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint import iterations
from megatron_dtrpo.checkpoint.adapter import is_adapter_folder
from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.conversion import mapping
from megatron_dtrpo.conversion.adapters import StoredAdapter
from megatron_dtrpo.conversion.dtypes import dtype_name
from megatron_dtrpo.conversion.hf_config import ADAPTER, CONFIG, architecture, model_settings, read_config, read_json
from megatron_dtrpo.conversion.safetensors_reader import SafetensorsFolder
from megatron_dtrpo.conversion.template import find_template
from megatron_dtrpo.conversion.torch_dist_reader import TorchDistReader
from megatron_dtrpo.data.tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.registry import family_of, family_of_config


def inspect(folder: str | Path) -> dict[str, str]:
    """Lines that describe ``folder``, in order. Raises UserError if it is no checkpoint that we know."""
    folder = Path(folder)
    if (folder / checkpoint_folder.MODEL_CONFIG).is_file() or (folder / iterations.TRACKER).is_file():
        return _megatron(folder)
    if (folder / CONFIG).is_file():
        return _huggingface(folder)
    if (folder / ADAPTER).is_file():
        return _peft(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    raise UserError(
        f"{folder}: neither a Hugging Face nor a Megatron checkpoint: no {CONFIG}, no {checkpoint_folder.MODEL_CONFIG}"
    )


def _megatron(folder: Path) -> dict[str, str]:
    model = checkpoint_folder.load_model_config(folder)
    iteration = iterations.require_latest(folder)
    if is_adapter_folder(folder):
        return _adapter(folder, model, iteration)
    expected = mapping.huggingface_tensors(mapping.megatron_tensors(model, model.vocab_size))
    keys = {part.tensor.key: part.tensor for parts in expected.values() for part in parts}
    with TorchDistReader(iterations.iteration_folder(folder, iteration)) as reader:
        dtypes = [reader.dtype(t.key, t.layer) for t in keys.values() if reader.find(t.key, t.layer) is not None]
    template = find_template(folder)
    name = "trained here" if template is None else architecture(read_config(template), template)
    return {
        "kind": "Megatron torch_dist",
        "architecture": name,
        **_model_lines(model, mapping.count_parameters(expected), dtypes),
        "mask token": _mask_token(lambda: load_tokenizer(folder / checkpoint_folder.TOKENIZER)),
        "iteration": str(iteration),
    }


def _adapter(folder: Path, model: ModelSettings, iteration: int) -> dict[str, str]:
    with StoredAdapter(folder, model) as adapter:
        record, parts = adapter.record, adapter.parts
        dtypes = {adapter.reader.dtype(own[0].tensor.key, own[0].tensor.layer) for own in parts.values()}
    return {
        "kind": "Megatron torch_dist, an adapter (LoRA)",
        "parameters": f"{mapping.count_parameters(parts):,}",
        "adapter": f"rank {record.lora_rank}, scale {record.scale:g}, of {' '.join(record.lora_target_modules)}",
        "weights": f"{record.base} (fingerprint {record.base_fingerprint[:12]})",
        "dtype": ", ".join(sorted(map(dtype_name, dtypes))),
        "iteration": str(iteration),
    }


def _peft(folder: Path) -> dict[str, str]:
    config = read_json(folder / ADAPTER)
    targets = config.get("target_modules") or []
    return {
        "kind": f"PEFT adapter, {config.get('peft_type')} (import it with --base)",
        "adapter": f"rank {config.get('r')}, alpha {config.get('lora_alpha')}, of "
        f"{targets if isinstance(targets, str) else ' '.join(sorted(targets))}",
        "weights": str(config.get("base_model_name_or_path")),
    }


def _huggingface(folder: Path) -> dict[str, str]:
    config = read_config(folder)
    model = model_settings(config, folder / CONFIG, reads_blocks=False)
    with SafetensorsFolder(folder) as weights:
        parameters = sum(math.prod(stored.shape) for stored in weights.tensors.values())
        dtypes = [stored.dtype for stored in weights.tensors.values()]
    lines = {
        "kind": "Hugging Face safetensors",
        "architecture": architecture(config, folder / CONFIG),
        **_model_lines(model, parameters, dtypes),
        "mask token": _mask_token(lambda: build_tokenizer("HuggingFaceTokenizer", folder, needs_mask=False)),
        "iteration": "none",
    }
    family = family_of_config(config, folder / CONFIG)
    if lines["mask token"] == "none":
        lines["mask token"] += (
            " (import it with --add-mask-token" + ", or with --block-size 1" * family.starting_point + ")"
        )
    if family.block_size_key is not None and family.block_size_key not in config:
        is_told = family.block_size is None and not family.starting_point
        lines["block size"] = (
            "none (import must be given --block-size)"
            if is_told
            else f"none ({model.block_size} unless import is given --block-size)"
        )
    return lines


def _model_lines(model: ModelSettings, parameters: int, dtypes: list[torch.dtype]) -> dict[str, str]:
    embeddings = "untied" if model.untie_embeddings_and_output_weights else "tied"
    heads = f"{model.num_attention_heads} query and {model.num_query_groups} key/value heads"
    family = family_of(model)
    return {
        "family": f"{family.name}, prediction shift {family.prediction_shift}, attention {family.attention}",
        "parameters": f"{parameters:,}",
        "layers": f"{model.num_layers} of width {model.hidden_size}, {heads} of width {model.kv_channels}",
        "vocabulary": f"{model.vocab_size}, padded to {model.padded_vocab_size}, {embeddings}",
        "dtype": ", ".join(sorted({dtype_name(dtype) for dtype in dtypes})) or "unknown",
        "block size": str(model.block_size or "the whole sequence"),
    }


def _mask_token(load) -> str:
    try:
        tokenizer: Tokenizer = load()
    except UserError as error:
        return f"none ({error})"
    return "none" if tokenizer.mask_token is None else f"{tokenizer.mask_token} ({tokenizer.mask_id})"
