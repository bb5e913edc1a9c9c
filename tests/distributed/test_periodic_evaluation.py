"""--eval-interval: the same numbers under any layout, and the ones that the tools give for the checkpoint."""

from __future__ import annotations

import json
import re

import pytest

from tests.support.launch import TINY_MODEL, ForkServer, uneven_pairs, write_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

BETA = 0.3
END = 256  # of the byte-level tokenizer


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("evaluation")
    rows = [json.loads(line) for line in uneven_pairs(folder / "all.jsonl", 30).read_text().splitlines()]
    # Random weights write noise; what is "right" is a property that about half of all texts have.
    heldout = [{**row, "answer": number} for number, row in enumerate(rows[16:])]
    (folder / "odd_verifier.py").write_text("def odd(row, text):\n    return sum(map(ord, text)) % 2 == 1\n")
    return {
        **TINY_MODEL,
        "init_method_std": 0.4,
        "data_path": write_lines(folder / "train.jsonl", rows[:16]),
        "eval_data_path": write_lines(folder / "heldout.jsonl", heldout),
        "eval_interval": 2,
        "eval_examples": 12,
        "eval_max_new_tokens": 10,
        "eval_verifier": "odd_verifier:odd",
        "global_batch_size": 8,
        "micro_batch_size": 3,
        "train_iters": 3,
        "lr": 1e-3,
        "beta": BETA,
    }


def evaluations(save) -> list[dict]:
    return [json.loads(line) for line in (save / "eval.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", autouse=True)
def verifier_is_importable(settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(settings["data_path"].parent))
        yield


@pytest.fixture(scope="module")
def server(settings, verifier_is_importable):
    server = ForkServer(settings["data_path"].parent / "server.log")
    yield server
    server.close()


@pytest.fixture(scope="module")
def alone(server, settings):
    save = settings["data_path"].parent / "alone"
    server.train({**settings, "save": save})
    return save


def test_when_and_what(alone):
    rows = evaluations(alone)
    assert [row["iteration"] for row in rows] == [0, 2, 3]
    assert rows[0]["eval/loss"] == pytest.approx(0.693147, abs=1e-5)  # the policy is its own reference
    assert rows[0]["eval/rewards/margins"] == 0
    assert rows[2]["eval/loss"] != rows[1]["eval/loss"]
    assert 0 < rows[0]["eval/exact_match"] < 1


@pytest.mark.parametrize(
    ("processes", "layout"),
    [
        (4, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}),
        (2, {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}),
        (2, {"context_parallel_size": 2}),
    ],
    ids=["TP2 x PP2, SP", "DP2, overlapped", "CP2"],
)
def test_layouts_agree(server, settings, alone, tmp_path, processes, layout):
    server.train({**settings, **layout, "save": tmp_path / "run"}, processes)
    for row, other in zip(evaluations(tmp_path / "run"), evaluations(alone), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_the_tools_give_the_same_numbers(server, settings, alone, tmp_path):
    rows = settings["eval_data_path"].read_text().splitlines()[:12]
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text("\n".join(rows) + "\n")
    base = tmp_path / "base"
    server.train(
        {**{k: v for k, v in settings.items() if not k.startswith("eval")}, "lr": 1e-30, "train_iters": 1, "save": base}
    )
    words = {"checkpoint": alone, "reference": base, "data": heldout}
    statuses, output = server.run(words, tmp_path / "score.log", verb="score")
    assert statuses == [0], output
    last = evaluations(alone)[-1]
    margin = float(re.search(r"reward margin +(-?[\d.]+)", output)[1])
    assert margin == pytest.approx(last["eval/rewards/margins"], abs=1e-4), output
    words = {"checkpoint": alone, "prompts": heldout, "output": tmp_path / "out.jsonl", "max_new_tokens": 10}
    statuses, output = server.run(words, tmp_path / "generate.log", verb="generate")
    assert statuses == [0], output
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    tokens, passes = sum(len(row["completion_ids"]) for row in rows), sum(row["completion_passes"] for row in rows)
    assert last["eval/completions/mean_length"] == pytest.approx(tokens / len(rows))
    assert last["eval/completions/mean_passes"] == pytest.approx(passes / len(rows))
    assert last["eval/completions/tokens_per_pass"] == pytest.approx(tokens / passes)
    open_ended = sum(row["completion_ids"][-1] != END for row in rows)
    assert last["eval/completions/clipped_ratio"] == pytest.approx(open_ended / len(rows))
    texts = [row["completion"] for row in rows]
    assert sum(sum(map(ord, text)) % 2 for text in texts) / len(texts) == pytest.approx(last["eval/exact_match"])
