"""Transformer Engine and FP8, as far as a CPU goes: what the settings become, what is refused, how micro-batches are
padded, and a model of fused layers that stand in for Transformer Engine's (tests/support/fused_layers.py)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megatron_dtrpo.config import fp8
from megatron_dtrpo.config.rules import validate, validate_training
from megatron_dtrpo.config.settings import Config, DataSettings, ModelSettings, ParallelSettings
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import fp8 as fp8_passes
from megatron_dtrpo.runtime import initialize, precision

MODEL = ModelSettings(
    num_layers=4,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=64,
    vocab_size=128,
    block_size=8,
)
SDAR = replace(MODEL, family="sdar", add_qkv_bias=False, qk_layernorm=True, kv_channels=32)
FP8 = ParallelSettings(bf16=True, fp8_format="hybrid")


@pytest.fixture(autouse=True)
def on_this_machine():
    initialize.enable_device()


def refused(model=MODEL, processes=1, seq_length=4096, **settings) -> str:
    config = Config(
        model=replace(model), parallel=ParallelSettings(**settings), data=DataSettings(seq_length=seq_length)
    )
    with pytest.raises(UserError) as error:
        validate(config, processes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_settings_become_megatron_cores():
    from megatron_dtrpo.model.provider import transformer_config

    parallel = replace(
        FP8,
        fp8_recipe="blockwise",
        fp8_param_gather=True,
        use_distributed_optimizer=True,
        first_last_layers_bf16=True,
        num_layers_at_start_in_bf16=2,
        transformer_impl="transformer_engine",
    )
    config = transformer_config(MODEL, parallel)
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == ("hybrid", "blockwise", True)
    assert config.first_last_layers_bf16
    assert (config.num_layers_at_start_in_bf16, config.num_layers_at_end_in_bf16) == (2, 1)
    assert config.transformer_impl == "transformer_engine"
    assert config.tp_only_amax_red
    assert precision.optimizer_precision(parallel)["fp8_recipe"] == "blockwise"
    assert precision.data_parallel_precision(parallel)["fp8_param_gather"]

    delayed = replace(FP8, fp8_recipe="delayed", fp8_margin=1, fp8_amax_history_len=16, fp8_amax_compute_algo="max")
    config = transformer_config(MODEL, delayed)
    assert (config.fp8_recipe, config.fp8_margin, config.fp8_amax_history_len) == ("delayed", 1, 16)
    assert config.fp8_amax_compute_algo == "max"


def test_without_fp8_nothing_of_it_is_set():
    from megatron_dtrpo.model.provider import transformer_config

    config = transformer_config(MODEL, ParallelSettings(bf16=True))
    assert config.fp8 is None and not config.fp8_param and config.transformer_impl == "local"
    assert "fp8_recipe" not in precision.optimizer_precision(ParallelSettings(bf16=True))


def test_transformer_engine_is_the_default_where_it_is(monkeypatch):
    assert precision.transformer_impl(ParallelSettings()) == "local"
    monkeypatch.setattr(precision, "transformer_engine_is_usable", lambda: True)
    assert precision.transformer_impl(ParallelSettings()) == "transformer_engine"
    assert precision.transformer_impl(ParallelSettings(transformer_impl="local")) == "local"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fp8_format": "hybrid"}, "fp8_format needs bf16"),
        ({"fp8_format": "e4m3", "bf16": True, "transformer_impl": "local"}, "needs Transformer Engine"),
        ({"fp8_param_gather": True}, "fp8_param_gather goes with FP8"),
        ({"first_last_layers_bf16": True}, "first_last_layers_bf16 goes with FP8"),
        ({"fp8_format": "hybrid", "bf16": True, "fp8_param_gather": True}, "needs use_distributed_optimizer"),
        ({"fp8_format": "hybrid", "bf16": True, "num_layers_at_end_in_bf16": 2}, "go with first_last_layers_bf16"),
        ({"fp8_format": "hybrid", "bf16": True, "fp8_margin": 1}, "fp8_margin belongs to fp8_recipe delayed"),
        (
            {"fp8_format": "hybrid", "bf16": True, "fp8_recipe": "delayed", "first_last_layers_bf16": True},
            "cannot be had with fp8_recipe delayed",
        ),
        (
            {"fp8_format": "hybrid", "bf16": True, "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 5},
            "a pipeline stage has 4 layers",
        ),
        (
            {"fp8_format": "hybrid", "bf16": True, "first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 3},
            "leave none of 4",
        ),
        (
            {
                "fp8_format": "hybrid",
                "bf16": True,
                "fp8_recipe": "mxfp8",
                "fp8_param_gather": True,
                "use_distributed_optimizer": True,
            },
            "cannot be had with fp8_recipe mxfp8",
        ),
    ],
)
def test_what_does_not_go_together_is_one_line(settings, message):
    assert message in refused(**settings)


def test_widths_are_checked_on_each_rank():
    settings = {"fp8_format": "hybrid", "bf16": True}
    narrow = replace(MODEL, ffn_hidden_size=504)
    assert "ffn_hidden_size / tensor_model_parallel_size is 504" in refused(narrow, **settings)
    assert "needs a multiple of 128" in refused(
        replace(MODEL, hidden_size=192, kv_channels=64), fp8_recipe="blockwise", **settings
    )
    halved = replace(MODEL, ffn_hidden_size=48)
    message = refused(halved, processes=2, tensor_model_parallel_size=2, **settings)
    assert "is 24: fp8_recipe tensorwise needs a multiple of 16" in message


def test_the_token_budget_holds_what_is_padded():
    assert "not divisible by 16" in refused(fp8_format="hybrid", bf16=True, seq_length=1000)


def test_the_seven_billion_model_takes_every_recipe():
    from megatron_dtrpo.config.yaml_file import read_yaml
    from tests.conftest import REPOSITORY

    for recipe in fp8.RECIPES:
        for tp in (1, 2, 4):
            config = Config.from_flat(read_yaml(REPOSITORY / "examples" / "dtrpo_7b.yaml"))
            config.parallel = replace(
                config.parallel, fp8_format="hybrid", fp8_recipe=recipe, tensor_model_parallel_size=tp
            )
            assert validate(config, 8) == 8 // tp


@pytest.mark.parametrize(
    "recipe, capability, cuda, problem",
    [
        ("delayed", (8, 9), "12.4", None),
        ("tensorwise", (9, 0), "12.4", None),
        ("tensorwise", (8, 0), "12.8", "needs a GPU of sm89 or newer, this one is sm80: leave FP8 out"),
        ("blockwise", (9, 0), "12.9", None),
        ("blockwise", (9, 0), "12.8", "needs CUDA 12.9, torch was built for 12.8"),
        ("blockwise", (8, 9), "12.9", "needs a GPU of sm90 or newer, this one is sm89: choose delayed or tensorwise"),
        ("mxfp8", (10, 0), "12.8", None),
        ("mxfp8", (9, 0), "12.8", "sm100 or newer, before sm120, this one is sm90: choose delayed or tensorwise or"),
        ("mxfp8", (12, 0), "12.8", "this one is sm120"),
    ],
)
def test_recipes_need_hardware(recipe, capability, cuda, problem):
    if problem is None:
        precision._check_recipe(recipe, capability, cuda)
        return
    with pytest.raises(UserError, match="fp8_recipe") as error:
        precision._check_recipe(recipe, capability, cuda)
    assert problem in str(error.value)


def test_this_machine_has_no_transformer_engine():
    with pytest.raises(UserError, match="transformer_impl transformer_engine needs a GPU"):
        precision.check_machine(ParallelSettings(transformer_impl="transformer_engine"))
    with pytest.raises(UserError, match="fp8_format needs Transformer Engine"):
        precision.check_machine(FP8)
    precision.check_machine(ParallelSettings())


@pytest.mark.parametrize(
    "settings, cuda, packages, refused",
    [
        ({"use_distributed_optimizer": True}, True, (), True),
        ({"use_distributed_optimizer": True}, True, ("apex",), True),  # PyPI's, or built without its extensions
        ({"use_distributed_optimizer": True}, True, ("apex", "amp_C"), False),
        ({"use_distributed_optimizer": True}, True, ("transformer_engine",), False),
        ({"use_distributed_optimizer": True}, False, (), False),  # our own Adam
        ({}, True, (), False),
    ],
)
def test_the_distributed_optimizer_needs_a_fused_adam_on_a_gpu(monkeypatch, settings, cuda, packages, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(precision, "find_spec", lambda name: name if name in packages else None)
    if not refused:
        precision.check_optimizer(ParallelSettings(**settings))
        return
    with pytest.raises(UserError, match="use_distributed_optimizer needs Transformer Engine or NVIDIA's Apex") as error:
        precision.check_optimizer(ParallelSettings(**settings))
    assert "\n" not in str(error.value)


def test_training_looks_for_the_fused_adam_before_it_opens_anything(monkeypatch, tmp_path):
    """The tokenizer is the first thing that is opened, and there is none."""
    from megatron_dtrpo.training.setup import prepare

    config = Config(model=replace(MODEL), parallel=ParallelSettings(use_distributed_optimizer=True))
    config.run.save, config.data.data_path, config.optimizer.train_iters = str(tmp_path / "run"), "pairs.jsonl", 1
    config.data.tokenizer_type, config.data.tokenizer_model = "HuggingFaceTokenizer", str(tmp_path / "none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="use_distributed_optimizer needs"):
        prepare(config, set())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [{}, {"reference_cache": "scores"}, {"objective": "sft"}, {"overlap": False}])
def test_an_overlapped_gather_in_fp8_does_not_meet_a_live_reference(settings):
    """The gather ends in the next forward pass, the reference's, and prepares FP8 weights that are not the policy's."""
    parallel = replace(
        FP8, use_distributed_optimizer=True, fp8_param_gather=True, overlap_param_gather=settings.get("overlap", True)
    )
    config = Config(model=replace(MODEL), parallel=parallel)
    config.run.save, config.optimizer.train_iters = "run", 1
    config.run.reference_cache = settings.get("reference_cache")
    config.objective.objective = settings.get("objective", "preference")
    data_parallel = validate(config, 1)
    if settings:
        validate_training(config, data_parallel)
        return
    with pytest.raises(UserError, match="fp8_param_gather with overlap_param_gather") as error:
        validate_training(config, data_parallel)
    assert "--reference-cache" in str(error.value) and "\n" not in str(error.value)


def test_cached_reference_scores_have_no_history():
    config = Config(model=replace(MODEL), parallel=replace(FP8, fp8_recipe="delayed"))
    config.run.save, config.run.reference_cache, config.optimizer.train_iters = "run", "scores", 1
    with pytest.raises(UserError, match="delayed takes its scales from the policy's history"):
        validate_training(config, validate(config, 1))
    config.parallel.fp8_reference = False
    validate_training(config, 1)


def test_a_reference_cache_is_for_one_format():
    assert fp8.reference_format(ParallelSettings(bf16=True)) is None
    assert fp8.reference_format(FP8) == "hybrid/tensorwise"
    assert fp8.reference_format(replace(FP8, fp8_reference=False)) is None
    assert "1+2 layers" in fp8.reference_format(replace(FP8, first_last_layers_bf16=True, num_layers_at_end_in_bf16=2))


def test_a_run_keeps_its_format():
    """Also one that was started before there was the setting: without FP8 then."""
    from megatron_dtrpo.training import resume

    now, first = Config(), resume._resolved(Config(), {})
    for key in ("fp8_format", "fp8_recipe", "fp8_reference"):
        del first[key]
    resume._check_pinned(now, first)
    now.parallel.fp8_format = "hybrid"
    with pytest.raises(UserError, match="this run has fp8_format none, not hybrid"):
        resume._check_pinned(now, first)
    with pytest.raises(UserError, match="this run has fp8_reference False, not True"):
        resume._check_pinned(now, first | {"fp8_format": "hybrid", "fp8_reference": False})


def test_tools_that_only_look_refuse_it():
    with pytest.raises(UserError, match="fp8_format is for training: scoring runs without it"):
        fp8.refuse_fp8(FP8, "scoring")
    fp8.refuse_fp8(ParallelSettings(), "scoring")


# Padding


@pytest.mark.parametrize(
    "settings, multiple",
    [
        ({}, 16),
        ({"fp8_recipe": "delayed"}, 16),
        ({"fp8_recipe": "mxfp8"}, 32),
        ({"fp8_recipe": "blockwise"}, 128),
        ({"tensor_model_parallel_size": 4}, 16),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 64),
        ({"tensor_model_parallel_size": 2, "sequence_parallel": True, "fp8_recipe": "mxfp8"}, 64),
        ({"fp8_format": None}, 1),
    ],
)
def test_token_multiple(settings, multiple):
    assert fp8.token_multiple(replace(FP8, **settings)) == multiple


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("multiple", [1, 16, 48, 128])
def test_micro_batches_are_padded(ranks, multiple):
    from megatron_dtrpo.data.micro_batch import MicroBatch
    from megatron_dtrpo.diffusion.layout import PADDING_DOCUMENT, lay_out
    from megatron_dtrpo.runtime import simulated_rank
    from megatron_dtrpo.training.device_batch import DeviceBatch

    masked = torch.ones(1, 3, 8, dtype=torch.bool)
    sequence = lay_out(
        torch.arange(9), [torch.arange(20)], [masked], [masked.double()], block_size=8, mask_id=99, block_start="clean"
    )
    length, targets = len(sequence), sequence.target_row.numel()
    seen = 0
    for rank in range(ranks):
        with simulated_rank.rank_of(ParallelSettings(context_parallel_size=ranks), rank, ranks):
            batch = DeviceBatch(MicroBatch(sequence, [], torch.tensor([20])), torch.device("cpu"), "sdpa", 32, multiple)
            part = batch.part
            assert len(part) % multiple == 0 and len(part) % 8 == 0
            if ranks == 1 and multiple == 1:
                assert len(part) == length
            padding = len(batch.of_padding().part)
            assert padding % multiple == 0 and padding > 0
            assert len(batch.part) - int((part.document != PADDING_DOCUMENT).sum()) < 8 * multiple * ranks
            seen += part.target_row.numel()
    assert seen == targets


# Passes


class Delayed(torch.nn.Module):
    """A module with the state that delayed scaling keeps in Transformer Engine's."""

    def __init__(self):
        super().__init__()
        self.fp8_meta = {"fp8_checkpoint": True, "scaling_fwd": SimpleNamespace(amax_history=torch.ones(2, 3))}


