"""megatron-core's data-parallel wrapper, optimizer and learning-rate schedule from the settings."""

from __future__ import annotations

import math

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.runtime.optimizer_state import save_own_share
from megatron_dtrpo.runtime.precision import data_parallel_precision, optimizer_precision


def wrap_data_parallel(chunks: list, config: Config) -> list[DistributedDataParallel]:
    """Wraps this rank's stages."""
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        bucket_size=parallel.ddp_bucket_size,
        **data_parallel_precision(parallel),
    )
    shared = chunks[0].config  # one object for all stages
    # Only the first stage's gradients are ready last and worth reducing piece by piece (as Megatron-LM does).
    wrapped = [
        DistributedDataParallel(config=shared, ddp_config=ddp_config, module=chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    shared.finalize_model_grads_func = finalize_model_grads
    if parallel.overlap_grad_reduce:
        pauses = [each.no_sync for each in wrapped]
        shared.no_sync_func = pauses if len(pauses) > 1 else pauses[0]  # the plain schedules take no list
    return wrapped


def finish_parameter_gather(wrapped: list[DistributedDataParallel]) -> None:
    """Brings all weights up to date on every process; collective, and free where nothing is left to do.

    With ``overlap_param_gather`` the optimizer's step writes each process's own share, and the next forward pass
    gathers the rest. What reads weights in between calls this first.
    """
    for chunk in wrapped:
        if chunk.ddp_config.overlap_param_gather:
            for group in chunk.bucket_groups:
                # As the forward pass does it, FP8's work on the gathered weights included, which start_param_sync
                # leaves out under overlap.
                group.finish_param_sync(skip_next_bucket_dispatch=True)


def build_optimizer(wrapped: list[DistributedDataParallel], config: Config):
    settings = config.optimizer
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        # megatron-core measures the norm only where it clips, and without it a step of NaN gradients goes unnoticed.
        clip_grad=settings.clip_grad or math.inf,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
        **_offload(config),
        **optimizer_precision(config.parallel),
    )
    optimizer = get_megatron_optimizer(optimizer_config, wrapped)
    save_own_share(optimizer)
    wrapped[0].config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _offload(config: Config) -> dict:
    """megatron-core's offloading optimizer follows the code path of its precision-aware one, in fp32 as everywhere."""
    if not config.parallel.optimizer_cpu_offload:
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": config.parallel.optimizer_offload_fraction,
        "overlap_cpu_optimizer_d2h_h2d": True,
        "use_precision_aware_optimizer": True,
    }


def build_scheduler(optimizer, config: Config, train_iters: int) -> OptimizerParamScheduler:
    """Counts steps; one call of ``step(increment=1)`` a step."""
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters,
        lr_decay_steps=max(train_iters, settings.lr_warmup_iters + 1),
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=train_iters,
        wd_incr_style="constant",
        # On resume the settings win over what the checkpoint recorded, so that a run can be extended.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
