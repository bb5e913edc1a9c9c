"""Forward and backward passes of one step through megatron-core's pipeline schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_dtrpo.config.backends import BACKENDS
from megatron_dtrpo.data.batches import MicroBatch
from megatron_dtrpo.diffusion.layout import Coordinates, PackedSequence, empty_sequence, pad_to
from megatron_dtrpo.diffusion.sharding import deal, padded_length, take_rows, unit_length
from megatron_dtrpo.model.attention import PackedAttention, plan_attention
from megatron_dtrpo.model.chunks import chunks_of
from megatron_dtrpo.model.context_parallel import add_up
from megatron_dtrpo.objectives.preference import response_log_likelihoods
from megatron_dtrpo.rounding import round_up
from megatron_dtrpo.runtime.transfer import pinned, to_device
from megatron_dtrpo.training.objectives import Objective, Outcome


@dataclass(frozen=True)
class HostBatch:
    """A micro-batch that only has to be copied: padded, in page-locked memory, and cut for context parallelism.

    ``batch`` has as its sequence what this process runs: the whole packed sequence, or its share under context
    parallelism; then ``keys`` are the coordinates ``[S]`` of all ranks' rows in the order in which their keys are
    gathered.
    """

    batch: MicroBatch
    keys: Coordinates | None
    tokens: int
    """Of the packed sequence, without padding."""

    @property
    def part(self) -> PackedSequence:
        return self.batch.sequence


def prepare(batch: MicroBatch, device: torch.device, backend: str, multiple: int = 1) -> HostBatch:
    """Does on the CPU, on whatever thread, all that needs no device. ``multiple``: of `DeviceBatch`."""
    block_size, group = batch.sequence.block_size, _context_group()
    step = math.lcm(block_size, multiple) if group.size() == 1 else block_size
    length = round_up(BACKENDS[backend].padded(len(batch.sequence)), step)
    tokens, sequence, keys = len(batch.sequence), pad_to(batch.sequence, length, pad_id=0), None
    pin = partial(pinned, device=device)
    if group.size() > 1:
        sequence, every = _share(sequence, group.rank(), group.size(), multiple)
        keys = Coordinates(*map(pin, every))
    return HostBatch(replace(batch, sequence=sequence).map_tensors(pin), keys, tokens)


class DeviceBatch:
    """A micro-batch on the device, with its attention plan, shared by the reference's and the policy's pass.

    ``part`` is what this process runs (see `HostBatch`). On the last stage ``reference`` holds the reference's ``L``
    per response, ``[responses]``.
    """

    def __init__(
        self, batch: MicroBatch | HostBatch, device: torch.device, backend: str, width: int, multiple: int = 1
    ):
        """``multiple``: the tokens of ``part`` are padded to a multiple of it (FP8 asks for one)."""
        host = batch if isinstance(batch, HostBatch) else prepare(batch, device, backend, multiple)
        move = partial(to_device, device=device)
        self.batch = host.batch.map_tensors(move)
        self.part = self.batch.sequence
        self.reference: Tensor | None = None
        self._made_for = (device, backend, width, multiple)
        keys, group = (None, None) if host.keys is None else (Coordinates(*map(move, host.keys)), _context_group())
        self.attention: PackedAttention = plan_attention(
            self.part.coordinates(), self.part.block_size, backend, width, keys, group
        )

    def of_padding(self) -> DeviceBatch:
        """A micro-batch without a response, for the same device: it weighs nothing and costs next to nothing."""
        block_size = self.batch.sequence.block_size
        sequence = pad_to(empty_sequence(block_size), block_size, pad_id=0)
        padding = DeviceBatch(MicroBatch(sequence, [], torch.zeros(0, dtype=torch.long)), *self._made_for)
        padding.reference = torch.zeros(0, dtype=torch.float64, device=self._made_for[0])
        return padding


def _context_group():
    return parallel_state.get_context_parallel_group()


def _share(sequence: PackedSequence, rank: int, ranks: int, multiple: int) -> tuple[PackedSequence, Coordinates]:
    """A context-parallel rank's rows of ``sequence`` (on the CPU), and the coordinates ``[S]`` of all ranks' rows in
    the order in which their keys are gathered."""
    block_size, length = sequence.block_size, len(sequence)
    sequence = pad_to(sequence, padded_length(length, block_size, ranks, multiple), pad_id=0)
    coordinates = sequence.coordinates()
    rows = deal(coordinates, block_size, unit_length(length, block_size, ranks), ranks)
    return take_rows(sequence, rows[rank]), coordinates.at(rows.flatten())


def _forward(iterator, model) -> tuple[DeviceBatch, Tensor]:
    item: DeviceBatch = next(iterator)
    part = item.part
    return item, model(part.tokens, part.position, item.attention, part.target_row, part.target_token)


def _log_likelihoods(log_probs: Tensor, item: DeviceBatch) -> Tensor:
    """``L`` of each response of a micro-batch from the log-probabilities of this process's targets: ``[N] ->
    fp64 [responses]``, the same on every context-parallel rank."""
    part = item.part
    likelihoods = response_log_likelihoods(log_probs, part.target_weight, part.target_response, part.responses)
    return add_up(likelihoods, parallel_state.get_context_parallel_group()) if part.responses else likelihoods


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


def score(model, batches: Sequence[DeviceBatch]) -> list[Tensor]:
    """``L`` per response of every micro-batch under ``model``: ``[responses]`` each on the last stage, an empty list on
    the others. No gradient."""

    def collect(item: DeviceBatch, log_probs: Tensor, non_loss_data: bool = True) -> Tensor:
        return _log_likelihoods(log_probs, item)

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
        outcome = objective.evaluate(_log_likelihoods(log_probs, item), item.batch, item.reference)
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
