"""A micro-batch on its way to the device: padded and cut on the host, then copied, with its attention plan."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_dtrpo.config.backends import BACKENDS
from megatron_dtrpo.data.micro_batch import MicroBatch, Sample
from megatron_dtrpo.diffusion.dropout import token_numbers
from megatron_dtrpo.diffusion.layout import Coordinates, PackedSequence, empty_sequence, pad_to
from megatron_dtrpo.diffusion.sharding import assign_rows, padded_length, take_rows, unit_length
from megatron_dtrpo.model.attention import PackedAttention, plan_attention
from megatron_dtrpo.rounding import round_up
from megatron_dtrpo.runtime.transfer import pinned, to_device


@dataclass(frozen=True)
class HostBatch:
    """A micro-batch that only has to be copied: padded, in page-locked memory, and cut for context parallelism.

    ``part`` is what this process runs: the whole packed sequence, or its share under context parallelism; then ``keys``
    are the coordinates ``[S]`` of all ranks' rows in the order in which their keys are gathered. ``response_length``:
    of all responses, int64 ``[R]``. ``tokens``: of the whole packed sequence, without padding. ``steps``, ``views``:
    one more than the largest number of a target's decoding step and of a view. ``token``: of
    `diffusion.dropout.token_numbers`, of this process's rows; None where nothing is dropped out.
    """

    samples: list[Sample]
    response_length: Tensor
    part: PackedSequence
    keys: Coordinates | None
    tokens: int
    steps: int
    views: int
    token: Tensor | None = None


def prepare(
    batch: MicroBatch, device: torch.device, backend: str, multiple: int = 1, dropout_seed: int | None = None
) -> HostBatch:
    """Does on the CPU, on whatever thread, all that needs no device. ``multiple``: of `DeviceBatch`. ``dropout_seed``:
    of the run, where something is dropped out."""
    block_size, group = batch.sequence.block_size, context_group()
    step = math.lcm(block_size, multiple) if group.size() == 1 else block_size
    length = round_up(BACKENDS[backend].padded(len(batch.sequence)), step)
    part, keys, pin = pad_to(batch.sequence, length, pad_id=0), None, partial(pinned, device=device)
    if group.size() > 1:
        part, keys = _share(part, group.rank(), group.size(), multiple)
        keys = Coordinates(*map(pin, keys))
    steps, views = (int(numbers.max()) + 1 if numbers.numel() else 0 for numbers in _numbers(batch.sequence))
    lengths = pin(batch.response_length)
    token = None if dropout_seed is None else pin(_token_numbers(part, batch.samples, dropout_seed))
    return HostBatch(batch.samples, lengths, part.map_tensors(pin), keys, len(batch.sequence), steps, views, token)


def _token_numbers(part: PackedSequence, samples: list[Sample], seed: int) -> Tensor:
    """int64 ``[s]``: by epoch, example, response, view and position; padding has some number too."""
    visits = torch.tensor([[sample.epoch, sample.index] for sample in [*samples, Sample(0, 0)]])
    epoch, index = visits[part.document].unbind(1)  # padding is document -1
    return token_numbers(seed, [epoch, index, part.branch, part.view, part.position])


def _numbers(sequence: PackedSequence) -> tuple[Tensor, Tensor]:
    """Of every target the decoding step and the view."""
    return sequence.target_step, sequence.view[sequence.target_row]


class DeviceBatch:
    """A micro-batch on the device, with its attention plan, shared by the reference's and the policy's pass.

    ``part`` is what this process runs (see `HostBatch`). On the last stage ``given`` holds what the objective is to
    know of the responses (see `objectives.objective.Objective`): a tensor or a tuple of them, response by response.
    """

    # What an objective is to know under another name would be missing without a word.
    __slots__ = ("_made_for", "attention", "given", "part", "response_length", "samples", "steps", "views")

    def __init__(
        self, batch: MicroBatch | HostBatch, device: torch.device, backend: str, width: int, multiple: int = 1
    ):
        """``multiple``: the tokens of ``part`` are padded to a multiple of it (FP8 asks for one)."""
        host = batch if isinstance(batch, HostBatch) else prepare(batch, device, backend, multiple)
        move = partial(to_device, device=device)
        self.samples, self.response_length = host.samples, move(host.response_length)
        self.part = host.part.map_tensors(move)
        self.steps, self.views = host.steps, host.views
        self.given: Any = None
        self._made_for = (device, backend, width, multiple)
        keys, group = (None, None) if host.keys is None else (Coordinates(*map(move, host.keys)), context_group())
        block_size = host.part.block_size
        self.attention: PackedAttention = plan_attention(
            self.part.coordinates(), block_size, backend, width, keys, group
        )
        self.attention.token = None if host.token is None else move(host.token)

    def of_padding(self) -> DeviceBatch:
        """A micro-batch without a response, for the same device: it weighs nothing and costs next to nothing."""
        block_size = self.part.block_size
        sequence = pad_to(empty_sequence(block_size), block_size, pad_id=0)
        padding = DeviceBatch(MicroBatch(sequence, [], torch.zeros(0, dtype=torch.long)), *self._made_for)
        padding.given = _of_nobody(self.given)
        padding.steps, padding.views = self.steps, self.views
        return padding


def _of_nobody(given):
    """``given``, of no response."""
    if isinstance(given, Tensor):
        return given[:0]
    return None if given is None else type(given)(*map(_of_nobody, given))


def context_group():
    """The processes that share each packed sequence."""
    return parallel_state.get_context_parallel_group()


def _share(sequence: PackedSequence, rank: int, ranks: int, multiple: int) -> tuple[PackedSequence, Coordinates]:
    """A context-parallel rank's rows of ``sequence`` (on the CPU), and the coordinates ``[S]`` of all ranks' rows in
    the order in which their keys are gathered."""
    block_size, length = sequence.block_size, len(sequence)
    sequence = pad_to(sequence, padded_length(length, block_size, ranks, multiple), pad_id=0)
    coordinates = sequence.coordinates()
    rows = assign_rows(coordinates, block_size, unit_length(length, block_size, ranks), ranks)
    return take_rows(sequence, rows[rank]), coordinates.at(rows.flatten())
