"""The model on megatron-core against transformers' Qwen2 and Qwen3 with the same weights, with and without tensor
parallelism."""

from __future__ import annotations

import pytest
import torch

from megatron_dtrpo.config.estimators import EstimatorOptions
from megatron_dtrpo.diffusion.estimators import NoiseRequest, dtrpo, noise_generator
from megatron_dtrpo.diffusion.layout import Blocks, concatenate, lay_out, pad_to
from megatron_dtrpo.runtime import versions
from tests.support import oracles
from tools.benchmarks.peers.qwen2_weights import megatron_from_qwen2

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

VOCABULARY, MASK, B = 61, 60, 4
PADDED = 64
SHAPE = dict(hidden_size=32, ffn_hidden_size=48, heads=8, groups=4)
ROTARY_BASE = 10000.0

# name -> (peer, parallel settings, logit rows alive at once)
CASES = {
    "plain": ("untied", {}, 2048),
    "sequence_parallel": ("untied", {"sequence_parallel": True}, 2048),
    "tied": ("tied", {}, 2048),
    "tied_sequence_parallel": ("tied", {"sequence_parallel": True}, 2048),
    "logits_in_chunks": ("tied", {"sequence_parallel": True}, 7),
    "recompute": (
        "untied",
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        2048,
    ),
    "wide": ("wide", {}, 2048),
    "sdar": ("sdar", {}, 2048),
    "sdar_sequence_parallel": ("sdar", {"sequence_parallel": True}, 2048),
}
# With megatron-core's HybridModel, where it has one: name -> the case of the GPT model that it must equal.
HYBRID = {f"hybrid_{name}": name for name in CASES} if versions.has_hybrid_model() else {}
CASES |= {
    name: (peer, {**parallel, "model_class": "hybrid"}, rows)
    for name, (peer, parallel, rows) in ((name, CASES[same]) for name, same in HYBRID.items())
}
WIDE = ("wide", "sdar")  # in float64, so that hidden states agree to 1e-9
# Its tokens are read at their own rows.
SDAR = {"family": "sdar", "add_qkv_bias": False, "qk_layernorm": True, "kv_channels": 6}


def packed_sequence(block_start: str | None):
    """Four pairs on awkward places of the block grid, noised by dtrpo, and padding."""
    generator = torch.Generator().manual_seed(5)
    documents = []
    for index, (P, lengths) in enumerate([(3, (9, 1)), (8, (4, 13)), (9, (6, 7)), (6, (2, 3))]):
        noise = []
        for branch, length in enumerate(lengths, start=1):
            maskable = Blocks(P, length, B).maskable(block_start)
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
                block_start=block_start,
                shift=0 if block_start is None else 1,
            )
        )
    sequence = concatenate(documents)
    return pad_to(sequence, len(sequence) + 2 * B, pad_id=0)


def peer(name: str):
    """transformers' own model."""
    known = dict(vocab_size=VOCABULARY, rotary_base=ROTARY_BASE, **SHAPE)
    if name == "sdar":
        return oracles.qwen3(head_dim=SDAR["kv_channels"], dtype=torch.float64, **known)
    return oracles.qwen2(tied=name == "tied", dtype=torch.float64 if name in WIDE else torch.float32, **known)


def megatron(named, name: str) -> dict[str, torch.Tensor]:
    return megatron_from_qwen2(dict(named), SHAPE["heads"], SHAPE["groups"], tied=name == "tied")


