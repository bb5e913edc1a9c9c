"""Goals of the benchmark: a speed is at least its goal, a peak of memory at most; only at the size they are for."""

from __future__ import annotations

from tools.benchmarks.peers.goals import MEMORY, SIZE, SPEED, verdicts


def test_speed_is_at_least_its_goal_and_memory_at_most():
    at_goal = verdicts(SIZE, SPEED, MEMORY)
    assert set(at_goal) == {*SPEED, *(f"peak_memory_{name}" for name in MEMORY)}
    assert all(verdict.met for verdict in at_goal.values())
    slower, larger = ({k: v * by for k, v in goals.items()} for goals, by in ((SPEED, 0.999), (MEMORY, 1.001)))
    assert not any(verdict.met for verdict in verdicts(SIZE, slower, larger).values())


def test_what_was_not_measured_has_no_verdict():
    assert set(verdicts(SIZE, {"trl_dpo": 1.3, "exact_trajectory": 20.0}, {})) == {"trl_dpo"}
    assert verdicts("tiny", SPEED, MEMORY) == {}
