"""Rows of a packed sequence assigned to the ranks of context parallelism, and the attention of those."""

from __future__ import annotations

import pytest
import torch

from megatron_dtrpo.config.backends import BACKENDS
from megatron_dtrpo.diffusion.layout import Coordinates, empty_sequence, pad_to
from megatron_dtrpo.diffusion.sharding import GRAIN, assign_rows, padded_length, take_rows, unit_length, work
from megatron_dtrpo.model.attention import plan_attention
from tests.support import oracles
from tests.unit.test_attention import WIDE, document, oracle_mask, random_qkv, random_sequence

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


def assigned(sequence, ranks: int, unit: int | None = None):
    """The padded sequence and the rows of every rank ``[ranks, s]``."""
    length, block_size = len(sequence), sequence.block_size
    unit = unit or unit_length(length, block_size, ranks)
    padded = pad_to(sequence, -(-length // (unit * ranks)) * unit * ranks, pad_id=0)
    return padded, assign_rows(padded.coordinates(), block_size, unit, ranks)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("block_size", [1, 4, 8, 24, 32, 200])
def test_units_are_whole_blocks_and_as_long_as_a_tile_where_there_is_room(block_size, ranks):
    for length in range(block_size, 40000, 37 * block_size):
        unit, padded = unit_length(length, block_size, ranks), padded_length(length, block_size, ranks)
        assert unit % block_size == 0 and (unit <= GRAIN or unit == block_size)
        assert padded % (ranks * unit) == 0 and 0 <= padded - length < ranks * unit
        assert unit == block_size or padded - length < length / 8
    assert unit_length(40000, block_size, ranks) > (GRAIN // 2 if block_size <= GRAIN else 0)


@pytest.mark.parametrize("seed", range(4))
def test_work_is_what_the_mask_shows(seed):
    sequence = random_sequence(seed, padding=seed)
    blocks = oracle_mask(sequence)[:: sequence.block_size, :: sequence.block_size]
    assert torch.equal(work(sequence.coordinates(), sequence.block_size), blocks.sum(1))


@pytest.mark.parametrize("ranks, unit", [(2, 4), (2, 8), (3, 4), (4, 16), (1, 4)])
def test_every_rank_gets_as_many_units_and_every_row_one_rank(ranks, unit):
    for seed in range(5):
        sequence, rows = assigned(random_sequence(seed), ranks, unit)
        assert rows.shape == (ranks, len(sequence) // ranks)
        assert torch.equal(rows.flatten().sort().values, torch.arange(len(sequence)))
        assert (rows.diff(dim=1) > 0).all()  # packed order, which keeps runs together
        starts = rows[:, ::unit]
        assert (starts % unit == 0).all()
        assert torch.equal(rows.view(ranks, -1, unit), starts.unsqueeze(2) + torch.arange(unit))


def loads(sequence, rows) -> torch.Tensor:
    return work(sequence.coordinates(), sequence.block_size)[
        rows[:, :: sequence.block_size] // sequence.block_size
    ].sum(1)


@pytest.mark.parametrize("ranks, unit", [(2, 4), (2, 8), (3, 4), (4, 16)])
def test_balance_is_within_the_stated_bound(ranks, unit):
    for seed in range(8):
        sequence, rows = assigned(random_sequence(seed, documents=3), ranks, unit)
        units = work(sequence.coordinates(), sequence.block_size).view(-1, unit // sequence.block_size).sum(1)
        rounds = units.sort(descending=True).values.view(-1, ranks)
        of_ranks = loads(sequence, rows)
        assert of_ranks.max() - of_ranks.min() <= (rounds[:, 0] - rounds[:, -1]).max()


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_long_sequence_is_balanced_to_a_few_percent_where_a_plain_cut_is_not(ranks):
    sequence, rows = assigned(document(2048, [2048], 32, 1), ranks)
    of_ranks = loads(sequence, rows).double()
    assert of_ranks.max() < 1.03 * of_ranks.mean()
    plain = loads(sequence, torch.arange(len(sequence)).view(ranks, -1)).double()
    assert plain.max() > 1.2 * plain.mean()


def test_a_rank_keeps_its_rows_and_their_predictions():
    sequence = random_sequence(1)
    generator = torch.Generator().manual_seed(0)
    N = 40
    sequence.tokens = torch.randperm(len(sequence), generator=generator)
    sequence.target_row = torch.randint(len(sequence), (N,), generator=generator)
    sequence.target_token = torch.arange(N)
    sequence.target_weight = torch.rand(N, generator=generator, dtype=torch.float64)
    sequence.target_response = torch.randint(sequence.responses, (N,), generator=generator)
    sequence.target_block, sequence.target_step = torch.arange(N) * 3, torch.arange(N) * 7
    sequence, rows = assigned(sequence, 3)
    seen = []
    for mine in rows:
        part = take_rows(sequence, mine)
        assert part.responses == sequence.responses and part.block_size == sequence.block_size
        for name in ("tokens", "document", "branch", "view", "block", "position"):
            assert torch.equal(getattr(part, name), getattr(sequence, name)[mine])
        target = part.target_token  # numbered 0 .. N-1
        assert torch.equal(mine[part.target_row], sequence.target_row[target])
        for name in ("target_weight", "target_response", "target_block", "target_step"):
            assert torch.equal(getattr(part, name), getattr(sequence, name)[target])
        seen += target.tolist()
    assert sorted(seen) == list(range(N))


def test_padding_alone_is_a_sequence():
    padding = pad_to(empty_sequence(4), 8, pad_id=3)
    assert padding.tokens.tolist() == [3] * 8 and padding.target_row.numel() == padding.responses == 0
    assert torch.equal(oracle_mask(padding), torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)).bool())
    assert {f.dtype for f in padding.coordinates()} == {torch.int64}


def attend_as(rank: int, sequence, rows, query, key, value, backend: str, width: int):
    """Attention of one rank's queries over everyone's keys in the order in which they are gathered."""
    coordinates, order = sequence.coordinates(), rows.flatten()
    keys = Coordinates(*(field[order] for field in coordinates))
    plan = plan_attention(coordinates.at(rows[rank]), sequence.block_size, backend, width, keys).plan
    return BACKENDS[backend].attend(query[rows[rank]], key[order], value[order], plan, 0.3)


@pytest.mark.parametrize("backend, width", [("sdpa", 8), ("sdpa", WIDE), ("flex", 8)])
@pytest.mark.parametrize("ranks, unit, padding", [(2, 4, 0), (3, 8, 1), (4, 4, 3)])
def test_attention_of_assigned_rows_equals_the_dense_softmax(backend, width, ranks, unit, padding):
    sequence, rows = assigned(random_sequence(padding, padding=padding), ranks, unit)
    inputs = [t.detach() for t in random_qkv(len(sequence), 4, 2, width=16)]
    expected = oracles.dense_attention(*inputs, oracle_mask(sequence), 0.3)
    for rank in range(ranks):
        out = attend_as(rank, sequence, rows, *inputs, backend, width)
        torch.testing.assert_close(out, expected[rows[rank]], rtol=0, atol=1e-10)
