"""The benchmarks run, their contenders compute what ours computes, and their numbers are where they are said to be."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_dtrpo.errors import UserError
from tests.support import launch
from tools.benchmarks.peers.pairs import preference_rows

pytestmark = [pytest.mark.end_to_end, pytest.mark.slow]


def run(name: str, *words: str, folder: Path) -> tuple[int, str]:
    log = folder / "log"
    command = [sys.executable, "-m", f"tools.benchmarks.{name}", *words]
    with log.open("wb") as output:
        done = subprocess.run(
            command, cwd=folder, env=launch._environment(), stdout=output, stderr=subprocess.STDOUT, timeout=300
        )
    return done.returncode, log.read_text()


def rows(path: Path, count: int = 12) -> Path:
    texts = [{"prompt": f"say {i} again", "chosen": f"{i} " * (i + 1), "rejected": f"not {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


@pytest.mark.parametrize("option", [[], ["--same-products"]], ids=["plain peers", "same products"])
def test_contenders_agree_and_are_timed(tmp_path, option):
    """Each contender's loss is checked against ours on the same noise before it is timed; a policy and a reference that
    differ make that loss tell."""
    status, output = run(
        "training",
        "--size",
        "tiny",
        "--layers",
        "2",
        "--block-size",
        "8",
        "--data",
        str(rows(tmp_path / "pairs.jsonl")),
        "--pairs",
        "3",
        "--slow-pairs",
        "2",
        "--micro-batch-size",
        "2",
        "--repetitions",
        "2",
        "--no-memory",
        "--output",
        "numbers.json",
        *option,
        folder=tmp_path,
    )
    assert status == 0, output
    record = json.loads((tmp_path / "numbers.json").read_text())
    names = {"fast_dllm_layout", "fast_dllm_layout_cached", "vrpo_8", "exact_trajectory", "packed_sketch"}
    names |= {"trl_dpo", "trl_dpo_autoregressive"} if find_spec("trl") else set()
    names |= {"padded_views"}
    assert set(record["ratios"]) == names
    assert all(row["loss_difference"] < 1e-5 for row in record["contenders"].values())
    machine = record["machine"]
    assert machine["torch"] == torch.__version__ and machine["instructions"] and machine["processor"]
    speed = {name: row["pairs_per_second"] for name, row in record["contenders"].items()}
    assert record["ratios"]["fast_dllm_layout"] == pytest.approx(speed["ours"] / speed["fast_dllm_layout"])
    assert record["ratios"]["vrpo_8"] == pytest.approx(speed["ours_few"] / speed["vrpo_8"])
    assert record["ratios"]["padded_views"] == pytest.approx(speed["ours_full"] / speed["padded_views"])
    assert record["goals"] == {}  # they are for another size
    tokens = {name: row["tokens_per_pair"] for name, row in record["contenders"].items()}
    assert tokens["ours"] == tokens["packed_sketch"] < tokens["fast_dllm_layout"]
    assert tokens["ours_full"] < tokens["padded_views"]
    if find_spec("trl"):
        ratio = speed["ours_autoregressive"] / speed["trl_dpo"]
        assert record["ratios"]["trl_dpo_autoregressive"] == pytest.approx(ratio)
        assert tokens["ours_autoregressive"] < tokens["trl_dpo"]
    assert tokens["exact_trajectory"] <= tokens["vrpo_8"]  # short responses end before their last step


def test_messages_are_pairs_too(tmp_path):
    """Both forms of one row become the same texts; what is neither is named with its line."""
    texts = rows(tmp_path / "texts.jsonl", 1)
    chat = json.loads(texts.read_text())
    asked = f"<|im_start|>user\n{chat['prompt']}<|im_end|>\n<|im_start|>assistant\n"
    chat["prompt"] = [{"role": "user", "content": chat["prompt"]}]
    for key in ("chosen", "rejected"):
        chat[key] = [{"role": "assistant", "content": chat[key]}]
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    (written,) = preference_rows(texts)
    assert preference_rows(tmp_path / "chat.jsonl") == [written | {"prompt": asked}]
    chat["chosen"] = [{"role": "assistant"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat) + "\n")
    with pytest.raises(UserError, match="chat.jsonl:1: chosen must be a text or messages"):
        preference_rows(tmp_path / "chat.jsonl")


def test_a_contender_that_computes_something_else_is_not_timed(tmp_path):
    spoiled = "import sys; from tools.benchmarks import training; from tools.benchmarks.peers import packed_layout; "
    spoiled += "seen = packed_layout.visible; packed_layout.visible = lambda q, k: seen(q, k) | (k.view == q.view); "
    words = ["--size", "tiny", "--block-size", "4", "--repetitions", "1", "--no-memory"]
    words += ["--contenders", "packed_sketch"]
    spoiled += f"sys.exit(training.run_command(training._benchmark, {words!r}))"
    done = subprocess.run(
        [sys.executable, "-c", "from megatron_dtrpo.runtime import initialize; initialize.enable_device(); " + spoiled],
        cwd=launch.REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and "packed_sketch computes something else" in done.stderr, done.stderr


def test_what_misses_its_goal_is_said_to_with_a_profile(tmp_path):
    words = ["--size", "tiny", "--block-size", "8", "--pairs", "2", "--repetitions", "1", "--no-memory"]
    words += ["--contenders", "packed_sketch", "fast_dllm_layout", "--output", str(tmp_path / "numbers.json")]
    code = "import sys; from tools.benchmarks import training; from tools.benchmarks.peers import goals; "
    code += "goals.SIZE = 'tiny'; goals.SPEED.update(packed_sketch=1e6, fast_dllm_layout=1e-6); "
    code += f"sys.exit(training.run_command(training._benchmark, {words!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=launch.REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "(goal 1e+06, missed)" in done.stdout and "(goal 1e-06, met)" in done.stdout, done.stdout
    assert "aten::" in done.stdout.partition("shares of a step of ours, live reference")[2]
    record = json.loads((tmp_path / "numbers.json").read_text())
    met = {name: goal["met"] for name, goal in record["goals"].items()}
    assert not met["packed_sketch"] and met["fast_dllm_layout"]
    shares = [share for _, share in record["profile"]["ours"]]
    assert shares == sorted(shares, reverse=True) and 0.2 < sum(shares) <= 1


@pytest.mark.parametrize(
    "name, words, said",
    [
        ("training", ["--pairs", "2", "--slow-pairs", "3"], "--slow-pairs must be at most --pairs"),
        ("training", ["--layers", "0"], "--layers must be at least 1"),
        ("training", ["--contenders", "dpo"], "no contender 'dpo': choose from ours"),
        ("training", ["--output", "absent/numbers.json"], "there is no folder absent"),
        ("training", ["--size", "tiny", "--tokenizer", "absent"], "--tokenizer absent: no such folder"),
        ("training", ["--size", "tiny", "--tokenizer", "."], "--tokenizer .: "),
        ("scaling", ["--plot", "."], "is a folder"),
        ("layers", ["--tokens", "100"], "--tokens multiples of 128"),
        ("layers", ["--formats", "tensorwise"], "needs a GPU"),
        ("scaling", ["--response", "0"], "at least 1"),
        ("batches", ["--stream", "5"], "--stream must be at least"),
        ("online", ["--checked-answers", "9"], "--checked-answers must be at most --answers"),
        ("online", ["--size", "tiny", "--prompts", "2000"], "1000 rows, --prompts asks for 2000"),
    ],
)
def test_mistakes_are_one_line(tmp_path, name, words, said):
    status, output = run(name, *words, folder=tmp_path)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(errors) == 1 and said in errors[0] and "Traceback" not in output, output


def online_rows(path: Path) -> Path:
    texts = [{"prompt": f"say {i} again", "completion": f"{i} and {i} and {i}"} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


TINY = ["--size", "tiny", "--layers", "2", "--answers", "3", "--answer-tokens", "20", "--prompts", "4"]
TINY += ["--max-new-tokens", "9", "--repetitions", "2", "--no-memory"]


def test_online_contenders_agree_and_are_timed(tmp_path):
    """Both estimators have the loss and the gradient of the rows that TraceRL lays out, for both kinds of model, and
    the decoders' greedy answers are equal, before any is timed."""
    data = str(online_rows(tmp_path / "answers.jsonl"))
    status, output = run("online", *TINY, "--data", data, "--output", "numbers.json", folder=tmp_path)
    assert status == 0, output
    record = json.loads((tmp_path / "numbers.json").read_text())
    assert set(record["models"]) == {"sdar", "fast_dllm_v2"}
    for model in record["models"].values():
        training, rollout = model["training"], model["rollout"]
        for loss, gradient in training["differences"].values():
            assert loss < 1e-5 and gradient < 1e-4
        tokens = {name: row["tokens"] for name, row in training["contenders"].items()}
        assert tokens["trajectory"] < tokens["exact_trajectory"] < tokens["tracerl_layout"]
        seconds = {name: row["seconds"] for name, row in training["contenders"].items()}
        pairs = zip(seconds["tracerl_layout"], seconds["trajectory"], strict=True)
        assert training["ratios"]["trajectory"] == pytest.approx(sum(theirs / ours for theirs, ours in pairs) / 2)
        per_step = [row["tokens_per_step"] for row in training["counted"]]
        assert per_step == sorted(per_step) and per_step[0] == 1
        assert rollout["equal_answers"] == [4, 4] and training["goals"] == rollout["goals"] == {}
        speed = {name: row["tokens_per_second"] for name, row in rollout["contenders"].items()}
        assert speed["rollout_batch"] > 0 and set(rollout["ratios"]) == {"rollout_alone", "rollout_batch"}


