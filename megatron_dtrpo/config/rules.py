"""Rules that settings must keep among themselves, checked once, before anything is allocated or loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

from megatron_dtrpo.config.blocks import grain
from megatron_dtrpo.config.decoding import RULES
from megatron_dtrpo.config.estimators import ESTIMATORS
from megatron_dtrpo.config.fp8 import check_cached_reference, check_fp8, check_live_reference
from megatron_dtrpo.config.lora_rules import check_lora
from megatron_dtrpo.config.losses import ALWAYS_READ, LOSSES, LossOptions
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.online_rules import check_online
from megatron_dtrpo.config.settings import (
    GROUPS,
    RECOMPUTABLE,
    Config,
    ModelSettings,
    ObjectiveSettings,
    ParallelSettings,
)
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.registry import family_of, is_autoregressive

AUTOREGRESSIVE = next(name for name, row in ESTIMATORS.items() if row.autoregressive)


def _demand(condition, message: str) -> None:
    if not condition:
        raise UserError(message)


def _multiple(name: str, value: int, divisor_name: str, divisor: int) -> None:
    _demand(
        value % divisor == 0,
        f"{name} {value} is not divisible by {divisor_name} {divisor}: change one of the two",
    )


def default_estimator(objective: str, model: ModelSettings) -> str:
    """The estimator of an ``objective`` where none is given."""
    return AUTOREGRESSIVE if is_autoregressive(model) else OBJECTIVES[objective].estimator


def fill_objective_defaults(objective: ObjectiveSettings, model: ModelSettings) -> None:
    """``model``: its family and its block size count."""
    objective.estimator = objective.estimator or default_estimator(objective.objective, model)
    if family_of(model).has_block_start:
        start = "clean" if is_autoregressive(model) else OBJECTIVES[objective.objective].block_start
        objective.block_start = objective.block_start or start
    objective.loss_type = objective.loss_type or ["sigmoid"]
    if objective.num_views is None:
        objective.num_views = ESTIMATORS[objective.estimator].default_views


def _fill_defaults(config: Config) -> None:
    """Resolves the defaults that depend on another setting."""
    model = config.model
    family = family_of(model)
    mismatch = family.mismatch(model)
    _demand(mismatch is None, f"{mismatch}: change {(mismatch or '').partition(' ')[0]} or family")
    _demand(
        config.objective.block_start is None or family.has_block_start,
        f"block_start {config.objective.block_start}: a model of family {family.name} predicts no block's first token "
        "from another block: leave it out",
    )
    fill_objective_defaults(config.objective, model)
    if model.num_query_groups is None:
        model.num_query_groups = model.num_attention_heads
    if model.kv_channels is None:
        _multiple("hidden_size", model.hidden_size, "num_attention_heads", model.num_attention_heads)
        model.kv_channels = model.hidden_size // model.num_attention_heads
    if config.parallel.tensor_model_parallel_size == 1:
        config.parallel.sequence_parallel = False  # as Megatron-LM does
    if config.parallel.recompute_granularity == "full":
        config.parallel.recompute_method = config.parallel.recompute_method or "uniform"
        config.parallel.recompute_num_layers = config.parallel.recompute_num_layers or 1


def validate(config: Config, world_size: int) -> int:
    """Checks every setting, fills in dependent defaults and returns the data-parallel size.

    Raises:
        UserError: naming the key and what to do.
    """
    model, parallel, data, objective = config.model, config.parallel, config.data, config.objective
    for key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
        _demand(getattr(model, key), f"{key} is missing: give it in --config, as a flag, or --load a checkpoint")
    for group in GROUPS:
        _check_ranges(getattr(config, group))
    _demand(objective.beta > 0, "beta is 0: without it the loss does not prefer anything")
    _fill_defaults(config)

    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp, virtual = parallel.context_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    sizes = "tensor_model_parallel_size x pipeline_model_parallel_size" + " x context_parallel_size" * (cp > 1)
    _multiple("world size", world_size, f"{sizes} =", tp * pp * cp)
    data_parallel = world_size // (tp * pp * cp)
    _multiple("num_attention_heads", model.num_attention_heads, "num_query_groups", model.num_query_groups)
    _multiple("num_attention_heads", model.num_attention_heads, "tensor_model_parallel_size", tp)
    _multiple("num_query_groups", model.num_query_groups, "tensor_model_parallel_size", tp)
    _multiple("ffn_hidden_size", model.ffn_hidden_size, "tensor_model_parallel_size", tp)
    _multiple("make_vocab_size_divisible_by", model.make_vocab_size_divisible_by, "tensor_model_parallel_size", tp)
    _multiple("num_layers", model.num_layers, "pipeline_model_parallel_size", pp)
    _check_virtual_stages(model.num_layers // pp, pp, virtual)
    if cp > 1:
        _multiple("seq_length", data.seq_length, "context_parallel_size x block_size =", cp * grain(model.block_size))
    _demand(model.kv_channels % 2 == 0, f"kv_channels {model.kv_channels} is odd: rotary angles need an even width")
    _demand(
        not (parallel.overlap_param_gather and not parallel.use_distributed_optimizer),
        "overlap_param_gather needs use_distributed_optimizer",
    )
    _demand(
        parallel.ddp_bucket_size is None or parallel.overlap_grad_reduce,
        "ddp_bucket_size goes with overlap_grad_reduce: give that too",
    )
    _demand(
        not parallel.optimizer_cpu_offload or (parallel.use_distributed_optimizer and parallel.bf16),
        "optimizer_cpu_offload needs use_distributed_optimizer and bf16",
    )
    _demand(
        parallel.optimizer_cpu_offload or parallel.optimizer_offload_fraction == 1.0,
        "optimizer_offload_fraction goes with optimizer_cpu_offload: give that too",
    )
    _check_recompute(parallel, model.num_layers // pp // virtual, "virtual stage" if virtual > 1 else "stage")

    check_fp8(model, parallel, data.seq_length)
    _demand(
        parallel.model_class == "gpt" or parallel.fp8_format is None,
        f"fp8_format with model_class {parallel.model_class} was never tried: leave one of the two out",
    )

    estimator = ESTIMATORS[objective.estimator]
    _check_block_size_1(model, objective)
    _demand(
        objective.objective in estimator.objectives,
        f"estimator {objective.estimator} does not fit objective {objective.objective}: leave it out or choose another",
    )
    _demand(
        objective.block_start is None or objective.block_start in estimator.block_starts,
        f"estimator {objective.estimator} with block_start {objective.block_start} is biased: it would read a block's "
        "first token from a block that is itself half masked, which no decoding does: give --block-start clean",
    )
    _demand(
        estimator.is_random or objective.num_views == 1,
        f"num_views is {objective.num_views}: estimator {objective.estimator} has no noise to average over views: "
        "leave num_views at 1",
    )
    _check_losses(objective)
    _refuse_unread(objective)
    check_online(config)
    check_lora(config)
    _demand(
        objective.sft_weighting == "uniform" or not objective.complementary,
        "sft_weighting elbo weighs what one view masks by its timestep: give --no-complementary with it",
    )
    return data_parallel


def _check_block_size_1(model: ModelSettings, objective: ObjectiveSettings) -> None:
    """An autoregressive model has one estimator, and no other model has it."""
    name, is_exact = objective.estimator, ESTIMATORS[objective.estimator].autoregressive
    _demand(
        is_exact or not is_autoregressive(model),
        f"estimator {name}: with block_size 1 there is nothing to mask: give --estimator {AUTOREGRESSIVE}, or leave "
        "estimator out",
    )
    _demand(
        is_autoregressive(model) or not is_exact,
        f"estimator {name} is for block_size 1 in families that predict the next token, this model has block_size "
        f"{model.block_size} and family {model.family}: leave estimator out or choose another",
    )
    _demand(
        objective.block_start != "noisy" or not is_exact,
        "block_start noisy: with block_size 1 there are no noisy views: leave it out",
    )


def unread_options(objective: ObjectiveSettings, estimator: str) -> dict[str, str]:
    """The options that the chosen objective, ``estimator`` and losses do not read, and who would read each."""
    chosen, losses = objective.objective, objective.loss_type or ["sigmoid"]
    unread = _of_others("estimator", ESTIMATORS, [estimator])
    if OBJECTIVES[chosen].compares_pairs:
        return unread | _of_others("loss_type", LOSSES, losses, ALWAYS_READ)
    names = ["loss_type", "loss_weights", *(f.name for f in dataclasses.fields(LossOptions))]
    names += [] if OBJECTIVES[chosen].may_read_reference else ["length_normalization"]
    return unread | dict.fromkeys(names, "objective preference")


def _of_others(kind: str, table: Mapping, chosen: Collection[str], always: Collection[str] = ()) -> dict[str, str]:
    """The options of a ``table``'s rows that no ``chosen`` row reads, and ``kind`` and names of the rows that do."""
    read = {*always, *(option for name in chosen for option in table[name].options)}
    readers: dict[str, list[str]] = {}
    for name, row in table.items():
        for option in row.options:
            readers.setdefault(option, []).append(name)
    return {option: f"{kind} {', '.join(names)}" for option, names in readers.items() if option not in read}


