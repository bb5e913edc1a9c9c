"""How much memory a rank needs: every formula takes settings and gives bytes. docs/memory.md explains them.

Legend: t packed tokens on one context-parallel rank; h, f, q, k, V, TP as in `parameters`; s is t, or t / TP under
sequence parallelism; b bytes of an activation, 2 with bf16, else 4. "Saved" is what the backward pass keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dtrpo.config.lora import LoraSettings
from megatron_dtrpo.config.settings import Config, ModelSettings, ParallelSettings
from megatron_dtrpo.model.limits import LOGIT_ROWS
from megatron_dtrpo.planning import parameters

GIB = 2**30
# CUDA's context, NCCL's buffers, cuBLAS's workspace and what the allocator cannot use: an assumption, not a formula.
OVERHEAD_BYTES = 5 * GIB


@dataclass(frozen=True)
class Plan:
    """Bytes on one rank of one pipeline stage."""

    weights: int
    fp8_weights: int
    gradients: int
    optimizer: int
    reference: int
    activations: int
    head: int
    overhead: int = OVERHEAD_BYTES

    @property
    def states(self) -> int:
        """What is there between two steps."""
        return self.weights + self.fp8_weights + self.gradients + self.optimizer + self.reference

    @property
    def total(self) -> int:
        return self.states + self.activations + self.head + self.overhead


def plan_stage(config: Config, data_parallel: int, stage: int) -> Plan:
    """The plan of a rank of pipeline stage ``stage`` under a validated ``config``, at its budget of tokens
    (``seq_length``) and with all parameters trained, or adapters alone where there are any."""
    model, parallel = config.model, config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    count = parameters.stage_parameters(model, tp, pp, stage)
    has_reference = config.objective.has_reference and config.run.reference_cache is None
    adapted = config.lora.lora_rank is not None
    numbers = parameters.stage_layer_numbers(model, pp, parallel.num_virtual_stages_per_pipeline_rank, stage)
    adapters = parameters.adapters_in(model, config.lora, tp, numbers)
    trained = adapters if adapted else count
    # Without its adapters the model is the reference, unless another one was asked for.
    copies = has_reference and (not adapted or config.run.reference is not None)
    shards = data_parallel * parallel.context_parallel_size
    matrices = parameters.stage_layers(model, pp) * parameters.matrix_parameters(model, tp)
    weights = weight_bytes(count, matrices, parallel)
    tokens = config.data.seq_length // parallel.context_parallel_size
    micro_batches = max(1, config.data.global_batch_size // (data_parallel * config.data.micro_batch_size))
    return Plan(
        weights=weights + weight_bytes(adapters, 0, parallel),
        fp8_weights=fp8_copy_bytes(matrices, parallel),
        gradients=4 * trained,
        optimizer=optimizer_bytes(trained, parallel, shards),
        reference=weights if copies else 0,
        activations=stage_activation_bytes(model, parallel, tokens, stage, micro_batches, config.lora),
        head=head_bytes(model, parallel, tokens, trains_head=not adapted) if stage == pp - 1 else 0,
    )


def weight_bytes(count: int, matrices: int, parallel: ParallelSettings) -> int:
    """``count`` parameters, of which ``matrices`` are weights of matrix products inside layers: 2 bytes each with bf16,
    else 4. With fp8_param_gather the matrices take 1."""
    each = 2 if parallel.bf16 else 4
    return each * count - (each - 1) * matrices * parallel.fp8_param_gather


def fp8_copy_bytes(matrices: int, parallel: ParallelSettings) -> int:
    """Transformer Engine keeps a matrix in FP8 twice, as it is and transposed, for the micro-batches of a step; with
    fp8_param_gather the first of the two is the weight itself."""
    if parallel.fp8_format is None:
        return 0
    return matrices * (1 if parallel.fp8_param_gather else 2)


def optimizer_bytes(count: int, parallel: ParallelSettings, shards: int) -> int:
    """Adam's two moments in fp32, with bf16 also fp32 main weights: 8 or 12 bytes a parameter, which the distributed
    optimizer divides among ``shards``, the data- and context-parallel processes."""
    each = 12 if parallel.bf16 else 8
    kept = 1 - parallel.optimizer_offload_fraction if parallel.optimizer_cpu_offload else 1
    return int(kept * each * count) // (shards if parallel.use_distributed_optimizer else 1)


@dataclass(frozen=True)
class LayerActivations:
    """Saved bytes of one layer and one micro-batch."""

    inputs: int
    """The residual stream before the layer: all that full recomputation keeps."""
    norms: int
    """Both norms' outputs and the residual stream between them."""
    attention: int
    """Rotated queries and keys, values, the attention's output and its log-sum-exp."""
    qk_norms: int
    """Queries and keys before their norms, and the norms' scales, one a head; nothing without such norms."""
    rotary: int
    """Cosines and sines, made anew for queries and for keys in every layer; the fused kernel keeps the angles, of which
    all layers have one copy. (Left to the machine, it is not counted on.)"""
    mlp: int
    """Gate and up as one tensor, and the activated product."""
    adapters: int = 0
    """What is between the two matrices of each adapter, and with dropout what is left of its input."""

    @property
    def total(self) -> int:
        return self.inputs + self.norms + self.attention + self.qk_norms + self.rotary + self.mlp + self.adapters


