"""Dealing and packing lose nothing, and what a step trains on does not depend on them."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
import torch

from megatron_dtrpo.config.estimators import EstimatorOptions
from megatron_dtrpo.data.batches import BatchBuilder, Noising
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.packing import balance, pack
from megatron_dtrpo.data.sampler import SampleOrder
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer


def random_costs(seed: int, count: int, longest: int = 400) -> list[int]:
    rng = random.Random(seed)
    return [rng.choice([rng.randint(1, longest), rng.randint(1, longest // 10), longest // 2]) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_balance_deals_everything_once_and_evenly(seed):
    rng = random.Random(seed)
    parts = rng.randint(1, 8)
    costs = random_costs(seed, parts * rng.randint(1, 9))
    assigned = balance(costs, parts)
    assert len(assigned) == parts
    assert sorted(i for part in assigned for i in part) == list(range(len(costs)))
    assert {len(part) for part in assigned} == {len(costs) // parts}
    totals = [sum(costs[i] for i in part) for part in assigned]
    assert max(totals) - min(totals) <= max(costs)
    assert balance(list(costs), parts) == assigned


def test_balance_is_better_than_dealing_in_order():
    gaps = []
    for seed in range(50):
        costs = random_costs(seed, 64)
        for parts_of in (balance(costs, 8), [list(range(i, 64, 8)) for i in range(8)]):
            totals = [sum(costs[i] for i in part) for part in parts_of]
            gaps.append(max(totals) / (sum(costs) / 8))
    assert sum(gaps[::2]) / 50 < 1.05 < sum(gaps[1::2]) / 50


@pytest.mark.parametrize("count, parts", [(7, 3), (1, 4), (9, 2), (0, 3)])
def test_balance_of_what_does_not_divide(count, parts):
    assigned = balance(random_costs(0, count), parts)
    assert len(assigned) == parts
    assert sorted(i for part in assigned for i in part) == list(range(count))
    assert max(len(part) for part in assigned) <= -(-count // parts)


@pytest.mark.parametrize("seed", range(30))
def test_pack_respects_budget_and_most(seed):
    rng = random.Random(seed)
    costs = random_costs(seed, rng.randint(1, 60))
    items = rng.sample(range(len(costs)), rng.randint(1, len(costs)))
    budget, most = rng.choice([400, 500, 2000]), rng.choice([1, 2, 5, 100])
    groups = pack(costs, items, budget, most)
    assert sorted(i for group in groups for i in group) == sorted(items)
    assert all(group for group in groups)
    assert all(sum(costs[i] for i in group) <= budget and len(group) <= most for group in groups)
    # No two groups would have fitted into one: first fit never leaves two groups half empty.
    if most == 100:
        totals = [sum(costs[i] for i in group) for group in groups]
        assert all(a + b > budget for n, a in enumerate(totals) for b in totals[:n])
    assert pack(costs, list(reversed(items)), budget, most) == groups


def test_pack_of_nothing():
    assert pack([5, 6], [], 10, 3) == []


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer("ByteLevelTokenizer")


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tokenizer):
    """kind -> a store of 23 examples of very unequal length."""
    folder = tmp_path_factory.mktemp("stores")
    rng = random.Random(0)

    def text(longest: int) -> str:
        return "".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, longest)))

    rows = [{"prompt": text(30), "chosen": text(40) + "+", "rejected": text(20) + "-"} for _ in range(23)]
    out = {}
    for kind in ("preference", "sft"):
        path = folder / f"{kind}.jsonl"
        lines = rows if kind == "preference" else [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out[kind] = build_token_store(path, kind, tokenizer, folder / "cache")
    return out


def noising(kind: str, tokenizer, **changes) -> Noising:
    settings = Noising(
        estimator={"preference": "dtrpo", "sft": "sft"}[kind],
        options=EstimatorOptions(steps_per_block=3),
        num_views=2,
        block_start={"preference": "clean", "sft": "noisy"}[kind],
        block_size=4,
        mask_id=tokenizer.mask_id,
        seed=11,
    )
    return dataclasses.replace(settings, **changes)


def build_step(store, noise, *, consumed, global_batch, micro_batch, budget, ranks, seed=11):
    """Every micro-batch of a step, of all ranks."""
    order = SampleOrder(torch.arange(len(store)).numpy(), seed)
    out = []
    for rank in range(ranks):
        builder = BatchBuilder(
            store,
            order,
            noise,
            global_batch_size=global_batch,
            micro_batch_size=micro_batch,
            seq_length=budget,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )
        out.append(builder.step(consumed))
    return out


def contents(micro_batch) -> dict[Sample, tuple]:
    """What a packed sequence holds of each sample, apart from where it lies in the sequence."""
    sequence, out = micro_batch.sequence, {}
    per_document = sequence.responses // len(micro_batch.samples)
    for d, sample in enumerate(micro_batch.samples):
        inside = (sequence.document == d).nonzero().squeeze(1)
        first = inside[0].item()
        assert inside.tolist() == list(range(first, first + len(inside)))
        own = sequence.target_response // per_document == d
        assert sample not in out
        out[sample] = (
            sequence.tokens[inside].tolist(),
            sequence.branch[inside].tolist(),
            sequence.view[inside].tolist(),
            sequence.position[inside].tolist(),
            (sequence.target_row[own] - first).tolist(),
            sequence.target_token[own].tolist(),
            sequence.target_weight[own].tolist(),
            (sequence.target_response[own] - d * per_document).tolist(),
            micro_batch.response_length[d * per_document : (d + 1) * per_document].tolist(),
        )
    return out


def union(steps) -> dict[Sample, tuple]:
    out: dict[Sample, tuple] = {}
    for micro_batches in steps:
        for micro_batch in micro_batches:
            found = contents(micro_batch)
            assert not out.keys() & found.keys(), "a sample is computed twice"
            out |= found
    return out


LAYOUTS = [
    dict(micro_batch=1, budget=700, ranks=1),
    dict(micro_batch=3, budget=700, ranks=1),
    dict(micro_batch=8, budget=1500, ranks=2),
    dict(micro_batch=100, budget=100_000, ranks=4),
    dict(micro_batch=100, budget=500, ranks=1),  # of which the budget is the bound
    dict(micro_batch=2, budget=700, ranks=8),
]


@pytest.mark.parametrize("kind", ["preference", "sft"])
@pytest.mark.parametrize("consumed", [0, 16, 40])  # the second and third cross the end of an epoch
def test_a_step_is_the_same_however_it_is_spread(stores, tokenizer, kind, consumed):
    store, noise = stores[kind], noising(kind, tokenizer)
    wanted = None
    for layout in LAYOUTS:
        steps = build_step(store, noise, consumed=consumed, global_batch=16, **layout)
        for micro_batch in (m for micro_batches in steps for m in micro_batches):
            assert len(micro_batch.sequence) <= layout["budget"]
            assert len(micro_batch.samples) <= layout["micro_batch"]
        got = union(steps)
        wanted = wanted or got
        assert got == wanted
    order = SampleOrder(torch.arange(len(store)).numpy(), 11)
    assert set(wanted) == set(order.take(consumed, 16)) and len(wanted) == 16


def test_noise_changes_with_the_epoch_and_the_seed_and_nothing_else(stores, tokenizer):
    store = stores["preference"]
    layout = dict(global_batch=23, micro_batch=4, budget=700, ranks=1)
    noise = noising("preference", tokenizer)
    first = union(build_step(store, noise, consumed=0, **layout))
    second = union(build_step(store, noise, consumed=23, **layout))
    other = union(build_step(store, dataclasses.replace(noise, seed=12), consumed=0, **layout))
    tokens = {
        name: {sample.index: held[0] for sample, held in step.items()}
        for name, step in {"first": first, "second": second, "other": other}.items()
    }
    long = [i for i in range(23) if store.lengths[1][i].sum() > 20]
    assert len(long) > 10
    assert all(tokens["first"][i] != tokens["second"][i] for i in long)
    assert all(tokens["first"][i] != tokens["other"][i] for i in long)
    # Another order of the same samples: same noise.
    reordered = union(build_step(store, noise, consumed=0, **layout, seed=99))
    assert reordered == first and list(reordered) != list(first)


@pytest.mark.parametrize("kind", ["preference", "sft"])
def test_a_micro_batch_holds_the_examples_it_names(stores, tokenizer, kind):
    store = stores[kind]
    noise = noising(kind, tokenizer)
    layout = dict(global_batch=16, micro_batch=4, budget=700, ranks=2)
    for sample, held in union(build_step(store, noise, consumed=8, **layout)).items():
        tokens, branch, view, position, _, target_token, target_weight, target_response, lengths = held
        example = store[sample.index]
        assert lengths == [len(r) for r in example.responses]
        assert len(tokens) == noise.packed_length(len(example.prompt), lengths)
        clean = {(b, p): t for t, b, v, p in zip(tokens, branch, view, position, strict=True) if v == 0}
        for b, response in enumerate(example.responses, start=1):
            whole = [*example.prompt.tolist(), *response.tolist()]
            for (where, p), token in clean.items():
                if where in (0, b):
                    assert token == whole[p]
            targets = [t for t, r in zip(target_token, target_response, strict=True) if r == b - 1]
            assert set(targets) <= set(response.tolist())
        if kind == "sft":  # complementary views: every token of the response once per pair of views
            assert sorted(target_token) == sorted(2 * example.responses[0].tolist())
            assert set(target_weight) == {0.5}


def test_chosen_and_rejected_have_noise_of_their_own(tokenizer):
    prompt, response = torch.arange(1, 5), torch.arange(5, 45)
    document = noising("preference", tokenizer, num_views=1).document(Sample(0, 0), prompt, [response, response])
    noisy = document.view == 1
    chosen, rejected = (document.tokens[noisy & (document.branch == b)].tolist() for b in (1, 2))
    assert len(chosen) == len(rejected) and chosen != rejected


@pytest.mark.parametrize("estimator, shared", [("elbo", False), ("vrpo", True), ("dtrpo", True), ("mean_field", True)])
def test_the_reference_sees_the_same_samples_in_the_same_places(stores, tokenizer, estimator, shared):
    store = stores["preference"]
    policy = noising("preference", tokenizer, estimator=estimator)
    layout = dict(consumed=16, global_batch=16, micro_batch=3, budget=700, ranks=2)
    for mine, theirs in zip(
        build_step(store, policy, **layout), build_step(store, policy.for_reference(), **layout), strict=True
    ):
        assert [batch.samples for batch in mine] == [batch.samples for batch in theirs]
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one.sequence.position, other.sequence.position)
            assert torch.equal(one.response_length, other.response_length)
            for view in (1, 2):
                of_view = one.sequence.view == view
                same = torch.equal(one.sequence.tokens[of_view], other.sequence.tokens[of_view])
                assert same == shared, f"view {view}"


def test_recorded_steps_reach_the_noise(tokenizer, tmp_path):
    """Through the store and the builder: each noisy block of a decoding that unmasked from right to left, one token a
    step, shows a tail of its tokens and reads the last one that is masked."""
    rng = random.Random(1)
    rows = []
    for _ in range(12):
        row = {"prompt_ids": [rng.randrange(256) for _ in range(rng.randint(1, 9))]}
        for name in ("chosen", "rejected"):
            places = range(len(row["prompt_ids"]), len(row["prompt_ids"]) + rng.randint(1, 15))
            row[f"{name}_ids"] = [rng.randrange(256) for _ in places]
            row[f"{name}_steps"] = [p // 4 * 5 + (4 - p % 4 if p % 4 else 0) for p in places]
            row[f"{name}_discarded"] = []
        rows.append(row)
    path = tmp_path / "recorded.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = build_token_store(path, "preference", tokenizer, tmp_path / "cache")
    noise = noising("preference", tokenizer, estimator="trajectory")
    (micro_batches,) = build_step(store, noise, consumed=0, global_batch=12, micro_batch=4, budget=700, ranks=1)
    moments = set()
    for sample, held in union([micro_batches]).items():
        tokens, branch, view, position, target_row, _, target_weight, _, _ = held
        P = len(rows[sample.index]["prompt_ids"])
        for b, name in enumerate(("chosen", "rejected"), start=1):
            end = P + len(rows[sample.index][f"{name}_ids"])
            for v in (1, 2):
                where = [i for i in range(len(tokens)) if branch[i] == b and view[i] == v]
                shown = {position[i]: tokens[i] for i in where}
                reads = {position[r] + 1: w for r, w in zip(target_row, target_weight, strict=True) if r in where}
                for first in range(P // 4 * 4, end, 4):
                    own = [p for p in range(max(first, P), min(first + 4, end)) if p % 4]
                    hidden = [p for p in own if shown[p] == tokenizer.mask_id]
                    assert hidden == own[: len(hidden)]
                    assert [p for p in own if p in reads] == hidden[-1:]
                    assert all(reads[p] == len(own) / 2 for p in hidden[-1:])
                    moments.add((len(own), len(hidden)))
    assert moments == {(m, t) for m in range(4) for t in range(1, m + 1)} | {(0, 0)}
