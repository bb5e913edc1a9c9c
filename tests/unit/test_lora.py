"""Adapters compute what PEFT's compute on transformers' Qwen2, in float64: losses, gradients, and the weights after
three steps. Without them the model is bit for bit what it was, and dropout is a function of what is dropped."""

from __future__ import annotations

import pytest
import torch

from megatron_dtrpo.config.estimators import EstimatorOptions
from megatron_dtrpo.config.lora import LoraSettings
from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.data.micro_batch import MicroBatch, Sample
from megatron_dtrpo.data.tokenizer import NO_MASK
from megatron_dtrpo.diffusion.dropout import kept, token_numbers
from megatron_dtrpo.diffusion.layout import Coordinates, concatenate
from tests.support import oracles
from tests.support.same_weights import with_weights_of

MODEL = ModelSettings(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=61,
    make_vocab_size_divisible_by=1,
    rotary_base=10000.0,
    block_size=1,
)
RANK, ALPHA, LR, STEPS, BETA = 3, 12.0, 1e-2, 3, 0.5
LORA = LoraSettings(RANK, ALPHA, lora_target_modules=["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"])
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT = "base_model.model.model.layers"


def random_adapter(rank: int = RANK, seed: int = 5) -> dict[str, torch.Tensor]:
    """PEFT's names of adapters of every projection, with random values."""
    peer = oracles.qwen2()
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in peer.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            rows, columns = module.weight.shape
            for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                values = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
                found[f"base_model.model.{name}.lora_{letter}.weight"] = values
    return found


def with_peft(peer, weights: dict[str, torch.Tensor], **options):
    """``peer`` with PEFT's adapters, which have these weights."""
    peft = pytest.importorskip("peft")
    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": PROJECTIONS, **options}
    model = peft.get_peft_model(peer, peft.LoraConfig(**options), autocast_adapter_dtype=False).double()
    peft.set_peft_model_state_dict(model, weights)
    return model


def ours_from_peft(weights: dict[str, torch.Tensor], groups: int = 2) -> dict[str, torch.Tensor]:
    """The same values under our names: written from the order of megatron-core's rows."""
    found = {}
    for n in range(2):

        def of(module: str, letter: str, n=n) -> torch.Tensor:
            return weights[f"{PEFT}.{n}.{module}.lora_{letter}.weight"]

        def grouped(name: str, of=of) -> torch.Tensor:
            return of(f"self_attn.{name}_proj", "B").unflatten(0, (groups, -1))

        layer = f"decoder.layers.{n}"
        qkv = torch.cat([grouped(name) for name in "qkv"], 1).flatten(0, 1)
        found |= {
            f"{layer}.self_attention.linear_qkv_adapter.lora_A": torch.cat(
                [of(f"self_attn.{name}_proj", "A") for name in "qkv"]
            ),
            f"{layer}.self_attention.linear_qkv_adapter.lora_B": qkv,
            f"{layer}.self_attention.linear_proj_adapter.lora_A": of("self_attn.o_proj", "A"),
            f"{layer}.self_attention.linear_proj_adapter.lora_B": of("self_attn.o_proj", "B"),
            f"{layer}.mlp.linear_fc2_adapter.lora_A": of("mlp.down_proj", "A"),
            f"{layer}.mlp.linear_fc2_adapter.lora_B": of("mlp.down_proj", "B"),
        }
        for letter in "AB":
            both = torch.cat([of(f"mlp.{name}_proj", letter) for name in ("gate", "up")])
            found[f"{layer}.mlp.linear_fc1_adapter.lora_{letter}"] = both
    return found


def build(peer, impl: str = "local", **settings):
    return with_weights_of(peer, MODEL, transformer_impl=impl, **settings)


def trained(model) -> dict[str, torch.nn.Parameter]:
    from megatron_dtrpo.model.initialization import global_parameter_names

    return {name: p for name, p in global_parameter_names(model).items() if p.requires_grad}


