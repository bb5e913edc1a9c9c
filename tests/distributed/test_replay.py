"""What a recorded decoding replays is what the decoder did: every step, also in a block that ends early.

A random model decodes at temperature 1 with several end tokens, so that tokens are often written behind a later end
token and thrown away again. Three computations of each step's log-probability must agree: the decoder's own, through
its cache; one forward pass over the packed layout; and a float64 transformer with a forward pass a step.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict

import pytest
import torch

from megatron_dtrpo.config.decoding import RULES
from tests.support import oracles
from tools.benchmarks.peers.qwen2_weights import megatron_from_qwen2

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BLOCK, VOCAB, MASK, END_IDS = 8, 61, 60, (59, 3, 17, 30)
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
OPTIONS = [
    {"max_new_tokens": 30, "temperature": 1.0, "top_p": 1.0, "threshold": 0.2, "small_block_size": 8},
    {"max_new_tokens": 21, "temperature": 1.0, "top_p": 1.0, "threshold": 0.5, "small_block_size": 4},
    {"max_new_tokens": 30, "temperature": 0.0, "threshold": 0.2, "small_block_size": 8},
]
SDAR = {"family": "sdar", "add_qkv_bias": False, "qk_layernorm": True, "kv_channels": 12}
MODELS = {1: MODEL, 0: {**MODEL, **SDAR}}
OPTIONS = {1: OPTIONS, 0: OPTIONS[:1]}
# Every other rule by blocks, and Dream's under full attention: shift, model, rules.
RULED = {
    "sdar": (0, MODELS[0], [rule for rule in RULES if rule != "threshold"]),
    "full": (1, {**MODEL, "block_size": 0}, ["entropy", "topk_margin", "origin"]),
}
FEW = slice(4, 16, 9)  # prompts


def by_rule(rule: str) -> dict:
    how = {"max_new_tokens": 13, "temperature": 1.0, "top_p": 1.0, "denoising_steps": 3, "small_block_size": 8}
    return {**how, "rule": rule}


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    allowed = [token for token in range(MASK) if token not in END_IDS]
    return [[rng.choice(allowed) for _ in range(length)] for length in [*range(1, 19)] * 2]


@pytest.fixture(scope="module")
def peers() -> dict:
    """By prediction shift. Sure of some tokens; forbidden ones, the mask and the padding, are probable enough to be
    missed."""
    found = {1: oracles.qwen2(vocab_size=PADDED, seed=3), 0: oracles.qwen3(vocab_size=PADDED, seed=3)}
    with torch.no_grad():
        for model in found.values():
            model.lm_head.weight.mul_(2.0)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="module", params=[1, 2], ids=["TP1", "TP2"])
def results(request, peers, server, folder) -> dict:
    """Per shift, options and prompt: the completion, and (position, log-probability) by the packed layout."""
    known = {"prompts": prompts(), "vocab_size": VOCAB, "mask_id": MASK, "end_ids": END_IDS}
    jobs = {
        shift: {
            **known,
            "shift": shift,
            "model": MODELS[shift],
            "parameters": megatron_from_qwen2(peer.state_dict(), heads=4, groups=2, tied=False),
            "options": OPTIONS[shift],
        }
        for shift, peer in peers.items()
    }
    for name, (shift, model, rules) in RULED.items():
        jobs[name] = {**jobs[shift], "model": model, "options": list(map(by_rule, rules)), "prompts": prompts()[FEW]}
    torch.save(jobs, folder / "job.pt")
    server.call("tests.distributed.replay_worker", folder / "job.pt", folder / "out.pt", processes=request.param)
    return torch.load(folder / "out.pt", weights_only=False)


def written(prompt: list[int], completion) -> list[tuple[int, int, int, float]]:
    """(position, token, step, until) and confidence of everything that was written."""
    response = zip(completion.tokens, completion.steps, completion.confidence, strict=True)
    kept = [(len(prompt) + i, *one[:2], math.inf, one[2]) for i, one in enumerate(response)]
    return kept + [(len(prompt) + token.place, *token[1:]) for token in completion.discarded]


def by_step(values) -> dict[int, float]:
    total: dict[int, float] = defaultdict(float)
    for step, value in values:
        total[step] += value
    return total


def step_by_step(model, shift: int, prompt: list[int], everything) -> dict[int, float]:
    """What every step wrote, from a forward pass of its own over what was there."""
    total = {}
    for now in sorted({step for _, _, step, *_ in everything}):
        new = {p: token for p, token, step, *_ in everything if step == now}
        shown = dict(enumerate(prompt)) | {p: token for p, token, step, until, _ in everything if step < now <= until}
        begin = min(new) // BLOCK * BLOCK
        # With shift 1 a block's first token is read from the pass that finished the block before.
        length = begin if shift and begin in new else begin + BLOCK
        tokens = torch.tensor([shown.get(p, MASK) for p in range(length)])
        with torch.no_grad():
            logits = oracles.qwen2_logits(model, tokens, torch.arange(length), oracles.block_causal(length, BLOCK))
        log_probs = torch.log_softmax(logits[:, :VOCAB], -1)  # without the rows that pad it
        total[now] = sum(log_probs[p - shift, token].item() for p, token in new.items())
    return total


@pytest.mark.parametrize("shift", MODELS)
def test_every_step_is_replayed(peers, results, shift):
    thrown = 0
    for options, done in zip(OPTIONS[shift], results[shift], strict=True):
        for prompt, (completion, scores) in zip(prompts(), done, strict=True):
            everything = written(prompt, completion)
            step_of = {position: step for position, _, step, *_ in everything}
            decoder = by_step((step, math.log(confidence)) for *_, step, _, confidence in everything)
            packed = by_step((step_of[position], value) for position, value in scores)
            oracle = step_by_step(peers[shift], shift, prompt, everything)
            assert len(scores) == len(everything) == len(step_of)
            assert sorted(decoder) == sorted(packed) == sorted(oracle)
            for step in decoder:
                assert packed[step] == pytest.approx(decoder[step], abs=1e-4), (options, prompt, step)
                assert oracle[step] == pytest.approx(decoder[step], abs=1e-4), (options, prompt, step)
            assert completion.log_likelihood() == pytest.approx(sum(oracle.values()), abs=1e-4)
            thrown += len(completion.discarded)
    assert thrown > 20


@pytest.mark.parametrize("kind", RULED)
def test_every_rule_is_replayed(results, kind):
    """What sorts proposals is apart from their confidence: the one is forgotten, the other is what training knows."""
    shared = 0
    for rule, done in zip(RULED[kind][2], results[kind], strict=True):
        for prompt, (completion, scores) in zip(prompts()[FEW], done, strict=True):
            everything = written(prompt, completion)
            step_of = {position: step for position, _, step, *_ in everything}
            decoder = by_step((step, math.log(confidence)) for *_, step, _, confidence in everything)
            packed = by_step((step_of[position], value) for position, value in scores)
            assert packed == pytest.approx(decoder, abs=1e-4), (rule, prompt)
            shared += len(everything) - len(decoder)
    assert shared > 20


def test_the_discarded_tokens_matter(peers, results):
    """Without them the same recording is another number: what was seen, and what was written, is missing."""
    differences = []
    for done in results[1]:
        for prompt, (completion, _) in zip(prompts(), done, strict=True):
            if completion.discarded:
                kept = written(prompt, completion._replace(discarded=[]))
                differences.append(sum(step_by_step(peers[1], 1, prompt, kept).values()) - completion.log_likelihood())
    assert sum(abs(difference) > 0.1 for difference in differences) > 10
