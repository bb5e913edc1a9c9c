"""The packed layout computes what Fast-dLLM v2's plain layout computes, one response at a time."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from megatron_dtrpo.diffusion.layout import (
    PADDING_DOCUMENT,
    Blocks,
    PackedSequence,
    concatenate,
    lay_out,
    packed_length,
    pad_to,
    visible,
)
from tests.support import oracles

MASK = 60
B = 4

# (prompt length, response lengths), B = 4. Prompts: shorter than a block, ending on a boundary, one past it, one
# before it; responses: one token, exactly one block of tokens, ending on a boundary, many blocks.
PAIRS = [
    (2, (1, 13)),
    (1, (3, 4)),
    (3, (1, 2)),
    (4, (1, 4)),
    (4, (4, 9)),
    (5, (1, 4)),
    (5, (3, 18)),
    (8, (8, 1)),
    (9, (4, 11)),
    (7, (1, 5)),
    (11, (14, 2)),
]


@dataclass
class Document:
    prompt: torch.Tensor
    responses: list[torch.Tensor]
    masked: list[torch.Tensor]
    weight: list[torch.Tensor]

    def lay_out(self, block_start: str | None) -> PackedSequence:
        """None: with shift 0."""
        return lay_out(
            self.prompt,
            self.responses,
            self.masked,
            self.weight,
            block_size=B,
            mask_id=MASK,
            block_start=block_start,
            shift=0 if block_start is None else 1,
        )

    def masked_positions(self, response: int, view: int) -> set[int]:
        start = len(self.prompt) // B * B
        return {start + i for i, hidden in enumerate(self.masked[response][view].flatten().tolist()) if hidden}


def make_document(prompt_length, response_lengths, views, block_start, generator, serial) -> Document:
    """Random tokens, random masks, and on every maskable token of every view a weight that nothing else has."""
    masked, weight = [], []
    for length in response_lengths:
        start = prompt_length // B * B
        stop = -(-(prompt_length + length) // B) * B
        maskable = [
            prompt_length <= p < prompt_length + length and not (block_start == "clean" and p % B == 0)
            for p in range(start, stop)
        ]
        maskable = torch.tensor(maskable).view(-1, B)
        rate = torch.rand(views, maskable.shape[0], 1, generator=generator)
        masked.append(maskable & (torch.rand(views, *maskable.shape, generator=generator) < rate))
        weight.append(maskable * (2.0 + serial + torch.arange(views * maskable.numel()).view(views, -1, B)).double())
        serial += 10_000
    return Document(
        prompt=torch.randint(0, MASK, (prompt_length,), generator=generator),
        responses=[torch.randint(0, MASK, (n,), generator=generator) for n in response_lengths],
        masked=masked,
        weight=weight,
    )


def make_documents(geometries, views, block_start, seed=0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    return [
        make_document(p, r, views, block_start, generator, serial=20_000 * i) for i, (p, r) in enumerate(geometries)
    ]


@pytest.fixture(scope="module")
def model():
    return oracles.qwen2(vocab_size=61, dtype=torch.float64)


@torch.no_grad()
def packed_logits(model, sequence: PackedSequence) -> torch.Tensor:
    at = sequence.coordinates()
    sees = visible(at.at((slice(None), None)), at.at((None, slice(None))))
    return oracles.qwen2_logits(model, sequence.tokens, sequence.position, sees)


@torch.no_grad()
def plain_logits(model, document: Document, response: int, view: int):
    plain = oracles.plain_layout(
        document.prompt.tolist(),
        document.responses[response].tolist(),
        document.masked_positions(response, view),
        B,
        MASK,
    )
    return plain, oracles.qwen2_logits(model, plain.tokens, plain.position, plain.sees)


def assert_equals_plain_layout(model, documents, sequence, block_start) -> None:
    """Every packed row equals its plain row, and every response position is read, once a view, from where it ought."""
    logits = packed_logits(model, sequence)
    row_of = {
        key: row
        for row, key in enumerate(
            zip(
                sequence.document.tolist(),
                sequence.branch.tolist(),
                sequence.view.tolist(),
                sequence.position.tolist(),
                strict=True,
            )
        )
    }
    assert len(row_of) == len(sequence), "two packed rows are the same token"
    reads = list(
        zip(
            sequence.target_weight.tolist(),
            sequence.target_row.tolist(),
            sequence.target_token.tolist(),
            sequence.target_response.tolist(),
            strict=True,
        )
    )
    targets = {weight: (row, token, response) for weight, row, token, response in reads if weight != 1.0}
    of_weight_one = [(response, row, token) for weight, row, token, response in reads if weight == 1.0]
    compared, read, worst, response_number, expected_of_weight_one = set(), 0, 0.0, 0, []
    for d, document in enumerate(documents):
        P = len(document.prompt)
        first = P // B * B
        for r, response in enumerate(document.responses):
            for k in range(document.masked[r].shape[0]):
                plain, expected = plain_logits(model, document, r, k)

                # Every packed row of this response and view, and of the shared prompt.
                for p in range(plain.length):
                    rows = {"clean": (d, 0 if p < first else r + 1, 0, p), "noisy": (d, r + 1, k + 1, p)}
                    plain_rows = {"clean": plain.clean_row(p), "noisy": plain.noisy_row(p)}
                    for half, key in rows.items():
                        if key in row_of:
                            worst = max(worst, (logits[row_of[key]] - expected[plain_rows[half]]).abs().max().item())
                            compared.add(row_of[key])

                # Every response position is read from the row that the plain layout reads it from.
                for p in range(P, P + len(response)):
                    half, where = oracles.read_from(p, B, block_start)
                    plain_row = plain.clean_row(where) if half == "clean" else plain.noisy_row(where)
                    token = response[p - P].item()
                    if half == "clean":
                        row = row_of[(d, 0 if where < first else r + 1, 0, where)]
                        if k == 0:  # once for all views
                            expected_of_weight_one.append((response_number, row, token))
                            read += 1
                    else:
                        weight = document.weight[r][k].flatten()[p - first].item()
                        row, target_token, target_response = targets[weight]
                        assert (target_token, target_response) == (token, response_number)
                        read += 1
                    worst = max(worst, (logits[row] - expected[plain_row]).abs().max().item())
            response_number += 1
    assert worst < 1e-9
    assert compared == {row for row in range(len(sequence)) if sequence.document[row] != PADDING_DOCUMENT}
    assert read == len(sequence.target_row), "something is read that is no response token"
    assert sorted(of_weight_one) == sorted(expected_of_weight_one)
    assert sequence.responses == response_number


@pytest.mark.parametrize("block_start", ["clean", "noisy", None])
@pytest.mark.parametrize("views", [1, 2])
def test_pairs_equal_the_plain_layout(model, views, block_start):
    documents = make_documents(PAIRS, views, block_start)
    sequence = concatenate([d.lay_out(block_start) for d in documents])
    assert_equals_plain_layout(model, documents, sequence, block_start)


@pytest.mark.parametrize("block_start", ["clean", "noisy", None])
def test_single_responses_equal_the_plain_layout(model, block_start):
    # Fine-tuning: one response to a prompt.
    documents = make_documents([(p, r[:1]) for p, r in PAIRS], 2, block_start, seed=1)
    sequence = concatenate([d.lay_out(block_start) for d in documents])
    assert_equals_plain_layout(model, documents, sequence, block_start)


def test_the_comparison_can_fail(model):
    documents = make_documents(PAIRS[:3], 1, "clean")
    sequence = concatenate([d.lay_out("clean") for d in documents])
    sequence.target_row[-1] -= 1
    with pytest.raises(AssertionError):
        assert_equals_plain_layout(model, documents, sequence, "clean")
    sequence = concatenate([d.lay_out("clean") for d in documents])
    sequence.branch[sequence.document == 1] = 1  # the responses of the second pair see each other
    with pytest.raises(AssertionError):
        assert_equals_plain_layout(model, documents, sequence, "clean")


@pytest.mark.parametrize("extra", [0, B, 5 * B])
def test_padding_changes_nothing(model, extra):
    documents = make_documents(PAIRS[:4], 1, "clean")
    sequence = concatenate([d.lay_out("clean") for d in documents])
    padded = pad_to(sequence, len(sequence) + extra, pad_id=7)
    assert len(padded) == len(sequence) + extra
    for name in ("target_row", "target_token", "target_weight", "target_response"):
        assert torch.equal(getattr(padded, name), getattr(sequence, name))
    assert_equals_plain_layout(model, documents, padded, "clean")
    logits = packed_logits(model, padded)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits[: len(sequence)], packed_logits(model, sequence), rtol=0, atol=1e-12)


def test_a_block_of_padding_sees_itself_only():
    sequence = make_documents(PAIRS[:2], 1, "clean")[0].lay_out("clean")
    padded = pad_to(sequence, len(sequence) + 3 * B, pad_id=7)
    at = padded.coordinates()
    sees = visible(at.at((slice(None), None)), at.at((None, slice(None))))
    n = len(sequence)
    assert not sees[:n, n:].any() and not sees[n:, :n].any()
    assert torch.equal(sees[n:, n:], torch.block_diag(*[torch.ones(B, B)] * 3).bool())


@pytest.mark.parametrize("views", [1, 2])
def test_the_predicate_is_the_description(views):
    documents = make_documents(PAIRS[4:8], views, "clean")
    sequence = pad_to(concatenate([d.lay_out("clean") for d in documents]), 400, pad_id=0)
    at = sequence.coordinates()
    sees = visible(at.at((slice(None), None)), at.at((None, slice(None))))
    assert torch.equal(
        sees,
        oracles.sees_by_description(sequence.document, sequence.branch, sequence.view, sequence.position, B),
    )


def test_documents_do_not_see_each_other(model):
    documents = make_documents(PAIRS[:3], 1, "clean")
    alone = [packed_logits(model, d.lay_out("clean")) for d in documents]
    together = packed_logits(model, concatenate([d.lay_out("clean") for d in documents]))
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)


def test_packed_length_is_the_length():
    random.seed(0)
    prompts, responses, lengths = [], [], []
    for _ in range(150):
        block_size, views = random.choice([2, 4, 5, 8]), random.choice([1, 2, 3])
        P, R = random.randint(1, 20), [random.randint(1, 20) for _ in range(random.choice([1, 2]))]
        counts = [Blocks(P, n, block_size).count for n in R]
        sequence = lay_out(
            torch.zeros(P, dtype=torch.long),
            [torch.zeros(n, dtype=torch.long) for n in R],
            [torch.zeros(views, c, block_size, dtype=torch.bool) for c in counts],
            [torch.zeros(views, c, block_size) for c in counts],
            block_size=block_size,
            mask_id=1,
            block_start="noisy",
        )
        assert packed_length(P, R, block_size, views) == len(sequence)
        assert len(sequence) % block_size == 0
        if len(R) == 2 and block_size == 4 and views == 1:
            prompts.append(P), responses.append(R), lengths.append(len(sequence))
    assert len(lengths) > 3
    columns = np.array(responses, dtype=np.int32).T
    assert packed_length(np.array(prompts, dtype=np.int32), columns, 4, 1).tolist() == lengths


@pytest.mark.parametrize("P, R", [(p, r) for p in range(1, 10) for r in range(1, 10)])
def test_blocks(P, R):
    blocks = Blocks(P, R, B)
    holding = sorted({p // B for p in range(P, P + R)})
    assert (blocks.first, blocks.count, blocks.start) == (holding[0], len(holding), holding[0] * B)
    response = {p for p in range(P, P + R)}
    grid = [[b * B + i for i in range(B)] for b in holding]
    assert blocks.is_response().tolist() == [[p in response for p in row] for row in grid]
    assert blocks.maskable("noisy").tolist() == [[p in response for p in row] for row in grid]
    assert blocks.maskable("clean").tolist() == [[p in response and p % B != 0 for p in row] for row in grid]


@pytest.mark.parametrize("block_start", ["clean", "noisy"])
def test_targets_of_a_document_written_out(block_start):
    # Positions:       0   1   2   3 | 4   5   6   7 | 8   9
    # Tokens:          1   2   3   4   5  11  12  13  14  15(end)         prompt is 1..5, B = 4
    masked = torch.tensor([[[0, 1, 0, 1], [0, 1, 0, 0]]]).bool()
    weight = torch.tensor([[[0, 3.0, 0, 0], [5.0 if block_start == "noisy" else 0, 7.0, 0, 0]]])
    if block_start == "noisy":
        masked[0, 1, 0] = True
    sequence = lay_out(
        torch.tensor([1, 2, 3, 4, 5]),
        [torch.tensor([11, 12, 13, 14, 15])],
        [masked],
        [weight],
        block_size=4,
        mask_id=MASK,
        block_start=block_start,
    )
    M = MASK
    noisy_second = [M if block_start == "noisy" else 14, M, M, M]  # the tail after the end token is [MASK]
    assert sequence.tokens.tolist() == [1, 2, 3, 4] + [5, 11, 12, 13] + [5, M, 12, M] + noisy_second
    assert sequence.position.tolist() == [0, 1, 2, 3] + [4, 5, 6, 7] + [4, 5, 6, 7] + [8, 9, 10, 11]
    assert sequence.branch.tolist() == [0] * 4 + [1] * 12
    assert sequence.view.tolist() == [0] * 8 + [1] * 8
    fields = (sequence.target_row, sequence.target_token, sequence.target_weight)
    targets = [tuple(row) for row in zip(*(field.tolist() for field in fields), strict=True)]
    # Token 11 is read from the noisy copy of token 5 (row 8), token 15 from the noisy row of token 14 (row 12); token
    # 14 starts a block: from the clean row of token 13 (row 7), or from its noisy row (row 11).
    if block_start == "clean":
        assert sorted(targets) == [(7, 14, 1.0), (8, 11, 3.0), (12, 15, 7.0)]
    else:
        assert sorted(targets) == [(8, 11, 3.0), (11, 14, 5.0), (12, 15, 7.0)]
    assert sequence.target_response.tolist() == [0, 0, 0]
    assert sequence.target_weight.dtype == torch.float64


def test_responses_are_numbered_through_the_sequence():
    documents = make_documents([(2, (3, 5)), (4, (1, 1)), (6, (9, 2))], 2, "clean")
    sequence = concatenate([d.lay_out("clean") for d in documents])
    assert sequence.responses == 6
    numbers = [2 * d + b - 1 for d, b in zip(sequence.document.tolist(), sequence.branch.tolist(), strict=True)]
    for row, response in zip(sequence.target_row.tolist(), sequence.target_response.tolist(), strict=True):
        # A row of the shared prompt serves either response of its document.
        assert response == numbers[row] or (
            sequence.branch[row] == 0 and response // 2 == sequence.document[row].item()
        )


def test_the_tail_is_masked_and_never_read():
    for P, R in [(2, 3), (4, 1), (5, 6), (7, 4)]:
        documents = make_documents([(P, (R, R + 1))], 2, "clean", seed=P)
        sequence = documents[0].lay_out("clean")
        for r, length in enumerate((R, R + 1)):
            after = (sequence.branch == r + 1) & (sequence.position >= P + length)
            assert (sequence.tokens[after] == MASK).all()
            assert not after[sequence.target_row].any()
        assert (sequence.target_token != MASK).all()


@pytest.mark.parametrize("block_start", ["clean", "noisy", None])
@pytest.mark.parametrize(
    ("prompt_length", "response_length", "turns"),
    [
        (5, 21, [(0, 6), (11, 21)]),  # two turns in different blocks
        (4, 11, [(0, 2), (3, 5), (6, 11)]),  # three within two blocks
        (6, 14, [(0, 2), (6, 7), (10, 14)]),  # beginning and ending on boundaries
        (1, 9, [(0, 3), (8, 9)]),
    ],
)
def test_each_turn_is_laid_out_as_a_response_of_its_own(model, prompt_length, response_length, turns, block_start):
    """Every prediction sees what it would see were the turn the only response, after everything that comes before."""
    generator = torch.Generator().manual_seed(1)
    prompt, response = (torch.randint(0, MASK, (n,), generator=generator) for n in (prompt_length, response_length))
    alone = []
    for number, (begin, end) in enumerate(turns):
        one = make_document(prompt_length + begin, (end - begin,), 2, block_start, generator, serial=10_000 * number)
        one.prompt, one.responses = torch.cat([prompt, response[:begin]]), [response[begin:end]]
        assert_equals_plain_layout(model, [one], one.lay_out(block_start), block_start)
        alone.append(one)
    masked, weight = (torch.cat([getattr(one, name)[0] for one in alone], 1) for name in ("masked", "weight"))
    known = {"block_size": B, "mask_id": MASK, "block_start": block_start, "shift": 0 if block_start is None else 1}
    sequence = lay_out(prompt, [response], [masked], [weight], turns=[turns], **known)
    sequence_length = packed_length(prompt_length, [response_length], B, 0, [2 * masked.shape[1]])
    assert len(sequence) == sequence_length

    def predictions(packed: PackedSequence) -> tuple[dict, list]:
        """Token and logits by weight, of which each token in each view has its own; and of weight 1, in order."""
        logits = packed_logits(model, packed)[packed.target_row]
        found = list(zip(packed.target_weight.tolist(), packed.target_token.tolist(), logits, strict=True))
        ones = [(token, row) for weight, token, row in found if weight == 1.0]
        return {weight: (token, row) for weight, token, row in found if weight != 1.0}, ones

    together, ones = predictions(sequence)
    expected, expected_ones = {}, []
    for one in alone:
        found, found_ones = predictions(one.lay_out(block_start))
        expected |= found
        expected_ones += found_ones
    assert together.keys() == expected.keys()
    pairs = [(together[weight], expected[weight]) for weight in expected] + list(zip(ones, expected_ones, strict=True))
    assert len(pairs) == len(sequence.target_row)
    for (token, row), (expected_token, expected_row) in pairs:
        assert token == expected_token and (row - expected_row).abs().max() < 1e-9
