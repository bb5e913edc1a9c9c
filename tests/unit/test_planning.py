"""The planner's formulae against what is there: parameters of the model itself, bytes of its tensors, bytes that
autograd saves. And its choices: the layout of examples/dtrpo_7b.yaml is the one that it puts first."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch

from megatron_dtrpo.cli import plan
from megatron_dtrpo.config.lora import LoraSettings
from megatron_dtrpo.config.rules import validate
from megatron_dtrpo.config.settings import Config, DataSettings, ModelSettings, OptimizerSettings, ParallelSettings
from megatron_dtrpo.config.yaml_file import read_yaml
from megatron_dtrpo.cpu import linear as cpu_linear
from megatron_dtrpo.diffusion.layout import Blocks, concatenate, lay_out
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.parameters import model_parameters
from megatron_dtrpo.planning import memory, parameters
from megatron_dtrpo.planning import step_time as time
from megatron_dtrpo.planning.layouts import layouts
from megatron_dtrpo.runtime import initialize
from tests.conftest import REPOSITORY

GIB = memory.GIB
SMALL = ModelSettings(
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=192,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=16,
    vocab_size=250,
    block_size=8,
)
SDAR = replace(SMALL, family="sdar", add_qkv_bias=False, qk_layernorm=True, kv_channels=24)


@pytest.fixture(autouse=True)
def on_this_machine():
    initialize.enable_device()


def layout(tp=1, pp=1, **settings) -> ParallelSettings:
    return ParallelSettings(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, **settings)


@pytest.mark.parametrize(
    "model, parallel",
    [
        (SMALL, layout()),
        (SMALL, layout(tp=2, pp=2)),
        (replace(SMALL, add_qkv_bias=False, untie_embeddings_and_output_weights=False), layout(pp=4)),
        (replace(SMALL, untie_embeddings_and_output_weights=False), layout(tp=2)),
        (SDAR, layout(tp=2, pp=2)),
        (SMALL, layout(pp=2, num_virtual_stages_per_pipeline_rank=2)),
    ],
)
def test_parameters_are_the_models_own(model, parallel):
    from megatron_dtrpo.model.provider import build_chunks
    from megatron_dtrpo.runtime import simulated_rank

    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    for stage in range(pp):
        with simulated_rank.rank_of(parallel, stage * tp, tp * pp), simulated_rank.without_memory():
            chunks = build_chunks(model, parallel)
            count = sum(p.numel() for chunk in chunks for p in chunk.parameters())
            assert all(p.is_meta for chunk in chunks for p in chunk.parameters())
        assert parameters.stage_parameters(model, tp, pp, stage) == count


@pytest.mark.parametrize(
    "parallel, processes",
    [
        (layout(), 1),
        (layout(bf16=True), 1),
        (layout(bf16=True, use_distributed_optimizer=True), 2),
        (layout(bf16=True, use_distributed_optimizer=True, tp=2), 8),
    ],
)
def test_states_are_as_large_as_their_tensors(parallel, processes):
    """Weights, gradients, optimizer and reference of one rank after a step. The distributed optimizer pads its buffers,
    so that a small model's shards are somewhat larger than their formula."""
    from megatron_dtrpo.model.initialization import initialize_weights
    from megatron_dtrpo.model.provider import build_chunks
    from megatron_dtrpo.runtime import simulated_rank
    from megatron_dtrpo.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_dtrpo.training.reference import ReferencePolicy

    config = Config(model=copy.copy(SMALL), parallel=parallel, data=DataSettings(seq_length=64))
    config.optimizer = OptimizerSettings(lr=1e-3)
    with simulated_rank.rank_of(parallel, 0, processes):
        data_parallel = validate(config, processes)
        chunks = build_chunks(config.model, parallel)
        for chunk in chunks:
            initialize_weights(chunk, 1)
        reference = ReferencePolicy(chunks)
        wrapped = wrap_data_parallel(chunks, config)
        optimizer = build_optimizer(wrapped, config)
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.step()
        plan = memory.plan_stage(config, data_parallel, 0)

        assert plan.weights == sum(p.nbytes for chunk in chunks for p in chunk.parameters())
        assert plan.reference == sum(value.nbytes for _, value in reference.frozen)
        buffers = [buffer for chunk in wrapped for buffer in chunk.buffers]
        assert plan.gradients == pytest.approx(sum(buffer.grad_data.nbytes for buffer in buffers), rel=0.01)
        inner = optimizer.chained_optimizers[0]
        tensors = [t for state in inner.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        if parallel.bf16:  # the fp32 main weights are the ones that Adam updates
            tensors += [p for group in inner.optimizer.param_groups for p in group["params"]]
        assert plan.optimizer == pytest.approx(sum(t.nbytes for t in tensors), rel=0.01)


def packed(tokens: int):
    """A packed sequence of two documents, about ``tokens`` long."""
    noise = torch.Generator().manual_seed(0)

    def document(prompt: int, response: int):
        blocks = Blocks(prompt, response, SMALL.block_size)
        masked = [torch.rand(1, blocks.count, SMALL.block_size, generator=noise) < 0.5] * 2
        masked = [m & blocks.maskable("clean") for m in masked]
        words = [torch.randint(0, 250, (length,), generator=noise) for length in (prompt, response, response)]
        return lay_out(
            words[0],
            words[1:],
            masked,
            [m.double() for m in masked],
            block_size=SMALL.block_size,
            mask_id=249,
            block_start="clean",
        )

    return concatenate([document(tokens // 12, tokens // 8), document(tokens // 16, tokens // 8)])


def saved_bytes(model, sequence, token=None) -> int:
    """What autograd saves in a forward pass, parameters excluded. ``token``: numbers that dropout draws from."""
    from megatron_dtrpo.model.attention import attention_width, plan_attention
    from megatron_dtrpo.model.lora import with_dropout

    attention = plan_attention(sequence.coordinates(), SMALL.block_size, "sdpa", attention_width(model.config))
    attention.token = token
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept, or its address would be used again
        return tensor

    with with_dropout([model]), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(sequence.tokens, sequence.position, attention)
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("settings", [SMALL, SDAR], ids=["qwen2", "sdar"])
@pytest.mark.parametrize(
    "recompute",
    [
        {},
        {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    ],
    ids=["none", "mlp", "full"],
)
def test_activations_are_what_autograd_saves(recompute, settings):
    """Within 1%, once what is the CPU's own is taken into account: it does not keep what its linear layers can make
    again, the norms' outputs (but their scales, a number a token) and the product in the MLP, and saves cosines and
    sines once for all layers."""
    from megatron_dtrpo.model.initialization import initialize_weights
    from megatron_dtrpo.model.provider import build_model

    parallel = ParallelSettings(**recompute)
    initialize.start(parallel, 1)
    try:
        model = build_model(settings, parallel)
        initialize_weights(model, 1)
        sequence = packed(1000)
        measured = saved_bytes(model, sequence)
    finally:
        initialize.stop()
    tokens = len(sequence)
    layer = memory.layer_activations(settings, parallel, tokens)
    normed, scales = 4 * tokens * SMALL.hidden_size, 2 * 4 * tokens
    product = 4 * tokens * SMALL.ffn_hidden_size
    cos_sin = 2 * 4 * tokens * settings.kv_channels
    final = normed + scales // 2
    if recompute.get("recompute_granularity") == "full":
        rotary_input = 4 * tokens * settings.kv_channels
        expected = SMALL.num_layers * layer.inputs + rotary_input + final
    else:
        # A recomputed MLP is given a norm's output, which is kept for it.
        made_again = normed if "recompute_modules" in recompute else 2 * normed + product
        each = memory.kept_bytes(layer, parallel) + scales - made_again - layer.rotary
        expected = SMALL.num_layers * each + cos_sin + final
    assert expected == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("lora", [LoraSettings(16), LoraSettings(16, lora_dropout=0.5)], ids=["plain", "dropout"])
def test_activations_beside_adapters_are_what_autograd_saves(lora):
    """Within 2%, once what is the CPU's own is taken into account, as above: without dropout it makes the norms'
    outputs and the product in the MLP again. The first layer's input has no gradient: its norm keeps nothing."""
    from megatron_dtrpo.model.initialization import initialize_weights
    from megatron_dtrpo.model.lora import adapters_of, add_adapters, initialize_adapters
    from megatron_dtrpo.model.provider import build_model

    config = Config(model=copy.copy(SMALL), lora=lora)
    initialize.start(config.parallel, 1)
    try:
        validate(config, 1)
        model = build_model(config.model, config.parallel)
        initialize_weights(model, 1)
        add_adapters([model], config.lora)
        initialize_adapters([model], 1)
        sequence = packed(1000)
        tokens = len(sequence)
        measured = saved_bytes(model, sequence, torch.arange(tokens) if lora.lora_dropout else None)
        spread = sum(a.lora_B.nbytes * a.mask.shape[1] for a in adapters_of([model]) if a.mask is not None)
    finally:
        initialize.stop()
    layer = memory.layer_activations(config.model, config.parallel, tokens, config.lora)
    assert layer.adapters > 4 * tokens * 7 * 16 - 1
    cos_sin, normed, scales = (2 * 4 * tokens * SMALL.kv_channels, 4 * tokens * SMALL.hidden_size, 2 * 4 * tokens)
    made_again = 0 if lora.lora_dropout else 2 * normed + 4 * tokens * SMALL.ffn_hidden_size
    each = layer.total + scales - layer.rotary - made_again
    expected = SMALL.num_layers * each - layer.inputs + cos_sin + normed + scales // 2 + spread
    assert expected == pytest.approx(measured, rel=0.02)


def peak_bytes(function, trace) -> int:
    """The most that ``function`` has allocated at once, from the profiler's record of every allocation."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    profile.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    events.sort(key=lambda event: event["ts"])
    first, totals = events[0]["args"], [event["args"]["Total Allocated"] for event in events]
    return max(totals) - (first["Total Allocated"] - first["Bytes"])


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_the_head_needs_what_it_allocates(bf16, chunks, monkeypatch, tmp_path):
    from megatron_dtrpo.model import gpt
    from megatron_dtrpo.model.initialization import initialize_weights
    from megatron_dtrpo.model.provider import build_model

    monkeypatch.setattr(cpu_linear, "_INTEL", True)  # oneDNN copies a transposed factor, which no GPU's library does
    rows = 256
    monkeypatch.setattr(gpt, "LOGIT_ROWS", rows)
    monkeypatch.setattr(memory, "LOGIT_ROWS", rows)
    settings, parallel = replace(SMALL, num_layers=1, vocab_size=8192), ParallelSettings(bf16=bf16)
    initialize.start(parallel, 1)
    try:
        model = build_model(settings, parallel)
        initialize_weights(model, 1)
        dtype = torch.bfloat16 if bf16 else torch.float32
        hidden = torch.randn(rows * chunks, settings.hidden_size, dtype=dtype, requires_grad=True)
        target = torch.randint(settings.vocab_size, (rows * chunks,))

        def step():
            model._target_log_probs(hidden * 1, target).sum().backward()
            hidden.grad = model.output_layer.weight.grad = None

        step()
        measured = peak_bytes(step, tmp_path / "trace.json")
    finally:
        initialize.stop()
    assert memory.head_bytes(settings, parallel, rows * chunks) == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("pp, virtual", [(2, 1), (4, 1), (2, 2), (4, 3)])
def test_chunks_in_flight_are_those_of_the_schedule(pp, virtual):
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    from megatron_dtrpo.runtime import simulated_rank

    parallel = layout(pp=pp, num_virtual_stages_per_pipeline_rank=virtual)
    for stage in range(pp):
        with simulated_rank.rank_of(parallel, stage, pp):
            _, _, warm_up, _ = get_pp_rank_microbatches(64, virtual, pp, forward_only=False)
        assert memory.chunks_in_flight(pp, virtual, stage, 64) == warm_up + 1


def seven_billion(name: str = "dtrpo_7b") -> Config:
    return Config.from_flat(read_yaml(REPOSITORY / "examples" / f"{name}.yaml"))


def test_seven_billion_parameters():
    assert model_parameters(seven_billion().model) == 7_615_616_512
    assert model_parameters(seven_billion("dpo_qwen2.5_7b").model) == 7_615_616_512
    assert model_parameters(seven_billion("dtrpo_sdar_8b").model) == 8_190_735_360  # Qwen3-8B's
    # The bytes that the index of each model's weights says, two a parameter.
    assert 2 * model_parameters(seven_billion("vrpo_llada_8b").model) == 16_031_162_368
    assert 2 * model_parameters(seven_billion("vrpo_dream_7b").model) == 15_231_233_024


@pytest.mark.parametrize(
    "name", ["dtrpo_7b", "sft_7b", "dtrpo_sdar_8b", "vrpo_llada_8b", "vrpo_dream_7b", "dpo_qwen2.5_7b", "online_7b"]
)
def test_the_example_has_the_layout_that_the_planner_prefers(name):
    config = seven_billion(name)
    best = layouts(config, 8, 80 * GIB)[0]
    parallel = config.parallel
    assert best.fits and best.recomputation == "none" and parallel.recompute_granularity is None
    assert best.sizes == (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        4,
    )
    assert parallel.sequence_parallel


def test_under_full_attention_a_token_sees_its_own_view():
    by_blocks, full = seven_billion("dtrpo_sdar_8b"), seven_billion("vrpo_llada_8b")
    for config in (by_blocks, full):
        validate(config, 8)
    assert (time.seen_share(by_blocks), time.seen_share(full)) == (0.25, 1 / (4 * 2 * 4))  # pairs, responses, views
    many = time.step_time(full, 4).compute
    full.objective.num_views = 1  # longer views in as many tokens
    assert time.step_time(full, 4).compute > many


def test_layouts_come_best_first():
    found = layouts(seven_billion(), 64, 80 * GIB)
    fitting = [each for each in found if each.fits]
    assert found[: len(fitting)] == fitting
    assert [each.seconds.total for each in fitting] == sorted(each.seconds.total for each in fitting)
    assert len({each.sizes for each in found}) == len(found)
    for each in found:
        tp, pp, cp, dp = each.sizes
        assert tp * pp * cp * dp == 64


def test_less_memory_means_more_recomputation():
    kinds = {"none": 0, "mlp": 1, "full": 2}
    before = None
    for capacity in (80, 64, 56, 48):
        at = {each.sizes: each for each in layouts(seven_billion(), 8, capacity * GIB)}[2, 1, 1, 4]
        assert before is None or kinds[at.recomputation] >= before
        before = kinds[at.recomputation]
    assert before == 2


def test_a_reference_cache_saves_the_copy():
    config = seven_billion()
    validate(config, 8)
    live = memory.plan_stage(config, 4, 0)
    config.run.reference_cache = "scores"
    assert live.reference == live.weights
    assert memory.plan_stage(config, 4, 0).reference == 0


def test_no_layout_is_one_line():
    with pytest.raises(UserError, match="not divisible"):
        layouts(seven_billion(), 11, 80 * GIB)


def test_plan_prints_a_table(capsys):
    words = ["--config", str(REPOSITORY / "examples" / "dtrpo_7b.yaml"), "--gpus", "8"]
    assert plan.main([*words, "--gpu-memory", "80", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "layouts fit" in lines[0] and len(lines) == 2 + 3
    assert lines[2].split()[:6] == ["fits", "2", "1", "1", "4", "none"]
    assert plan.main([*words, "--gpus", "0"]) == 2
    assert capsys.readouterr().err == "error: --gpus is 0: it must be a positive number\n"


@pytest.mark.parametrize(
    "pp, virtual, micro_batches, share", [(1, 1, 4, 0), (4, 1, 8, 3 / 8), (4, 7, 4, 3 / 28), (4, 7, 2, 15 / 14)]
)
def test_bubble(pp, virtual, micro_batches, share):
    """7 virtual stages: 28 slots for 4 micro-batches and 3 to wait; 14 for 2, of the 7 x 4 + 1 that are taken."""
    assert time.bubble_share(pp, virtual, micro_batches) == pytest.approx(share)


@pytest.mark.parametrize("patterns", [["linear_fc2"], ["layers.0.mlp", "linear_q*"], ["layers.[13]"], ["*"]])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (2, 2, 2)])
def test_adapters_are_counted_as_they_are_built(patterns, sizes):
    """Weights once, gradients of adapters alone, and a reference only where another one was asked for."""
    from megatron_dtrpo.model.lora import add_adapters
    from megatron_dtrpo.model.provider import build_chunks
    from megatron_dtrpo.runtime import simulated_rank

    tp, pp, virtual = sizes
    parallel = layout(tp, pp, num_virtual_stages_per_pipeline_rank=virtual)
    config = Config(model=copy.copy(SMALL), parallel=parallel, lora=LoraSettings(3, lora_target_modules=patterns))
    validate(config, tp * pp)
    for stage in range(pp):
        with simulated_rank.rank_of(parallel, stage * tp, tp * pp), simulated_rank.without_memory():
            chunks = build_chunks(config.model, parallel)
            add_adapters(chunks, config.lora)
            own = [p for chunk in chunks for p in chunk.parameters()]
        plan = memory.plan_stage(config, 1, stage)
        assert plan.gradients == sum(4 * p.numel() for p in own if p.requires_grad)
        assert plan.weights == sum(p.nbytes for p in own) and plan.reference == 0
    config.run.reference = "another"
    base = sum(p.nbytes for p in own if not p.requires_grad)
    assert memory.plan_stage(config, 1, pp - 1).reference == base


def test_states_of_a_run_that_trains_adapters_are_as_large_as_their_tensors():
    from megatron_dtrpo.model.initialization import initialize_weights
    from megatron_dtrpo.model.lora import add_adapters, initialize_adapters
    from megatron_dtrpo.model.provider import build_chunks
    from megatron_dtrpo.runtime import simulated_rank
    from megatron_dtrpo.training.optimizer import build_optimizer, wrap_data_parallel
    from megatron_dtrpo.training.reference import ReferencePolicy

    config = Config(model=copy.copy(SMALL), parallel=layout(bf16=True), lora=LoraSettings(4))
    with simulated_rank.rank_of(config.parallel, 0, 1):
        validate(config, 1)
        chunks = build_chunks(config.model, config.parallel)
        initialize_weights(chunks[0], 1)
        add_adapters(chunks, config.lora)
        initialize_adapters(chunks, 1)
        reference = ReferencePolicy(chunks)
        wrapped = wrap_data_parallel(chunks, config)
        optimizer = build_optimizer(wrapped, config)
        wrapped[0].zero_grad_buffer()
        optimizer.step()
        plan = memory.plan_stage(config, 1, 0)
        assert plan.weights == sum(p.nbytes for p in chunks[0].parameters())
        assert plan.reference == sum(value.nbytes for _, value in reference.frozen) == 0
        assert plan.gradients == sum(buffer.grad_data.nbytes for buffer in wrapped[0].buffers)
        inner = optimizer.chained_optimizers[0].optimizer
        main = sum(p.nbytes for group in inner.param_groups for p in group["params"])
        moments = sum(t.nbytes for state in inner.state.values() for t in state.values() if torch.is_tensor(t))
        assert plan.optimizer == main + moments


def test_seven_billion_with_adapters_fit_on_one_gpu_of_80_gib():
    """The example; not on one of 24, as docs/lora.md says, and all of its weights do not fit on one."""
    config = seven_billion("lora_7b")
    (best,) = layouts(config, 1, 80 * GIB)
    assert best.fits and best.recomputation == "none" and best.worst.reference == 0
    config.data.seq_length, config.data.micro_batch_size = 2048, 1
    (small,) = layouts(config, 1, 24 * GIB)
    assert not small.fits and small.recomputation == "full" and small.worst.total < 25 * GIB
    config.lora = LoraSettings()
    (whole,) = layouts(config, 1, 80 * GIB)
    assert not whole.fits and whole.worst.states > 140 * GIB
