"""Rounds are `pairs` and `train` by hand, one after the other, under every layout, and go on where they were killed or
stopped."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from megatron_dtrpo.checkpoint.iterations import TRACKER
from megatron_dtrpo.online.rollouts import rollout_seed
from tests.support.launch import TINY_MODEL, disagreements, read_metrics, write_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

DECODING = {"max_new_tokens": 21, "threshold": 0.006, "batch_size": 5}
TRAINING = {"train_iters": 2, "global_batch_size": 4, "lr": 1e-3, "num_views": 2, "tensorboard": False, "seed": 7}
ROUNDS = {
    **TRAINING,
    **{f"rollout_{key}": value for key, value in DECODING.items()},
    "rounds": 2,
    "rewards": ["tests.support.rewards:even"],
    "reward_workers": 1,
    "group_size": 4,
    "pairs_per_prompt": 2,
}
TP2 = {"tensor_model_parallel_size": 2}
INTERLEAVED = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
OVERLAPPED = {"overlap_grad_reduce": True, "overlap_param_gather": True}
NAMES = [f"round-{number}" for number in (1, 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rounds")
    write_lines(folder / "prompts.jsonl", [{"prompt": "question " + "abc"[n % 3] * (3 * n)} for n in range(6)])
    write_lines(folder / "sft.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    return folder


@pytest.fixture(scope="module")
def sft(server, folder) -> Path:
    """A start that answers at random, with an end now and then."""
    settings = {**TINY_MODEL, "objective": "sft", "data_path": folder / "sft.jsonl", "tensorboard": False}
    server.train({**settings, "train_iters": 12, "lr": 3e-3, "global_batch_size": 4, "save": folder / "sft"})
    return folder / "sft"


@pytest.fixture(scope="module")
def settings(folder, sft) -> dict:
    return {**ROUNDS, "data_path": folder / "prompts.jsonl", "load": sft}


@pytest.fixture(scope="module")
def alone(server, folder, settings) -> Path:
    """Two rounds on one process, and what they printed beside their folder."""
    return rounds(server, {**settings, "save": folder / "alone"})


def rounds(server, settings: dict, processes: int = 1) -> Path:
    save = settings["save"]
    statuses, output = server.run(settings, save.with_suffix(".log"), processes)
    assert statuses == [0] * processes and "is the run of the last round" in output, output
    return save


def of_rounds(save: Path) -> list[list[dict]]:
    return [read_metrics(save / name) for name in NAMES]


def pairs_of(save: Path) -> list[list[dict]]:
    """Without likelihoods, which are rounded under another layout."""
    files = [(save / name / "pairs.jsonl").read_text().splitlines() for name in NAMES]
    return [[{k: v for k, v in json.loads(line).items() if "likelihood" not in k} for line in lines] for lines in files]


def by_hand(
    server, save: Path, start: Path, settings: dict, number: int, options: dict, adapter: dict | None = None
) -> Path:
    """`pairs` and `train`: one round from ``start``. ``adapter``: for both, ``options``: for the latter."""
    save.mkdir()
    words = {**DECODING, "checkpoint": start, "prompts": settings["data_path"], "output": save / "pairs.jsonl"}
    words |= adapter or {}
    words |= {"samples": 4, "pairs_per_prompt": 2, "verifier": ROUNDS["rewards"][0], "seed": rollout_seed(7, number)}
    statuses, output = server.run(words, save / "pairs.log", verb="pairs")
    assert statuses == [0], output
    options = {**options, **(adapter or {})}
    server.train({**TRAINING, **options, "load": start, "data_path": save / "pairs.jsonl", "save": save})
    return save


@pytest.mark.parametrize("moves", [False, True], ids=["reference kept", "reference moved"])
def test_rounds_are_pairs_and_train_by_hand(server, folder, settings, alone, sft, moves):
    save = rounds(server, {**settings, "move_reference": True, "save": folder / "moved"}) if moves else alone
    if moves:
        first = alone / "round-1"  # the same, and done
    else:
        first = by_hand(server, folder / "by hand 1", sft, settings, 1, {})
    second = by_hand(server, folder / f"by hand 2 {moves}", first, settings, 2, {} if moves else {"reference": sft})
    for one, name in zip((first, second), NAMES, strict=True):
        assert (one / "pairs.jsonl").read_bytes() == (save / name / "pairs.jsonl").read_bytes()
        assert disagreements(read_metrics(one), read_metrics(save / name), tolerance=0.0) == []
    start = read_metrics(second)[0]["rewards/margins"]
    assert (start == 0) == moves  # the second round starts at its reference, or away from it


LORA = {"lora_rank": 3, "lora_alpha": 6.0, "lr": 1e-2}


def test_rounds_of_adapters_go_on_with_the_last_one(server, folder, settings, sft):
    """By hand; and killed while the second round trains, under another layout."""
    save = rounds(server, {**settings, **LORA, "save": folder / "adapters"})
    first = by_hand(server, folder / "adapters by hand 1", sft, settings, 1, LORA)
    second = by_hand(server, folder / "adapters by hand 2", sft, settings, 2, LORA, {"load_adapter": first})
    for one, name in zip((first, second), NAMES, strict=True):
        assert (one / "pairs.jsonl").read_bytes() == (save / name / "pairs.jsonl").read_bytes()
        assert disagreements(read_metrics(one), read_metrics(save / name), tolerance=0.0) == []
    assert pairs_of(save)[0] != pairs_of(save)[1]
    assert read_metrics(second)[0]["rewards/margins"] != 0  # of the weights without an adapter

    killed = {**settings, **LORA, "save": folder / "adapters killed", "save_interval": 1}
    server.kill(killed, 2, lambda: (killed["save"] / "round-2" / TRACKER).exists(), 0.0)
    rounds(server, {**killed, **TP2}, 2)
    assert pairs_of(killed["save"]) == pairs_of(save)
    for ours, theirs in zip(of_rounds(killed["save"]), of_rounds(save), strict=True):
        assert disagreements(ours, theirs) == []
    (status,), output = server.run({**killed, "lora_rank": 4}, folder / "other rank.log")
    assert status == 2 and "these rounds have lora_rank 3, not 4: give another folder" in output, output


def test_every_round_has_answers_of_its_own(alone):
    first, second = ({tuple(row["chosen_ids"]) for row in rows} for rows in pairs_of(alone))
    assert first and second and not first & second


def test_what_is_said(alone, sft):
    lines = alone.with_suffix(".log").read_text().splitlines()
    for number, start in ((1, sft), (2, alone / "round-1")):
        seed = rollout_seed(7, number)
        assert f"round {number} of 2: {start} answers all prompts, with --seed {seed}" in lines
    pairs = [len(rows) for rows in pairs_of(alone)]
    measured = [json.loads((alone / name / "answers.json").read_text()) for name in NAMES]
    for row, count in zip(measured, pairs, strict=True):
        assert (row["pairs"], row["answers"], row["prompts"]) == (count, 24, 6)
        assert row["reward/mean"] == row["reward/accuracy"] and row["tokens"] == 24 * row["response/length"]
    found = [line for line in lines if "different answers" in line]
    assert len(found) == 2 and all(f", {count} pairs of " in line for count, line in zip(pairs, found, strict=True))


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (4, {**TP2, "sequence_parallel": True, **INTERLEAVED}),
        (4, {"use_distributed_optimizer": True, **OVERLAPPED, "context_parallel_size": 2}),
    ],
    ids=["TP2 x PP2", "CP2 x DP2"],
)
def test_rounds_do_not_depend_on_the_layout(server, folder, settings, alone, processes, layout):
    save = folder / "-".join(layout)[:20]
    rounds(server, {**settings, **layout, "save": save}, processes)
    assert pairs_of(save) == pairs_of(alone)
    for ours, theirs in zip(of_rounds(save), of_rounds(alone), strict=True):
        assert disagreements(ours, theirs) == []


DECODER = "megatron_dtrpo.inference.decoder:BlockDecoder._round"
STEP = "megatron_dtrpo.training.trainer:Trainer._step"


def test_rounds_go_on_where_they_were_interrupted(server, folder, settings, alone):
    """Stopped while the first round decodes, killed while it trains, stopped in its last step, and killed while the
    second one decodes, each time under another layout."""
    save = folder / "interrupted"
    settings = {**settings, "save": save, "save_interval": 1}

    def stop(before: str, call: int, number: int, **layout) -> None:
        log, processes = folder / f"stopped {number}.log", 2 if layout else 1
        events = [[before, call, "SIGTERM", [0]]]
        statuses, output = server.run({**settings, **layout}, log, processes, events=events)
        assert statuses == [0] * processes and "stopped by SIGTERM" in output, output
        assert output.splitlines()[-1] == f"round {number} of 2 is not finished: start the same command again"
        assert not (save / f"round-{number}" / "pairs.jsonl").exists()

    stop(DECODER, 8, 1)
    server.kill({**settings, **TP2}, 2, lambda: (save / "round-1" / TRACKER).exists(), 0.0)
    stop(STEP, 1, 2, **TP2)
    written = (save / "round-1" / "pairs.jsonl").stat().st_mtime_ns
    server.kill(settings, 1, lambda: (save / "round-2").exists(), 0.0)
    assert not (save / "round-2" / "pairs.jsonl").exists()
    rounds(server, settings)
    assert (save / "round-1" / "pairs.jsonl").stat().st_mtime_ns == written
    assert pairs_of(save) == pairs_of(alone)
    for ours, theirs in zip(of_rounds(save), of_rounds(alone), strict=True):
        assert disagreements(ours, theirs) == []


def test_more_rounds_later_and_no_other_ones(server, folder, settings, alone):
    """Finished rounds are not made again; others than these are refused, with what differs."""
    times = {path: path.stat().st_mtime_ns for path in (alone / "round-1").glob("*.jsonl")}
    log = (folder / f"again {number}.log" for number in itertools.count())
    (status,), output = server.run({**settings, "save": alone, "rounds": 3, "round_prompts": 5}, next(log))
    assert status == 2 and f"error: {alone}: these rounds have round_prompts None, not 5: give another folder" in output
    (status,), output = server.run({**settings, "save": alone, "rounds": 3}, next(log))
    assert status == 0 and "round 1 of 3" not in output and "nothing to do: iteration 2 is reached" in output, output
    assert {path: path.stat().st_mtime_ns for path in (alone / "round-1").glob("*.jsonl")} == times
    assert len(read_metrics(alone / "round-3")) == 2
    (status,), output = server.run({**settings, "save": alone}, next(log))
    assert status == 2 and f"error: rounds 2: {alone} has 3 already: give as many or more" in output
    prompts = [json.loads(line) for line in settings["data_path"].read_text().splitlines()]
    other = write_lines(folder / "other.jsonl", [{**row, "answer": 1} for row in prompts])
    (status,), output = server.run({**settings, "save": alone, "rounds": 3, "data_path": other}, next(log))
    assert status == 2 and f"error: {alone}: these rounds have rows of fingerprint" in output, output


def test_prompts_of_a_round_are_the_next_ones(server, folder, settings):
    rows = [{"prompt": f"question {n}", "answer": n} for n in range(5)]
    held = {"eval_interval": 2, "eval_data_path": write_lines(folder / "next.jsonl", rows), "eval_max_new_tokens": 9}
    asked = {"data_path": folder / "next.jsonl", "round_prompts": 3, "group_size": 8}
    save = rounds(server, {**settings, **asked, **held, "save": folder / "next"})
    first, second = ({row["answer"] for row in rows} for rows in pairs_of(save))
    assert first <= {0, 1, 2} and second <= {3, 4, 0} and 3 in second | {4}
    for name in NAMES:
        evaluations = [json.loads(line) for line in (save / name / "eval.jsonl").read_text().splitlines()]
        assert [row["iteration"] for row in evaluations] == [0, 2] and "eval/exact_match" in evaluations[0]
    assert "5 prompts have no pair" not in save.with_suffix(".log").read_text()


MISTAKES = {
    "moved": ({"lora_rank": 3, "move_reference": True}, "move_reference with lora_rank: "),
    "no pairs": (
        {"rewards": ["tests.support.rewards:same"]},
        "round 1 of 2: no prompt has a better and a worse answer (",
    ),
    "no answer": ({"rewards": ["numeric"]}, "6 of 6 rows cannot be rewarded: "),
    "too many": ({"round_prompts": 7}, "round_prompts 7: "),
    "a run's folder": ({"save": "sft"}, "is the folder of a run without rounds: give another folder"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(server, folder, settings, name):
    changed, words = MISTAKES[name]
    save = folder / changed.get("save", name.replace(" ", "-"))
    processes = 2 if name == "no pairs" else 1
    statuses, output = server.run({**settings, **changed, "save": save}, folder / f"{name}.log", processes)
    lines = [line for line in output.splitlines() if line.startswith("error:")]
    assert statuses == [2] * processes and len(lines) == 1 and words in lines[0], output
    assert "Traceback" not in output
