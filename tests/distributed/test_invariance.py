"""A run's numbers do not depend on how it is spread over processes, packed or recomputed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import TINY_MODEL, Layout, disagreements, layout_metrics, uneven_pairs

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PREFERENCE = {
    **TINY_MODEL,
    "seq_length": 1200,
    "micro_batch_size": 8,
    "global_batch_size": 8,
    "num_views": 2,
    "steps_per_block": 4,
    "train_iters": 5,
    "lr": 1e-3,
    "min_lr": 1e-4,
}
SFT = {**PREFERENCE, "objective": "sft", "num_views": 1, "steps_per_block": 8}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
RECOMPUTE = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]}
MLP_ONLY = {"trainable_modules": ["mlp"]}
ELBO, VRPO = ({"estimator": name, "steps_per_block": 8} for name in ("elbo", "vrpo"))  # the default: it is not read
SIMPO = {"loss_type": ["simpo", "sft"], "loss_weights": [1.0, 0.5]}  # has no reference
TIED = {"untie_embeddings_and_output_weights": False}
# Norms of queries and keys, no biases, wide heads, blocks of 4, tokens read at their own rows.
QK_NORMS = {"trainable_modules": ["q_layernorm", "k_layernorm"]}
SDAR = {"family": "sdar", "add_qkv_bias": False, "qk_layernorm": True, "kv_channels": 12, "block_size": 4}
# The same layers under prediction shift 1; and neither norms nor biases.
QWEN3 = {**SDAR, "family": "qwen3", "block_size": 8}
LLAMA = {"family": "llama", "add_qkv_bias": False, "rotary_base": 500000.0, "norm_epsilon": 1e-5}

# One block for prompt and response, each view with the prompt before it; no biases, no groups of heads.
FULL = {"block_size": 0, "steps_per_block": 4}
LLADA = {**FULL, "family": "llada", "add_qkv_bias": False, "num_query_groups": 4, "rotary_base": 500000.0}
DREAM = {**FULL, "family": "dream"}  # tokens are read at the rows before them
AUTOREGRESSIVE = {"block_size": 1, "num_views": 1, "steps_per_block": 8}  # of the estimator exact, which reads none


LAYOUTS = {
    "one process": Layout(1, same_as=None),
    "one example per micro-batch": Layout(1, {"micro_batch_size": 1}),
    "one long sequence": Layout(1, {"seq_length": 8192}),
    "full recompute": Layout(1, RECOMPUTE),
    "TP2": Layout(2, TP2),
    "TP2 SP": Layout(2, {**TP2, "sequence_parallel": True}),
    "PP2": Layout(2, PP2),
    "TP2 x PP2": Layout(4, {**TP2, **PP2}),
    "DP2": Layout(2),
    "DP2 distributed optimizer": Layout(2, SHARDED),
    "DP2 overlapped": Layout(2, {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2 SP x DP2, all at once": Layout(
        4, {**TP2, **SHARDED, **RECOMPUTE, "sequence_parallel": True, "micro_batch_size": 3, "seq_length": 1000}
    ),
    "MLP only": Layout(1, MLP_ONLY, None),
    "MLP only, PP2": Layout(2, {**MLP_ONLY, **PP2, **RECOMPUTE}, "MLP only"),
    "MLP only, TP2 SP x DP2": Layout(
        4,
        {**MLP_ONLY, **TP2, **SHARDED, **SELECTIVE, "sequence_parallel": True, "overlap_grad_reduce": True},
        "MLP only",
    ),
    "tied": Layout(1, TIED, None),
    "tied, PP2": Layout(2, {**TIED, **PP2}, "tied"),
    "elbo": Layout(1, ELBO, None),
    "elbo, TP2 x PP2": Layout(4, {**ELBO, **TP2, **PP2, "micro_batch_size": 3}, "elbo"),
    "elbo, DP2": Layout(2, {**ELBO, **SHARDED, "seq_length": 1000}, "elbo"),
    "vrpo": Layout(1, VRPO, None),
    "vrpo, TP2 SP": Layout(2, {**VRPO, **TP2, "sequence_parallel": True, "micro_batch_size": 1}, "vrpo"),
    "sdar": Layout(1, SDAR, None),
    "sdar, TP2": Layout(2, {**SDAR, **TP2}, "sdar"),
    "sdar, norms of queries and keys": Layout(1, {**SDAR, **QK_NORMS}, None),
    # Each process norms the heads that it has; the norms' gradients are added up, with sequence parallelism or without.
    "sdar, norms of queries and keys, TP2": Layout(2, {**SDAR, **QK_NORMS, **TP2}, "sdar, norms of queries and keys"),
    "sdar, TP2 SP x PP2": Layout(4, {**SDAR, **TP2, **PP2, "sequence_parallel": True}, "sdar"),
    "sdar, PP2": Layout(2, {**SDAR, **PP2}, "sdar"),
    "sdar, CP2": Layout(2, {**SDAR, "context_parallel_size": 2}, "sdar"),
    "sdar, DP2": Layout(2, {**SDAR, **SHARDED, "seq_length": 1000}, "sdar"),
    "qwen3": Layout(1, QWEN3, None),
    "qwen3, TP2 SP x PP2": Layout(4, {**QWEN3, **TP2, **PP2, "sequence_parallel": True}, "qwen3"),
    "llama": Layout(1, LLAMA, None),
    "llama, TP2 SP x CP2": Layout(
        4, {**LLAMA, **TP2, "sequence_parallel": True, "context_parallel_size": 2, "micro_batch_size": 3}, "llama"
    ),
    "llada": Layout(1, LLADA, None),
    "llada, TP2 SP": Layout(2, {**LLADA, **TP2, "sequence_parallel": True}, "llada"),
    "llada, PP2 x CP2": Layout(4, {**LLADA, **PP2, "context_parallel_size": 2}, "llada"),
    "llada, DP2": Layout(2, {**LLADA, **SHARDED, "seq_length": 1000}, "llada"),
    "dream": Layout(1, DREAM, None),
    "dream, TP2 SP x CP2": Layout(4, {**DREAM, **TP2, "sequence_parallel": True, "context_parallel_size": 2}, "dream"),
    "dream, PP2": Layout(2, {**DREAM, **PP2, "micro_batch_size": 3}, "dream"),
    "autoregressive": Layout(1, AUTOREGRESSIVE, None),
    "autoregressive, TP2 SP": Layout(
        2, {**AUTOREGRESSIVE, **TP2, "sequence_parallel": True, "micro_batch_size": 3}, "autoregressive"
    ),
    "autoregressive, PP2": Layout(2, {**AUTOREGRESSIVE, **PP2}, "autoregressive"),
    "autoregressive, CP2": Layout(2, {**AUTOREGRESSIVE, "context_parallel_size": 2}, "autoregressive"),
    "autoregressive, DP2": Layout(2, {**AUTOREGRESSIVE, **SHARDED, "seq_length": 700}, "autoregressive"),
    "simpo": Layout(1, SIMPO, None),
    "simpo, TP2 x PP2": Layout(4, {**SIMPO, **TP2, **PP2, "micro_batch_size": 3}, "simpo"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("invariance")


@pytest.fixture(scope="module")
def metrics_of(folder, server) -> Callable[[str], list[dict]]:
    uneven_pairs(folder / "pairs.jsonl", 20)
    return layout_metrics(server.train, folder, LAYOUTS, **PREFERENCE, overlong="error")


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "elbo" not in name and "simpo" not in name])
def test_first_loss_is_ln_2(metrics_of, name):
    """Policy and reference are equal before the first step, and share their noise."""
    first = metrics_of(name)[0]
    assert 0.69314 < first["loss"] < 0.69316
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.same_as])
def test_metrics_do_not_depend_on_the_layout(metrics_of, name):
    assert disagreements(metrics_of(name), metrics_of(LAYOUTS[name].same_as)) == []


def test_the_runs_trained(metrics_of):
    """Agreement would be cheap if nothing moved, or if both ways to train were one."""
    rows = metrics_of("one process")
    assert all(abs(row["rewards/margins"]) > 1e-3 for row in rows[1:])
    assert all(
        disagreements(rows, metrics_of(other))
        for other in (
            "MLP only",
            "tied",
            "elbo",
            "vrpo",
            "simpo",
            "sdar",
            "qwen3",
            "llama",
            "llada",
            "dream",
            "autoregressive",
        )
    )
    assert abs(metrics_of("elbo")[0]["rewards/margins"]) > 1e-3  # its reference has other noise


def test_metrics_have_the_documented_keys(metrics_of):
    documented = ["iteration", "consumed_samples", "loss"]
    documented += ["rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"]
    documented += ["logps/chosen", "logps/rejected", "grad_norm", "lr", "pairs_per_second", "tokens_per_second"]
    rows = metrics_of("TP2 x PP2")
    assert [list(row) for row in rows] == [documented] * 5
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["consumed_samples"] for row in rows] == [8, 16, 24, 32, 40]
    assert all(row["pairs_per_second"] > 0 and row["tokens_per_second"] > 0 for row in rows)


def test_tensorboard_has_every_metric(metrics_of, folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = metrics_of("one process")
    events = EventAccumulator(str(folder / "one_process" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(rows[0]) - {"iteration"}
    logged = [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")]
    assert [(row["iteration"], row["loss"]) for row in rows] == logged


def test_sft_does_not_depend_on_the_layout(folder, server):
    records = uneven_pairs(folder / "sft_pairs.jsonl", 20, seed=1).read_text().replace('"chosen"', '"completion"')
    data = folder / "sft.jsonl"
    data.write_text(records)
    alone = server.train({**SFT, "data_path": data, "save": folder / "sft"})
    settings = {**SFT, **TP2, **PP2, "sequence_parallel": True, "data_path": data, "save": folder / "sft_tp2_pp2"}
    assert disagreements(server.train(settings, processes=4), alone) == []
    assert alone[-1]["loss"] < alone[0]["loss"]
