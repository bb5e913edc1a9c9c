"""Number formats of weights, activations and gradients."""

from __future__ import annotations

import torch

from megatron_dtrpo.config import ParallelSettings


def params_dtype(parallel: ParallelSettings) -> torch.dtype:
    return torch.bfloat16 if parallel.bf16 else torch.float32


def transformer_precision(parallel: ParallelSettings) -> dict:
    """The precision arguments of megatron-core's ``TransformerConfig``."""
    dtype = params_dtype(parallel)
    return {"bf16": parallel.bf16, "params_dtype": dtype, "pipeline_dtype": dtype, "attention_softmax_in_fp32": True}


def optimizer_precision(parallel: ParallelSettings) -> dict:
    """The precision arguments of megatron-core's ``OptimizerConfig``: fp32 main weights under bf16."""
    return {"bf16": parallel.bf16, "params_dtype": params_dtype(parallel)}
