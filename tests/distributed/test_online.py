"""Policy gradient is one program under every layout: rollouts, losses and gradient norms; and goes on where it was
killed."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.launch import TINY_MODEL, Layout, disagreements, layout_metrics, read_metrics, write_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ONLINE = {
    **TINY_MODEL,
    "objective": "policy_gradient",
    "rewards": ["tests.support.rewards:parity", "speed"],
    "reward_aggregation": "normalize_then_sum",
    "reward_workers": 1,
    "rollout_prompts": 4,
    "group_size": 3,
    "rollout_max_new_tokens": 21,
    "rollout_batch_size": 5,
    "kl_coefficient": 0.1,
    "seq_length": 2000,
    "train_iters": 3,
    "lr": 1e-3,
    "tensorboard": False,
}
BLOCKS = {"rollout_threshold": 0.006}  # several tokens a step
OVERLAPPED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
SAMPLED = {**BLOCKS, "estimator": "trajectory", "num_views": 2, "ratio": "step", "updates_per_rollout": 2}
SAMPLED |= {"clip": "always", "self_normalize": True, "clip_low": 1e-3, "clip_high": 2e-3}
SDAR = {**BLOCKS, "family": "sdar", "add_qkv_bias": False, "qk_layernorm": True, "kv_channels": 12, "block_size": 4}
SDAR |= {"rollout_small_block_size": 2}
LLADA = {"family": "llada", "block_size": 0, "add_qkv_bias": False, "num_query_groups": 4, "rollout_max_new_tokens": 9}
LLADA |= {"ratio": "sequence", "estimator": "vrpo", "num_views": 2}
REPLAYED = {**LLADA, "ratio": "token", "estimator": "exact_trajectory", "num_views": 1, "rollout_small_block_size": 3}
CAUSAL = {"block_size": 1}


LAYOUTS = {
    "one process": Layout(1, BLOCKS, None),
    "cut groups": Layout(1, {**BLOCKS, "seq_length": 90, "micro_batch_size": 1}),
    "TP2 SP": Layout(2, {**BLOCKS, **TP2, "sequence_parallel": True}),
    "CP2": Layout(2, {**BLOCKS, "context_parallel_size": 2}),
    "DP2": Layout(2, {**BLOCKS, **OVERLAPPED}),
    "PP2": Layout(2, {**BLOCKS, **PP2}),
    "virtual stages": Layout(2, {**BLOCKS, **PP2, "num_virtual_stages_per_pipeline_rank": 2}),
    "sampled": Layout(1, SAMPLED, None),
    "sampled, DP2": Layout(2, {**SAMPLED, **OVERLAPPED}, "sampled"),
    "sampled, TP2 x CP2": Layout(4, {**SAMPLED, **TP2, "context_parallel_size": 2}, "sampled"),
    "sdar": Layout(1, SDAR, None),
    "sdar, TP2 x PP2": Layout(4, {**SDAR, **TP2, **PP2}, "sdar"),
    "llada": Layout(1, LLADA, None),
    "llada, CP2": Layout(2, {**LLADA, "context_parallel_size": 2}, "llada"),
    "llada, exact": Layout(1, REPLAYED, None),
    "autoregressive": Layout(1, CAUSAL, None),
    "autoregressive, PP2": Layout(2, {**CAUSAL, **PP2}, "autoregressive"),
}
# Times, and what is zero up to rounding: the gap, and the loss where advantages that add up to 0 meet a ratio of 1.
UNCOMPARED = ("seconds/", "rollout/logp_gap")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("online")
    write_lines(folder / "pairs.jsonl", [{"prompt": "question " + "abc"[n % 3] * (3 * n)} for n in range(9)])
    return folder


@pytest.fixture(scope="module")
def metrics_of(folder, server) -> Callable[[str], list[dict]]:
    return layout_metrics(server.train, folder, LAYOUTS, **ONLINE)


def compared(rows: list[dict]) -> list[dict]:
    return [
        {key: value if abs(value) > 1e-9 else 0.0 for key, value in row.items() if not key.startswith(UNCOMPARED)}
        for row in rows
    ]


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.same_as])
def test_metrics_do_not_depend_on_the_layout(metrics_of, name):
    # A loss is a sum of gains of either sign, of about 1 each, which fp32 knows to some 1e-7.
    ours, theirs = compared(metrics_of(name)), compared(metrics_of(LAYOUTS[name].same_as))
    assert disagreements(ours, theirs, floors={"loss": 1e-7}) == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_computes_what_the_decoder_recorded(metrics_of, name):
    rows = metrics_of(name)
    assert all(row["rollout/logp_gap_max"] < 1e-4 for row in rows)
    assert all(row["grad_norm"] > 1e-3 and row["groups/trained"] > 1 for row in rows)
    assert rows[-1]["kl"] > 1e-7
    if "updates_per_rollout" not in LAYOUTS[name].settings:
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-9)
        assert all(row["ratio"] == pytest.approx(1, abs=1e-12) and row["clip/fraction"] == 0 for row in rows)


def rollouts_of(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "rollouts.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.same_as])
def test_rollouts_do_not_depend_on_the_layout(metrics_of, folder, name):
    found, expected = [], []
    for rollouts, one in ((found, name), (expected, LAYOUTS[name].same_as)):
        metrics_of(one)
        for line in rollouts_of(folder / one.replace(" ", "_").replace(",", "")):
            advantages = pytest.approx(line.pop("advantages"), abs=1e-9)
            rollouts.append((line, advantages if rollouts is expected else advantages.expected))
    assert found == expected and len(found) == 3


DECODING = "megatron_dtrpo.inference.decoder:BlockDecoder._round"
REWARDS = "megatron_dtrpo.online.reward_workers:RewardWorkers._with_news"
TRAINING = "megatron_dtrpo.training.engine:Engine.update"


def test_a_run_goes_on_under_another_layout_wherever_it_is_killed(metrics_of, server, folder):
    """In training, in scoring and in the rollout of the second iteration, one after the other."""
    save = folder / "killed"
    settings = {**ONLINE, **BLOCKS, "data_path": folder / "pairs.jsonl", "save": save, "save_interval": 1}
    # Before which call of a process, on which ranks, and under which layout.
    for moment, call, ranks, layout in ((TRAINING, 2, [0], {}), (REWARDS, 10, [0], TP2), (DECODING, 20, [0, 1], PP2)):
        events = [[moment, call, "SIGKILL", ranks]]
        processes = 2 if layout else 1
        statuses, output = server.run({**settings, **layout}, save.with_suffix(".log"), processes, events=events)
        assert statuses[0] == -signal.SIGKILL and all(statuses), output
        assert [row["iteration"] for row in read_metrics(save)] == [1]
    rows = server.train({**settings, "context_parallel_size": 2}, 2)
    assert disagreements(compared(rows), compared(metrics_of("one process"))) == []
    assert [line["iteration"] for line in rollouts_of(save)] == [1, 2, 3]
    assert read_metrics(save) == rows
    # The same prompts, which are rewarded otherwise, are other data.
    prompts = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    other = write_lines(folder / "other.jsonl", [{**row, "answer": 1} for row in prompts])
    statuses, output = server.run({**settings, "data_path": other}, save.with_suffix(".log"))
    assert statuses == [2] and f"error: {save}: this run compares with other answers, or its rows" in output, output


def test_a_sample_of_the_rollouts_is_kept(metrics_of, folder):
    metrics_of("one process")
    lines = [json.loads(line) for line in (folder / "one_process" / "rollouts.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(len(line["completions"]) == 3 for line in lines)
    for line in lines:
        assert sum(line["advantages"]) == pytest.approx(0, abs=1e-9)
        assert line["prompt"].startswith("question") and len(line["rewards"][0]) == 2


def test_mistakes_in_the_data_are_one_line_before_weights_load(server, folder):
    settings = {**ONLINE, "data_path": folder / "pairs.jsonl", "save": folder / "refused", "rewards": ["numeric"]}
    (status,), output = server.run({**settings, "reward_aggregation": "sum_then_normalize"}, folder / "refused.log")
    (line,) = [line for line in output.splitlines() if line.startswith("error:")]
    assert status == 2 and line == (
        f"error: 9 of 9 rows cannot be rewarded: {folder / 'pairs.jsonl'}:1: reward numeric: the row has no 'answer' "
        "to compare with"
    )
    assert not (folder / "refused" / "metrics.jsonl").exists()


def test_rows_without_an_answer_are_skipped_and_a_reward_that_always_fails_ends_the_run(server, folder):
    rows = [{"prompt": "question", "answer": 3}, {"prompt": "no answer"}, {"prompt": "other", "answer": "4"}]
    settings = {**ONLINE, "data_path": write_lines(folder / "rows.jsonl", rows), "save": folder / "failing"}
    settings |= {"rewards": ["numeric", "tests.support.rewards:broken"], "bad_rows": "skip"}
    (status,), output = server.run(settings, folder / "failing.log")
    place = f"{folder / 'rows.jsonl'}"
    assert f"warning: left out: 1 of 3 rows cannot be rewarded: {place}:2: reward numeric: the row has no" in output
    assert status == 2 and "error: iteration 1: no group has two answers with a reward: " in output
    assert "reward tests.support.rewards:broken raised KeyError in rewards.py:" in output


def test_a_run_that_learns_nothing_says_so_and_ends(server, folder):
    save = folder / "equal"
    settings = {**ONLINE, "data_path": folder / "pairs.jsonl", "save": save, "equal_iterations": 2, "train_iters": 4}
    settings |= {"rewards": ["tests.support.rewards:same"], "reward_aggregation": "sum_then_normalize"}
    (status,), output = server.run(settings, folder / "equal.log")
    assert status == 2 and output.count("warning: iteration") == 2
    assert "for 2 iterations in a row: take easier or harder prompts, more answers (group_size)" in output
    assert [row["groups/trained"] for row in read_metrics(save)] == [0, 0]


@pytest.mark.parametrize(("moment", "call"), [(DECODING, 30), (REWARDS, 3)], ids=["rollout", "rewards"])
def test_a_run_that_is_asked_to_stop_goes_on_later(metrics_of, server, folder, moment, call):
    save = folder / f"stopped in {moment.rpartition('.')[2]}"
    settings = {**ONLINE, **BLOCKS, **TP2, "data_path": folder / "pairs.jsonl", "save": save}
    events = [[moment, call, "SIGTERM", [0]]]
    statuses, output = server.run(settings, save.with_suffix(".log"), 2, timeout=120, events=events)
    assert statuses == [0, 0] and output.count("stopped by SIGTERM") == 1, output
    assert disagreements(compared(server.train(settings, 2)), compared(metrics_of("one process"))) == []