def _refuse_unread(objective: ObjectiveSettings) -> None:
    defaults = ObjectiveSettings(loss_type=["sigmoid"])
    for option, readers in unread_options(objective, objective.estimator).items():
        choice = getattr(objective, readers.partition(" ")[0])
        chosen = choice if isinstance(choice, str) else ", ".join(choice)
        _demand(
            getattr(objective, option) == getattr(defaults, option),
            f"{option} belongs to {readers}: leave it out with {chosen}",
        )


def _check_losses(objective: ObjectiveSettings) -> None:
    names, weights = objective.loss_type, objective.loss_weights
    for name in names:
        _demand(name in LOSSES, f"loss_type: {name!r} is none of {', '.join(LOSSES)}")
        _demand(names.count(name) == 1, f"loss_type has {name} twice: give it once, with loss_weights")
    if weights is not None:
        _demand(
            len(weights) == len(names),
            f"loss_weights has {len(weights)} weights, loss_type {len(names)} losses: give as many of both",
        )
        _demand(any(weights), "loss_weights are all 0: there is nothing to learn")
    _demand(
        "robust" not in names or objective.label_smoothing < 0.5,
        "label_smoothing 0.5 with loss_type robust: half of the labels wrong say nothing; give less",
    )


def validate_data(config: Config) -> None:
    """Checks that there is something to train on or to score. Raises UserError."""
    data = config.data
    _demand(data.data_path, "data_path is missing: give --data-path FILE")
    _demand(
        data.tokenizer_model is None or data.tokenizer_type is not None,
        "tokenizer_model goes with tokenizer_type: give that too",
    )
    _demand(
        data.tokenizer_model is None or data.tokenizer_type != "ByteLevelTokenizer",
        "tokenizer_model: a ByteLevelTokenizer reads no file: leave it out",
    )