def adapter_activation_bytes(
    model: ModelSettings, parallel: ParallelSettings, tokens: int, lora: LoraSettings | None
) -> int:
    """Of a layer all of whose linear layers have an adapter: seven times its rank a token, of q, k, v, the attention's
    output, gate, up and down. Dropout keeps what is left of an input in the input's place, but the attention's output,
    which the attention keeps too; and for each number a byte that says whether it is left."""
    if lora is None or lora.lora_rank is None:
        return 0
    width, tp = 2 if parallel.bf16 else 4, parallel.tensor_model_parallel_size
    local = tokens // tp if parallel.sequence_parallel else tokens
    q, _ = parameters.widths(model)
    inputs = local * 2 * model.hidden_size + tokens * (q + model.ffn_hidden_size) // tp
    dropout = inputs + width * tokens * q // tp if lora.lora_dropout else 0
    return width * tokens * 7 * lora.lora_rank + dropout


def layer_activations(
    model: ModelSettings, parallel: ParallelSettings, tokens: int, lora: LoraSettings | None = None
) -> LayerActivations:
    """Without recomputation, with an attention that saves its operands (FlexAttention). FP8 saves what matrix products
    read, and nothing else does, in one byte: the norms' outputs and the product in the MLP."""
    tp = parallel.tensor_model_parallel_size
    width = 2 if parallel.bf16 else 4
    narrow = 1 if parallel.fp8_format else width
    local = tokens // tp if parallel.sequence_parallel else tokens
    h, f, (q, k) = model.hidden_size, model.ffn_hidden_size, parameters.widths(model)
    heads, groups = model.num_attention_heads, model.num_query_groups
    return LayerActivations(
        inputs=width * local * h,
        norms=2 * narrow * local * h + width * local * h,
        attention=(width * tokens * (2 * q + 2 * k) + 4 * tokens * heads) // tp,
        qk_norms=(width * tokens * (q + k) + 4 * tokens * (heads + groups)) // tp if model.qk_layernorm else 0,
        rotary=0 if parallel.apply_rope_fusion else 4 * width * tokens * model.kv_channels,
        mlp=(width * tokens * 2 * f + narrow * tokens * f) // tp,
        adapters=adapter_activation_bytes(model, parallel, tokens, lora),
    )


