"""The model on megatron-core against transformers' Qwen2 with the same weights, with and without tensor parallelism."""

from __future__ import annotations

import pytest
import torch

from megatron_dtrpo.config.estimators import EstimatorOptions
from megatron_dtrpo.diffusion.estimators import NoiseRequest, dtrpo, noise_generator
from megatron_dtrpo.diffusion.layout import Blocks, concatenate, lay_out, pad_to
from tests.support import oracles
from tools.benchmarks.peers.qwen2_weights import megatron_from_qwen2

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

VOCABULARY, MASK, B = 64, 63, 4
SHAPE = dict(hidden_size=32, ffn_hidden_size=48, heads=8, groups=4)
ROTARY_BASE = 10000.0

# name -> (tied embeddings, parallel settings, logit rows alive at once)
CASES = {
    "plain": (False, {}, 2048),
    "sequence_parallel": (False, {"sequence_parallel": True}, 2048),
    "tied": (True, {}, 2048),
    "tied_sequence_parallel": (True, {"sequence_parallel": True}, 2048),
    "logits_in_chunks": (True, {"sequence_parallel": True}, 7),
    "recompute": (
        False,
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        2048,
    ),
}


def packed_sequence():
    """Four pairs on awkward places of the block grid, noised by dtrpo, and padding."""
    generator = torch.Generator().manual_seed(5)
    documents = []
    for index, (P, lengths) in enumerate([(3, (9, 1)), (8, (4, 13)), (9, (6, 7)), (6, (2, 3))]):
        noise = []
        for branch, length in enumerate(lengths, start=1):
            maskable = Blocks(P, length, B).maskable("clean")
            generators = [noise_generator(7, 0, index, branch, view) for view in (1, 2)]
            noise.append(dtrpo(NoiseRequest(maskable, generators, EstimatorOptions(steps_per_block=2))))
        documents.append(
            lay_out(
                torch.randint(0, MASK, (P,), generator=generator),
                [torch.randint(0, MASK, (n,), generator=generator) for n in lengths],
                [n.masked for n in noise],
                [n.weight for n in noise],
                block_size=B,
                mask_id=MASK,
                block_start="clean",
            )
        )
    sequence = concatenate(documents)
    return pad_to(sequence, len(sequence) + 2 * B, pad_id=0)


def qwen2(tied: bool):
    return oracles.qwen2(vocab_size=VOCABULARY, tied=tied, rotary_base=ROTARY_BASE, dtype=torch.float32, **SHAPE)


def megatron(named, tied: bool) -> dict[str, torch.Tensor]:
    return megatron_from_qwen2(dict(named), SHAPE["heads"], SHAPE["groups"], tied)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def sequence():
    return packed_sequence()


@pytest.fixture(scope="module")
def expected(sequence):
    """tied -> Qwen2's log-probabilities of the targets and the gradients of their weighted sum."""
    sees = oracles.sees_by_description(sequence.document, sequence.branch, sequence.view, sequence.position, B)
    out = {}
    for tied in (False, True):
        model = qwen2(tied)
        logits = oracles.qwen2_logits(model, sequence.tokens, sequence.position, sees)
        log_probs = torch.log_softmax(logits, -1)[sequence.target_row, sequence.target_token]
        (log_probs * sequence.target_weight.float()).sum().backward()
        gradients = megatron(((name, p.grad) for name, p in model.named_parameters()), tied)
        out[tied] = log_probs.detach(), gradients
    return out


@pytest.fixture(scope="module")
def case_file(sequence, folder):
    cases = {}
    for name, (tied, parallel, logit_rows) in CASES.items():
        settings = dict(
            num_layers=2,
            hidden_size=SHAPE["hidden_size"],
            ffn_hidden_size=SHAPE["ffn_hidden_size"],
            num_attention_heads=SHAPE["heads"],
            num_query_groups=SHAPE["groups"],
            kv_channels=SHAPE["hidden_size"] // SHAPE["heads"],
            rotary_base=ROTARY_BASE,
            vocab_size=VOCABULARY,
            make_vocab_size_divisible_by=4,
            untie_embeddings_and_output_weights=not tied,
            block_size=B,
        )
        cases[name] = dict(
            model=settings,
            parallel=parallel,
            logit_rows=logit_rows,
            parameters={n: p.detach() for n, p in megatron(qwen2(tied).named_parameters(), tied).items()},
            sequence=sequence,
            seed=21,
        )
    path = folder / "cases.pt"
    torch.save(cases, path)
    return path


@pytest.fixture(scope="module")
def results(case_file, server):
    """Tensor-parallel size -> what `model_worker.py` wrote."""
    out = {}
    for ranks in (1, 2):
        target = case_file.with_name(f"tp{ranks}.pt")
        server.call("tests.distributed.model_worker", case_file, target, processes=ranks)
        out[ranks] = torch.load(target)
    return out


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_log_probs_equal_qwen2(results, expected, sequence, ranks, name):
    log_probs, _ = expected[CASES[name][0]]
    got = results[ranks][name]
    assert got["log_probs"].dtype == torch.float32
    torch.testing.assert_close(got["log_probs"], log_probs, rtol=0, atol=1e-4)
    assert got["hidden_shape"] == (len(sequence), 1, SHAPE["hidden_size"])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_equal_qwen2(results, expected, ranks, name):
    _, gradients = expected[CASES[name][0]]
    got = results[ranks][name]["gradients"]
    assert set(got) == set(gradients)
    for parameter, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 1e-3, parameter  # the comparison compares something
        torch.testing.assert_close(got[parameter], gradient, rtol=0, atol=1e-4 * max(scale, 1), msg=parameter)


@pytest.mark.parametrize("probability", oracles.SHARP)
@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_keeps_the_targets_gradient_where_the_model_is_sure(results, ranks, probability):
    _, _, expected = oracles.sharp_logits(probability, torch.bfloat16)
    got = results[ranks]["sharp gradients"][probability].double()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_initial_weights_do_not_depend_on_tensor_parallelism(results, name):
    one, two = (results[ranks][name]["initial"] for ranks in (1, 2))
    assert set(one) == set(two)
    for parameter, full in one.items():
        assert torch.equal(two[parameter], full), parameter


def test_initial_weights_are_what_they_should_be(results):
    initial = results[1]["plain"]["initial"]
    for name, full in initial.items():
        if name.endswith("bias"):
            assert not full.any(), name
        elif full.dim() == 1:
            assert (full == 1).all(), name
        else:
            small = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            std = 0.02 / (2 * 2) ** 0.5 if small else 0.02  # the default, 2 layers
            assert full.std().item() == pytest.approx(std, rel=0.15), name
            assert abs(full.mean().item()) < 5 * std / full.numel() ** 0.5, name
    matrices = [full.flatten()[:16] for full in initial.values() if full.dim() == 2]
    for n, first in enumerate(matrices):
        assert not any(torch.allclose(first, other) for other in matrices[:n])
    tied = results[1]["tied"]["initial"]
    assert all(torch.equal(tied[name], initial[name]) for name in tied)
