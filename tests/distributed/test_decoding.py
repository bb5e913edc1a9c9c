"""Cached, batched decoding on the Megatron model against decoding that recomputes everything in every step."""

from __future__ import annotations

import random
from functools import partial
from itertools import product

import pytest
import torch

from megatron_dtrpo.diffusion.estimators import noise_generator
from tests.support import oracles
from tests.unit.test_full_attention import coin_of
from tools.benchmarks.peers.qwen2_weights import megatron_from_qwen2

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BLOCK, VOCAB, MASK, END = 32, 61, 60, 59
PADDED = 64
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "vocab_size": VOCAB,
    "make_vocab_size_divisible_by": PADDED,
    "rotary_base": 10000.0,
    "block_size": BLOCK,
}
NEW = 14
THRESHOLDS, SUB_BLOCKS = (0.5, 0.9, 1.0), (4, 8, 32)
SETTINGS = [dict(threshold=t, small_block_size=s) for t, s in product(THRESHOLDS, SUB_BLOCKS)]
APPROXIMATE = [dict(threshold=0.9, small_block_size=s, sub_block_cache=c) for s, c in ((4, "prefix"), (8, "dual"))]


def peer():
    """A float64 Qwen2 that is sure of some tokens and not of others."""
    model = oracles.qwen2(vocab_size=PADDED, seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
        model.lm_head.weight[END].mul_(1.3)  # some responses end early
    return model


def prompts() -> list[list[int]]:
    """Fifty of lengths on both sides of the boundaries at 32 and 64, so that most responses cross one."""
    rng = random.Random(0)
    lengths = [1, 2, 31, 32, 33, 63, 64, 65, 96] + [
        rng.choice((rng.randint(18, 36), rng.randint(50, 68))) for _ in range(41)
    ]
    return [[rng.randrange(END) for _ in range(length)] for length in lengths]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("decoding")


@pytest.fixture(scope="module")
def job() -> dict:
    model = peer()
    parameters = megatron_from_qwen2(model.state_dict(), heads=4, groups=2, tied=False)
    cases = [
        {"options": {"max_new_tokens": NEW, **setting}, "batch_size": batch}
        for setting in SETTINGS + APPROXIMATE
        for batch in (1, 5)
    ]
    vocabulary = {"vocab_size": VOCAB, "mask_id": MASK, "end_id": END}
    return {"model": MODEL, "parameters": parameters, "prompts": prompts(), "cases": cases, **vocabulary}


@pytest.fixture(scope="module")
def expected(job) -> dict:
    model = peer()
    known = {"block_size": BLOCK, "max_new_tokens": NEW, "mask_id": MASK, "end_id": END, "vocab_size": VOCAB}
    with torch.no_grad():
        return {
            tuple(setting.items()): [
                oracles.decode_without_cache(model, prompt, **known, **setting) for prompt in job["prompts"]
            ]
            for setting in SETTINGS + APPROXIMATE
        }


def decode(server, job: dict, folder, processes: int, stages: int = 1) -> list:
    torch.save(job, folder / "job.pt")
    worker = "tests.distributed.decoding_worker"
    server.call(worker, folder / "job.pt", stages, folder / "out.pt", processes=processes)
    return torch.load(folder / "out.pt", weights_only=False)


# Across processes one prompt at a time is slow, and the same code as five: one setting of it will do there; under a
# pipeline, a sample of all cases.
LAYOUTS = {
    "TP1": (1, 1, lambda cases: cases),
    "TP2": (2, 1, lambda cases: cases[:1] + cases[1::2]),
    "PP2": (2, 2, lambda cases: cases[::5]),
}


@pytest.mark.parametrize(("processes", "stages", "choose"), LAYOUTS.values(), ids=LAYOUTS)
def test_cached_decoding_is_decoding_without_cache(server, job, expected, tmp_path, processes, stages, choose):
    part = dict(job, cases=choose(job["cases"]))
    results = decode(server, part, tmp_path, processes, stages)
    for case, completions in zip(part["cases"], results, strict=True):
        setting = {key: value for key, value in case["options"].items() if key != "max_new_tokens"}
        for prompt, got, (tokens, steps) in zip(
            job["prompts"], completions, expected[tuple(setting.items())], strict=True
        ):
            assert (got.tokens, got.steps) == (tokens, steps), (case, len(prompt))


def test_prompts_through_flex_attention_give_the_same_tokens(server, job, expected, tmp_path):
    """What a GPU does: prompts padded to few lengths, one call a layer. Uncompiled here, which is a dense oracle."""
    part = dict(job, cases=job["cases"][1::9], attention_backend="flex")
    for case, completions in zip(part["cases"], decode(server, part, tmp_path, 1), strict=True):
        setting = {key: value for key, value in case["options"].items() if key != "max_new_tokens"}
        assert [(got.tokens, got.steps) for got in completions] == expected[tuple(setting.items())]


@pytest.mark.parametrize("processes, stages, backend", [(2, 1, "sdpa"), (2, 2, "flex")], ids=["TP2", "PP2"])
def test_full_attention_decodes_by_its_published_rule(server, job, tmp_path, processes, stages, backend):
    """The vocabulary in two shards, and in stages; under sequence parallelism too."""
    rules = [("static", 5, None), ("entropy", NEW, None), ("topk_margin", NEW, None), ("origin", NEW, None)]
    rules += [("entropy", 5, "prefix"), ("topk_margin", 5, "dual")]
    part = dict(job, model={**MODEL, "block_size": 0}, prompts=job["prompts"][:4], attention_backend=backend)
    part["sequence_parallel"] = stages == 1
    rules = rules if stages == 1 else rules[1::4]  # uncompiled FlexAttention is slow
    part["cases"] = [
        {
            "options": {
                "max_new_tokens": NEW,
                "rule": rule,
                "small_block_size": size,
                "denoising_steps": 3,
                "sub_block_cache": cache,
            },
            "batch_size": 3,
        }
        for rule, size, cache in rules
    ]
    model, known = peer(), {"gen_length": NEW, "steps": 3, "mask_id": MASK, "shift": 1, "vocab_size": VOCAB}
    for (rule, size, cache), found in zip(rules, decode(server, part, tmp_path, processes, stages), strict=True):
        how = dict(known, block_length=size, cache=cache)
        for index, (prompt, one) in enumerate(zip(part["prompts"], found, strict=True)):
            drawn = torch.rand(NEW, generator=noise_generator(0, -1, index, 0, 1), dtype=torch.float64)
            coin = partial(coin_of, drawn, len(prompt))
            with torch.no_grad():
                if rule == "static":
                    expected = oracles.decode_as_llada(model, prompt, **how)
                else:
                    expected = oracles.decode_as_dream(model, prompt, **how, alg=rule, coin=coin)
            assert (one.tokens, one.steps) == expected, (rule, cache, len(prompt))


@pytest.mark.parametrize(("processes", "stages", "changes"), [(2, 1, {"sequence_parallel": True}), (2, 2, {})])
def test_a_model_of_block_size_1_writes_token_by_token(server, job, tmp_path, processes, stages, changes):
    """Under sequence parallelism, as in periodic evaluation, too: two processes share a pass over five tokens."""
    case = {"options": {"max_new_tokens": NEW, "small_block_size": 1}, "batch_size": 5}
    part = {**job, "model": {**MODEL, "block_size": 1}, "cases": [case], "prompts": job["prompts"][:12], **changes}
    known = {"block_size": 1, "mask_id": MASK, "end_id": END, "vocab_size": VOCAB, "threshold": 0.9, **case["options"]}
    with torch.no_grad():
        expected = [oracles.decode_without_cache(peer(), prompt, **known) for prompt in part["prompts"]]
    (found,) = decode(server, part, tmp_path, processes, stages)
    assert [(got.tokens, got.steps) for got in found] == expected


def test_the_cases_are_worth_testing(expected):
    """Several tokens a step under low thresholds, responses that end and that do not, an approximation that shows."""
    exact = expected[tuple(dict(threshold=0.5, small_block_size=8).items())]
    strict = expected[tuple(dict(threshold=1.0, small_block_size=8).items())]
    assert sum(len(set(steps)) < len(steps) for _, steps in exact) > 10
    assert all(len(set(steps)) == len(steps) for _, steps in strict)
    ended = sum(tokens[-1] == END for tokens, _ in strict)
    assert 5 < ended < 45
    approximate = expected[tuple(APPROXIMATE[1].items())]
    assert approximate != expected[tuple(dict(threshold=0.9, small_block_size=8).items())]
