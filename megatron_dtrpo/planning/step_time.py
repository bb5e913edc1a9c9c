"""A rough time per step, to compare layouts with. Arithmetic and messages are counted, rates and shares are assumed:
the order of two layouts means something where they differ much, the seconds mean little.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.config.estimators import total_views
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.settings import Config, ModelSettings, ParallelSettings
from megatron_dtrpo.planning import parameters
from megatron_dtrpo.rounding import ceil_divide

GPUS_PER_NODE = 8
PEAK_FLOPS = 989e12  # H100, bf16, dense
REACHED = 0.4  # of the peak, in matrix products and all that goes with them
FP8_GAIN = 1.5  # matrix products in FP8, casts included, over bf16
NODE_BYTES = 350e9  # a second and GPU within a node, reached
NETWORK_BYTES = 40e9  # a second and GPU between nodes, reached
LATENCY = 20e-6  # seconds before a message starts
FULL_TOKENS = 512  # a matrix product of so many tokens reaches half of what a long one does
# The packed layout's mask: a token sees a quarter of its sequence, and every fourth token is read for a prediction.
SEEN_SHARE = 0.25
TARGET_SHARE = 0.25
RESPONSES = {"preference": 2, "sft": 1}  # of an example, by objective


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step."""

    compute: float
    bubble: float
    tensor: float
    context: float
    data: float

    @property
    def total(self) -> float:
        return self.compute + self.bubble + self.tensor + self.context + self.data


def bubble_share(pp: int, virtual: int, micro_batches: int) -> float:
    """Idle over busy time of a stage. The interleaved schedule takes micro-batches in groups of ``pp``, and leaves the
    places that its last group lacks empty once for every virtual stage but one."""
    missing = -micro_batches % pp
    return (pp - 1 + (virtual - 1) * missing) / (virtual * micro_batches)


def batch_of_step(config: Config) -> int:
    """Examples of an optimizer step over all processes; online groups of answers, an update's share of the prompts."""
    if OBJECTIVES[config.objective.objective].is_online:
        return ceil_divide(config.online.rollout_prompts, config.online.updates_per_rollout)
    return config.data.global_batch_size


def examples_of_step(config: Config, data_parallel: int) -> int:
    """Of the data-parallel process that has most."""
    return ceil_divide(batch_of_step(config), data_parallel)


def micro_batches_of_step(config: Config, data_parallel: int) -> int:
    """Of the data-parallel process that has most, where ``micro_batch_size`` examples fit a packed sequence."""
    return ceil_divide(examples_of_step(config, data_parallel), config.data.micro_batch_size)


def step_time(config: Config, data_parallel: int) -> StepTime:
    """Of a validated ``config``. Every packed sequence is taken to be full, and to hold ``micro_batch_size`` examples
    then."""
    model, parallel, data = config.model, config.parallel, config.data
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    micro_batches = micro_batches_of_step(config, data_parallel)
    has_reference = config.objective.has_reference and config.run.reference_cache is None
    adapted = config.lora.lora_rank is not None
    # A backward pass counts twice, for the gradients of inputs and of weights. Frozen weights have none.
    passes = (2 if adapted else 3) + has_reference + recomputed_share(model, parallel)
    tokens = data.seq_length // cp
    rate = PEAK_FLOPS * REACHED * (FP8_GAIN if parallel.fp8_format else 1) * tokens / (tokens + FULL_TOKENS)
    flops = forward_flops(model, data.seq_length, seen_share(config))
    compute = micro_batches * passes * flops / (tp * pp * cp) / rate
    bubble = compute * bubble_share(pp, parallel.num_virtual_stages_per_pipeline_rank, micro_batches)

    layers = parameters.stage_layers(model, pp)
    residual = 2 * tokens * model.hidden_size
    # Twice a gather and a reduce-scatter in every pass; a backward pass, which counts twice, gathers its inputs again.
    messages = micro_batches * layers * (passes - 0.5) * 4
    tensor = messages * (residual * (tp - 1) / tp / _rate(tp) + LATENCY) if tp > 1 else 0.0
    _, k = parameters.widths(model)
    keys = 2 * 2 * data.seq_length * k // tp
    messages = micro_batches * layers * (passes - 1)
    context = messages * (keys * (cp - 1) / cp / _rate(tp * cp) + LATENCY) if cp > 1 else 0.0
    # fp32 gradients are added up, and bf16 weights gathered.
    if adapted:
        count = parameters.adapters_in(model, config.lora, tp, range(model.num_layers)) // pp
    else:
        count = max(parameters.stage_parameters(model, tp, pp, stage) for stage in (0, pp - 1))
    ranks = data_parallel * cp
    exchange = 6 * count * (ranks - 1) / ranks
    return StepTime(
        compute=compute,
        bubble=bubble,
        tensor=tensor,
        context=context,
        data=exchange / _rate(tp * cp * data_parallel),
    )


def _rate(span: int) -> float:
    """Bytes a second between ranks that are at most ``span`` apart."""
    return NODE_BYTES if span <= GPUS_PER_NODE else NETWORK_BYTES


def seen_share(config: Config) -> float:
    """The share of a full packed sequence that a token sees on average. Under full attention that is one view of one
    response, with the prompt before it."""
    if config.model.block_size != FULL:
        return SEEN_SHARE
    objective = config.objective
    views = total_views(objective.estimator, objective.num_views, objective)
    return 1 / (RESPONSES[objective.objective] * views * config.data.micro_batch_size)


def forward_flops(model: ModelSettings, tokens: int, seen: float = SEEN_SHARE) -> float:
    """Of one forward pass over a packed sequence, through all layers and the head."""
    q, _ = parameters.widths(model)
    layer = 2 * parameters.matrix_parameters(model, tp=1) + 4 * q * seen * tokens
    head = 2 * parameters.vocabulary_parameters(model, tp=1) * TARGET_SHARE
    return tokens * (model.num_layers * layer + head)


def recomputed_share(model: ModelSettings, parallel: ParallelSettings) -> float:
    """Forward passes that recomputation adds."""
    if parallel.recompute_granularity == "full":
        layers = parameters.stage_layers(model, parallel.pipeline_model_parallel_size)
        layers //= parallel.num_virtual_stages_per_pipeline_rank
        return 1.0 if parallel.recompute_method == "uniform" else parallel.recompute_num_layers / layers
    if "mlp" in (parallel.recompute_modules or ()):
        return 3 * model.hidden_size * model.ffn_hidden_size / parameters.matrix_parameters(model, tp=1)
    return 0.0