def chunk() -> torch.nn.Module:
    stage = torch.nn.Sequential(Delayed(), Delayed(), torch.nn.Linear(2, 2))
    stage.config = SimpleNamespace(fp8="hybrid")
    return stage


def test_the_references_maxima_are_taken_back():
    stage = chunk()
    first, second = stage[0].fp8_meta, stage[1].fp8_meta
    del second["scaling_fwd"]  # no pass yet
    history = first["scaling_fwd"].amax_history
    with fp8_passes.reference_pass([stage], in_fp8=True):
        assert stage.config.fp8 == "hybrid" and not stage.training and not stage[0].training
        history[0] = 7.0
        second["scaling_fwd"] = SimpleNamespace(amax_history=torch.full((2, 3), 7.0))
    assert stage.training and stage[2].training
    assert first["scaling_fwd"].amax_history is history and torch.equal(history, torch.ones(2, 3))
    assert not second["scaling_fwd"].amax_history.any()


def test_a_pass_in_bf16_leaves_no_trace():
    stage = chunk()
    with pytest.raises(KeyboardInterrupt), fp8_passes.reference_pass([stage], in_fp8=False):
        assert stage.config.fp8 is None
        stage[0].fp8_meta["fp8_checkpoint"] = False
        raise KeyboardInterrupt
    assert stage.config.fp8 == "hybrid" and stage[0].fp8_meta["fp8_checkpoint"] and stage.training


