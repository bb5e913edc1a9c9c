"""Number formats of weights, activations and gradients, and who computes them: Transformer Engine or megatron-core.

The one place that asks whether Transformer Engine is there, and it never imports it: on a machine without a GPU the
import itself fails.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

from megatron_dtrpo.config.fp8 import RECIPES
from megatron_dtrpo.config.settings import ParallelSettings
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import versions


def params_dtype(parallel: ParallelSettings) -> torch.dtype:
    return torch.bfloat16 if parallel.bf16 else torch.float32


def transformer_engine_is_usable() -> bool:
    return torch.cuda.is_available() and find_spec("transformer_engine") is not None


def fused_adam_is_there() -> bool:
    """Whether megatron-core finds an Adam on CUDA whose state its distributed optimizer can save and load. Only
    NVIDIA's Apex brings ``amp_C``; PyPI's package of that name is something else."""
    return transformer_engine_is_usable() or (find_spec("apex") is not None and find_spec("amp_C") is not None)


def transformer_impl(parallel: ParallelSettings) -> str:
    """Resolves ``transformer_impl``."""
    return parallel.transformer_impl or default_transformer_impl()


def default_transformer_impl() -> str:
    return "transformer_engine" if transformer_engine_is_usable() else "local"


def transformer_precision(parallel: ParallelSettings) -> dict:
    """The precision arguments of megatron-core's ``TransformerConfig``."""
    dtype = params_dtype(parallel)
    common = {"bf16": parallel.bf16, "params_dtype": dtype, "pipeline_dtype": dtype, "attention_softmax_in_fp32": True}
    return common | {"transformer_impl": transformer_impl(parallel)} | _fp8(parallel)


def fuses_rotary(parallel: ParallelSettings) -> bool:
    """Resolves ``apply_rope_fusion``. Transformer Engine's kernel takes angles ``[s, 1, 1, d]`` of each row's own
    position, as ours are, in fp32."""
    return transformer_engine_is_usable() if parallel.apply_rope_fusion is None else parallel.apply_rope_fusion


def fused_gradients(parallel: ParallelSettings) -> str | None:
    """Resolves ``gradient_accumulation_fusion``: who adds weight gradients into the fp32 gradient, ``"apex"`` in every
    layer, ``"transformer_engine"`` in its own layers, or nobody."""
    if parallel.gradient_accumulation_fusion is False:
        return None
    if torch.cuda.is_available() and find_spec("fused_weight_gradient_mlp_cuda") is not None:
        return "apex"
    return "transformer_engine" if transformer_impl(parallel) == "transformer_engine" else None


def _fp8(parallel: ParallelSettings) -> dict:
    if parallel.fp8_format is None:
        return {}
    return {
        "fp8": parallel.fp8_format,
        "fp8_recipe": parallel.fp8_recipe,
        "fp8_margin": parallel.fp8_margin,
        "fp8_amax_history_len": parallel.fp8_amax_history_len,
        "fp8_amax_compute_algo": parallel.fp8_amax_compute_algo,
        "fp8_param": parallel.fp8_param_gather,
        "first_last_layers_bf16": parallel.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": parallel.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": parallel.num_layers_at_end_in_bf16,
        # Delayed scaling reduces its maxima once a micro-batch. Data-parallel processes may run different numbers of
        # micro-batches, so they must not wait for each other there; tensor- and context-parallel ones run the same.
        "tp_only_amax_red": True,
    }


def optimizer_precision(parallel: ParallelSettings) -> dict:
    """The precision arguments of megatron-core's ``OptimizerConfig``: fp32 main weights under bf16."""
    arguments = {"bf16": parallel.bf16, "params_dtype": params_dtype(parallel)}
    return arguments | ({"fp8_recipe": parallel.fp8_recipe} if parallel.fp8_format else {})


def data_parallel_precision(parallel: ParallelSettings) -> dict:
    """The precision arguments of ``DistributedDataParallelConfig``: gradients are reduced in fp32, whatever the weights
    are."""
    return {"grad_reduce_in_fp32": True, "fp8_param_gather": parallel.fp8_param_gather}


def check_machine(parallel: ParallelSettings) -> None:
    """Raises UserError if this machine cannot run what was asked for; before any weight is loaded."""
    versions.require_model_class(parallel.model_class)
    if parallel.transformer_impl == "transformer_engine" and not transformer_engine_is_usable():
        lacking = "a GPU" if not torch.cuda.is_available() else "the package transformer_engine"
        raise UserError(f"transformer_impl transformer_engine needs {lacking}: leave it out, or give local")
    if parallel.apply_rope_fusion and not transformer_engine_is_usable():
        raise UserError("apply_rope_fusion needs a GPU and Transformer Engine: leave it out here")
    if parallel.gradient_accumulation_fusion and fused_gradients(parallel) is None:
        raise UserError(
            "gradient_accumulation_fusion needs Transformer Engine's layers or Apex's CUDA extension: leave it out"
        )
    if parallel.fp8_format is None:
        return
    if not transformer_engine_is_usable():
        raise UserError("fp8_format needs Transformer Engine and a GPU that it runs on: leave it out here")
    _check_recipe(parallel.fp8_recipe, torch.cuda.get_device_capability(), torch.version.cuda)


def check_optimizer(parallel: ParallelSettings) -> None:
    """Raises UserError if this machine can train so but not resume; before any weight is loaded."""
    if parallel.use_distributed_optimizer and torch.cuda.is_available() and not fused_adam_is_there():
        raise UserError(
            "use_distributed_optimizer needs Transformer Engine or NVIDIA's Apex on a GPU: the state of torch's Adam "
            "does not load again; install one of the two, or leave it out"
        )


def _check_recipe(name: str, capability: tuple[int, int], cuda: str) -> None:
    """``capability``: of the GPU, (9, 0) say; ``cuda``: the version that torch was built for, "12.9" say."""
    recipe, here = RECIPES[name], f"sm{capability[0]}{capability[1]}"
    if capability < recipe.least or (recipe.below is not None and capability >= recipe.below):
        bounds = f"sm{recipe.least[0]}{recipe.least[1]} or newer"
        bounds += f", before sm{recipe.below[0]}{recipe.below[1]}" if recipe.below else ""
        other = [n for n, r in RECIPES.items() if r.least <= capability and (r.below is None or capability < r.below)]
        advice = f"choose {' or '.join(other)}" if other else "leave FP8 out"
        raise UserError(f"fp8_recipe {name} needs a GPU of {bounds}, this one is {here}: {advice}")
    if tuple(int(part) for part in cuda.split(".")[:2]) < recipe.cuda:
        raise UserError(f"fp8_recipe {name} needs CUDA {recipe.cuda[0]}.{recipe.cuda[1]}, torch was built for {cuda}")