def validate_training(config: Config, data_parallel: int) -> None:
    """Checks what only training needs; after `validate`. Raises UserError."""
    optimizer = config.optimizer
    _demand(config.run.save, "save is missing: give --save DIR, the run folder")
    for key in ("reference", "reference_cache"):
        _demand(
            config.objective.has_reference or getattr(config.run, key) is None,
            f"{key}: {no_reference(config.objective)}: leave it out",
        )
    _demand(
        config.objective.has_reference or not config.rounds.move_reference,
        f"move_reference: {no_reference(config.objective)}: leave it out",
    )
    if config.run.reference_cache is not None:
        check_cached_reference(config.parallel)
    elif config.objective.has_reference:
        check_live_reference(config.parallel)
    _check_length(config, data_parallel)
    _demand(optimizer.min_lr <= optimizer.lr, f"min_lr {optimizer.min_lr} is larger than lr {optimizer.lr}")
    _demand(
        config.data.assistant_turns == "last" or config.objective.objective == "sft",
        "assistant_turns all is for objective sft: a preference compares one answer; leave it out",
    )
    interval, path = config.evaluation.eval_interval, config.evaluation.eval_data_path
    _demand(interval is None or path, "eval_interval needs data: give --eval-data-path FILE")
    _demand(path is None or interval, "eval_data_path is never read without eval_interval: give --eval-interval N")
    _demand(path or config.evaluation.eval_split is None, "eval_split is a part of eval_data_path: give that too")
    rule = "leftmost" if config.model.block_size == 1 else family_of(config.model).rule
    _demand(
        config.evaluation.eval_threshold is None or "threshold" in RULES[rule].reads,
        f"eval_threshold: decoding by the rule {rule} has no threshold: leave it out",
    )
    for option in dataclasses.fields(config.evaluation):
        _demand(
            path or getattr(config.evaluation, option.name) == option.default,
            f"{option.name} goes with eval_interval and eval_data_path: give those too",
        )
    _demand(
        optimizer.min_lr == 0 or optimizer.lr_decay_style != "constant",
        "min_lr is where a decay ends: leave it out with lr_decay_style constant",
    )
    _demand(
        config.run.wandb_exp_name is None or config.run.wandb_project,
        "wandb_exp_name goes with wandb_project: give that too",
    )


