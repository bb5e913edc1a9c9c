"""Random initial weights that do not depend on the layout.

megatron-core draws from per-rank streams, so each TP or PP size starts from another model. Here a parameter's values
are a function of the seed and its name in the whole model, and a rank takes its shard of them.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

# Layers that write to the residual stream start smaller, by 1 / sqrt(2 * layers) (GPT-2, Megatron).
_RESIDUAL_WRITERS = ("linear_proj.weight", "linear_fc2.weight")


def global_parameter_names(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by the name they have in an unpipelined model: layers are numbered through all stages."""
    names = {}
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, local, rest = name.split(".", 3)
            name = f"decoder.layers.{model.decoder.layers[int(local)].layer_number - 1}.{rest}"
        names[name] = parameter
    return names


@torch.no_grad()
def initialize_weights(model: torch.nn.Module, seed: int) -> None:
    """Normal matrices, zero biases, unit norms, in place. ``model`` is one stage of a `BlockDiffusionGPTModel`."""
    config, tp = model.config, model.pg_collection.tp
    for name, parameter in global_parameter_names(model).items():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"  # the last stage's copy of a tied matrix
        std = config.init_method_std
        if name.endswith(_RESIDUAL_WRITERS):
            std /= math.sqrt(2 * config.num_layers)
        parameter.copy_(_shard(_draw(name, _full_shape(parameter, tp.size()), seed) * std, parameter, tp))


def _draw(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator)


def _full_shape(parameter: Tensor, tp_size: int) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= tp_size
    return tuple(shape)


def _shard(full: Tensor, parameter: Tensor, tp) -> Tensor:
    """This rank's part. A stride of 2 marks two stacked matrices (gate and up), each of which is sharded."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return full
    dim, stride = parameter.partition_dim, parameter.partition_stride
    stacked = full.unflatten(dim, (stride, tp.size(), -1))
    return stacked.select(dim + 1, tp.rank()).flatten(dim, dim + 1)
