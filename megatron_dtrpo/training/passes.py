"""Forward and backward passes of one step through megatron-core's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_dtrpo.model.chunks import chunks_of
from megatron_dtrpo.model.context_parallel import add_up
from megatron_dtrpo.objectives.objective import Objective, Outcome
from megatron_dtrpo.objectives.targets import Targets
from megatron_dtrpo.training.device_batch import DeviceBatch, context_group


def _forward(iterator, model) -> tuple[DeviceBatch, Tensor]:
    item: DeviceBatch = next(iterator)
    part = item.part
    return item, model(part.tokens, part.position, item.attention, part.target_row, part.target_token)


def _targets(item: DeviceBatch, log_probs: Tensor) -> Targets:
    """This process's targets of a micro-batch with their log-probabilities ``[N]``."""
    part = item.part
    return Targets(
        log_prob=log_probs,
        weight=part.target_weight,
        response=part.target_response,
        block=part.target_block,
        step=part.target_step,
        length=item.response_length,
        view=part.view[part.target_row],
        steps=item.steps,
        views=item.views,
        add_up=partial(add_up, group=context_group()),
    )


def _run(forward_step, model, batches: Sequence[DeviceBatch], **kwargs) -> list:
    """What ``forward_step`` leaves for each of ``batches`` on the last stage, ``[]`` on the others."""
    chunks, stages = chunks_of(model), parallel_state.get_pipeline_model_parallel_world_size()
    count = len(batches)
    if len(chunks) > 1:  # the interleaved schedule goes through micro-batches in groups of as many as there are stages
        batches = [*batches, *(batches[0].of_padding() for _ in range(-count % stages))]
    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in chunks],
        model=chunks,
        num_microbatches=len(batches),
        seq_length=max(len(b.part) for b in batches),  # stages exchange real shapes: variable_seq_lengths
        micro_batch_size=1,
        **kwargs,
    )
    return results[:count]


def log_probs(model, batches: Sequence[DeviceBatch]) -> list[Tensor]:
    """The log-probabilities ``[N]`` of the targets that this process predicts, of every micro-batch; as `score`."""
    return _collected(model, batches, lambda item, found: found.detach())


def score(model, batches: Sequence[DeviceBatch]) -> list[Tensor]:
    """``L`` per response of every micro-batch under ``model``: ``[responses]`` each on the last stage, an empty list on
    the others. No gradient."""
    return measure(model, batches, lambda targets, given: targets.likelihoods())


def measure(model, batches: Sequence[DeviceBatch], of: Callable[[Targets, Any], Tensor]) -> list[Tensor]:
    """``of`` the targets and what is ``given`` of every micro-batch; where and how as `score`."""
    return _collected(model, batches, lambda item, found: of(_targets(item, found), item.given))


def _collected(model, batches: Sequence[DeviceBatch], of: Callable[[DeviceBatch, Tensor], Tensor]) -> list[Tensor]:
    """``of`` every micro-batch and its targets' log-probabilities on the last stage, without gradient."""

    def collect(item: DeviceBatch, found: Tensor, non_loss_data: bool = True) -> Tensor:
        return of(item, found)

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
        outcome = objective.evaluate(_targets(item, log_probs), item.given)
        # Every context-parallel rank has the whole loss, and the gradients of its own tokens. Gradients are summed over
        # data- and context-parallel processes, and so is the divisor, which therefore one rank alone counts.
        count = outcome.count if _speaks_for_context() else torch.zeros_like(outcome.count)
        if not forward_only:
            outcome = outcome._replace(slope=slope(outcome.loss, log_probs))
        return outcome.loss, count, outcome._replace(loss=outcome.loss.detach())

    def forward_step(iterator, model):
        item, output = _forward(iterator, model)
        return output, partial(loss_func, item)

    return _run(forward_step, model, batches, forward_only=forward_only)


def slope(loss: Tensor, log_probs: Tensor) -> Tensor:
    """How much a micro-batch's loss asks of the logits that its targets' ``log_probs`` ``[N]`` come from: the sum of
    ``|d loss / d log p| (1 - p)``, a scalar. Zero where there is nothing to learn: no target, every target certain, or
    a loss that is content. A loss that no trained parameter has a part in counts as 1."""
    if not loss.requires_grad:
        return torch.ones((), dtype=torch.float64, device=loss.device)
    (gradient,) = torch.autograd.grad(loss, log_probs, retain_graph=True)
    return (gradient.double() * torch.expm1(log_probs.detach().double())).abs().sum()


def _speaks_for_context() -> bool:
    return parallel_state.get_context_parallel_rank() == 0


class Reduced(NamedTuple):
    """Sums over the global batch, fp64: ``metrics`` ``[width]``, and scalars: the divisor ``count``, ``packed_tokens``,
    the number of processes asked to ``stop`` and the ``slope`` of the loss (see `slope`)."""

    metrics: Tensor
    count: Tensor  # type: ignore[assignment]  # a tuple has a method of this name
    packed_tokens: Tensor
    stop: Tensor
    slope: Tensor


def reduce_metrics(
    outcomes: Sequence[Outcome], width: int, packed_tokens: int, stop: bool, device: torch.device
) -> Reduced:
    """Sums over the global batch, in one message to every process.

    Args:
        outcomes: of this process's micro-batches; empty except on the last pipeline stage.
        width: number of metrics.
        packed_tokens: tokens this process's micro-batches ran.
        stop: whether this process was asked to stop.
    """
    total = torch.zeros(width + 4, dtype=torch.float64, device=device)
    # Tensor- and context-parallel ranks hold the same numbers, except for the slope of a rank's own targets.
    if parallel_state.is_pipeline_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0:
        for outcome in outcomes:
            if outcome.slope is not None:
                total[width + 3] += outcome.slope
            if _speaks_for_context():
                total[:width] += outcome.metrics
                total[width] += outcome.count
        if _speaks_for_context():
            total[width + 1] = packed_tokens
    total[width + 2] = stop
    dist.all_reduce(total)
    return Reduced(total[:width], *total[width:])