def give(model, values: dict[str, torch.Tensor]) -> None:
    found = trained(model)
    assert found.keys() == values.keys()
    with torch.no_grad():
        for name, parameter in found.items():
            parameter.copy_(values[name])


def pairs() -> list[tuple[torch.Tensor, list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(4, 7, 3), (9, 2, 8), (1, 5, 5)]
    return [
        (
            torch.randint(0, 61, (p,), generator=generator),
            [torch.randint(0, 61, (r,), generator=generator) for r in two],
        )
        for p, *two in shapes
    ]


def packed():
    noising = Noising("exact", EstimatorOptions(), 1, "clean", block_size=1, mask_id=NO_MASK, seed=3)
    return concatenate([noising.document(Sample(0, n), prompt, two) for n, (prompt, two) in enumerate(pairs())])


def our_log_probs(model, sequence) -> torch.Tensor:
    from megatron_dtrpo.model.attention import attention_width, plan_attention

    attention = plan_attention(sequence.coordinates(), 1, "sdpa", attention_width(model.config))
    hidden = model(sequence.tokens, sequence.position, attention)[:, 0]
    return torch.log_softmax(model.logits(hidden), -1)[sequence.target_row, sequence.target_token]


def our_likelihoods(model, sequence) -> torch.Tensor:
    """``L`` of both responses of each pair, ``[pairs, 2]``."""
    log_probs = our_log_probs(model, sequence)
    return log_probs.new_zeros(6).index_add(0, sequence.target_response, log_probs).view(3, 2)


def their_likelihoods(model) -> torch.Tensor:
    found = []
    for prompt, responses in pairs():
        for response in responses:
            whole = torch.cat([prompt, response])
            log_probs = torch.log_softmax(model(input_ids=whole[None], use_cache=False).logits[0], -1)
            places = torch.arange(len(prompt), len(whole))
            found.append(log_probs[places - 1, whole[places]].sum())
    return torch.stack(found).view(3, 2)


def dpo(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    score = policy - reference
    return -torch.nn.functional.logsigmoid(BETA * (score[:, 0] - score[:, 1])).mean()


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize("rslora", [False, True])
def test_three_steps_are_pefts(alone, fused, impl, rslora):
    from dataclasses import replace

    from megatron_dtrpo.model.lora import add_adapters, without_adapters

    start = random_adapter()
    theirs = with_peft(oracles.qwen2(), start, use_rslora=rslora)
    model = build(oracles.qwen2(), impl)
    add_adapters([model], replace(LORA, use_rslora=rslora))
    give(model, ours_from_peft(start))
    sequence = packed()
    with torch.no_grad():
        with theirs.disable_adapter():
            their_reference = their_likelihoods(theirs)
        with without_adapters([model]):
            our_reference = our_likelihoods(model, sequence)
    ours = trained(model)
    adapters = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if p.requires_grad}
    assert adapters.keys() == start.keys()
    optimizers = [torch.optim.AdamW(list(each.values()), lr=LR, eps=1e-6) for each in (ours, adapters)]
    for _ in range(STEPS):
        losses = dpo(our_likelihoods(model, sequence), our_reference), dpo(their_likelihoods(theirs), their_reference)
        assert (losses[0] - losses[1]).abs() < 1e-8
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        expected = ours_from_peft({name: p.grad for name, p in adapters.items()})
        assert all(p.grad.abs().max() > 1e-4 for p in ours.values())
        for name, parameter in ours.items():
            assert (parameter.grad - expected[name]).abs().max() < 1e-8, name
        for optimizer in optimizers:
            optimizer.step()
    expected, before = ours_from_peft(dict(adapters)), ours_from_peft(start)
    for name, parameter in ours.items():
        assert (parameter - expected[name]).abs().max() < 1e-8, name
        assert (parameter - before[name]).abs().max() > 1e-3, name
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
def test_without_adapters_the_model_is_what_it_was_bit_for_bit(alone, fused, impl):
    """So are new adapters, whose B is zero; and a fingerprint of the weights takes no notice of them."""
    from megatron_dtrpo.checkpoint.fingerprint import base_fingerprint, weights_fingerprint
    from megatron_dtrpo.model.lora import add_adapters, initialize_adapters, without_adapters
    from megatron_dtrpo.training.reference import ReferencePolicy

    model = build(oracles.qwen2(), impl)
    sequence = packed()
    before = our_log_probs(model, sequence)
    prints = weights_fingerprint(model), base_fingerprint(model)
    add_adapters([model], LORA)
    initialize_adapters([model], seed=3)
    assert (weights_fingerprint(model), base_fingerprint(model)) == prints
    for name, parameter in trained(model).items():
        bound = parameter.shape[1] ** -0.5
        assert not parameter.any() if name.endswith("B") else 0.9 * bound < parameter.abs().max() <= bound
    assert torch.equal(our_log_probs(model, sequence), before)
    give(model, ours_from_peft(random_adapter()))
    assert (our_log_probs(model, sequence) - before).abs().max() > 0.1
    assert ReferencePolicy([model]).frozen == []
    with without_adapters([model]):
        assert torch.equal(our_log_probs(model, sequence), before)
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad)[0, 0] += 0.1
    assert base_fingerprint(model) != prints[1]


