"""Export: a Megatron checkpoint, from any layout, to a folder that transformers loads."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint.adapter import base_and_adapter
from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.conversion import mapping
from megatron_dtrpo.conversion.adapters import StoredAdapter, complete_iteration, stored_fingerprint
from megatron_dtrpo.conversion.hf_config import CONFIG, architecture, model_settings, read_config, read_json
from megatron_dtrpo.conversion.mapping import Part, embedding_name, head_name, holds_vocabulary
from megatron_dtrpo.conversion.output import output_folder, require_space
from megatron_dtrpo.conversion.peft import export_peft
from megatron_dtrpo.conversion.prefetch import prefetch
from megatron_dtrpo.conversion.safetensors_writer import (
    Planned,
    shard_names,
    split_into_shards,
    write_index,
    write_shard,
)
from megatron_dtrpo.conversion.template import (
    GENERATION_CONFIG,
    Source,
    find_template,
    read_source,
    with_dtype,
    write_config,
)
from megatron_dtrpo.conversion.tokenizer_export import export_tokenizer
from megatron_dtrpo.conversion.torch_dist_reader import TorchDistReader
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.registry import family_of, family_of_config, same_predictions

CHUNK_BYTES = 8 << 20  # what is in memory at a time, beside the stored part that it comes from
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class ExportOptions:
    iteration: int | None = None  # None: the latest
    max_shard_bytes: int = 5 * 10**9
    dtype: torch.dtype | None = None  # None: the imported folder's, else the checkpoint's
    hf_reference: Path | None = None
    check_finite: bool = False
    overwrite: bool = False
    progress: bool = True
    tokenizer: bool = True  # False leaves it out
    adapter: Path | None = None  # an adapter of the checkpoint's weights
    peft: bool = False  # the adapter alone; else it is merged into the weights


def parse_size(text: str) -> int:
    """``5GB`` in bytes. Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)", text.strip().upper())
    unit = match and (match[2] if match[2] in _UNITS else match[2] + "B")
    if not match or unit not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"--max-shard-size {text}: expected a size such as 5GB or 500MB")
    return max(1, int(float(match[1]) * _UNITS[unit]))


def export_checkpoint(megatron_path: str | Path, hf_path: str | Path, options: ExportOptions) -> list[str]:
    """Writes ``hf_path``. ``megatron_path`` may be an adapter's folder. Returns what its user should know, a line each.
    Raises UserError, and leaves nothing."""
    given, hf_path = Path(megatron_path), Path(hf_path)
    megatron_path, adapter_path = base_and_adapter(given, options.adapter)
    if adapter_path is not None:
        return _export_with_adapter(megatron_path, adapter_path, hf_path, options, given == adapter_path)
    if options.peft:
        raise UserError(f"--peft: {megatron_path} holds no adapter: give one with --load-adapter DIR")
    return _export(megatron_path, hf_path, options, options.iteration)


def _export_with_adapter(
    base: Path, folder: Path, hf_path: Path, options: ExportOptions, is_of_adapter: bool
) -> list[str]:
    """``is_of_adapter``: whether ``options.iteration`` is the adapter's."""
    of_adapter, of_base = (options.iteration, None) if is_of_adapter else (None, options.iteration)
    model = checkpoint_folder.load_model_config(base)
    with StoredAdapter(folder, model, of_adapter) as adapter:
        if adapter.record.fp8_format is not None and not options.peft:
            raise UserError(
                f"{folder}: trained under FP8 (fp8_format {adapter.record.fp8_format}): merged weights would round "
                "otherwise than those that it was trained beside: export it alone, with --peft"
            )
        with TorchDistReader(complete_iteration(base, of_base)) as reader:
            adapter.record.require_base(folder, stored_fingerprint(reader, model), base)
        if options.peft:
            export_peft(adapter, model, hf_path, options.overwrite, str(options.hf_reference or base))
            return []
        return _export(base, hf_path, options, of_base, adapter)


def _export(
    megatron_path: Path,
    hf_path: Path,
    options: ExportOptions,
    iteration: int | None,
    adapter: StoredAdapter | None = None,
) -> list[str]:
    """Writes the weights of a checkpoint, plus what ``adapter`` adds to them."""
    if options.hf_reference is not None and not options.hf_reference.is_dir():
        raise UserError(f"--hf-reference {options.hf_reference}: no such folder")
    template, config, model = _description(megatron_path, options)
    folder = complete_iteration(megatron_path, iteration)
    parts = mapping.huggingface_tensors(mapping.megatron_tensors(model, model.vocab_size))
    with TorchDistReader(folder) as reader:
        _check_keys_and_shapes(reader, parts)
        source = _source(template, reader, parts)
        if source.head_stored_though_tied:
            parts[head_name(model)] = parts[embedding_name(model)]
        planned = [
            Planned(name, options.dtype or source.dtype_of(name), mapping.huggingface_shape(own))
            for name, own in parts.items()
        ]
        shards = split_into_shards(planned, options.max_shard_bytes)
        with output_folder(hf_path, options.overwrite, megatron_path) as partial:
            # First, because they may be refused, and weights take long.
            notes = _write_small_files(partial, megatron_path, template, config, source.dtype, options)
            total = sum(tensor.nbytes for tensor in planned)
            require_space(partial, total)
            bar = tqdm(
                total=total, desc="export", unit="B", unit_scale=True, disable=None if options.progress else True
            )
            with bar:
                for name, shard in zip(shard_names(len(shards)), shards, strict=True):
                    rows = _rows(reader, shard, parts, options.check_finite, bar, adapter)
                    write_shard(partial / name, shard, prefetch(rows))
            if len(shards) > 1:
                write_index(partial, shards)
    return notes


