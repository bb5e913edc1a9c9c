"""Full preference steps of a few layers, from the trainer's own parts: their peak memory, waits and profile."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import torch
from gpu_checks.common import Result, Size, has_gpu, verdict

GIB = 2**30


class Steps:
    """Policy, live reference and optimizer of one process on packed sequences of random pairs. Weights are drawn on the
    device, which is quick; numbers do not matter here."""

    def __init__(self, config, sequences: int):
        from megatron_dtrpo.config.objectives import OBJECTIVES
        from megatron_dtrpo.data.micro_batch import MicroBatch
        from megatron_dtrpo.training.engine import Engine
        from megatron_dtrpo.training.reference import ReferencePolicy
        from tools.benchmarks.layers import packed

        self.engine = Engine.new(config, tokenizer=None)  # nothing is decoded
        self.reference = ReferencePolicy(self.engine.chunks)
        self.engine.prepare_training(train_iters=1)
        self.objective = OBJECTIVES["preference"](config.objective)
        packs = [packed(config.model, config.data.seq_length, seed) for seed in range(sequences)]
        self.batches = [MicroBatch(pack, [], torch.ones(pack.responses, dtype=torch.long)) for pack in packs]

    def run(self, count: int | None = None) -> None:
        """One step on the first ``count`` sequences; default: all."""
        batches = self.engine.to_device(self.batches[:count])
        with self.reference.in_place_of_policy(), self.engine.as_reference():
            scores = self.engine.score(batches)
        for batch, reference in zip(batches, scores, strict=True):
            batch.given = reference
        self.engine.train_pass(batches, self.objective)
        self.engine.update()


def memory(size: Size, folder: Path) -> Result:
    """Peak memory of six layers of the 7B model against the plan; of fewer on a smaller GPU."""
    from megatron_dtrpo.planning.memory import plan_stage
    from megatron_dtrpo.runtime import initialize

    initialize.enable_device()
    config = _config(size, size.layers[1])
    room = torch.cuda.get_device_properties(0).total_memory if has_gpu() else float("inf")
    while plan_stage(config, 1, 0).total > 0.92 * room and config.model.num_layers > 1:
        config = _config(size, config.model.num_layers - 1)
    plan = plan_stage(config, 1, 0)
    expected = plan.total - plan.overhead
    initialize.start(config.parallel, seed=0)
    steps = Steps(config, sequences=2)
    for _ in range(2):
        steps.run()
    layers = f"{config.model.num_layers} layers of {size.layers[0]}"
    if not has_gpu():
        return Result("skipped", f"peak memory needs CUDA; two steps of {layers} ran, {expected / GIB:.3f} GiB planned")
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    free, total = torch.cuda.mem_get_info()
    return verdict(
        0.85 < peak / expected < 1.03,
        f"{layers}: peak {peak / GIB:.2f} GiB, planned {expected / GIB:.2f} ({peak / expected:.1%}); reserved "
        f"{reserved / GIB:.2f}, in use on the GPU {(total - free) / GIB:.2f}",
        peak=peak,
        planned=vars(plan),
        reserved=reserved,
        in_use=total - free,
    )


def profile(size: Size, folder: Path) -> Result:
    """Whether a step waits for the GPU once more for each micro-batch, and where two steps' time goes."""
    from megatron_dtrpo.runtime import initialize

    initialize.enable_device()
    config = _config(size, 2)
    initialize.start(config.parallel, seed=0)
    steps = Steps(config, sequences=4)
    steps.run()
    few, many = _waits(lambda: steps.run(2)), _waits(lambda: steps.run(4))
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if has_gpu() else []
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(2):
            steps.run()
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    order = "self_device_time_total" if has_gpu() else "self_cpu_time_total"
    (folder / "profile.txt").write_text(recorded.key_averages().table(sort_by=order, row_limit=40))
    recorded.export_chrome_trace(str(folder / "trace.json"))
    told = f"two steps in {seconds:.2f} s, see {folder.name}/profile.txt"
    if not has_gpu():
        return Result("ok", f"{told}; waits are seen on CUDA only")
    (folder / "waits.txt").write_text("\n".join(many) + "\n")
    return verdict(
        len(many) <= len(few),
        f"{len(few)} waits in a step of 2 micro-batches, {len(many)} in one of 4, see {folder.name}/waits.txt; {told}",
        waits=many,
        seconds=seconds,
    )


def _waits(step) -> list[str]:
    """Where ``step`` waited for the GPU, as torch's synchronisation warnings say."""
    if not has_gpu():
        step()
        return []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return [f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def _config(size: Size, layers: int):
    from megatron_dtrpo.config.rules import validate
    from megatron_dtrpo.config.settings import Config, DataSettings, ModelSettings, OptimizerSettings, ParallelSettings
    from megatron_dtrpo.runtime.precision import fused_gradients, fuses_rotary
    from tools.benchmarks.layers import SIZES

    # What the machine decides is filled in, so that the plan knows it.
    parallel = ParallelSettings(bf16=True, use_distributed_optimizer=True)
    parallel.apply_rope_fusion = fuses_rotary(parallel)
    parallel.gradient_accumulation_fusion = fused_gradients(parallel) is not None
    config = Config(
        model=ModelSettings(num_layers=layers, **SIZES[size.layers[0]]),
        parallel=parallel,
        data=DataSettings(seq_length=size.tokens, micro_batch_size=1, global_batch_size=2),
        optimizer=OptimizerSettings(train_iters=1, lr=1e-6),
    )
    validate(config, 1)
    return config