def test_main_weights_start_from_exact_values():
    parameter = torch.nn.Parameter(torch.zeros(2))
    fp8_passes.keep_exact_value(parameter, torch.ones(2))
    assert not hasattr(parameter, "_high_precision_init_val")
    parameter.get_high_precision_init_val = lambda: parameter._high_precision_init_val
    fp8_passes.keep_exact_value(parameter, torch.ones(2))
    assert torch.equal(parameter.get_high_precision_init_val(), torch.ones(2))


# Fused layers


@pytest.fixture
def alone():
    initialize.start(ParallelSettings(), 1)
    yield
    initialize.stop()


def build(transformer_impl: str, seed: int = 1, shape: ModelSettings = MODEL, **settings):
    from megatron_dtrpo.model.initialization import initialize_weights
    from megatron_dtrpo.model.provider import build_model

    model = build_model(shape, ParallelSettings(transformer_impl=transformer_impl, **settings))
    initialize_weights(model, seed)
    return model


def log_probs(model) -> torch.Tensor:
    from megatron_dtrpo.diffusion.layout import lay_out
    from megatron_dtrpo.model.attention import attention_width, plan_attention

    masked = torch.ones(1, 3, 8, dtype=torch.bool)
    sequence = lay_out(
        torch.arange(9), [torch.arange(20)], [masked], [masked.double()], block_size=8, mask_id=99, block_start="clean"
    )
    attention = plan_attention(sequence.coordinates(), 8, "sdpa", attention_width(model.config))
    with torch.no_grad():
        return model(sequence.tokens, sequence.position, attention, sequence.target_row, sequence.target_token)