def test_online_contenders_that_compute_something_else_are_not_timed(tmp_path):
    code = "import sys; from megatron_dtrpo.runtime import initialize; initialize.enable_device(); "
    code += "from tools.benchmarks import online; from tools.benchmarks.peers import tracerl_layout; "
    code += "mask = tracerl_layout._mask; tracerl_layout._mask = lambda block, noisy: mask(block, noisy) * 0; "
    code += f"sys.exit(online.run_command(online._benchmark, {[*TINY, '--models', 'sdar']!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=launch.REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "compute different things" in done.stderr, done.stderr


def test_layers_are_near_the_fp32_oracle(tmp_path):
    status, output = run(
        "layers",
        "--size",
        "tiny",
        "--layers",
        "2",
        "--tokens",
        "512",
        "--repetitions",
        "2",
        "--output",
        "numbers.json",
        folder=tmp_path,
    )
    assert status == 0, output
    (row,) = json.loads((tmp_path / "numbers.json").read_text())["rows"]
    assert row["format"] == "bf16" and 0 < row["log_prob_error"] < 2e-3 and 0 < row["gradient_error"] < 0.1
    assert row["compiled_after_warm_up"] == 0 and 0 < row["model_flop_utilisation"] < 1


def test_scaling_is_fitted(tmp_path):
    status, output = run(
        "scaling",
        "--lengths",
        "32",
        "64",
        "96",
        "--pairs-per-micro-batch",
        "1",
        "2",
        "--response",
        "32",
        "--repetitions",
        "1",
        "--output",
        "numbers.json",
        folder=tmp_path,
    )
    assert status == 0, output
    record = json.loads((tmp_path / "numbers.json").read_text())
    assert [row["tokens"] for row in record["by_length"]] == [128, 256, 384]
    assert [row["visible"] for row in record["by_length"]] == sorted(row["visible"] for row in record["by_length"])
    assert [row["pairs"] for row in record["by_packing"]] == [1, 2]


def test_one_length_has_no_power(tmp_path):
    status, output = run(
        "scaling",
        "--lengths",
        "32",
        "--pairs-per-micro-batch",
        "1",
        "--response",
        "32",
        "--repetitions",
        "1",
        "--output",
        "numbers.json",
        folder=tmp_path,
    )
    assert status == 0, output
    fit = json.loads((tmp_path / "numbers.json").read_text(), parse_constant=pytest.fail)["fit"]  # JSON has no NaN
    assert fit["power"] is None and fit["r_squared"] is None


def test_batches_are_streamed(tmp_path):
    status, output = run(
        "batches",
        "--stream",
        "2600",
        "--size",
        "tiny",
        "--steps",
        "1",
        "--output",
        "numbers.json",
        folder=tmp_path,
    )
    assert status == 0, output
    record = json.loads((tmp_path / "numbers.json").read_text())
    assert len(record["memory_bytes_by_tenth"]) == 10 and record["ratio"] > 1
