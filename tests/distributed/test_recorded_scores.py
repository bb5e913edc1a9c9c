"""Training and decoding are one policy, through the commands: what `score --estimator exact_trajectory` finds for the
responses that `pairs` wrote is the sum of the decoder's own log-confidences, under every layout."""

from __future__ import annotations

import json
import random

import pytest

from tests.support.launch import TINY_MODEL, flags, write_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NAMES = ("chosen", "rejected")
VERIFIER = "tests.distributed.test_recorded_scores:has_a_vowel_late"
LAYOUTS = {
    "TP2 x PP2": (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}),
    "CP2": (2, {"context_parallel_size": 2}),
    "DP2": (2, {}),
}


def has_a_vowel_late(row: dict, text: str) -> bool:
    """A verifier that calls about half of what an untaught model writes right."""
    return any(letter in "abcdefgh" for letter in text[len(text) // 2 :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("recorded")


@pytest.fixture(scope="module")
def pairs(folder, server) -> list[dict]:
    """Pairs of a model that has learned to end, sampled several tokens a step, so that some are thrown away."""
    rng = random.Random(0)
    rows = [
        {"prompt": "abcd"[: i % 4 + 1] * (i % 5 + 1), "completion": "".join(rng.choices("aeklm", k=rng.randint(1, 14)))}
        for i in range(32)
    ]
    data = write_lines(folder / "sft.jsonl", rows)
    training = {**TINY_MODEL, "objective": "sft", "data_path": data, "global_batch_size": 32, "train_iters": 12}
    server.train({**training, "lr": 5e-3, "save": folder / "run"})
    files = {"checkpoint": folder / "run", "prompts": data, "output": folder / "pairs.jsonl"}
    options = {"samples": 8, "verifier": VERIFIER, "max_new_tokens": 40, "threshold": 0.1}
    verb(server, "pairs", {**files, **options}, folder / "pairs.log")
    found = [json.loads(line) for line in files["output"].read_text().splitlines()]
    assert sum(len(row[f"{name}_discarded"]) for row in found for name in NAMES) > 20
    return found


def verb(server, name: str, settings: dict, log, processes: int = 1) -> str:
    statuses, output = server.run({}, log, processes, verb=name, arguments=flags(settings))
    assert statuses == [0] * processes, output
    return output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_score_is_the_decoders_own(folder, server, pairs, layout):
    processes, settings = LAYOUTS[layout]
    scores = folder / f"{layout}.jsonl"
    files = {"checkpoint": folder / "run", "data": folder / "pairs.jsonl", "output": scores}
    settings = {**files, **settings, "estimator": "exact_trajectory"}
    printed = verb(server, "score", settings, folder / f"{layout}.log", processes)
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    differences = []
    for row, pair in zip(rows, pairs, strict=True):
        for name in NAMES:
            differences.append(abs(row[f"logps/{name}"] - pair[f"{name}_log_likelihood"]))
    assert max(differences) < 1e-4
    assert f"{max(differences):.2g} at most, of {len(differences)} recorded log-likelihoods" in printed