def test_a_base_is_the_same_in_bf16_and_in_fp32(alone, tmp_path):
    """Whose fingerprint a checkpoint's files have, too."""
    from megatron_dtrpo.checkpoint.fingerprint import base_fingerprint, weights_fingerprint
    from megatron_dtrpo.conversion.adapters import stored_fingerprint
    from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
    from megatron_dtrpo.conversion.torch_dist_reader import TorchDistReader
    from megatron_dtrpo.model.provider import build_model
    from megatron_dtrpo.training.engine import checkpoint
    from tests.support import conversion_folders as folders

    for tied in (False, True):
        hf, ours = tmp_path / f"hf{tied}", tmp_path / f"ours{tied}"
        folders.write_folder(hf, folders.QWEN2, tied=tied)
        settings = import_checkpoint(hf, ours, ImportOptions(progress=False))
        models = [build_model(settings, ParallelSettings(bf16=bf16)) for bf16 in (False, True)]
        for model in models:
            checkpoint.load(ours, 0, model)
        assert weights_fingerprint(models[0]) != weights_fingerprint(models[1])
        assert base_fingerprint(models[0]) == base_fingerprint(models[1])
        with TorchDistReader(ours / "iter_0000000") as reader:
            assert stored_fingerprint(reader, settings) == base_fingerprint(models[0])


def test_dropout_is_a_function_of_what_is_dropped():
    """Not of the order or the number of tokens; kept shares are binomial, and rows and columns unrelated."""
    generator = torch.Generator().manual_seed(0)
    fields = [torch.randint(0, 50, (400,), generator=generator) for _ in range(5)]
    token, features = token_numbers(7, fields), torch.arange(256)
    mask = kept(token, 11, features, 0.25)
    assert abs(mask.float().mean() - 0.75) < 4 * (0.25 * 0.75 / mask.numel()) ** 0.5
    for along in (0, 1):
        share, count = mask.float().mean(along), mask.shape[along]
        assert (share - 0.75).abs().max() < 5 * (0.25 * 0.75 / count) ** 0.5
        assert abs(share.var() / (0.25 * 0.75 / count) - 1) < 0.4
    joint = (mask[:-1] & mask[1:]).float().mean(), (mask[:, :-1] & mask[:, 1:]).float().mean()
    assert all(abs(share - 0.75**2) < 0.01 for share in joint)
    order = torch.randperm(400, generator=generator)
    assert torch.equal(kept(token_numbers(7, [f[order] for f in fields]), 11, features, 0.25), mask[order])
    assert torch.equal(kept(token, 11, features[64:128], 0.25), mask[:, 64:128])
    for other in (kept(token, 12, features, 0.25), kept(token_numbers(8, fields), 11, features, 0.25)):
        assert abs((other == mask).float().mean() - (0.75**2 + 0.25**2)) < 0.01
    assert kept(token, 11, features, 0.0).all()


