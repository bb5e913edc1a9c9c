"""``--dry-run``: a run's settings checked, its model built rank by rank without memory, and what it will need."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from megatron_dtrpo.checkpoint.folder import MODEL_CONFIG
from megatron_dtrpo.config.fp8 import token_multiple
from megatron_dtrpo.config.notes import notes
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.rules import validate, validate_training
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.model.initialization import global_parameter_names
from megatron_dtrpo.model.lora import add_adapters
from megatron_dtrpo.model.provider import build_chunks, transformer_config
from megatron_dtrpo.planning.layouts import fits_in, stage_plans
from megatron_dtrpo.planning.memory import GIB
from megatron_dtrpo.planning.report import gib, memory_table
from megatron_dtrpo.planning.step_time import examples_of_step, micro_batches_of_step
from megatron_dtrpo.rounding import round_up
from megatron_dtrpo.runtime import initialize, simulated_rank
from megatron_dtrpo.training.setup import check_reference_architecture, resolve_start

# What a run must be given and a look at one need not: any name does.
_PLACEHOLDER = "dry-run"


def dry_run(config: Config, given: set[str], world_size: int | None, gpu_memory: float | None) -> None:
    """Prints the report; on one process, where a launcher started several. Raises UserError."""
    if gpu_memory is not None and not 0 < gpu_memory < math.inf:
        raise UserError(f"--gpu-memory is {gpu_memory}: it must be a positive number")
    data_parallel, world_size = _settle(config, given, world_size)
    print("\n".join(_report(config, data_parallel, world_size, gpu_memory or 80.0)), flush=True)


def _settle(config: Config, given: set[str], world_size: int | None) -> tuple[int, int]:
    """Checks the settings as a run does. Returns the data-parallel and the world size."""
    run = config.run
    if run.load is not None and (Path(run.load) / MODEL_CONFIG).exists():
        resolve_start(config, given)
    if config.model.vocab_size is None:
        raise UserError(
            "vocab_size is missing: a dry run opens no tokenizer; give --vocab-size, or --load a checkpoint"
        )
    parallel = config.parallel
    model_parallel = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    if world_size is None:
        world_size = round_up(initialize.world_size(), model_parallel)
    if world_size < 1:
        raise UserError(f"--world-size is {world_size}: it must be positive")
    data_parallel = validate(config, world_size)
    if run.reference is not None and (Path(run.reference) / MODEL_CONFIG).exists():
        check_reference_architecture(config)
    run.save = run.save or _PLACEHOLDER
    validate_training(config, data_parallel)
    return data_parallel, world_size


def _report(config: Config, data_parallel: int, world_size: int, gpu_memory: float) -> list[str]:
    parallel, model = config.parallel, config.model
    stages = parallel.pipeline_model_parallel_size
    here = initialize.world_size()
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    processes = f"{world_size} processes" + (f" ({here} here)" if here not in (1, world_size) else "")
    lines = [f"dry run of {processes}: TP {tp}, PP {stages}, CP {cp}, DP {data_parallel}", *notes(config)]
    # Its own checks; on this machine the layers of Transformer Engine cannot be built, but theirs have the same shapes.
    unfused = dataclasses.replace(parallel, gradient_accumulation_fusion=False, apply_rope_fusion=False)
    transformer_config(model, unfused)
    here_buildable = dataclasses.replace(unfused, transformer_impl="local", fp8_format=None, fp8_param_gather=False)
    for stage in range(stages):
        # Pipeline stages are the slowest dimension of megatron-core's order of ranks.
        with (
            simulated_rank.rank_of(here_buildable, stage * world_size // stages, world_size),
            simulated_rank.without_memory(),
        ):
            chunks = build_chunks(model, here_buildable)
            if config.lora.lora_rank is not None:
                add_adapters(chunks, config.lora)
            names = [name for chunk in chunks for name in global_parameter_names(chunk)]
            layers = sorted({int(name.split(".")[2]) + 1 for name in names if name.startswith("decoder.layers.")})
            own = [parameter for chunk in chunks for parameter in chunk.parameters()]
            count, trained = (sum(p.numel() for p in own if p.requires_grad >= only) for only in (False, True))
        adapters = f", {trained:,} of them adapters" if config.lora.lora_rank is not None else ""
        lines.append(f"stage {stage}: layers {_ranges(layers)}, {count:,} parameters per rank{adapters}")
    multiple = token_multiple(parallel)
    if parallel.fp8_format is not None:
        lines.append(
            f"FP8: {parallel.fp8_format}, {parallel.fp8_recipe}; micro-batches are padded to a multiple of {multiple} "
            f"tokens per context-parallel rank; reference in {'FP8' if parallel.fp8_reference else 'bf16'}"
        )
    if config.run.reference is not None:
        kept = "its scores are read from the cache" if config.run.reference_cache else "a copy of its weights is kept"
        lines.append(f"reference: {config.run.reference}: {kept}")
    elif config.lora.lora_rank is not None and config.objective.has_reference:
        lines.append("reference: the model without its adapters: nothing is kept")
    plans = stage_plans(config, data_parallel)
    most = max(plan.total for plan in plans)
    verdict = "fits" if fits_in(plans, int(gpu_memory * GIB)) else "does not fit"
    examples, together = examples_of_step(config, data_parallel), config.data.micro_batch_size
    if OBJECTIVES[config.objective.objective].is_online:
        lines.append(
            f"an iteration: {config.online.group_size} answers to each of {config.online.rollout_prompts} prompts, "
            f"learned in {config.online.updates_per_rollout} steps; how many tokens they pack into, decoding says"
        )
    else:
        if config.rounds.rounds:
            some = config.rounds.round_prompts
            prompts = f"each of {some} prompts" if some else "every prompt"
            lines.append(f"{config.rounds.rounds} rounds: {config.online.group_size} answers to {prompts}")
        lines.append(
            f"a step: {config.data.global_batch_size} examples, {examples} on each of {data_parallel} data-parallel "
            f"processes, in {micro_batches_of_step(config, data_parallel)} packed sequences of at most {together}"
            + (": not full, a larger global_batch_size would cost little more" if examples < together else "")
        )
    return [
        *lines,
        "memory plan (docs/memory.md):",
        *memory_table(plans),
        f"{verdict} in {gpu_memory:g} GiB: {gib(most)} GiB on the fullest GPU",
    ]


def _ranges(numbers: list[int]) -> str:
    """``[1, 2, 3, 7]`` as ``1-3, 7``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(f"{first}-{last}" if first != last else str(first) for first, last in parts)