def kept_bytes(layer: LayerActivations, parallel: ParallelSettings) -> int:
    """Activations of one layer until its backward pass, under the recomputation that is set. Recomputing the attention
    itself keeps its operands and its output, which the next matrix product reads: next to nothing is saved. What full
    recomputation keeps is `stage_activation_bytes`'s to count."""
    if parallel.recompute_granularity == "selective" and "mlp" in (parallel.recompute_modules or ()):
        return layer.total - layer.mlp
    return layer.total


def stage_activation_bytes(
    model: ModelSettings,
    parallel: ParallelSettings,
    tokens: int,
    stage: int,
    micro_batches: int,
    lora: LoraSettings | None = None,
) -> int:
    """Peak over a step: what all micro-batches in flight keep, and one layer (or recomputed chunk) in its backward pass
    with as much again for the gradients of its widest part, and the gradient of its largest weight."""
    pp, virtual = parallel.pipeline_model_parallel_size, parallel.num_virtual_stages_per_pipeline_rank
    per_chunk = parameters.stage_layers(model, pp) // virtual
    layer = layer_activations(model, parallel, tokens, lora)
    in_flight = chunks_in_flight(pp, virtual, stage, micro_batches)
    frozen = lora is not None and lora.lora_rank is not None
    working = layer.mlp + (0 if frozen else largest_weight_gradient(model, parallel))
    if parallel.recompute_granularity != "full":
        if kept_bytes(layer, parallel) < layer.total:
            working += layer.mlp  # the recomputed one
        return in_flight * per_chunk * kept_bytes(layer, parallel) + working
    span = parallel.recompute_num_layers
    if parallel.recompute_method == "uniform":
        return in_flight * (per_chunk // span) * layer.inputs + span * layer.total + working
    # block: the first `span` layers of every chunk are recomputed one by one, the others keep everything
    kept = span * layer.inputs + (per_chunk - span) * layer.total
    return in_flight * kept + layer.total + working


def largest_weight_gradient(model: ModelSettings, parallel: ParallelSettings) -> int:
    """Of the gate and up matrix, in the activations' format, until it is added to the fp32 gradient; none where the
    matrix product does that."""
    if parallel.gradient_accumulation_fusion:
        return 0
    return (
        (2 if parallel.bf16 else 4)
        * model.hidden_size
        * 2
        * model.ffn_hidden_size
        // parallel.tensor_model_parallel_size
    )


def chunks_in_flight(pp: int, virtual: int, stage: int, micro_batches: int) -> int:
    """Forward passes of a (virtual) stage that wait for their backward pass at most: pp - stage in the plain schedule;
    in the interleaved one 2 (pp - stage - 1) + (virtual - 1) pp + 1."""
    if pp == 1:
        return 1
    if virtual == 1:
        return min(pp - stage, micro_batches)
    return min(2 * (pp - stage - 1) + (virtual - 1) * pp + 1, virtual * micro_batches)


def head_bytes(model: ModelSettings, parallel: ParallelSettings, tokens: int, trains_head: bool = True) -> int:
    """Peak of the head: the gathered hidden states and the rows read from them, and the larger of two moments on R =
    min(t, LOGIT_ROWS) target rows (more are cut into chunks and recomputed). Going forward there are logits, their fp32
    copy, fp32 probabilities and their copy that is kept; going backward the gradient of the logits and that of the
    output matrix. With several chunks the gradient of the chunks before is there as well: autograd adds them up
    before the fp32 gradient gets any."""
    width = 2 if parallel.bf16 else 4
    rows = min(tokens, LOGIT_ROWS)
    logits = rows * model.padded_vocab_size // parallel.tensor_model_parallel_size
    gradient = width * parameters.vocabulary_parameters(model, parallel.tensor_model_parallel_size) * trains_head
    earlier = gradient if tokens > LOGIT_ROWS else 0
    forward = logits * (2 + 4 + 4 + 2 if parallel.bf16 else 4 + 4)
    return 2 * width * tokens * model.hidden_size + earlier + max(forward, width * logits + gradient)
