"""Low-rank adapters (LoRA): what a linear layer of the frozen model computes, plus ``scale B A`` of its input.

An adapter stands beside its linear layer, which keeps its name, its parameters and its place in a checkpoint, and a
hook adds the one's output to the other's. megatron-core fuses what Hugging Face and PEFT keep apart, query, key and
value, and gate and up. An adapter of such a layer has a matrix A for each *part*, one above the other, and the rows of
B in the order of the layer's own rows, each of which reads its part's A: it is PEFT's adapters of the parts, exactly,
and is split among tensor-parallel processes as the layer is.

    column-parallel (linear_qkv, linear_fc1)   A [parts r, in] whole, B [out / TP, r]
    row-parallel (linear_proj, linear_fc2)     A [r, in / TP],        B [out, r] whole

Between A and B there are r numbers a token, and they are all that travels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    layers,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn.functional import linear

from megatron_dtrpo.config.lora import LINEAR, ROW_PARALLEL, LoraSettings, is_target
from megatron_dtrpo.diffusion.dropout import kept
from megatron_dtrpo.model.initialization import draw_uniform, global_parameter_names, shard_of
from megatron_dtrpo.seeds import stable_seed

_SUFFIX = "_adapter"


def is_adapter(name: str) -> bool:
    """Whether a parameter, or a key of a checkpoint, of this name is an adapter's."""
    return f"{_SUFFIX}." in name


class _Kind(NamedTuple):
    """What a linear layer is made of. ``parts``: this rank's rows of each part before the first part comes again.
    ``stride``: matrices that stand one above the other, each of which is split."""

    parts: Callable[[TransformerConfig], list[int]]
    stride: int = 1


def _query_key_value(config: TransformerConfig) -> list[int]:
    width, each = config.kv_channels, config.num_attention_heads // config.num_query_groups
    return [each * width, width, width]


