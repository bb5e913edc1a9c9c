"""How one packed sequence is divided among the ranks of context parallelism.

A rank holds some of the packed rows and attends to all of them. Its work is the number of keys that its queries see,
which differs many times over between the first and the last block of a document. Rows are assigned in units of a few
diffusion blocks, as many to each rank, so that the work is even too.

Legend: S packed tokens, B block size, s = S / ranks. Nothing here touches a device or a process group.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dtrpo.diffusion.layout import Coordinates, PackedSequence, runs, visible
from megatron_dtrpo.rounding import round_up

GRAIN = 128  # tokens of a FlexAttention tile: a unit of as many leaves the mask's empty tiles empty
UNITS_PER_RANK = 8  # fewer cannot be balanced; shorter sequences are cut into smaller units
_ROWS = 512  # runs of queries whose row of the mask is alive at once


def unit_length(length: int, block_size: int, ranks: int) -> int:
    """Tokens of a unit for a packed sequence of ``length`` tokens: ``block_size`` times a power of two, at most `GRAIN`
    (or the block size, where that is more)."""
    unit = block_size
    while 2 * unit <= GRAIN and 2 * unit * ranks * UNITS_PER_RANK <= length:
        unit *= 2
    return unit


def padded_length(length: int, block_size: int, ranks: int, multiple: int = 1) -> int:
    """``length`` tokens, rounded up so that every rank gets as many whole units, and a multiple of ``multiple``."""
    step = math.lcm(unit_length(length, block_size, ranks), multiple) * ranks
    return round_up(length, step)


def work(coordinates: Coordinates, block_size: int) -> Tensor:
    """Key blocks that each query block sees: ``[S] -> int64 [S / B]``."""
    blocks, lengths = runs(coordinates)
    keys = blocks.at((None, slice(None)))
    counts = [
        (visible(blocks.at((slice(start, start + _ROWS), None)), keys) * lengths).sum(1)
        for start in range(0, lengths.numel(), _ROWS)
    ]
    return torch.cat(counts).repeat_interleave(lengths)[::block_size] // block_size


def assign_rows(coordinates: Coordinates, block_size: int, unit: int, ranks: int) -> Tensor:
    """Packed rows of each rank, in packed order: int64 ``[ranks, s]``, all together a permutation of ``0 .. S-1``.

    Units go round by round from the one with most work to the one with least, and in a round the rank that has least
    so far gets most. No two ranks then differ by more than two units assigned in one round do.

    Args:
        coordinates: ``[S]``; S is a multiple of ``ranks * unit``, and ``unit`` one of ``block_size``.
    """
    loads = work(coordinates, block_size).view(-1, unit // block_size).sum(1)
    rounds = loads.argsort(descending=True, stable=True).view(-1, ranks)
    totals = torch.zeros(ranks, dtype=torch.long)
    owned = torch.empty_like(rounds)
    for number, units in enumerate(rounds):
        poorest_first = totals.argsort(stable=True)
        owned[number, poorest_first] = units
        totals[poorest_first] += loads[units]
    units = owned.T.sort(1).values
    return (units.unsqueeze(2) * unit + torch.arange(unit)).flatten(1)


def take_rows(sequence: PackedSequence, rows: Tensor) -> PackedSequence:
    """The packed ``rows`` (int64 ``[s]``) of a sequence with the predictions that are read from them; responses keep
    their numbers."""
    place = torch.full((len(sequence),), -1)
    place[rows] = torch.arange(rows.numel())
    target_row = place[sequence.target_row]
    here = target_row >= 0
    of_tokens = ("tokens", "document", "branch", "view", "block", "position")
    of_targets = ("target_token", "target_weight", "target_response", "target_block", "target_step")
    return replace(
        sequence,
        target_row=target_row[here],
        **{name: getattr(sequence, name)[rows] for name in of_tokens},
        **{name: getattr(sequence, name)[here] for name in of_targets},
    )