def _check_reference(reference: Path | None, ours: str) -> None:
    """Modelling files of one architecture do not belong beside the weights of another."""
    if reference is not None and (reference / CONFIG).is_file():
        theirs = architecture(read_config(reference), reference / CONFIG)
        if theirs != ours:
            raise UserError(f"--hf-reference {reference}: is a {theirs}, the checkpoint a {ours}")


# Settings that a template's config.json has to share.
_SHAPE = (
    "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels vocab_size "
    "untie_embeddings_and_output_weights rotary_base norm_epsilon block_size"
).split()


def _description(megatron_path: Path, options: ExportOptions) -> tuple[Path | None, dict, ModelSettings]:
    """The template folder, the configuration to export and the model's settings, checked against each other."""
    template = find_template(megatron_path)
    if template is None and options.hf_reference is not None and (options.hf_reference / CONFIG).is_file():
        template = options.hf_reference
    has_settings = (megatron_path / checkpoint_folder.MODEL_CONFIG).exists()
    if not has_settings and template is not None and megatron_path.is_dir():
        config = read_config(template)  # as Megatron-LM saves: the reference says what the architecture is
        return template, config, model_settings(config, template / CONFIG)
    model = checkpoint_folder.load_model_config(megatron_path)
    if mismatch := family_of(model).mismatch(model):
        raise UserError(f"{megatron_path}: {mismatch}, so it cannot be exported")
    if template is None:
        return None, family_of(model).new_config(model), model
    config = read_config(template)
    family = family_of_config(config, template / CONFIG)
    _check_reference(options.hf_reference, family.architecture)
    block_size = None if family.is_full or family.block_size_key in config else model.block_size
    theirs = model_settings(config, template / CONFIG, block_size, model.make_vocab_size_divisible_by)
    if family_of(model).parameters != family.parameters or not same_predictions(family_of(model), family):
        raise UserError(
            f"{template / CONFIG}: of another model: family is {family.name} there, {model.family} in {megatron_path}"
        )
    for name in _SHAPE:
        mine, other = getattr(model, name), getattr(theirs, name)
        if mine != other:
            raise UserError(
                f"{template / CONFIG}: of another model: {name} is {other} there, {mine} in {megatron_path}"
            )
    return template, config, model


def _check_keys_and_shapes(reader: TorchDistReader, parts: dict[str, list[Part]]) -> None:
    for tensor in {part.tensor.key: part.tensor for own in parts.values() for part in own}.values():
        shape = reader.shape(tensor.key, tensor.layer)
        if shape is None:
            raise UserError(f"{reader.folder}: {tensor.key} is missing")
        # Megatron-LM pads the vocabulary more when it trains with more tensor parallelism.
        longer = holds_vocabulary(tensor) and shape[:1] > tensor.shape[:1]
        if shape != tensor.shape and not (longer and shape[1:] == tensor.shape[1:]):
            raise UserError(
                f"{reader.folder}: {tensor.key} has shape {list(shape)}, the architecture says {list(tensor.shape)}"
            )


def _source(template: Path | None, reader: TorchDistReader, parts: dict[str, list[Part]]) -> Source:
    """How the imported folder stored its weights; for a model that was never imported, how the checkpoint does."""
    if template is not None and (template / "source.json").is_file():
        return read_source(template)
    dtypes = {name: reader.dtype(own[0].tensor.key, own[0].tensor.layer) for name, own in parts.items()}
    return Source.of(dtypes, False)


def _rows(
    reader: TorchDistReader,
    shard: list[Planned],
    parts: dict[str, list[Part]],
    check_finite: bool,
    bar: tqdm,
    adapter: StoredAdapter | None,
) -> Iterator[Tensor]:
    for planned in shard:
        step = max(1, CHUNK_BYTES // (math.prod(planned.shape[1:]) * planned.dtype.itemsize))
        merges, row = adapter is not None and adapter.changes(planned.name), 0
        for part in parts[planned.name]:
            for start in range(0, part.rows, step):
                count = min(step, part.rows - start)
                tensor = part.tensor
                dtype = torch.float32 if merges else planned.dtype
                out = reader.rows(tensor.key, tensor.layer, part.start + start, count, dtype)
                if merges:
                    out = adapter.added(planned.name, row, out).to(planned.dtype)
                row += count
                if check_finite and not out.isfinite().all():
                    raise UserError(f"{reader.folder}: {planned.name} has values that are not finite")
                yield out
                bar.update(out.nbytes)


def _write_small_files(
    partial: Path,
    megatron_path: Path,
    template: Path | None,
    config: dict,
    stored: torch.dtype,
    options: ExportOptions,
) -> list[str]:
    notes = []
    if options.dtype is not None or template is None:
        write_config(partial, with_dtype(config, options.dtype or stored))
    else:
        shutil.copyfile(template / CONFIG, partial / CONFIG)
    if template is not None and (template / GENERATION_CONFIG).is_file():
        read_json(template / GENERATION_CONFIG)
        shutil.copyfile(template / GENERATION_CONFIG, partial / GENERATION_CONFIG)
    if options.tokenizer:
        notes += export_tokenizer(megatron_path / checkpoint_folder.TOKENIZER, partial)
    if options.hf_reference is not None:
        for file in sorted(options.hf_reference.glob("*.py")):
            shutil.copyfile(file, partial / file.name)
    absent = [name for name in _own_code(config) if not (partial / name).is_file()]
    if absent:
        notes.append(f"{CONFIG} asks for {', '.join(absent)}: copy them in, or export with --hf-reference DIR")
    return notes


def _own_code(config: dict) -> list[str]:
    """Modelling files that a configuration names in this folder (not in a repository on the hub)."""
    classes = (config.get("auto_map") or {}).values()
    return sorted({f"{name.split('.')[0]}.py" for name in classes if isinstance(name, str) and "--" not in name})
