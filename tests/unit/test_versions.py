"""What newer versions of megatron-core pass, write and ask for, seen from the version that is installed."""

from __future__ import annotations

import inspect

import pytest
import torch
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.fusions import fused_bias_swiglu

from megatron_dtrpo.cpu import kernels
from megatron_dtrpo.cpu.adam import CpuAdam
from megatron_dtrpo.cpu.linear import linear
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import versions

OLD = "async_strategy" not in inspect.signature(dist_checkpointing.save).parameters


def test_a_save_is_megatron_cores_own():
    """0.19 would by default ask for a package of NVIDIA's."""
    assert versions.save_options() == ({} if OLD else {"async_strategy": "mcore"})


def test_an_optimizer_of_0_17_and_a_layer_of_0_19():
    """They pass ``capturable`` and ``gtp_remat_size``."""
    weight = torch.nn.Parameter(torch.ones(2, 3))
    CpuAdam([weight], capturable=False)
    out = linear(torch.ones(1, 1, 3), weight, None, False, False, False, None, gtp_remat_size=1)
    assert out.tolist() == [[[3.0, 3.0]]]


@pytest.mark.parametrize(
    ("original", "stand_in"),
    [
        (tensor_parallel.linear_with_grad_accumulation_and_async_allreduce, linear),
        (tensor_parallel.layers.linear_with_frozen_weight, linear),
        (fused_bias_swiglu.bias_swiglu_impl, kernels.bias_swiglu_impl),
    ],
    ids=lambda function: f"{function.__module__}.{function.__name__}",
)
def test_a_stand_in_accepts_what_its_original_does(original, stand_in):
    """In the release that is installed; megatron-core's layers call it with names."""
    deprecated = {"async_grad_allreduce"}
    names, accepted = (inspect.signature(function).parameters.keys() for function in (original, stand_in))
    assert names - accepted <= deprecated


@pytest.mark.skipif(not OLD, reason="this megatron-core reads both forms")
def test_a_checkpoint_of_a_newer_core_is_one_line(tmp_path):
    versions.require_readable(tmp_path, ["decoder.layers.0.weight"])
    with pytest.raises(UserError, match=r"written by megatron-core 0.19 or newer, and this is 0\.1\d"):
        versions.require_readable(tmp_path, ["decoder.layers.0.weight", "common_state/shard_0_1"])
