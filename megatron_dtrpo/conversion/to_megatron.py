"""Import: a Hugging Face folder to a checkpoint that training loads under any layout."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.checkpoint import iterations
from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.conversion import mapping
from megatron_dtrpo.conversion.hf_config import CONFIG, model_settings, read_config
from megatron_dtrpo.conversion.mapping import MegatronTensor, embedding_name, head_name
from megatron_dtrpo.conversion.output import output_folder, require_space
from megatron_dtrpo.conversion.prefetch import prefetch
from megatron_dtrpo.conversion.safetensors_reader import SafetensorsFolder
from megatron_dtrpo.conversion.template import FOLDER, Source, save_template
from megatron_dtrpo.conversion.tokenizer_files import import_tokenizer
from megatron_dtrpo.conversion.torch_dist_writer import TorchDistWriter
from megatron_dtrpo.data.tokenizer import NO_MASK, Tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.config_json import block_size_entry
from megatron_dtrpo.families.registry import family_of, is_autoregressive
from megatron_dtrpo.files import write_atomically

CHUNK_BYTES = 8 << 20  # what is in memory at a time: small enough that the allocator keeps it, so no page faults
_CONTENT = {"non_homogeneous_layers": True}  # one key per layer, as training writes it


@dataclass(frozen=True)
class ImportOptions:
    """``tokenizer`` False leaves the tokenizer out, and the block size may be unknown: where only weights matter."""

    params_dtype: torch.dtype | None = None  # None: as stored
    add_mask_token: bool = False
    mask_token: str | None = None
    eos_token: str | None = None
    block_size: int | None = None
    make_vocab_size_divisible_by: int = ModelSettings.make_vocab_size_divisible_by
    check_finite: bool = False
    overwrite: bool = False
    progress: bool = True
    tokenizer: bool = True


def import_checkpoint(hf_path: str | Path, megatron_path: str | Path, options: ImportOptions) -> ModelSettings:
    """Writes ``megatron_path``. Raises UserError, and then leaves nothing behind."""
    hf_path, megatron_path = Path(hf_path), Path(megatron_path)
    if options.add_mask_token and options.mask_token is not None:
        raise UserError("--mask-token names a token that is there, --add-mask-token adds one: give one of the two")
    config = read_config(hf_path)
    settings = model_settings(
        config,
        hf_path / CONFIG,
        options.block_size,
        options.make_vocab_size_divisible_by,
        reads_blocks=options.tokenizer,
    )
    with SafetensorsFolder(hf_path) as weights:
        head_is_double = _check_names_and_shapes(weights, settings)
        dtypes = {name: stored.dtype for name, stored in weights.tensors.items() if not ignored(name)}
        if len(dtypes) < len(weights.tensors):
            count = len(weights.tensors) - len(dtypes)
            print(
                f"note: {hf_path}: {count} tensors rotary_emb.inv_freq are left out: rope_theta says the same",
                file=sys.stderr,
            )
        with output_folder(megatron_path, options.overwrite, hf_path) as partial:
            if head_is_double:
                _require_equal(weights, head_name(settings), embedding_name(settings))
            model, mask_row = settings, None
            if options.tokenizer:
                tokenizer = import_tokenizer(
                    hf_path,
                    partial / checkpoint_folder.TOKENIZER,
                    options.mask_token,
                    options.add_mask_token,
                    options.eos_token,
                    family_of(settings).mask_token,
                )
                if tokenizer.mask_id == NO_MASK:
                    _require_no_mask(settings, hf_path)
                elif options.mask_token is None:
                    _require_mask_of(config, tokenizer, hf_path / CONFIG)
                model = dataclasses.replace(settings, vocab_size=max(settings.vocab_size, tokenizer.vocab_size))
                if model.vocab_size != settings.vocab_size:
                    _require_only_mask_is_new(settings, tokenizer, hf_path, options.add_mask_token)
                    config, mask_row = {**config, "vocab_size": model.vocab_size}, tokenizer.mask_id
            if options.add_mask_token or options.block_size is not None:
                config = {**config, **block_size_entry(family_of(model), model)}
            plan = mapping.megatron_tensors(model, settings.vocab_size)
            rows = _Rows(weights, options, model, mask_row)
            require_space(partial, sum(rows.nbytes(tensor) for tensor in plan))
            _write_weights(iterations.iteration_folder(partial, 0), plan, rows, options.progress)
            checkpoint_folder.save_model_config(partial, model)
            save_template(partial / FOLDER, config, hf_path, Source.of(dtypes, head_is_double))
            write_atomically(partial / iterations.TRACKER, "0")
    return model


def ignored(name: str) -> bool:
    """Whether a tensor holds what is computed from the configuration: the rotary frequencies in older checkpoints."""
    return name.endswith(".rotary_emb.inv_freq")


def _check_names_and_shapes(weights: SafetensorsFolder, settings: ModelSettings) -> bool:
    """Raises UserError at the first tensor that is missing, unknown or of another shape. Returns whether the folder
    holds an output matrix although it is tied."""
    expected = mapping.huggingface_tensors(mapping.megatron_tensors(settings, settings.vocab_size))
    tied, head = not settings.untie_embeddings_and_output_weights, head_name(settings)
    for name in expected:
        if name == head and name not in weights.tensors:
            raise UserError(
                f"{weights.folder}: tensor {head} is missing, though {CONFIG} does not tie it to the embedding: if the "
                "model is tied, set tie_word_embeddings to true there"
            )
        if name not in weights.tensors:
            raise UserError(f"{weights.folder}: tensor {name} is missing")
    for name, stored in weights.tensors.items():
        if ignored(name):
            continue
        if name not in expected and not (tied and name == head):
            raise UserError(f"{weights.folder}: unexpected tensor {name}: the architecture has none of that name")
        shape = mapping.huggingface_shape(expected[embedding_name(settings) if tied and name == head else name])
        if stored.shape != shape:
            raise UserError(f"{stored.file}: {name} has shape {list(stored.shape)}, {CONFIG} says {list(shape)}")
    return tied and head in weights.tensors


def _require_equal(weights: SafetensorsFolder, name: str, other: str) -> None:
    shape, dtype = weights.tensors[name].shape, weights.tensors[name].dtype
    step = _rows_at_a_time(shape, dtype)
    for start in range(0, shape[0], step):
        a, b = (torch.empty((min(step, shape[0] - start), *shape[1:]), dtype=dtype) for _ in range(2))
        weights.read_rows(name, start, a)
        weights.read_rows(other, start, b)
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            raise UserError(f"{weights.folder}: {name} differs from {other}, though tie_word_embeddings is true")


def _require_only_mask_is_new(settings: ModelSettings, tokenizer: Tokenizer, folder: Path, added: bool) -> None:
    if not added or tokenizer.mask_id != settings.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {settings.vocab_size}: "
            "they do not belong together"
        )


def _require_no_mask(settings: ModelSettings, folder: Path) -> None:
    """Only an autoregressive model does without a mask token."""
    family = family_of(settings)
    if not is_autoregressive(settings):
        raise UserError(
            f"{folder}: its tokenizer has no mask token: --add-mask-token adds {family.mask_token}, --mask-token names "
            "one that it has" + "; --block-size 1 needs none" * family.starting_point
        )


def _require_mask_of(config: dict, tokenizer: Tokenizer, where: Path) -> None:
    """A model knows its mask token by its number, whatever the tokenizer's files call it."""
    trained = config.get("mask_token_id")
    if trained not in (None, tokenizer.mask_id):
        raise UserError(
            f"{where}: mask_token_id is {trained}, the tokenizer's mask token {tokenizer.mask_token} has the id "
            f"{tokenizer.mask_id}: name the right one with --mask-token"
        )


