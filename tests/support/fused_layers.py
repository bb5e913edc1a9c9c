"""Stand-ins for Transformer Engine's layers that run on a CPU: the names, the checkpoint keys and the extra state of
the real ones, around megatron-core's own arithmetic. Transformer Engine itself cannot be imported without a GPU."""

from __future__ import annotations

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_dtrpo.model.norm import RMSNorm


class _ExtraState:
    """Transformer Engine writes a tensor of bytes, empty where there is no FP8, and reads what others wrote."""

    loaded = None

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        assert state is None or state.numel() == 0
        self.loaded = state


class FusedNormLinear(_ExtraState, ColumnParallelLinear):
    """`TELayerNormColumnParallelLinear`: the norm's weight is a parameter of the layer that it feeds."""

    fuse_wgrad_accumulation = False
    return_layernorm_output = False

    def __init__(self, input_size, output_size, *, config, **kwargs):
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel
        self.epsilon = config.layernorm_epsilon

    def forward(self, x):
        normed = torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.epsilon)
        output, bias = super().forward(normed)
        return ((output, normed) if self.return_layernorm_output else output), bias

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            {"weight": 0, "bias": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )


class FusedRowLinear(_ExtraState, RowParallelLinear):
    """`TERowParallelLinear`."""

    fuse_wgrad_accumulation = False


class FusedNorm(_ExtraState, RMSNorm):
    """`TENorm`."""


class FusedSpecProvider(LocalSpecProvider):
    """`TESpecProvider`."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return FusedNormLinear

    def row_parallel_linear(self) -> type:
        return FusedRowLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return FusedNorm
