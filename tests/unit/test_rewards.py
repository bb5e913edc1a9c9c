"""Rewards, their processes, and advantages."""

from __future__ import annotations

import os
import signal
import statistics
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.data.prompts import Prompt
from megatron_dtrpo.data.sampler import SampleOrder
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.errors import StopRequest, UserError
from megatron_dtrpo.evaluation.generation import efficiency
from megatron_dtrpo.online.advantages import group_advantages, has_spread
from megatron_dtrpo.online.reward_workers import RewardWorkers
from megatron_dtrpo.online.rewards import Answer, load_reward, reward_of
from megatron_dtrpo.online.rollouts import RolloutMaker
from megatron_dtrpo.runtime import stop

USERS = """
import os, time
def sized(row, text):
    return len(text) * row["scale"]
def odd(row, text):
    return {"raise": lambda: 1 / 0, "nan": lambda: float("nan"), "words": lambda: "much", "true": lambda: True,
            "die": lambda: os._exit(3), "hang": lambda: time.sleep(60), "none": lambda: None}[text]()
"""


def answer(text="", tokens=4, passes=2, ended=True, longest=8, written=4, **row) -> Answer:
    return Answer(row, text, tokens, passes, ended, longest, written)


def test_built_in_rewards():
    names = ["numeric", "format", "length", "speed"]
    rewards = {name: load_reward(name) for name in names}
    assert reward_of(rewards, answer("so #### 42", answer="42")) == [1, 1, -0.5, 2]
    assert reward_of(rewards, answer("\\boxed{7}", answer="8", passes=4, ended=False)) == [0, 0, -0.5, 1]
    assert reward_of({"format": rewards["format"]}, answer("no result")) == [0]
    short = answer("so #### 42", answer="42", tokens=2)
    assert reward_of(rewards, short) == [1, 1, -0.25, 2]


@pytest.mark.parametrize("name", ["exact", "nowhere:function", "os:nothing", "os:getcwd"])
def test_a_reward_that_is_not_there(name):
    with pytest.raises(
        UserError, match="give numeric, format, length, speed" if name == "exact" else f"^rewards: '{name}': "
    ):
        load_reward(name)


@pytest.fixture
def users(tmp_path, monkeypatch):
    (tmp_path / "users.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)


def test_an_answer_whose_reward_fails_is_the_only_one_that_is_lost(users):
    workers = RewardWorkers(["users:odd", "users:sized"], 2, 1.0)
    texts = ["true", "raise", "die", "nan", "hang", "words", "true", "none", "hang", "true"]
    try:
        found = workers.score([answer(text, scale=n) for n, text in enumerate(texts)])
        processes = [worker.process for worker in workers.workers]
        assert workers.score([answer("true", scale=1)]) == [[1.0, 4.0]]
    finally:
        workers.close()
    assert [found[n] for n in (0, 6, 9)] == [[1.0, 0.0], [1.0, 24.0], [1.0, 36.0]]
    one, both = "reward users:odd", "rewards users:odd, users:sized"
    failures = {1: f"{one} raised ZeroDivisionError in users.py:6: ", 2: f"the process of {both} ended"}
    failures |= {3: f"{one} is nan", 4: f"{both} took longer than 1 s", 5: f"{one} is a str, not a number"}
    failures |= {7: f"{one} is a NoneType, not a number", 8: f"{both} took longer than 1 s"}
    for number, words in failures.items():
        assert found[number].startswith(words), number
    assert len(processes) == 2 and not any(process.is_alive() for process in processes)


def test_a_reward_that_never_comes_is_given_up(users):
    workers = RewardWorkers(["users:odd"], 1, 0.2)
    try:
        found = workers.score([answer(text) for text in ("hang", "die", "hang", "hang", "hang", "true")])
        assert workers.score([answer("true"), answer("hang")]) == [[1.0], "reward users:odd took longer than 0.2 s"]
    finally:
        workers.close()
    assert found[4:] == ["not tried: 4 answers before took too long or ended the process of reward users:odd"] * 2
    assert not any("not tried" in one for one in found[:4])


def test_an_interrupt_is_the_runs_own(users):
    workers = RewardWorkers(["users:odd"], 1, 30.0)
    try:
        assert workers.score([answer("true")]) == [[1.0]]
        (worker,) = workers.workers
        os.kill(worker.process.pid, signal.SIGINT)
        assert workers.score([answer("true")]) == [[1.0]] and workers.workers == [worker]
    finally:
        workers.close()


def test_a_request_to_stop_ends_the_wait(users, monkeypatch):
    workers = RewardWorkers(["users:odd"], 1, 60.0)
    monkeypatch.setattr(stop, "requested", lambda: "SIGTERM" if workers.workers[0].answer is not None else None)
    try:
        with pytest.raises(StopRequest, match="SIGTERM"):
            workers.score([answer("hang")])
    finally:
        workers.close()
    assert os.getcwd()


def test_advantages_by_hand():
    right = [1.0, 0.0, 0.0, 1.0]
    speed = [3.0, 1.0, 2.0, 2.0]
    rewards = np.array([right, speed]).T
    summed = [a + 0.5 * b for a, b in zip(right, speed, strict=True)]
    mean, spread = statistics.mean(summed), statistics.stdev(summed) + 1e-4
    plain = group_advantages(rewards, [1, 0.5], False, False)
    assert plain == pytest.approx([value - mean for value in summed])
    assert group_advantages(rewards, [1, 0.5], True, False) == pytest.approx(plain / spread)
    apart = [
        (a - 0.5) / (statistics.stdev(right) + 1e-4) + 0.5 * (b - 2) / (statistics.stdev(speed) + 1e-4)
        for a, b in zip(right, speed, strict=True)
    ]
    assert group_advantages(rewards, [1, 0.5], True, True) == pytest.approx(apart)


def test_spread():
    equal, other = np.array([[1.0, 2.0], [1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0]])
    assert not has_spread(equal, [1, 1], True) and not has_spread(equal, [1, 1], False)
    assert has_spread(other, [1, 1], True) and not has_spread(other, [1, 1], False)
    assert not has_spread(np.array([[1.0, 0.0], [1.0, 1.0]]), [1, 0], True)


def test_under_full_attention_an_answer_is_as_long_as_its_text():
    """All places are written, and those behind the end token are no part of the answer."""
    config = Config.from_flat({"family": "llada", "block_size": 0, "rollout_max_new_tokens": 8, "rewards": ["length"]})
    config.online.rollout_prompts, config.online.group_size = 1, 2
    asked = []

    def decode(engine, prompts, options, **settings):
        lengths = (2, 5)
        return [[Completion([65] * 8, [0] * 8, [1.0] * 8, [0] * 8, 4, True, [], length) for length in lengths]]

    def score(answers):
        asked.extend(answers)
        return [reward_of({"length": load_reward("length")}, one) for one in answers]

    prompt = Prompt({"prompt": "x"}, "row 1", "x", [120], "x")
    order, workers = SampleOrder(np.arange(1), 0, False), SimpleNamespace(score=score)
    maker = RolloutMaker(config, [prompt], order, workers, decode)
    engine = SimpleNamespace(tokenizer=build_tokenizer("ByteLevelTokenizer"))
    (group,) = maker.make(engine, 0, 0).groups
    assert group.texts == ["AA", "AAAAA"] and group.total.tolist() == [-2 / 8, -5 / 8]
    assert [(one.tokens, one.written) for one in asked] == [(2, 8), (5, 8)]
    found = efficiency(group.completions)
    assert (found["completions/mean_length"], found["completions/tokens_per_pass"]) == (3.5, 2.0)
