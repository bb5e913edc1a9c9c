"""Makes megatron-core fast on a CPU: kernels, linear layers and large pages. Nothing needs it to be right.

It serves those who train and test small models without a GPU: the quickstart, the test suite, a laptop. Numbers with it
and without it are equal up to rounding. ``MEGATRON_DTRPO_CPU_SPEED=0`` turns all of it off: to see megatron-core's own
layers at work, or where one of its assumptions about torch no longer holds.
"""

from __future__ import annotations

import os

import torch
from megatron.core.tensor_parallel import layers
from megatron.core.transformer import attention, mlp

from megatron_dtrpo.cpu import kernels, linear

SWITCH = "MEGATRON_DTRPO_CPU_SPEED"


def is_on() -> bool:
    return os.environ.get(SWITCH, "1") != "0"


def replace_kernels() -> None:
    """megatron-core compiles its SwiGLU, makes cosines, sines and copies anew in every layer, and multiplies by MKL."""
    layers.linear_with_grad_accumulation_and_async_allreduce = layers.linear_with_frozen_weight = linear.linear
    layers.copy_to_tensor_model_parallel_region = linear.copy_to_region
    layers.reduce_from_tensor_model_parallel_region = linear.reduce_from_region
    mlp.bias_swiglu_impl = kernels.bias_swiglu_impl
    attention.apply_rotary_pos_emb = kernels.apply_rotary_pos_emb


def use_huge_pages() -> None:
    """Has torch ask the kernel for pages of 2 MiB for large tensors (its own switch; where the kernel has none nothing
    changes). What a step frees goes back to the system and is mapped again in the next, page by page: with pages of
    4 KiB a million times in a step of six pairs of a 135M model. torch looks once, at its first tensor; call before."""
    if is_on() and not torch.cuda.is_available():
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