def padded(parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters with rows below the vocabulary that would have large logits."""
    generator = torch.Generator().manual_seed(6)
    out = {}
    for name, parameter in parameters.items():
        full = parameter.detach()
        if len(full) == VOCABULARY:
            rows = torch.randn(PADDED - VOCABULARY, full.shape[1], generator=generator, dtype=full.dtype)
            full = torch.cat([full, 9 * rows])
        out[name] = full
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


@pytest.fixture(scope="module")
def sequences():
    """The packed sequence that each peer is run on."""
    clean = packed_sequence("clean")
    return {"untied": clean, "tied": clean, "wide": clean, "sdar": packed_sequence(None)}


@pytest.fixture(scope="module")
def expected(sequences):
    """Peer -> hidden states, log-probabilities of the targets and the gradients of their weighted sum."""
    out = {}
    for name, sequence in sequences.items():
        sees = oracles.sees_by_description(sequence.document, sequence.branch, sequence.view, sequence.position, B)
        model, hidden = peer(name), []
        model.model.register_forward_hook(lambda module, given, output, to=hidden: to.append(output.last_hidden_state))
        logits = oracles.qwen2_logits(model, sequence.tokens, sequence.position, sees)
        log_probs = torch.log_softmax(logits, -1)[sequence.target_row, sequence.target_token]
        (log_probs * sequence.target_weight.float()).sum().backward()
        gradients = megatron(((name, p.grad) for name, p in model.named_parameters()), name)
        out[name] = hidden[0][0].detach(), log_probs.detach(), gradients
    return out


@pytest.fixture(scope="module")
def case_file(sequences, folder):
    cases = {}
    for name, (whose, parallel, logit_rows) in CASES.items():
        settings = dict(
            num_layers=2,
            hidden_size=SHAPE["hidden_size"],
            ffn_hidden_size=SHAPE["ffn_hidden_size"],
            num_attention_heads=SHAPE["heads"],
            num_query_groups=SHAPE["groups"],
            rotary_base=ROTARY_BASE,
            vocab_size=VOCABULARY,
            make_vocab_size_divisible_by=PADDED,
            untie_embeddings_and_output_weights=whose != "tied",
            block_size=B,
            **(SDAR if whose == "sdar" else {"kv_channels": SHAPE["hidden_size"] // SHAPE["heads"]}),
        )
        cases[name] = dict(
            model=settings,
            parallel=parallel,
            logit_rows=logit_rows,
            parameters=padded(megatron(peer(whose).named_parameters(), whose)),
            sequence=sequences[whose],
            wide=whose in WIDE,
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
def test_log_probs_equal_qwen2(results, expected, ranks, name):
    hidden, log_probs, _ = expected[CASES[name][0]]
    got = results[ranks][name]
    close = dict(rtol=0, atol=1e-9 if hidden.dtype == torch.float64 else 1e-4)
    torch.testing.assert_close(got["log_probs"], log_probs, **close)
    torch.testing.assert_close(got["hidden"][:, 0], hidden, **close)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_equal_qwen2(results, expected, ranks, name):
    *_, gradients = expected[CASES[name][0]]
    got = results[ranks][name]["gradients"]
    assert set(got) == set(gradients)
    for parameter, gradient in gradients.items():
        scale = gradient.abs().max().item()
        assert scale > 1e-3, parameter  # the comparison compares something
        ours, padding = got[parameter].split([len(gradient), len(got[parameter]) - len(gradient)])
        torch.testing.assert_close(ours, gradient, rtol=0, atol=1e-4 * max(scale, 1), msg=parameter)
        assert not padding.any(), parameter


@pytest.mark.parametrize("name", HYBRID)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_hybrid_model_equals_the_gpt_model(results, ranks, name):
    got, expected = results[ranks][name], results[ranks][HYBRID[name]]
    torch.testing.assert_close(got["hidden"], expected["hidden"], rtol=0, atol=1e-6)
    assert set(got["gradients"]) == set(expected["gradients"])
    for parameter, gradient in expected["gradients"].items():
        torch.testing.assert_close(got["gradients"][parameter], gradient, rtol=1e-5, atol=1e-6, msg=parameter)
    for parameter, value in expected["initial"].items():
        assert torch.equal(got["initial"][parameter], value), parameter


@pytest.mark.parametrize("probability", oracles.SHARP)
@pytest.mark.parametrize("ranks", [1, 2])
def test_bf16_keeps_the_targets_gradient_where_the_model_is_sure(results, ranks, probability):
    _, _, expected = oracles.sharp_logits(probability, torch.bfloat16)
    got = results[ranks]["sharp gradients"][probability].double()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("ranks", [1, 2])
def test_padding_rows_of_the_vocabulary_are_not_there(results, ranks):
    """With two ranks the second has nothing else."""
    logits, target = oracles.padded_logits()
    tokens = logits[:, : oracles.FEW].requires_grad_()
    expected = torch.log_softmax(tokens, -1).gather(1, target[:, None])[:, 0]
    expected.sum().backward()
    log_probs, gradient = results[ranks]["padded"]
    torch.testing.assert_close(log_probs, expected.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient[:, : oracles.FEW], tokens.grad, rtol=0, atol=1e-12)
    assert not gradient[:, oracles.FEW :].any()


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
