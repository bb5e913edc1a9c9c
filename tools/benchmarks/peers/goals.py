"""What ours is meant to reach against its peers, and, where it does not, what a step's time goes into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch.profiler import ProfilerActivity, profile

SIZE = "135m"  # the model that the goals are for, in fp32 on two cores, on GSM8K pairs
SPEED = {
    "packed_sketch": 0.91,
    "fast_dllm_layout": 3.0,
    "fast_dllm_layout_cached": 4.0,
    "trl_dpo": 1.2,
    "trl_dpo_autoregressive": 1.3,
    "vrpo_8": 12.0,
    "padded_views": 1.5,
}
ONLINE = {"exact_trajectory": 3.0, "trajectory": 6.0, "rollout_alone": 1.0, "rollout_batch": 4.0}
MEMORY = {"fast_dllm_layout": 0.5, "trl_dpo_autoregressive": 0.6}


class Verdict(NamedTuple):
    ratio: float
    goal: float
    met: bool

    def __str__(self) -> str:
        return f"goal {self.goal:g}, {'met' if self.met else 'missed'}"


def verdicts(
    size: str, ratios: Mapping[str, float], memory_ratios: Mapping[str, float], goals: Mapping[str, float] = SPEED
) -> dict[str, Verdict]:
    """By name, of what was measured: speed must be at least its goal of ``goals``, memory (``peak_memory_NAME``) at
    most."""
    if size != SIZE:
        return {}
    speed = {k: Verdict(ratios[k], goal, ratios[k] >= goal) for k, goal in goals.items() if k in ratios}
    memory = {k: Verdict(memory_ratios[k], g, memory_ratios[k] <= g) for k, g in MEMORY.items() if k in memory_ratios}
    return speed | {f"peak_memory_{k}": verdict for k, verdict in memory.items()}


def where_time_goes(step: Callable[[], object], most: int = 12) -> list[tuple[str, float]]:
    """The ``most`` expensive operations of a step with their own shares of its time on the CPU, largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    events = recorded.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    largest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:most]
    return [(event.key, event.self_cpu_time_total / total) for event in largest]