def write(model, folder):
    from megatron.core import dist_checkpointing

    from megatron_dtrpo.checkpoint import distributed as checkpoint
    from megatron_dtrpo.checkpoint import iterations

    target = iterations.iteration_folder(folder, 1)
    target.mkdir(parents=True)
    state = checkpoint._sharded_state(model, None, checkpoint._SHARDING, is_loading=False)
    dist_checkpointing.save(state, str(target), content_metadata=checkpoint._SHARDING)


def test_fused_spec_has_our_attention(fused):
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_dtrpo.model.attention import BlockDiffusionAttention
    from megatron_dtrpo.model.layer_spec import block_diffusion_layer_spec

    layer = block_diffusion_layer_spec("transformer_engine").submodules
    attention = layer.self_attention.submodules
    assert attention.core_attention is BlockDiffusionAttention
    assert attention.linear_qkv is fused.FusedNormLinear
    assert layer.self_attention.params["attn_mask_type"] == AttnMaskType.arbitrary
    assert layer.input_layernorm is layer.pre_mlp_layernorm is IdentityOp
    assert block_diffusion_layer_spec().submodules.input_layernorm is not IdentityOp  # no GPU: local


def test_both_backends_are_one_model(fused, alone):
    """The same initial weights under the same names, the same fingerprint, the same numbers."""
    from megatron_dtrpo.checkpoint.fingerprint import weights_fingerprint
    from megatron_dtrpo.model.initialization import global_parameter_names

    local, other = build("local"), build("transformer_engine")
    assert isinstance(other.decoder.final_layernorm, fused.FusedNorm)
    mine, theirs = global_parameter_names(local), global_parameter_names(other)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert weights_fingerprint(local) == weights_fingerprint(other)
    torch.testing.assert_close(log_probs(local), log_probs(other), rtol=0, atol=1e-4)  # different fp32 products


