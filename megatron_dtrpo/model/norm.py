"""RMSNorm for the local layer spec."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dtrpo.cpu import kernels as cpu_kernels
from megatron_dtrpo.cpu import speed


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with megatron-core's constructor.

    megatron-core's own wrapper refuses sequence parallelism. All that asks for is that the weight is marked, so that
    its gradient, which each rank has for its part of the sequence only, is summed over the tensor-parallel group.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused):
        super().__init__(hidden_size, eps=eps, device=torch.cuda.current_device(), dtype=config.params_dtype)
        weight: Any = self.weight  # megatron-core reads this attribute of a parameter
        weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        """``[..., h]`` to ``[..., h]``."""
        # A key is a view of the fused projection's output, all of which it would keep for its gradient.
        x = x.contiguous()
        if speed.is_on() and cpu_kernels.supports(x):
            return cpu_kernels.rms_norm(x, self.weight, self.eps)
        return super().forward(x)
