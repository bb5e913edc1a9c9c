"""Every layout of a number of GPUs, with the least recomputation that fits, best first."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_dtrpo.config.rules import validate
from megatron_dtrpo.config.settings import Config, ParallelSettings
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.planning import memory
from megatron_dtrpo.planning import step_time as time

# A plan that leaves less than this share free is not trusted: memory fragments, and batches differ.
HEADROOM = 0.08

# Settings of recomputation from none to all, in the order in which they are tried.
RECOMPUTATION: dict[str, dict[str, Any]] = {
    "none": {},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
_NO_RECOMPUTATION = {f"recompute_{word}": None for word in ("granularity", "modules", "method", "num_layers")}


@dataclass(frozen=True)
class Layout:
    """One way to spread a run: its validated settings, and what it needs."""

    config: Config
    data_parallel: int
    recomputation: str
    plans: tuple[memory.Plan, ...]
    seconds: time.StepTime
    fits: bool

    @property
    def worst(self) -> memory.Plan:
        """The plan of the pipeline stage that needs most."""
        return max(self.plans, key=lambda plan: plan.total)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """TP, PP, CP, DP."""
        parallel = self.config.parallel
        return (
            parallel.tensor_model_parallel_size,
            parallel.pipeline_model_parallel_size,
            parallel.context_parallel_size,
            self.data_parallel,
        )


def stage_plans(config: Config, data_parallel: int) -> tuple[memory.Plan, ...]:
    stages = range(config.parallel.pipeline_model_parallel_size)
    return tuple(memory.plan_stage(config, data_parallel, stage) for stage in stages)


def fits_in(plans: tuple[memory.Plan, ...], capacity: int) -> bool:
    """Whether every stage fits on a GPU with ``capacity`` bytes."""
    return max(plan.total for plan in plans) <= (1 - HEADROOM) * capacity


def layouts(config: Config, gpus: int, capacity: int) -> list[Layout]:
    """Layouts of ``gpus`` GPUs with ``capacity`` bytes each: those that fit by time, then the others by memory.

    Raises:
        UserError: if the settings allow no layout at all, for the reason that the last one was refused.
    """
    found, refusal = [], None
    for tp, pp, cp in _sizes(gpus, config.model.num_layers or 1):
        try:
            found.append(_least_recomputation(config, gpus, capacity, tp, pp, cp))
        except UserError as error:
            refusal = error
    if not found:
        raise refusal
    return sorted(found, key=lambda each: (not each.fits, each.seconds.total if each.fits else each.worst.total))


def _sizes(gpus: int, layers: int) -> Iterator[tuple[int, int, int]]:
    for tp in _divisors(min(gpus, time.GPUS_PER_NODE)):
        for pp in _divisors(layers):
            for cp in (1, 2, 4, 8):
                if gpus % (tp * pp * cp) == 0:
                    yield tp, pp, cp


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _least_recomputation(config: Config, gpus: int, capacity: int, tp: int, pp: int, cp: int) -> Layout:
    layout = None
    for name, settings in RECOMPUTATION.items():
        layout = _layout(config, gpus, capacity, (tp, pp, cp), name, settings)
        if layout.fits:
            break
    return layout


def _layout(config: Config, gpus: int, capacity: int, sizes: tuple[int, int, int], name: str, settings: dict) -> Layout:
    config = copy.deepcopy(config)
    config.parallel = _spread(config.parallel, *sizes, settings)
    data_parallel = validate(config, gpus)
    if config.data.global_batch_size % data_parallel:
        raise UserError(f"global_batch_size {config.data.global_batch_size} is not divisible by DP {data_parallel}")
    plans = stage_plans(config, data_parallel)
    seconds = time.step_time(config, data_parallel)
    return Layout(config, data_parallel, name, plans, seconds, fits_in(plans, capacity))


def _spread(parallel: ParallelSettings, tp: int, pp: int, cp: int, settings: dict) -> ParallelSettings:
    virtual = parallel.num_virtual_stages_per_pipeline_rank if pp > 1 else 1
    return replace(
        parallel,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        num_virtual_stages_per_pipeline_rank=virtual,
        sequence_parallel=tp > 1,
        **(_NO_RECOMPUTATION | settings),
    )