def test_dropout_drops_in_training_alone_and_is_pefts_on_what_is_left(alone):
    """PEFT's, given the masks of ours: one for each fused layer's input."""
    from dataclasses import replace

    from megatron_dtrpo.model.attention import attention_width, plan_attention
    from megatron_dtrpo.model.lora import adapters_of, add_adapters, with_dropout

    start, p = random_adapter(), 0.5
    theirs = with_peft(oracles.qwen2(), start, lora_dropout=p).eval()
    model = build(oracles.qwen2())
    add_adapters([model], replace(LORA, lora_dropout=p))
    give(model, ours_from_peft(start))
    whole = torch.randint(0, 61, (9,), generator=torch.Generator().manual_seed(2))

    zeros = torch.zeros(9, dtype=torch.long)
    attention = plan_attention(
        Coordinates(zeros, zeros, zeros, torch.arange(9)), 1, "sdpa", attention_width(model.config)
    )
    attention.token = token_numbers(3, [zeros, torch.arange(9)])

    def ours() -> torch.Tensor:
        return model.logits(model(whole, torch.arange(9), attention)[:, 0])

    masks = {}
    names = {"linear_qkv": "qkv", "linear_proj": "o", "linear_fc1": ("gate", "up"), "linear_fc2": ("down",)}
    for name, adapter in model.named_modules():
        if adapter in adapters_of([model]):
            layer, kind = name.split(".")[2], name.rpartition(".")[2].removesuffix("_adapter")
            width = adapter.lora_A.shape[1]
            for part in names[kind]:
                masks[layer, f"{part}_proj"] = kept(attention.token, adapter.seed, torch.arange(width), p).double()
    for name, module in theirs.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            mask = masks[name.split(".")[-3], name.rpartition(".")[2]]
            module.lora_dropout["default"].forward = lambda x, mask=mask: x * mask / (1 - p)
    dropped = theirs(input_ids=whole[None], use_cache=False).logits[0]
    with with_dropout([model]):
        assert (ours() - dropped).abs().max() < 1e-9
    assert (ours() - dropped).abs().max() > 0.1
    attention.token = None
    with with_dropout([model]):
        assert (ours() - dropped).abs().max() > 0.1