def _gate_up(config: TransformerConfig) -> list[int]:
    return [config.ffn_hidden_size // config.tensor_model_parallel_size] * 2


def _one(config: TransformerConfig) -> list[int]:
    return [1]


_KINDS = {
    "linear_qkv": _Kind(_query_key_value),
    "linear_proj": _Kind(_one),
    "linear_fc1": _Kind(_gate_up, stride=2),
    "linear_fc2": _Kind(_one),
}


def _part_of_rows(parts: Sequence[int], rows: int) -> Tensor:
    """Bool ``[rows, parts]``: which part each of a layer's rows is; ``parts``: rows of each before the first comes
    again."""
    pattern = torch.tensor([part for part, count in enumerate(parts) for _ in range(count)])
    return pattern.repeat(rows // len(pattern)).unsqueeze(1) == torch.arange(len(parts))


def _product(input: Tensor, weight: Tensor, tp) -> Tensor:
    """``input [s, b, in]`` times the transpose of ``weight``, as megatron-core's linear layers multiply: on a CPU what
    can be made again is not kept for the backward pass. Collectives are the caller's."""
    return layers.linear_with_grad_accumulation_and_async_allreduce(
        input,
        weight,
        bias=None,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=False,
        tp_group=tp,
    )


class Adapter(MegatronModule):
    """The adapter of one linear layer.

    Attributes:
        enabled: off: the layer computes as if there were no adapter.
        drops: whether the input is dropped out.
        token: of `diffusion.dropout.token_numbers`, ``[s]`` of the micro-batch that is computed; None: nothing drops.
    """

    def __init__(self, config: TransformerConfig, lora: LoraSettings, name: str, weight: Tensor, tp):
        """``name``: of the linear layer in the whole model; ``weight``: its, on this rank; ``tp``: process group."""
        super().__init__(config=config)
        kind = name.rpartition(".")[2]
        self.kind, self.is_row = _KINDS[kind], kind in ROW_PARALLEL
        self.tp, self.scale, self.dropout = tp, lora.scale, lora.lora_dropout
        self.seed = stable_seed(name.encode())
        self.enabled, self.drops, self.token = True, False, None
        (rows, columns), parts = weight.shape, self.kind.parts(config)
        empty = partial(torch.empty, dtype=config.params_dtype, device=weight.device)
        self.lora_A = torch.nn.Parameter(empty(len(parts) * lora.lora_rank, columns))
        self.lora_B = torch.nn.Parameter(empty(rows, lora.lora_rank))
        mask = _part_of_rows(parts, rows).to(self.lora_B) if len(parts) > 1 else None
        self.register_buffer("mask", mask, persistent=False)
        whole: Any
        split, whole = (self.lora_A, self.lora_B) if self.is_row else (self.lora_B, self.lora_A)
        set_tensor_model_parallel_attributes(split, True, int(self.is_row), self.kind.stride)
        # Each rank has the gradient of its part of the sequence: they are added up, as a norm's are.
        whole.sequence_parallel = config.sequence_parallel

    def forward(self, input: Tensor) -> Tensor:
        """What the adapter adds: from the layer's input ``[s, b, in]`` (of this rank, as the layer gets it) to the
        shape of its output."""
        inner = _product(self._dropped(input.to(self.lora_A.dtype)), self.lora_A, self.tp)
        return linear(self._joined(inner) * self.scale, self._spread_B())

    def _joined(self, inner: Tensor) -> Tensor:
        """``[s, b, parts r]`` of all tokens that the layer's output has on this rank, complete."""
        sequence_parallel, group = self.config.sequence_parallel, self.tp
        if self.is_row:
            if sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(inner, group=group)
            return reduce_from_tensor_model_parallel_region(inner, group=group)
        if sequence_parallel:
            return gather_from_sequence_parallel_region(inner, tensor_parallel_output_grad=True, group=group)
        return copy_to_tensor_model_parallel_region(inner, group=group)

    def _spread_B(self) -> Tensor:
        """``[out, parts r]``: each row of B under its part's A, zeros under the others."""
        if self.mask is None:
            return self.lora_B
        return (self.mask.unsqueeze(2) * self.lora_B.unsqueeze(1)).flatten(1)

    def _dropped(self, input: Tensor) -> Tensor:
        if not self.drops or self.dropout == 0 or self.token is None:
            return input
        rows, columns = len(input), input.shape[-1]
        token, first = self.token, self.tp.rank() * columns if self.is_row else 0
        if rows < len(token):  # this rank's part of the sequence
            token = token.narrow(0, self.tp.rank() * rows, rows)
        features = torch.arange(first, first + columns, device=input.device)
        mask = kept(token, self.seed, features, self.dropout).unsqueeze(1)
        return input * mask / (1 - self.dropout)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """As megatron-core's linear layers: B, or A, as it is split."""
        split = "lora_A" if self.is_row else "lora_B"
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {split: int(self.is_row)},
            sharded_offsets,
            tp_group=self.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )
        if self.kind.stride > 1:
            key = f"{prefix}{split}"
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state


def add_adapters(chunks: Sequence[Any], lora: LoraSettings) -> None:
    """Freezes this rank's stages and puts adapters beside their linear layers, with uninitialised weights: load those
    of a checkpoint or call `initialize_adapters`."""
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.has_adapters = True
        for layer in chunk.decoder.layers:
            _add_to_layer(chunk, layer, lora)


def _add_to_layer(chunk, layer, lora: LoraSettings) -> None:
    own = []
    for path in LINEAR:
        name = f"decoder.layers.{layer.layer_number - 1}.{path}"
        if is_target(name, lora.lora_target_modules):
            parent_name, _, child = path.rpartition(".")
            parent = getattr(layer, parent_name)
            own.append(_add_beside(parent, child, name, chunk, lora))
    if lora.lora_dropout > 0:
        layer.register_forward_pre_hook(partial(_tell_tokens, own), with_kwargs=True)


def _add_beside(parent, child: str, name: str, chunk, lora: LoraSettings) -> Adapter:
    layer = getattr(parent, child)
    adapter = Adapter(chunk.config, lora, name, layer.weight, chunk.pg_collection.tp)
    parent.add_module(child + _SUFFIX, adapter)
    if hasattr(layer, "return_layernorm_output"):
        layer.return_layernorm_output = True  # Transformer Engine's norm is inside the layer
    layer.register_forward_hook(partial(_add_output, adapter))
    return adapter


def _add_output(adapter: Adapter, layer, args: tuple, output: tuple) -> tuple:
    """A hook of the linear layer, whose ``output`` is its result and a bias that is left to the caller."""
    (result, bias), (input, *_) = output, args
    if isinstance(result, tuple):
        result, input = result
    return (result + adapter(input) if adapter.enabled else result), bias


def _tell_tokens(adapters: Sequence[Adapter], layer, args: tuple, kwargs: dict) -> None:
    """A hook of the transformer layer, which is called once more where it is recomputed."""
    for adapter in adapters:
        adapter.token = getattr(kwargs.get("packed_seq_params"), "token", None)


@torch.no_grad()
def initialize_adapters(chunks: Sequence[Any], seed: int) -> None:
    """As PEFT: A uniform with the bound 1 / sqrt(in), a function of the seed and the layer's name; B zero, so that the
    model computes what it did."""
    for chunk in chunks:
        tp = chunk.pg_collection.tp
        for name, parameter in global_parameter_names(chunk).items():
            if name.endswith(".lora_B"):
                parameter.zero_()
            elif name.endswith(".lora_A"):
                whole = draw_uniform(name, parameter, seed, tp.size())
                parameter.copy_(shard_of(whole, parameter, tp) / math.sqrt(whole.shape[1]))


def adapters_of(chunks: Sequence[torch.nn.Module]) -> list[Adapter]:
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, Adapter)]


def has_adapters(chunks: Sequence[torch.nn.Module]) -> bool:
    """Whether the model has adapters, also where none is on this rank's stages."""
    return any(getattr(chunk, "has_adapters", False) for chunk in chunks)


@contextmanager
def _set(chunks: Sequence[torch.nn.Module], attribute: str, value: bool) -> Iterator[None]:
    adapters = adapters_of(chunks)
    before = [getattr(adapter, attribute) for adapter in adapters]
    for adapter in adapters:
        setattr(adapter, attribute, value)
    try:
        yield
    finally:
        for adapter, each in zip(adapters, before, strict=True):
            setattr(adapter, attribute, each)


def without_adapters(chunks: Sequence[torch.nn.Module]):
    """Inside, the stages compute as if they had no adapters, bit for bit."""
    return _set(chunks, "enabled", False)


def with_dropout(chunks: Sequence[torch.nn.Module]):
    """Inside, the adapters drop out a part of their input; elsewhere nothing."""
    return _set(chunks, "drops", True)