@pytest.mark.parametrize("shape", [MODEL, SDAR], ids=["qwen2", "sdar"])
@pytest.mark.parametrize("writer, reader", [("local", "transformer_engine"), ("transformer_engine", "local")])
def test_either_backend_reads_the_others_checkpoint(fused, alone, tmp_path, writer, reader, shape):
    """The final norm's extra state is in Transformer Engine's checkpoints alone."""
    from megatron_dtrpo.checkpoint import distributed as checkpoint

    written = build(writer, seed=5, shape=shape)
    with torch.no_grad():
        for parameter in written.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    write(written, tmp_path)
    read = build(reader, shape=shape)
    checkpoint.load(tmp_path, 1, read)
    torch.testing.assert_close(log_probs(read), log_probs(written), rtol=0, atol=1e-4)  # different fp32 products
    keys = (tmp_path / "iter_0000001" / ".metadata").read_bytes()
    assert (b"final_layernorm._extra_state" in keys) == (writer == "transformer_engine")


def test_gradients_are_fused_by_whoever_can(fused, alone, monkeypatch):
    """Transformer Engine's layers without megatron-core's output layer, which asks for Apex; with Apex everything."""
    who = precision.fused_gradients
    assert who(ParallelSettings()) is None and who(ParallelSettings(transformer_impl="local")) is None
    engine = ParallelSettings(transformer_impl="transformer_engine")
    assert who(engine) == "transformer_engine"
    assert who(replace(engine, gradient_accumulation_fusion=False)) is None
    for asked, fuses in ((None, True), (False, False)):
        model = build("transformer_engine", gradient_accumulation_fusion=asked)
        flags = [m.fuse_wgrad_accumulation for m in model.modules() if hasattr(m, "fuse_wgrad_accumulation")]
        assert flags == [fuses] * 4 * MODEL.num_layers
        assert not model.output_layer.gradient_accumulation_fusion
    with pytest.raises(UserError, match="gradient_accumulation_fusion needs"):
        precision.check_machine(ParallelSettings(gradient_accumulation_fusion=True))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precision, "find_spec", lambda name: name == "fused_weight_gradient_mlp_cuda" or None)
    assert who(ParallelSettings(transformer_impl="local")) == who(engine) == "apex"