def config_of(**changes):
    from megatron_dtrpo.config.settings import Config

    model = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 61}
    return Config.from_flat({**model, **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_rank": 0}, "lora_rank is 0: it must be at least 1"),
        ({"lora_alpha": 8.0}, "lora_alpha goes with lora_rank: give --lora-rank N"),
        ({"use_rslora": True}, "use_rslora goes with lora_rank"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "lora_alpha is 0"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "lora_dropout is 1.0: it must be below 1"),
        ({"lora_rank": 4, "lora_target_modules": ["mlp", "q_proj"]}, "lora_target_modules: 'q_proj' matches no linear"),
        ({"lora_rank": 4, "lora_target_modules": ["layers.4"]}, "lora_target_modules: 'layers.4' matches no linear"),
        ({"lora_rank": 4, "trainable_modules": ["mlp"]}, "trainable_modules with lora_rank"),
        (
            {"lora_rank": 4, "rounds": 2, "load": "base", "rewards": ["numeric"], "move_reference": True},
            "move_reference with lora_rank",
        ),
        ({"lora_rank": 4, "model_class": "hybrid"}, "lora_rank with model_class hybrid"),
        (
            {"lora_rank": 4, "lora_dropout": 0.1, "recompute_granularity": "selective", "recompute_modules": ["mlp"]},
            "lora_dropout with recompute_modules mlp",
        ),
        (
            {"lora_rank": 4, "lora_dropout": 0.1, "objective": "policy_gradient", "rewards": ["numeric"]},
            "lora_dropout with objective policy_gradient",
        ),
        ({"lora_rank": 4, "bf16": True, "fp8_format": "hybrid", "fp8_recipe": "delayed"}, "fp8_recipe delayed with"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    from megatron_dtrpo.config.rules import validate
    from megatron_dtrpo.errors import UserError

    with pytest.raises(UserError) as error:
        validate(config_of(**changes), 1)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_reference_of_its_own_is_kept_beside_adapters(alone):
    """Its values where they differ, and none for the adapters."""
    from megatron_dtrpo.model.initialization import global_parameter_names
    from megatron_dtrpo.model.lora import add_adapters, without_adapters
    from megatron_dtrpo.training.reference import ReferencePolicy

    model, other = build(oracles.qwen2()), build(oracles.qwen2())
    name, sequence = "decoder.layers.1.mlp.linear_fc1.weight", packed()
    with torch.no_grad():
        global_parameter_names(other)[name][3] += 0.5
    expected = our_log_probs(other, sequence)
    add_adapters([model], LORA)
    give(model, ours_from_peft(random_adapter()))
    before = our_log_probs(model, sequence)
    reference = ReferencePolicy([model], [other])
    assert [p for p, _ in reference.frozen] == [global_parameter_names(model)[name]]
    with reference.in_place_of_policy(), without_adapters([model]):
        assert torch.equal(our_log_probs(model, sequence), expected)
    assert torch.equal(our_log_probs(model, sequence), before)


def test_likelihoods_of_an_adapter_that_was_trained_with_dropout(alone):
    """Continuations are no examples of a data set: several in one packed sequence have no noise to drop them by."""
    from dataclasses import replace

    from megatron_dtrpo.config.settings import Config
    from megatron_dtrpo.data.tokenizer import build_tokenizer
    from megatron_dtrpo.evaluation.likelihood import Continuation, score_continuations
    from megatron_dtrpo.training.engine import Engine

    noising = Noising("exact", EstimatorOptions(), 1, "clean", 1, NO_MASK, 0)
    continuations = [Continuation((1, 2), (3, 4)), Continuation((5,), (6,)), Continuation((7, 8, 9), (3,))]
    scores = []
    for dropout in (0.0, 0.5):
        config = Config(model=MODEL, lora=replace(LORA, lora_dropout=dropout))
        engine = Engine(config, build_tokenizer("ByteLevelTokenizer"), [build(oracles.qwen2())])
        engine.add_adapters()
        give(engine.chunks[0], ours_from_peft(random_adapter()))
        scores.append(score_continuations(engine, noising, continuations, 64))
    assert scores[0] == scores[1]
    examples = MicroBatch(packed(), [Sample(0, number) for number in range(3)], torch.ones(6, dtype=torch.long))
    assert engine.prepare(examples).token is None
    engine.prepare_training(1)
    assert engine.prepare(examples).token is not None


def test_names_for_peft_mean_the_layers_that_have_an_adapter():
    """LLaDA's head is called as a projection of its layers: a short name would put a new adapter beside it."""
    from dataclasses import replace
    from types import SimpleNamespace

    from megatron_dtrpo.conversion import mapping
    from megatron_dtrpo.conversion.adapters import sources, target_weights
    from megatron_dtrpo.conversion.peft import _modules

    peft = pytest.importorskip("peft.tuners.tuners_utils")
    llada = replace(MODEL, family="llada", num_query_groups=4, block_size=0, add_qkv_bias=False)
    for model in (MODEL, replace(llada, untie_embeddings_and_output_weights=True)):
        every = mapping.huggingface_tensors(mapping.megatron_tensors(model, model.vocab_size))
        for targets in (["linear_fc2"], LORA.lora_target_modules, ["layers.0.mlp"]):
            weights = target_weights(model, targets)
            config = SimpleNamespace(
                target_modules=_modules(SimpleNamespace(weights=weights), model),
                exclude_modules=None,
                layers_to_transform=None,
                layers_pattern=None,
            )
            found = [name for name in every if peft.check_target_module_exists(config, name.removesuffix(".weight"))]
            assert sorted(found) == sorted(name for weight in weights for name in sources(weight))
