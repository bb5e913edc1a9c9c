"""What training receives: visits to examples, packed into one sequence. Nothing here knows where rows come from."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_dtrpo.diffusion.layout import PackedSequence


@dataclass(frozen=True)
class Sample:
    """One visit to an example: the epoch, from 0, and the example's number in the store."""

    epoch: int
    index: int


@dataclass
class MicroBatch:
    """One packed sequence and what it was made of: ``samples`` in packed order and how many tokens of every response
    the assistant writes, int64 ``[responses]``."""

    sequence: PackedSequence
    samples: list[Sample]
    response_length: Tensor
