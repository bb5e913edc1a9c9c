"""Forward and backward passes of one step through megatron-core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_dtrpo.data.batches import MicroBatch
from megatron_dtrpo.model.attention import PackedAttention, plan_attention
from megatron_dtrpo.training.objectives import Objective, Outcome, log_likelihoods


def choose_backend(name: str, device: torch.device) -> str:
    """Resolves ``attention_backend``."""
    return name if name != "auto" else "flex" if device.type == "cuda" else "sdpa"


class DeviceBatch:
    """A micro-batch on the device, with its attention plan, shared by the reference's and the policy's pass. On the
    last stage ``reference`` holds the reference's ``L`` per response, ``[responses]``."""

    def __init__(self, batch: MicroBatch, device: torch.device, backend: str, width: int):
        self.host_tokens = len(batch.sequence)
        self.batch = batch.to(device)
        sequence = self.batch.sequence
        self.attention: PackedAttention = plan_attention(sequence.coordinates(), sequence.block_size, backend, width)
        self.reference: Tensor | None = None


def _forward(iterator, model) -> tuple[DeviceBatch, Tensor]:
    item: DeviceBatch = next(iterator)
    sequence = item.batch.sequence
    output = model(
        sequence.tokens, sequence.position, item.attention, sequence.target_row, sequence.target_token
    )  # fmt: skip
    return item, output


def _run(forward_step, model, batches: Sequence[DeviceBatch], **kwargs) -> list:
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=max(b.host_tokens for b in batches),  # stages exchange real shapes: variable_seq_lengths
        micro_batch_size=1,
        **kwargs,
    )


def score(model, batches: Sequence[DeviceBatch]) -> list[Tensor]:
    """``L`` per response of every micro-batch under ``model``: ``[responses]`` each on the last stage, an empty list on
    the others. No gradient."""

    def collect(item: DeviceBatch, log_probs: Tensor, non_loss_data: bool = True) -> Tensor:
        return log_likelihoods(log_probs, item.batch)

    def forward_step(iterator, model):
        item, output = _forward(iterator, model)
        return output, partial(collect, item)

    with torch.no_grad():
        return _run(forward_step, model, batches, forward_only=True, collect_non_loss_data=True)


def train_pass(
    model, batches: Sequence[DeviceBatch], objective: Objective, forward_only: bool = False
) -> list[Outcome]:
    """Accumulates gradients over the micro-batches; returns their outcomes on the last stage, ``[]`` on the others."""

    def loss_func(item: DeviceBatch, log_probs: Tensor):
        outcome = objective.evaluate(log_probs, item.batch, item.reference)
        return outcome.loss, outcome.count, outcome._replace(loss=outcome.loss.detach())

    def forward_step(iterator, model):
        item, output = _forward(iterator, model)
        return output, partial(loss_func, item)

    return _run(forward_step, model, batches, forward_only=forward_only)


def reduce_metrics(
    outcomes: Sequence[Outcome], width: int, packed_tokens: int, stop: bool, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums over the global batch, in one message to every process.

    Args:
        outcomes: of this process's micro-batches; empty except on the last pipeline stage.
        width: number of metrics.
        packed_tokens: tokens this process's micro-batches ran.
        stop: whether this process was asked to stop.

    Returns:
        In fp64: metric sums ``[width]``, the divisor's total, the packed tokens, the number of processes to stop.
    """
    total = torch.zeros(width + 3, dtype=torch.float64, device=device)
    # Tensor-parallel ranks hold the same numbers: one of them speaks.
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        for outcome in outcomes:
            total[:width] += outcome.metrics
            total[width] += outcome.count
        total[width + 1] = packed_tokens
    total[width + 2] = stop
    dist.all_reduce(total)
    return total[:width], total[width], total[width + 1], total[width + 2]