def test_the_fused_rotary_embedding_gets_each_rows_own_angles(alone, monkeypatch):
    """What Transformer Engine's kernel expects, in a stand-in that rotates complex numbers: queries and keys
    ``[s, 1, heads, d]``, fp32 angles ``[s, 1, 1, d]`` whose halves are alike. The numbers are those of the unfused."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import attention

    calls = []

    def rotate(t, freqs, interleaved=False):
        calls.append(t.shape)
        assert t.dim() == 4 and t.shape[1] == 1 and not interleaved
        assert freqs.shape == (t.shape[0], 1, 1, t.shape[-1]) and freqs.dtype == torch.float32 and freqs.is_contiguous()
        first, second = freqs.chunk(2, -1)
        assert torch.equal(first, second)
        turned = torch.complex(*t.chunk(2, -1)) * torch.polar(torch.ones_like(first), first)
        return torch.cat((turned.real, turned.imag), -1)

    expected = log_probs(build("local"))
    monkeypatch.setattr(attention, "apply_rotary_pos_emb", rope_utils.apply_rotary_pos_emb)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", rotate)
    monkeypatch.setattr(precision, "transformer_engine_is_usable", lambda: True)
    found = log_probs(build("local"))
    assert len(calls) == 2 * MODEL.num_layers
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    count = len(calls)
    log_probs(build("local", apply_rope_fusion=False))
    assert len(calls) == count
    monkeypatch.undo()
    with pytest.raises(UserError, match="apply_rope_fusion needs a GPU"):
        precision.check_machine(ParallelSettings(apply_rope_fusion=True))


def test_nothing_but_extra_state_may_be_missing(alone, tmp_path):
    from megatron_dtrpo.checkpoint import distributed as checkpoint

    model = build("local")
    write(model, tmp_path)
    model.decoder.final_layernorm.register_parameter("shift", torch.nn.Parameter(torch.zeros(MODEL.hidden_size)))
    with pytest.raises(UserError, match="does not load into this model: decoder.final_layernorm.shift"):
        checkpoint.load(tmp_path, 1, model)


def test_a_stage_takes_no_other_mismatch(alone):
    from megatron_dtrpo.checkpoint import distributed as checkpoint

    model = build("local")
    state = model.state_dict()
    checkpoint._load_stage(model, state | {"decoder.final_layernorm._extra_state": torch.empty(0)})
    with pytest.raises(RuntimeError, match="stranger"):
        checkpoint._load_stage(model, state | {"stranger": torch.empty(0)})
