"""Core attention over the packed layout against a dense masked softmax."""

from __future__ import annotations

import functools
import itertools
import random
import subprocess
import sys

import pytest
import torch

from megatron_dtrpo.config.backends import BACKENDS, few_lengths
from megatron_dtrpo.diffusion.layout import Blocks, concatenate, lay_out, pad_to, visible
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.model import flex, segmented_sdpa
from megatron_dtrpo.model.attention import plan_attention
from megatron_dtrpo.model.flex import flex_kernel, flex_variants
from megatron_dtrpo.runtime import compiler
from megatron_dtrpo.runtime.compiler import compilations
from tests.support import oracles
from tests.support.launch import REPOSITORY

# Eager FlexAttention, which says that it is slow, is all that a CPU has.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

NARROW, WIDE = 8, 1 << 40  # widths for which calls are dear, so that runs share them, and for which they are free


def document(prompt_length: int, response_lengths, block_size: int, views: int):
    shapes = [(views, Blocks(prompt_length, n, block_size).count, block_size) for n in response_lengths]
    return lay_out(
        torch.zeros(prompt_length, dtype=torch.long),
        [torch.zeros(n, dtype=torch.long) for n in response_lengths],
        [torch.zeros(shape, dtype=torch.bool) for shape in shapes],
        [torch.zeros(shape) for shape in shapes],
        block_size=block_size,
        mask_id=1,
        block_start="noisy",
    )


def random_sequence(seed: int, block_size: int = 4, documents: int = 5, longest: int = 30, padding: int = 0):
    rng = random.Random(seed)
    sequence = concatenate(
        [
            document(
                rng.randint(1, longest),
                [rng.randint(1, longest) for _ in range(rng.choice([1, 2]))],
                block_size,
                rng.choice([1, 2]),
            )
            for _ in range(documents)
        ]
    )
    return pad_to(sequence, len(sequence) + padding * block_size, pad_id=0)


def oracle_mask(sequence) -> torch.Tensor:
    return oracles.sees_by_description(
        sequence.document, sequence.branch, sequence.view, sequence.position, sequence.block_size
    )


