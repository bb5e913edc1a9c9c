"""What FP8 asks of a configuration: rules without a device, looked up by recipe.

Which machine and which Transformer Engine there is belongs to `runtime.precision`; what the choices do to a run is in
docs/fp8.md.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from megatron_dtrpo.config.blocks import grain
from megatron_dtrpo.errors import UserError


class Recipe(NamedTuple):
    """``multiple``: tokens of a rank and widths of a matrix product are multiples of it. ``least``, ``below``: compute
    capabilities that run it (``below`` excluded). ``cuda``: least CUDA version."""

    multiple: int
    least: tuple[int, int]
    below: tuple[int, int] | None = None
    cuda: tuple[int, int] = (12, 1)


# Transformer Engine 2.9 to 2.11. Its block scaling takes other token counts too, but not under sequence parallelism,
# where it gathers whole blocks of 128.
RECIPES = {
    "delayed": Recipe(16, (8, 9)),
    "tensorwise": Recipe(16, (8, 9)),
    "blockwise": Recipe(128, (9, 0), cuda=(12, 9)),
    "mxfp8": Recipe(32, (10, 0), below=(12, 0)),
}
# Settings of one recipe alone, with the value that says nothing.
_OF_DELAYED = {"fp8_margin": 0, "fp8_amax_history_len": 1, "fp8_amax_compute_algo": "most_recent"}


def token_multiple(parallel) -> int:
    """The number that packed tokens on one context-parallel rank must be a multiple of. Under sequence parallelism
    they are shared by all tensor-parallel ranks, under FP8 in whole multiples of what its matrix products ask for."""
    ranks = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return ranks if parallel.fp8_format is None else RECIPES[parallel.fp8_recipe].multiple * ranks


def check_fp8(model, parallel, seq_length: int) -> None:
    """Raises UserError for settings that FP8 cannot be had with; ``model`` and ``parallel`` have their defaults filled
    in and divide among the ranks."""
    if parallel.fp8_format is None:
        for name in ("fp8_param_gather", "first_last_layers_bf16"):
            _demand(not getattr(parallel, name), f"{name} goes with FP8: give --fp8-format or leave it out")
        return
    _demand(
        parallel.bf16, "fp8_format needs bf16: FP8 is a format of matrix products in a model that is bf16 elsewhere"
    )
    _demand(
        parallel.transformer_impl != "local",
        "fp8_format needs Transformer Engine: leave out --transformer-impl local, or --fp8-format",
    )
    _demand(
        parallel.use_distributed_optimizer or not parallel.fp8_param_gather,
        "fp8_param_gather needs use_distributed_optimizer, whose gather it shortens",
    )
    _demand(
        not (parallel.fp8_param_gather and parallel.fp8_recipe == "mxfp8"),
        "fp8_param_gather cannot be had with fp8_recipe mxfp8 here: leave out one of the two",
    )
    if parallel.fp8_recipe != "delayed":
        for name, neutral in _OF_DELAYED.items():
            _demand(
                getattr(parallel, name) == neutral,
                f"{name} belongs to fp8_recipe delayed: leave it out with {parallel.fp8_recipe}",
            )
    _check_bf16_layers(parallel, model.num_layers)
    _check_widths(model, parallel)
    unit = math.lcm(grain(model.block_size), token_multiple(parallel)) * parallel.context_parallel_size
    _demand(
        seq_length % unit == 0,
        f"seq_length {seq_length} is not divisible by {unit}, what packed sequences are padded to for fp8_recipe "
        f"{parallel.fp8_recipe}: change it",
    )


def check_live_reference(parallel) -> None:
    """Raises UserError where the reference cannot take the policy's place in the model."""
    _demand(
        not (parallel.fp8_param_gather and parallel.overlap_param_gather),
        "fp8_param_gather with overlap_param_gather: the gather would end in the reference's pass and prepare its "
        "weights for FP8 instead of the policy's: give --reference-cache, or leave out one of the two",
    )


def check_cached_reference(parallel) -> None:
    """Raises UserError where reference scores that were computed before the run cannot be the live reference's."""
    _demand(
        parallel.fp8_format is None or not parallel.fp8_reference or parallel.fp8_recipe != "delayed",
        "fp8_recipe delayed takes its scales from the policy's history, which reference scores computed beforehand do "
        "not have: give --no-fp8-reference or another recipe",
    )


def refuse_fp8(parallel, what: str) -> None:
    """Raises UserError where FP8 was asked for and is not for: ``what`` runs in bf16."""
    _demand(parallel.fp8_format is None, f"fp8_format is for training: {what} runs without it")


def reference_format(parallel) -> str | None:
    """The number format of the reference, beyond bf16: ``hybrid/tensorwise`` say, or None. Its scores depend on it."""
    if parallel.fp8_format is None or not parallel.fp8_reference:
        return None
    bf16_layers = ""
    if parallel.first_last_layers_bf16:
        bf16_layers = f"/{parallel.num_layers_at_start_in_bf16}+{parallel.num_layers_at_end_in_bf16} layers bf16"
    return f"{parallel.fp8_format}/{parallel.fp8_recipe}{bf16_layers}"


def _check_bf16_layers(parallel, layers: int) -> None:
    start, end = parallel.num_layers_at_start_in_bf16, parallel.num_layers_at_end_in_bf16
    if not parallel.first_last_layers_bf16:
        _demand(
            start == end == 1,
            "num_layers_at_start_in_bf16 and num_layers_at_end_in_bf16 go with first_last_layers_bf16: give that too",
        )
        return
    _demand(
        parallel.fp8_recipe != "delayed",
        "first_last_layers_bf16 cannot be had with fp8_recipe delayed, whose scales are updated for all layers at "
        "once: take another recipe",
    )
    per_stage = layers // parallel.pipeline_model_parallel_size
    _demand(
        max(start, end) <= per_stage,
        f"num_layers_at_start_in_bf16 {start} and num_layers_at_end_in_bf16 {end}: a pipeline stage has {per_stage} "
        "layers, give no more",
    )
    _demand(start + end < layers, f"{start} + {end} layers in bf16 leave none of {layers} for FP8: leave FP8 out")


def _check_widths(model, parallel) -> None:
    """Every width that meets an FP8 matrix product on one rank."""
    tp, multiple = parallel.tensor_model_parallel_size, RECIPES[parallel.fp8_recipe].multiple
    heads, groups = model.num_attention_heads, model.num_query_groups
    widths = {
        "hidden_size": model.hidden_size,
        "ffn_hidden_size / tensor_model_parallel_size": model.ffn_hidden_size // tp,
        "num_attention_heads x kv_channels / tensor_model_parallel_size": heads * model.kv_channels // tp,
        "the width of queries, keys and values / tensor_model_parallel_size": (
            (heads + 2 * groups) * model.kv_channels // tp
        ),
    }
    for name, width in widths.items():
        _demand(
            width % multiple == 0,
            f"{name} is {width}: fp8_recipe {parallel.fp8_recipe} needs a multiple of {multiple}",
        )


def _demand(condition, message: str) -> None:
    if not condition:
        raise UserError(message)