def _rows_at_a_time(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return max(1, CHUNK_BYTES // (math.prod(shape[1:]) * dtype.itemsize))


class _Rows:
    """Rows of the Megatron tensors, gathered from the Hugging Face ones."""

    def __init__(self, weights: SafetensorsFolder, options: ImportOptions, model: ModelSettings, mask_row: int | None):
        self.weights, self.options, self.model, self.mask_row = weights, options, model, mask_row

    def dtype(self, tensor: MegatronTensor) -> torch.dtype:
        if self.options.params_dtype is not None:
            return self.options.params_dtype
        stored = {self.weights.tensors[s.source].dtype for s in tensor.segments if s.source is not None}
        first, *others = stored
        for other in others:
            first = torch.promote_types(first, other)  # fused tensors of several dtypes: nothing is lost
        return first

    def nbytes(self, tensor: MegatronTensor) -> int:
        return math.prod(tensor.shape) * self.dtype(tensor).itemsize

    def gather(self, tensor: MegatronTensor, start: int, stop: int) -> Tensor:
        """Rows ``start:stop``, contiguous."""
        out = torch.empty((stop - start, *tensor.shape[1:]), dtype=self.dtype(tensor))
        for row, segment in mapping.segments_between(tensor, start, stop):
            target = out[row : row + segment.rows]
            if segment.source is None:
                target.zero_()
                continue
            self.weights.read_rows(segment.source, segment.start, target)
            if self.options.check_finite and not target.isfinite().all():
                raise UserError(f"{self.weights.folder}: {segment.source} has values that are not finite")
        if self.mask_row is not None and tensor.segments[-1].source is None and start <= self.mask_row < stop:
            out[self.mask_row - start] = self._mean_row(tensor.segments[0].source)
        return out

    def _mean_row(self, name: str) -> Tensor:
        """The mean embedding, where a new mask token begins: a zero row would be blown up by the first norm."""
        shape = self.weights.tensors[name].shape
        total = torch.zeros(shape[1:], dtype=torch.float64)
        step = _rows_at_a_time(shape, torch.float32)
        for start in range(0, shape[0], step):
            part = torch.empty((min(step, shape[0] - start), *shape[1:]), dtype=torch.float32)
            self.weights.read_rows(name, start, part)
            total += part.sum(0, dtype=torch.float64)
        return total / shape[0]


def _write_weights(folder: Path, plan: list[MegatronTensor], rows: _Rows, progress: bool) -> None:
    total = sum(rows.nbytes(tensor) for tensor in plan)
    bar = tqdm(total=total, desc="import", unit="B", unit_scale=True, disable=None if progress else True)
    with bar, TorchDistWriter(folder, _CONTENT) as writer:
        for tensor in plan:
            writer.begin(tensor.key, rows.dtype(tensor), tensor.shape)
        for tensor, start, part in prefetch(_parts(plan, rows)):
            writer.write(tensor.key, start, part)
            bar.update(part.nbytes)
        for module in mapping.stateful_keys(rows.model):
            writer.write_empty_object(module)


def _parts(plan: list[MegatronTensor], rows: _Rows) -> Iterator[tuple[MegatronTensor, int, Tensor]]:
    for tensor in plan:
        step = _rows_at_a_time(tensor.shape, rows.dtype(tensor))
        for start in range(0, tensor.shape[0], step):
            yield tensor, start, rows.gather(tensor, start, min(start + step, tensor.shape[0]))