def random_qkv(length: int, heads: int, groups: int, width: int = 8, dtype=torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(length, n, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for n in (heads, groups, groups)
    ]


def attend(sequence, query, key, value, *, backend: str = "sdpa", width: int = NARROW, scale: float = 0.3):
    plan = plan_attention(sequence.coordinates(), sequence.block_size, backend, width=width)
    return BACKENDS[backend].attend(query, key, value, plan.plan, scale)


_sdpa = torch.nn.functional.scaled_dot_product_attention


def _strided_as_on_a_gpu(*args, **kwargs):
    """CUDA's kernels lay their output out as ``[batch, tokens, heads, d]``."""
    return _sdpa(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("width", [NARROW, WIDE])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("seed, padding", [(0, 0), (1, 3), (2, 1)])
@pytest.mark.parametrize("kernels", [segmented_sdpa.KERNELS, {}], ids=["the CPU's kernel", "any device's"])
def test_forward_and_gradients_equal_the_dense_softmax(seed, padding, heads, groups, width, kernels, monkeypatch):
    monkeypatch.setattr(segmented_sdpa, "KERNELS", kernels)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", _strided_as_on_a_gpu)
    sequence = random_sequence(seed, padding=padding)
    ours, theirs = (random_qkv(len(sequence), heads, groups) for _ in range(2))
    upstream = torch.randn(len(sequence), heads, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    out = attend(sequence, *ours, width=width)
    expected = oracles.dense_attention(*theirs, oracle_mask(sequence), 0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for mine, right in zip(
        torch.autograd.grad(out, ours, upstream), torch.autograd.grad(expected, theirs, upstream), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-11)


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_runs_longer_than_a_chunk(width):
    sequence = concatenate([document(700, [300, 20], 16, 1), document(40, [50, 30], 16, 1)])
    ours, theirs = (random_qkv(len(sequence), 2, 1) for _ in range(2))
    # The oracle's loop over every pair of tokens would take too long: one token stands for its block.
    of_blocks = oracles.sees_by_description(
        *(f[::16] for f in (sequence.document, sequence.branch, sequence.view, sequence.position)), 16
    )
    sees = of_blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)
    out = attend(sequence, *ours, width=width)
    expected = oracles.dense_attention(*theirs, sees, 0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    for mine, right in zip(
        torch.autograd.grad(out.square().sum(), ours), torch.autograd.grad(expected.square().sum(), theirs), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-11)


def test_bf16_is_close():
    sequence = random_sequence(3)
    inputs = random_qkv(len(sequence), 4, 2, dtype=torch.bfloat16)
    out = attend(sequence, *inputs)
    assert out.dtype == torch.bfloat16
    expected = oracles.dense_attention(*(t.double() for t in inputs), oracle_mask(sequence), 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.05)


@pytest.mark.parametrize("width", [NARROW, WIDE])
def test_the_plan_covers_what_is_seen_and_hides_the_rest(width):
    for seed in range(8):
        sequence = random_sequence(seed, padding=seed % 3)
        expected = oracle_mask(sequence)
        sees = torch.zeros_like(expected)
        chunks = plan_attention(sequence.coordinates(), sequence.block_size, "sdpa", width=width).plan
        assert [c.start for c in chunks] == [0, *(c.stop for c in chunks[:-1])] and chunks[-1].stop == len(sequence)
        for chunk in chunks:
            assert len(set(chunk.keys.tolist())) == len(chunk.keys)
            seen = torch.ones(chunk.stop - chunk.start, len(chunk.keys)).bool()
            if chunk.mask is not None:
                assert set(chunk.mask.flatten().tolist()) == {0.0, -torch.inf}
                seen = chunk.mask == 0
            sees[chunk.start : chunk.stop, chunk.keys] = seen
        assert torch.equal(sees, expected)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_other_documents_are_not_seen(backend):
    sequence = random_sequence(4, padding=2)
    query, key, value = (t.detach() for t in random_qkv(len(sequence), 4, 2))
    before = attend(sequence, query, key, value, backend=backend)
    for changed in sorted(set(sequence.document.tolist())):
        inside = sequence.document == changed
        other_key, other_value = key.clone(), value.clone()
        other_key[inside] += 100
        other_value[inside] -= 100
        after = attend(sequence, query, other_key, other_value, backend=backend)
        assert torch.equal(before[~inside], after[~inside])
        assert (before[inside] != after[inside]).any(-1).all()


def test_gradients_stay_within_a_document():
    sequence = random_sequence(5, padding=1)
    inputs = random_qkv(len(sequence), 4, 2)
    inside = sequence.document == 2
    for gradient in torch.autograd.grad(attend(sequence, *inputs)[inside].square().sum(), inputs):
        assert not gradient[~inside].any() and gradient[inside].any()


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2)])
@pytest.mark.parametrize("seed, padding", [(0, 0), (1, 3)])
def test_flex_attention_equals_the_dense_softmax(seed, padding, heads, groups):
    # Forward only: FlexAttention has no backward on CPU.
    sequence = random_sequence(seed, padding=padding)
    inputs = [t.detach() for t in random_qkv(len(sequence), heads, groups, width=16)]
    out = attend(sequence, *inputs, backend="flex")
    torch.testing.assert_close(out, oracles.dense_attention(*inputs, oracle_mask(sequence), 0.3), rtol=0, atol=1e-10)
    torch.testing.assert_close(out, attend(sequence, *inputs), rtol=0, atol=1e-10)


def test_compiled_flex_attention_meets_few_shapes_and_a_limit_that_is_an_error():
    """In a process of its own: the compiler knows torch's functions by identity, and some have been replaced for
    megatron-core's sake where other tests have run."""
    check = "from tests.unit import test_attention as t; t.compile_few_shapes(); t.reach_the_limit()"
    done = subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def compile_few_shapes():
    sequences = [random_sequence(seed, block_size=32, documents=2, longest=90) for seed in (0, 1, 3, 4)]
    lengths = [few_lengths(len(sequence)) for sequence in sequences]
    assert all(0 <= padded - len(s) <= max(511, len(s) / 8) for s, padded in zip(sequences, lengths, strict=True))
    before = compilations()
    for sequence, length in zip(sequences, lengths, strict=True):
        sequence = pad_to(sequence, length, pad_id=0)
        query, key, value = (t.detach().float() for t in random_qkv(length, 4, 2, width=16))
        plan = plan_attention(sequence.coordinates(), 32, "flex", width=64).plan
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, key, value))
        out = flex_kernel(True)(q, k, v, block_mask=plan, scale=0.3, enable_gqa=True).squeeze(0).transpose(0, 1)
        torch.testing.assert_close(out, attend(sequence, query, key, value), rtol=0, atol=1e-5)
    assert compilations() - before == len(set(lengths)) == 2


@pytest.mark.parametrize(
    "length, padded", [(1, 512), (512, 512), (1500, 1536), (7000, 7168), (7681, 8192), (8192, 8192), (8193, 9216)]
)
def test_few_lengths(length, padded):
    assert few_lengths(length) == padded