def no_reference(objective: ObjectiveSettings) -> str:
    """Why nothing is compared with a reference."""
    kind = OBJECTIVES[objective.objective]
    if not kind.may_read_reference:
        return f"objective {objective.objective} has no reference"
    if not kind.compares_pairs:
        return f"objective {objective.objective} with kl_coefficient 0 has no reference"
    return f"loss_type {', '.join(objective.loss_type or ['sigmoid'])} has no reference"


def validate_precomputing(config: Config, data_parallel: int) -> None:
    """Checks what only the reference's scores of a coming run need; after `validate`. Raises UserError."""
    objective = config.objective
    _demand(
        objective.has_reference and OBJECTIVES[objective.objective].compares_pairs,
        f"{no_reference(objective)}: there is nothing to precompute",
    )
    _demand(config.rounds.rounds is None, "rounds make their own pairs: there is nothing to precompute: leave it out")
    check_cached_reference(config.parallel)
    _check_length(config, data_parallel)


def _check_length(config: Config, data_parallel: int) -> None:
    """How many steps there are and how they divide."""
    optimizer = config.optimizer
    if not OBJECTIVES[config.objective.objective].is_online:
        _multiple("global_batch_size", config.data.global_batch_size, "the data-parallel size", data_parallel)
    _demand(
        (optimizer.train_iters is None) != (optimizer.num_epochs is None),
        "give exactly one of train_iters and num_epochs",
    )


def _check_virtual_stages(layers_per_stage: int, stages: int, virtual: int) -> None:
    name = "num_virtual_stages_per_pipeline_rank"
    _demand(virtual == 1 or stages > 1, f"{name} {virtual} needs pipeline_model_parallel_size above 1")
    _multiple("layers per stage", layers_per_stage, name, virtual)


def _check_recompute(parallel: ParallelSettings, layers: int, stage: str) -> None:
    """``layers``: in a ``stage``, which is what megatron-core recomputes in chunks."""
    method, count = parallel.recompute_method, parallel.recompute_num_layers
    _demand(
        parallel.recompute_modules is None or parallel.recompute_granularity == "selective",
        "recompute_modules goes with recompute_granularity selective: set that or leave it out",
    )
    for name in parallel.recompute_modules or ():
        _demand(name in RECOMPUTABLE, f"recompute_modules: {name!r} is none of {', '.join(RECOMPUTABLE)}")
    if parallel.recompute_granularity != "full":
        _demand(
            method is None and count is None,
            "recompute_method and recompute_num_layers go with recompute_granularity full: set that or leave them out",
        )
    elif method == "uniform":
        _multiple(f"layers per {stage}", layers, "recompute_num_layers", count)
    else:
        _demand(
            count <= layers,
            f"recompute_num_layers {count} is more than the {layers} layers of a {stage}",
        )


def _check_ranges(group) -> None:
    for f in dataclasses.fields(group):
        given, low, high = getattr(group, f.name), f.metadata["at_least"], f.metadata["at_most"]
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            _demand(not isinstance(value, float) or math.isfinite(value), f"{f.name} is {value}: it must be finite")
            _demand(low is None or value >= low, f"{f.name} is {value}: it must be at least {low}")
            _demand(high is None or value <= high, f"{f.name} is {value}: it must be at most {high}")
