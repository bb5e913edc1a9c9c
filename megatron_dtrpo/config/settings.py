"""Every setting of the trainer: one dataclass field is one YAML key, one flag, one help text and one default.

Names are Megatron-LM's where Megatron-LM has the setting. YAML files are flat: the groups below only say what a
setting belongs to. `validation.validate` is the one door: code behind it does not check settings again.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from megatron_dtrpo.config.backends import AUTO, BACKENDS
from megatron_dtrpo.config.decoding import RULES
from megatron_dtrpo.config.estimators import ESTIMATORS, EstimatorOptions
from megatron_dtrpo.config.fp8 import RECIPES
from megatron_dtrpo.config.lora import LoraSettings
from megatron_dtrpo.config.losses import LOSSES, LossOptions, reads_reference
from megatron_dtrpo.config.objectives import OBJECTIVES
from megatron_dtrpo.config.policy_gradient import PolicyGradientOptions
from megatron_dtrpo.config.rows import setting
from megatron_dtrpo.families.registry import DEFAULT_FAMILY, FAMILIES
from megatron_dtrpo.rounding import round_up

RECOMPUTABLE = ("core_attn", "mlp")  # what megatron-core can without Transformer Engine


@dataclass
class ModelSettings:
    """The architecture. Saved beside every checkpoint; with ``load`` it is read from there."""

    family: str = setting(
        DEFAULT_FAMILY, "Model family; an export has its names of weights and its config.json.", FAMILIES
    )
    num_layers: int | None = setting(None, "Transformer layers.", at_least=1)
    hidden_size: int | None = setting(None, "Width of the residual stream.", at_least=1)
    ffn_hidden_size: int | None = setting(None, "Width of the gated MLP.", at_least=1)
    num_attention_heads: int | None = setting(None, "Query heads.", at_least=1)
    num_query_groups: int | None = setting(None, "Key/value heads; default: as many as query heads.", at_least=1)
    kv_channels: int | None = setting(
        None, "Width of one head; default: hidden_size / num_attention_heads.", at_least=1
    )
    max_position_embeddings: int = setting(32768, "Longest prompt plus response, in tokens.", at_least=1)
    rotary_base: float = setting(1000000.0, "Base of the rotary angles (rope_theta).")
    norm_epsilon: float = setting(1e-6, "Epsilon of the RMS norms.", at_least=0)
    add_qkv_bias: bool = setting(True, "Biases on the query, key and value projections, as Qwen2 has.")
    qk_layernorm: bool = setting(False, "RMS norms of queries and keys over the width of a head, as Qwen3 has.")
    untie_embeddings_and_output_weights: bool = setting(True, "Separate embedding and output matrices.")
    init_method_std: float = setting(0.02, "Standard deviation of random initial weights.", at_least=0)
    vocab_size: int | None = setting(None, "Vocabulary before padding; default: the tokenizer's.", at_least=1)
    make_vocab_size_divisible_by: int = setting(
        128,
        "Pad the vocabulary to a multiple of this, whatever the layout, so that TP does not change the model.",
        at_least=1,
    )
    block_size: int = setting(
        32,
        "Tokens per diffusion block (Fast-dLLM v2's bd_size, SDAR's block_size). 0: prompt and response are one block, "
        "which is full attention (LLaDA, Dream). 1: autoregressive, in families that predict the next token.",
        at_least=0,
    )

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, self.make_vocab_size_divisible_by)


@dataclass
class ParallelSettings:
    """How a run is spread over processes, and in which number formats it computes."""

    tensor_model_parallel_size: int = setting(1, "Processes that share each layer.", at_least=1)
    pipeline_model_parallel_size: int = setting(1, "Pipeline stages.", at_least=1)
    num_virtual_stages_per_pipeline_rank: int = setting(
        1,
        "Parts that each pipeline stage is cut into; above 1 the interleaved schedule, with smaller bubbles.",
        at_least=1,
    )
    context_parallel_size: int = setting(
        1,
        "Processes that share each packed sequence, which is padded to whole units of at most 128 tokens for each.",
        at_least=1,
    )
    sequence_parallel: bool = setting(False, "Shard norms and residuals along the sequence; no effect without TP.")
    use_distributed_optimizer: bool = setting(False, "Shard optimizer state over data-parallel processes.")
    optimizer_cpu_offload: bool = setting(
        False,
        "Keep optimizer state and main weights in host memory and update them there; with use_distributed_optimizer.",
    )
    optimizer_offload_fraction: float = setting(
        1.0, "Share of the parameters whose update is offloaded.", at_least=0, at_most=1
    )
    overlap_grad_reduce: bool = setting(False, "Overlap gradient reduction with the backward pass.")
    overlap_param_gather: bool = setting(False, "Overlap the distributed optimizer's gather with the forward pass.")
    ddp_bucket_size: int | None = setting(
        None,
        "Parameters whose gradients or values travel in one message, with overlap_grad_reduce. Default: 40 million, or "
        "a million for each data-parallel process if that is more.",
        at_least=1,
    )
    bf16: bool = setting(False, "bfloat16 weights and activations, fp32 main weights and gradient reduction.")
    transformer_impl: str | None = setting(
        None,
        "Layers of Transformer Engine (fused norms, FP8) or megatron-core's own; default: Transformer Engine where it "
        "is installed and there is a GPU.",
        ("transformer_engine", "local"),
    )
    model_class: str = setting(
        "gpt",
        "Which class of megatron-core computes the model: GPTModel, or HybridModel, which is to replace it there: a "
        "prototype, with megatron-core 0.18 or newer. Checkpoints are the same; see docs/notes/hybrid_model.md.",
        ("gpt", "hybrid"),
    )
    fp8_format: str | None = setting(
        None,
        "Matrix products in FP8: e4m3 throughout, or hybrid with e5m2 gradients. Default: none; see docs/fp8.md.",
        ("e4m3", "hybrid"),
    )
    fp8_recipe: str = setting(
        "tensorwise",
        "How FP8 tensors are scaled. Megatron-LM's default is delayed, with scales of past steps; with the others "
        "policy and reference round alike.",
        tuple(RECIPES),
    )
    fp8_margin: int = setting(0, "delayed: scales are smaller by 2 to this power.", at_least=0)
    fp8_amax_history_len: int = setting(1, "delayed: how many past maxima are kept.", at_least=1)
    fp8_amax_compute_algo: str = setting(
        "most_recent", "delayed: which of the kept maxima sets the scale.", ("max", "most_recent")
    )
    fp8_param_gather: bool = setting(False, "Keep and gather the weights of FP8 matrix products in FP8.")
    fp8_reference: bool = setting(
        True,
        "The reference policy computes in FP8 too. Off: in bf16, and the likelihood ratio has FP8's error in it.",
    )
    first_last_layers_bf16: bool = setting(False, "Keep the first and last layers out of FP8.")
    num_layers_at_start_in_bf16: int = setting(
        1, "Layers at the start that first_last_layers_bf16 keeps in bf16.", at_least=0
    )
    num_layers_at_end_in_bf16: int = setting(1, "Layers at the end that it keeps in bf16.", at_least=0)
    attention_backend: str = setting(AUTO, "auto: flex on CUDA, sdpa elsewhere.", (AUTO, *BACKENDS))
    gradient_accumulation_fusion: bool | None = setting(
        None,
        "Add weight gradients into the fp32 gradient in the matrix product. Default: where Transformer Engine's layers "
        "or Apex's CUDA extension can; without that extension the output layer does not.",
    )
    apply_rope_fusion: bool | None = setting(
        None, "Rotate queries and keys in one kernel of Transformer Engine's. Default: where it is there."
    )
    recompute_granularity: str | None = setting(
        None, "Recompute activations in the backward pass: whole layers or some modules.", ("full", "selective")
    )
    recompute_modules: list[str] | None = setting(
        None, f"With selective: which of {', '.join(RECOMPUTABLE)}. Default: core_attn."
    )
    recompute_method: str | None = setting(
        None, "With full: uniform chunks of layers, or a number of layers per stage (block).", ("uniform", "block")
    )
    recompute_num_layers: int | None = setting(
        None, "Layers per recomputed chunk (uniform) or recomputed (block).", at_least=1
    )
    distributed_timeout_minutes: int = setting(
        60, "A collective on the device that takes longer ends the run.", at_least=1
    )


@dataclass
class DataSettings:
    """Training data and its packing."""

    data_path: str | None = setting(
        None,
        "JSONL, JSON, CSV, Parquet or Arrow; a folder or glob of such files, or a saved Hugging Face data set. "
        "See docs/data.md.",
    )
    split: str | None = setting(
        None, "Split of a folder or glob that holds several: train, train_prefs, train+validation."
    )
    data_cache_path: str | None = setting(None, "Folder of tokenized data; default: data_cache in the run folder.")
    tokenizer_type: str | None = setting(
        None,
        "Tokenizer library; with load, default: the checkpoint's own.",
        ("HuggingFaceTokenizer", "SentencePieceTokenizer", "ByteLevelTokenizer"),
    )
    tokenizer_model: str | None = setting(None, "Tokenizer folder (Hugging Face) or model file (SentencePiece).")
    mask_token: str | None = setting(None, "The mask token; default: the tokenizer's own.")
    eos_token: str | None = setting(None, "The token that ends a response; default: the tokenizer's own.")
    apply_chat_template: bool = setting(False, "Wrap text prompts in the chat template as one user message.")
    assistant_turns: str = setting(
        "last",
        "What sft learns of a conversation in messages: the assistant's last message, or all of them, each an example "
        "with the conversation before it as its prompt.",
        ("last", "all"),
    )
    make_response_length_divisible_by: int = setting(
        1,
        "Fill responses with end tokens, which are learned as LLaDA's SFT learns them, to a multiple of this. Recorded "
        "decodings stay as they are.",
        at_least=1,
    )
    seq_length: int = setting(8192, "Token budget of one packed sequence: clean and noisy tokens together.", at_least=1)
    micro_batch_size: int = setting(8, "At most this many examples in one packed sequence.", at_least=1)
    global_batch_size: int = setting(32, "Examples per step, over all processes.", at_least=1)
    overlong: str = setting(
        "skip", "Examples that do not fit seq_length: skip (counted in a warning) or error.", ("skip", "error")
    )
    bad_rows: str = setting(
        "error",
        "Rows that cannot be used: error (every kind of problem is named, with its first places) or skip (the same in "
        "a warning).",
        ("error", "skip"),
    )
    shuffle: bool = setting(True, "A new order every epoch; off: file order.")


@dataclass
class ObjectiveChoices:
    """The objective, without the options of its estimator and losses."""

    objective: str = setting(
        "preference", "preference (dTRPO), sft, or policy_gradient on the policy's own answers.", tuple(OBJECTIVES)
    )
    estimator: str | None = setting(
        None,
        "How log-likelihoods are estimated. dtrpo: one random decoding step per block; trajectory: the same of the "
        "decodings recorded in the data (chosen_steps, rejected_steps); exact_trajectory: all of its steps; "
        "elbo; vrpo: elbo with levels stratified over "
        "views and noise shared with the reference; mean_field: all masked; sft; exact: the likelihood itself, with "
        "block_size 1. Default: that of the objective, with block_size 1 exact.",
        tuple(ESTIMATORS),
    )
    block_start: str | None = setting(
        None,
        "Where a block's first token is read: the clean pass, as the decoder does (default for preference), or the "
        "noisy view, as Fast-dLLM v2 trains (default for sft). Families of prediction shift 0 have no such choice.",
        ("clean", "noisy"),
    )
    num_views: int | None = setting(
        None,
        "K, independent noisy views per response (pairs of views if complementary). Default: 8 for vrpo, whose levels "
        "are stratified over views, 1 for the others.",
        at_least=1,
    )
    loss_type: list[str] | None = setting(
        None,
        "Preference losses, see docs/method.md; several are added up. sft is the likelihood anchor: mean -log p of the "
        "chosen's tokens. Default: sigmoid.",
        tuple(LOSSES),
    )
    loss_weights: list[float] | None = setting(None, "A weight for each of loss_type. Default: 1 each.", at_least=0)
    length_normalization: bool = setting(
        False, "Losses see log-likelihoods divided by their responses' tokens, as ipo, simpo and sft always do."
    )


@dataclass
class ObjectiveSettings(PolicyGradientOptions, LossOptions, EstimatorOptions, ObjectiveChoices):
    """The objective: estimator, losses, trained parameters."""

    trainable_modules: list[str] | None = setting(
        None,
        "Train only modules of these names, e.g. mlp linear_proj; wildcards match parts of a name ('*norm'). Default: "
        "all.",
    )

    def losses(self) -> dict[str, float]:
        """Preference losses and their weights."""
        names = self.loss_type or ["sigmoid"]
        return dict(zip(names, self.loss_weights or [1.0] * len(names), strict=True))

    @property
    def has_reference(self) -> bool:
        """Whether the objective compares the policy with a reference."""
        kind = OBJECTIVES[self.objective]
        compares = reads_reference(self.loss_type or ["sigmoid"]) if kind.compares_pairs else self.kl_coefficient > 0
        return kind.may_read_reference and compares


@dataclass
class OnlineSettings:
    """Rollouts of ``objective policy_gradient``, and of rounds: answers that the policy writes, and their rewards."""

    rollout_prompts: int = setting(16, "Prompts of an iteration.", at_least=1)
    group_size: int = setting(8, "Answers to each.", at_least=1)
    rewards: list[str] | None = setting(
        None,
        "Who rewards an answer: numeric, format, length, speed, or module:function of (row, text) that returns a "
        "number or truth.",
    )
    reward_weights: list[float] | None = setting(None, "A weight for each of rewards. Default: 1 each.")
    reward_aggregation: str = setting(
        "sum_then_normalize",
        "Several rewards: their weighted sum is compared within the group, or each by itself, in units of its own "
        "spread, and then summed.",
        ("sum_then_normalize", "normalize_then_sum"),
    )
    advantage_std: bool = setting(
        True, "Advantages are divided by the standard deviation of the group's rewards (GRPO; off: Dr. GRPO)."
    )
    drop_equal_groups: bool = setting(
        True, "Groups whose answers all have one reward are left out, and other prompts decoded for them (DAPO)."
    )
    resamplings: int = setting(2, "At most so often in an iteration; then it takes fewer groups.", at_least=0)
    equal_iterations: int = setting(
        10, "Iterations in a row in which every group has one reward, after which the run ends.", at_least=1
    )
    reward_timeout: float = setting(
        30.0, "Seconds after which a reward is given up, and its answer left out.", at_least=0
    )
    reward_workers: int = setting(4, "Processes that compute rewards.", at_least=1)
    updates_per_rollout: int = setting(
        1, "Optimizer steps of an iteration, each on its share of the groups.", at_least=1
    )
    rollout_max_new_tokens: int = setting(512, "Longest answer.", at_least=1)
    rollout_temperature: float = setting(
        1.0, "1: the decoder's probabilities are the policy's, which training replays.", at_least=0
    )
    rollout_rule: str | None = setting(
        None, "What a decoding step writes, see docs/decoding.md. Default: the family's own.", tuple(RULES)
    )
    rollout_threshold: float | None = setting(
        None,
        "The threshold of the rule, see docs/decoding.md. Default: the rule's own.",
        at_least=0,
        at_most=1,
    )
    rollout_denoising_steps: int | None = setting(
        None,
        "Steps that a sub-block is written in, where the rule has a schedule. Default: as many as it has tokens.",
        at_least=1,
    )
    rollout_small_block_size: int | None = setting(
        None,
        "Tokens of a sub-block; sub-blocks are written from left to right. It divides block_size; with block_size 0 it "
        "is any length. Default: that of generate.",
        at_least=1,
    )
    rollout_batch_size: int = setting(64, "Answers decoded at once on each data-parallel process.", at_least=1)


@dataclass
class RoundSettings:
    """Rounds of ``objective preference``: the policy answers prompts, decoded and rewarded as rollouts are, its answers
    become pairs, it trains on them, and again."""

    rounds: int | None = setting(
        None,
        "So many times the policy answers the prompts of data_path and trains for train_iters or num_epochs on pairs "
        "of its answers. Default: data_path has pairs.",
        at_least=1,
    )
    round_prompts: int | None = setting(
        None,
        "Prompts of a round, the next ones in the order of the data. Default: all of them, every round.",
        at_least=1,
    )
    pairs_per_prompt: int = setting(1, "At most this many pairs of one prompt, no answer twice.", at_least=1)
    move_reference: bool = setting(
        False, "A round's reference is what the round starts from; off: what the first one starts from, or reference."
    )


@dataclass
class OptimizerSettings:
    """Adam and its schedule, as Megatron names them."""

    train_iters: int | None = setting(None, "Steps to train. Give this or num_epochs.", at_least=1)
    num_epochs: float | None = setting(None, "Passes over the data to train. Give this or train_iters.", at_least=0)
    lr: float = setting(5e-7, "Peak learning rate.", at_least=0)
    min_lr: float = setting(0.0, "Learning rate at the end of the decay.", at_least=0)
    lr_decay_style: str = setting(
        "cosine", "Shape of the decay.", ("constant", "linear", "cosine", "inverse-square-root")
    )
    lr_warmup_iters: int = setting(0, "Steps of linear warm-up.", at_least=0)
    weight_decay: float = setting(0.0, "Decoupled weight decay (norms and biases excluded).", at_least=0)
    adam_beta1: float = setting(0.9, "Adam's first moment decay.", at_least=0, at_most=1)
    adam_beta2: float = setting(0.95, "Adam's second moment decay.", at_least=0, at_most=1)
    adam_eps: float = setting(1e-8, "Adam's epsilon.", at_least=0)
    clip_grad: float = setting(1.0, "Clip the global gradient norm to this; 0: do not clip.", at_least=0)
    seed: int = setting(1234, "Seed of initial weights, data order and noise.", at_least=0, at_most=2**63 - 1)

    def steps(self, examples: int, global_batch_size: int) -> int:
        """Steps of a whole run over data of so many examples."""
        return self.train_iters or math.ceil(self.num_epochs * examples / global_batch_size)


@dataclass
class RunSettings:
    """Where a run starts from and what it leaves behind."""

    load: str | None = setting(None, "Checkpoint folder to start from.")
    load_adapter: str | None = setting(
        None, "Folder of an adapter (LoRA) to start from, of the weights in load; see docs/lora.md."
    )
    reference: str | None = setting(
        None,
        "Checkpoint folder of the reference policy, of the same architecture and tokenizer. The first step's rewards "
        "are then not 0, nor is its loss ln 2. Default: what the run starts from.",
    )
    reference_cache: str | None = setting(
        None,
        "Folder of reference scores that megatron-dtrpo reference wrote for this run; no reference policy is kept "
        "in memory.",
    )
    save: str | None = setting(None, "Run folder: checkpoints, metrics.jsonl, TensorBoard. Resumed if it has any.")
    save_interval: int = setting(500, "Steps between checkpoints; the last step is always saved.", at_least=1)
    async_save: bool = setting(
        False, "Write checkpoints beside the run: processes forked from its own write while training goes on."
    )
    keep_last: int | None = setting(
        None, "Keep this many of the run's checkpoints and delete older ones. Default: keep all.", at_least=1
    )
    ckpt_format: str = setting("torch_dist", "Checkpoint format.", ("torch_dist",))
    log_interval: int = setting(1, "Steps between lines on the terminal; metrics.jsonl has every step.", at_least=1)
    tensorboard: bool = setting(True, "Write TensorBoard events to the run folder.")
    wandb_project: str | None = setting(None, "Also log to this Weights & Biases project (extra wandb).")
    wandb_exp_name: str | None = setting(None, "Run name in Weights & Biases.")
    progress: bool = setting(True, "A progress bar on rank 0 where standard error is a terminal.")


@dataclass
class EvaluationSettings:
    """Evaluation of a run on held-out data, into eval.jsonl and TensorBoard."""

    eval_interval: int | None = setting(
        None, "Steps between evaluations; also before the first step and after the last.", at_least=1
    )
    eval_data_path: str | None = setting(
        None,
        "Held-out data of the kind that is trained on. Rows with an answer are also decoded, greedily, and judged: "
        "exact match.",
    )
    eval_split: str | None = setting(None, "Its split, where it holds several.")
    eval_examples: int = setting(512, "At most this many of its rows, the first ones.", at_least=1)
    eval_verifier: str = setting("numeric", "Judges decoded answers: numeric, or module:function.")
    eval_max_new_tokens: int = setting(512, "Longest decoded answer.", at_least=1)
    eval_threshold: float | None = setting(
        None,
        "Decoding unmasks tokens whose confidence is above this, where the family's rule has a threshold. Default: the "
        "rule's own.",
        at_least=0,
        at_most=1,
    )
    eval_batch_size: int = setting(64, "Prompts decoded at once on each data-parallel process.", at_least=1)


GROUPS = {
    "model": ModelSettings,
    "parallel": ParallelSettings,
    "data": DataSettings,
    "objective": ObjectiveSettings,
    "lora": LoraSettings,
    "online": OnlineSettings,
    "rounds": RoundSettings,
    "optimizer": OptimizerSettings,
    "evaluation": EvaluationSettings,
    "run": RunSettings,
}
FIELDS = {f.name: f for kind in GROUPS.values() for f in dataclasses.fields(kind)}
_GROUP_OF = {f.name: group for group, kind in GROUPS.items() for f in dataclasses.fields(kind)}


@dataclass
class Config:
    """All settings of one run."""

    model: ModelSettings = field(default_factory=ModelSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    online: OnlineSettings = field(default_factory=OnlineSettings)
    rounds: RoundSettings = field(default_factory=RoundSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    run: RunSettings = field(default_factory=RunSettings)

    @classmethod
    def from_flat(cls, values: dict) -> Config:
        """Builds the groups from ``{key: value}``; keys must be known."""
        grouped: dict[str, dict] = {group: {} for group in GROUPS}
        for key, value in values.items():
            grouped[_GROUP_OF[key]][key] = value
        return cls(**{group: kind(**grouped[group]) for group, kind in GROUPS.items()})

    def group_of(self, key: str):
        """The group of settings that ``key`` is one of."""
        return getattr(self, _GROUP_OF[key])

    def to_flat(self) -> dict:
        return {key: value for group in GROUPS for key, value in dataclasses.asdict(getattr(self, group)).items()}
