"""Random initial weights that do not depend on the layout.

megatron-core draws from per-rank streams, so each TP or PP size starts from another model. Here a parameter's values
are a function of the seed and its name in the whole model, and a rank takes its shard of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_dtrpo.runtime.fp8 import keep_exact_value
from megatron_dtrpo.seeds import stable_seed

# Layers that write to the residual stream start smaller, by 1 / sqrt(2 * transformer layers) (GPT-2, Megatron).
_RESIDUAL_WRITERS = ("linear_proj.weight", "linear_fc2.weight")

# Transformer Engine keeps a norm inside the layer that it feeds; megatron-core's own layers keep it beside that. A
# parameter has the latter name whoever computes it, so that neither fingerprints of weights nor patterns of trainable
# modules depend on that.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def global_parameter_names(model: Any) -> dict[str, Any]:
    """Parameters by the name they have in an unpipelined GPT model: layers are numbered through all stages."""
    names = {}
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, local, rest = name.split(".", 3)
            number = model.decoder.layers[int(local)].layer_number - 1
            name = common_name(f"decoder.layers.{number}.{rest}")
        names[model.gpt_name(name)] = parameter
    return names


def common_name(name: str) -> str:
    """The name, whoever computes it, of a parameter that is called ``name`` in a checkpoint."""
    for fused, own in _FUSED_NORMS.items():
        if name.endswith(f".{fused}"):
            return name.removesuffix(fused) + own
    return name


def shared_name(model: Any, name: str) -> str:
    """``name``, or the embedding's where the parameter is the last stage's copy of a tied embedding."""
    tied_copy = name == "output_layer.weight" and model.share_embeddings_and_output_weights
    return "embedding.word_embeddings.weight" if tied_copy else name


@torch.no_grad()
def initialize_weights(model: Any, seed: int) -> None:
    """Normal matrices, zero biases, unit norms, in place. ``model`` is one stage of a `BlockDiffusionModel`."""
    config, tp = model.config, model.pg_collection.tp
    writes = model.writes_per_layer * config.num_layers
    for name, parameter in global_parameter_names(model).items():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        name = shared_name(model, name)
        std = config.init_method_std
        if name.endswith(_RESIDUAL_WRITERS):
            std /= math.sqrt(writes)
        value = shard_of(_draw(name, _full_shape(parameter, tp.size()), seed) * std, parameter, tp)
        parameter.copy_(value)
        keep_exact_value(parameter, value)


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(stable_seed(f"{seed}/{name}".encode()))


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=_generator(name, seed))


def draw_uniform(name: str, parameter: Any, seed: int, tp_size: int) -> Tensor:
    """Values in [-1, 1) for the whole parameter ``name``, of which ``parameter`` is this rank's part."""
    return 2 * torch.rand(_full_shape(parameter, tp_size), generator=_generator(name, seed)) - 1


def _full_shape(parameter: Any, tp_size: int) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tp_size
    return tuple(shape)


def shard_of(full: Tensor, parameter: Any, tp) -> Tensor:
    """This rank's part. A stride of 2 marks two stacked matrices (gate and up), each of which is sharded."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim, stride = parameter.partition_dim, parameter.partition_stride
    stacked = full.unflatten(dim, (stride, tp.size(), -1))
    return stacked.select(dim + 1, tp.rank()).flatten(dim, dim + 1)