@pytest.mark.parametrize("longest", [1, 512, 8192, 32768])
def test_variants_are_three_for_each_length(longest):
    lengths = {few_lengths(length) for length in range(1, longest + 1)}
    assert flex_variants(longest) == 3 * len(lengths)


def reach_the_limit():
    """Nothing runs uncompiled in silence; and masks need few kernels for any length."""
    from torch.nn.attention.flex_attention import create_block_mask

    torch._dynamo.config.recompile_limit = 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "_LEAST", 2)
        patch.setattr(
            torch, "compile", functools.partial(torch.compile, backend="eager")
        )  # what is counted is the same
        twice = compiler.compiled(lambda x: x * 2)
        build = compiler.compiled(create_block_mask, dynamic=None)
    shapes = [torch.ones(length) for length in (2, 3, 4)]
    assert torch.equal(twice(shapes[0]), twice(shapes[0])) and twice(shapes[1]).numel() == 3
    with pytest.raises(UserError, match="was compiled 2 times.*--attention-backend sdpa"):
        twice(shapes[2])
    compiler.allow_variants(3)
    assert twice(shapes[2]).sum() == 8

    before = compilations()
    for length in (512, 1024, 1536, 2560):
        sequence = pad_to(random_sequence(0, block_size=32, documents=2), length, pad_id=0)
        coordinates = sequence.coordinates()

        def mask_mod(batch, head, query, key, seen=coordinates):
            return visible(seen.at(query), seen.at(key))

        mask = build(mask_mod, None, None, length, length, device="cpu", BLOCK_SIZE=128)
        dense = oracle_blocks(sequence, 128)
        assert torch.equal(mask.to_dense()[0, 0].bool(), dense)
    assert compilations() - before == 2


def oracle_blocks(sequence, grain: int) -> torch.Tensor:
    """Which tiles of ``grain`` tokens the mask leaves something of."""
    seen = visible(sequence.coordinates().at((slice(None), None)), sequence.coordinates().at((None, slice(None))))
    return seen.unfold(0, grain, grain).unfold(1, grain, grain).flatten(2).any(-1)


@pytest.mark.parametrize("together", [False, True], ids=["fused projection", "gathered keys and values"])
def test_flex_keeps_no_more_than_its_operands(monkeypatch, together):
    """What the backward pass would save must not be a view of something larger."""
    given = []

    def kernel(query, key, value, **kwargs):
        given.extend([key, value])
        return query

    monkeypatch.setattr(flex, "flex_kernel", lambda compile_it: kernel)
    fused = torch.randn(16, 2, 24)
    query, key, value = fused.split(8, -1)
    query, key = query.contiguous(), key if together else key.contiguous()
    BACKENDS["flex"].attend(query, key, value, None, 0.3)
    assert [t.untyped_storage().nbytes() for t in given] == [t.numel() * 4 for t in (key, value)]


def area(sequence, width: int) -> int:
    plan = plan_attention(sequence.coordinates(), sequence.block_size, "sdpa", width=width).plan
    return sum((chunk.stop - chunk.start) * len(chunk.keys) for chunk in plan)


def test_work_grows_with_the_documents_and_not_with_their_square():
    one = document(40, [60, 33], 8, 1)
    # Where a call costs nothing, no work is shared at all.
    assert area(concatenate([one] * 7), WIDE) == 7 * area(one, WIDE)
    # Where it costs something, sharing calls may add work, but only so much for every document.
    areas = {n: area(concatenate([one] * n), 2048) for n in (8, 16, 32, 64)}
    for n, m in itertools.pairwise(areas):
        assert areas[m] < 2.2 * areas[n]
    assert areas[64] < 0.05 * (64 * len(one)) ** 2


def test_work_of_a_long_document_is_near_what_the_mask_asks_for():
    sequence = document(1024, [1024, 1024], 32, 1)
    blocks = oracles.sees_by_description(
        *(f[::32] for f in (sequence.document, sequence.branch, sequence.view, sequence.position)), 32
    )
    needed = int(blocks.sum()) * 32**2
    assert needed <= area(sequence, 3584) < 1.25 * needed


def test_no_gradient_without_being_asked():
    sequence = random_sequence(0)
    inputs = random_qkv(len(sequence), 4, 2)
    with torch.no_grad():
        out = attend(sequence, *inputs)
    assert not out.requires_grad
    plan = plan_attention(sequence.coordinates(), 4, "sdpa", width=NARROW).plan
    assert torch.equal(out, segmented_sdpa.segmented_sdpa(*inputs, plan, 0.3).detach())
