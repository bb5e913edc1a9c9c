"""Qwen3 and the families that come from it: SDAR and Tiny-A2D. Conversion, bad input, and the model on megatron-core
against transformers' Qwen3 in float64: hidden states, a noisy block's cross-entropy, decoding with a cache."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.config.decoding import CACHES, RULES, DecodingOptions
from megatron_dtrpo.config.estimators import ESTIMATORS, EstimatorOptions
from megatron_dtrpo.config.rules import validate
from megatron_dtrpo.config.settings import Config, ModelSettings, ParallelSettings
from megatron_dtrpo.conversion.hf_config import CONFIG, model_settings, read_config
from megatron_dtrpo.conversion.inspection import inspect
from megatron_dtrpo.conversion.roundtrip import roundtrip
from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.tokenizer import METADATA_FILE, load_tokenizer
from megatron_dtrpo.diffusion.layout import Coordinates, concatenate
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.registry import family_of
from megatron_dtrpo.rounding import round_up
from megatron_dtrpo.training import resume
from megatron_dtrpo.training.setup import check_reference_architecture
from tests.support import conversion_folders as folders
from tests.support import oracles
from tests.support.same_weights import with_weights_of

QUIET = dict(progress=False)
WIDE = dict(folders.SHAPE, width=6)  # heads wider than hidden size / heads
B, MASK = 4, 60
MODEL = ModelSettings(
    family="sdar",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=12,
    rotary_base=10000.0,
    vocab_size=61,
    make_vocab_size_divisible_by=1,
    add_qkv_bias=False,
    qk_layernorm=True,
    block_size=B,
)


@pytest.mark.parametrize(
    "architecture, name, block, shift, tied",
    [
        (folders.SDAR, "sdar", 4, 0, False),
        (folders.A2D, "a2d_qwen3", 32, 0, True),
        (folders.QWEN3, "qwen3", 32, 1, False),
    ],
)
def test_there_and_back(tmp_path, architecture, name, block, shift, tied):
    source = folders.write_folder(
        tmp_path / "hf", architecture, torch.bfloat16, tied, shards=2, mask=name != "qwen3", shape=WIDE
    )
    options = ImportOptions(add_mask_token=name == "qwen3", **QUIET)
    model = import_checkpoint(source, tmp_path / "megatron", options)
    assert (model.family, model.block_size, model.kv_channels) == (name, block, 6)
    assert (model.add_qkv_bias, model.qk_layernorm, family_of(model).prediction_shift) == (False, True, shift)
    folders.assert_same_model(tmp_path / "megatron", source)
    assert load_tokenizer(tmp_path / "megatron" / checkpoint_folder.TOKENIZER).mask_token == "<MASK>"
    for folder in (source, tmp_path / "megatron"):
        found = inspect(folder)
        assert found["architecture"] == architecture
        assert found["family"] == f"{name}, prediction shift {shift}, attention block_causal"
        parameters = sum(w.numel() for w in folders.read_weights(source).values())
        assert found["parameters"] == f"{parameters:,}"
    assert export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET)) == []
    folders.assert_same_weights(source, tmp_path / "back")
    exported, original = (json.loads((f / CONFIG).read_text()) for f in (tmp_path / "back", source))
    assert exported == original | ({"block_size": 32} if name == "qwen3" else {})
    if name != "qwen3":
        names = ("config.json", "generation_config.json", "tokenizer_config.json", "added_tokens.json", "vocab.json")
        assert all((tmp_path / "back" / n).read_bytes() == (source / n).read_bytes() for n in names)


def test_a_family_that_needs_a_block_size_and_has_none(tmp_path, capsys):
    source = folders.write_folder(tmp_path / "hf", folders.SDAR, shape=WIDE)
    config = json.loads((source / CONFIG).read_text())
    del config["block_size"]
    (source / CONFIG).write_text(json.dumps(config))
    folders.import_refused(
        capsys, source, "no block_size, and a model of family sdar has one: import it with --block-size N"
    )
    assert inspect(source)["block size"] == "none (import must be given --block-size)"
    assert all(row.equal for row in roundtrip(source, ImportOptions(**QUIET), tmp_path))
    model = import_checkpoint(source, tmp_path / "megatron", ImportOptions(block_size=16, **QUIET))
    assert model.block_size == 16
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET))
    assert json.loads((tmp_path / "back" / CONFIG).read_text()) == {**config, "block_size": 16}


@pytest.mark.parametrize(
    "changes, flags, words",
    [
        ({"attention_bias": True}, (), "attention_bias is true"),
        ({"mask_token_id": 258}, (), "mask_token_id is 258, the tokenizer's mask token <MASK> has the id 259"),
        ({}, ("--mask-token", "<|nothing|>"), "the mask token '<|nothing|>' is not in the vocabulary"),
        ({}, ("--block-size", "8"), "block_size is 4: it cannot be imported with --block-size 8"),
        ({"block_size": 0}, (), "block_size is 0: expected a positive integer"),
        ({"architectures": ["SDARMoeForCausalLM"]}, (), "unknown architecture SDARMoeForCausalLM: known are"),
        ({"head_dim": 8}, (), "k_norm.weight has shape [6], config.json says [8]"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, changes, flags, words):
    source = folders.write_folder(tmp_path / "hf", folders.SDAR, shape=WIDE, **changes)
    folders.import_refused(capsys, source, words, *flags)


def test_a_width_of_heads_that_is_not_given_is_transformers_own():
    config = folders.config(folders.QWEN3, shape=WIDE)
    del config["head_dim"]
    assert model_settings(config, CONFIG).kv_channels == 128


def test_the_same_weights_are_not_exported_as_a_family_that_reads_them_otherwise(tmp_path):
    source = folders.write_folder(tmp_path / "hf", folders.SDAR, shape=WIDE)
    model = import_checkpoint(source, tmp_path / "megatron", ImportOptions(**QUIET))
    model.family = "qwen3"
    checkpoint_folder.save_model_config(tmp_path / "megatron", model)
    with pytest.raises(UserError, match="of another model: family is sdar there, qwen3 in"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET))


def test_the_real_configuration_and_tokenizer(shared_dir, tmp_path):
    """Of SDAR-1.7B-Chat: two of its files call the mask token by different names, and its number decides."""
    real = shared_dir / "data" / "sdar_1_7b_chat"
    model = model_settings(read_config(real), real / CONFIG)
    assert (model.family, model.block_size, model.kv_channels, model.vocab_size) == ("sdar", 4, 128, 151936)
    source = tmp_path / "hf"
    shutil.copytree(real, source)
    small = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = read_config(real) | small | {"num_key_value_heads": 1, "head_dim": 4}
    (source / CONFIG).write_text(json.dumps(config))
    shape = dict(layers=1, hidden=16, ffn=8, heads=2, groups=1, width=4, vocabulary=151936)
    folders.write_weights(source, folders.random_weights(torch.bfloat16, shape=shape, architecture=folders.SDAR))
    import_checkpoint(source, tmp_path / "megatron", ImportOptions(**QUIET))
    metadata = json.loads((tmp_path / "megatron" / checkpoint_folder.TOKENIZER / METADATA_FILE).read_text())
    assert metadata["mask_token"] == "<|MASK|>"  # whose number import compares with config.json's
    notes = export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET))
    assert len(notes) == 1 and "configuration_sdar.py, modeling_sdar.py: copy them in" in notes[0]
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def config_of(**settings) -> Config:
    model = {key: value for key, value in vars(MODEL).items() if value is not None}
    return Config.from_flat(model | settings)


@pytest.mark.parametrize("estimator", [name for name, row in ESTIMATORS.items() if not row.autoregressive])
def test_there_is_no_block_start_to_choose(estimator):
    objective = ESTIMATORS[estimator].objectives[0]
    config = config_of(estimator=estimator, objective=objective)
    validate(config, 1)
    assert config.objective.block_start is None
    noising = Noising.from_config(config, MASK)
    assert (noising.shift, noising.block_start) == (0, None)
    expected = "^block_start noisy: a model of family sdar predicts no block's first token from another block: leave"
    with pytest.raises(UserError, match=expected):
        validate(config_of(estimator=estimator, objective=objective, block_start="noisy"), 1)


@pytest.mark.parametrize("key", ["add_qkv_bias", "qk_layernorm"])
def test_layers_of_another_family_are_not_trained(key):
    other = not getattr(MODEL, key)
    expected = f"^{key} is {str(other).lower()}, in family sdar it is {str(not other).lower()}: change {key} or family$"
    with pytest.raises(UserError, match=expected):
        validate(config_of(**{key: other}), 1)


def test_a_resumed_run_and_a_reference_keep_the_shift(tmp_path):
    """A resumed run's settings are compared before its model is known, and its record says the family."""
    first = config_of(load="base")
    validate(first, 1)
    resume._check_pinned(Config(), first.to_flat())
    with pytest.raises(UserError, match="this run has block_start none, not clean"):
        resume._check_pinned(Config.from_flat({"block_start": "clean"}), first.to_flat())
    for family in ("a2d_qwen3", "qwen3"):
        folder = tmp_path / family
        folder.mkdir()
        checkpoint_folder.save_model_config(folder, dataclasses.replace(MODEL, family=family))
        config = config_of(reference=str(folder))
        if family == "a2d_qwen3":
            check_reference_architecture(config)
            continue
        with pytest.raises(UserError, match="family is qwen3 there, sdar here"):
            check_reference_architecture(config)


@pytest.fixture(scope="module")
def peer():
    model = oracles.qwen3(seed=3)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)  # sure of some tokens and not of others
        model.lm_head.weight[59].mul_(1.3)  # which ends a response
    return model


@pytest.fixture(scope="module")
def wide(alone, peer):
    """The peer's weights on megatron-core, in float64."""
    return with_weights_of(peer, MODEL)


# (prompt length, response length): within a block, on boundaries and across them.
SHAPES = [(2, 1), (3, 9), (4, 4), (5, 13), (8, 6), (9, 3)]


@torch.no_grad()
def test_hidden_states_and_the_cross_entropy_of_noisy_blocks(peer, wide):
    """Every row of the packed layout is transformers' Qwen3 under a block-causal mask to 1e-9; and what a noisy block's
    tokens cost is read from their own rows: by the plain layout, prompt and response whole, one example at a time."""
    from megatron_dtrpo.model.attention import attention_width, plan_attention

    noising = Noising("vrpo", EstimatorOptions(), 2, None, B, MASK, seed=1, shift=0)
    generator = torch.Generator().manual_seed(0)
    words = [[torch.randint(0, 59, (n,), generator=generator) for n in shape] for shape in SHAPES]
    documents = [noising.document(Sample(0, n), prompt, [response]) for n, (prompt, response) in enumerate(words)]
    packed = concatenate(documents)
    attention = plan_attention(packed.coordinates(), B, "sdpa", attention_width(wide.config))
    hidden = wide(packed.tokens, packed.position, attention)[:, 0]
    sees = oracles.sees_by_description(packed.document, packed.branch, packed.view, packed.position, B)
    additive = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -torch.inf)
    expected = peer.model(
        input_ids=packed.tokens[None],
        position_ids=packed.position[None],
        attention_mask=additive[None, None],
        use_cache=False,
    ).last_hidden_state[0]
    assert (hidden - expected).abs().max() < 1e-9

    log_probs = torch.log_softmax(wide.logits(hidden), -1)[packed.target_row, packed.target_token]
    compared = 0
    for n, ((prompt, response), document) in enumerate(zip(words, documents, strict=True)):
        mine = packed.target_response == n
        for view in (1, 2):
            of_view = mine & (packed.view[packed.target_row] == view)
            shown = document.tokens[document.view == view]
            places = document.position[document.view == view]
            tail = len(prompt) + len(response)
            hidden_places = {p for p, t in zip(places.tolist(), shown.tolist(), strict=True) if t == MASK and p < tail}
            plain = oracles.plain_layout(prompt.tolist(), response.tolist(), hidden_places, B, MASK)
            logits = oracles.qwen2_logits(peer, plain.tokens, plain.position, plain.sees)
            whole = torch.cat([prompt, response])
            costs = {p: -torch.log_softmax(logits[plain.noisy_row(p)], 0)[whole[p]].item() for p in hidden_places}
            assert sorted(packed.position[packed.target_row[of_view]].tolist()) == sorted(costs)
            assert -log_probs[of_view].sum().item() == pytest.approx(sum(costs.values()), abs=1e-9)
            compared += len(costs)
    assert compared == len(packed.target_row) > 30


@pytest.mark.parametrize(
    "options", [{}, {"small_block_size": 2}, *({"small_block_size": 2, "sub_block_cache": c} for c in CACHES)]
)
@pytest.mark.parametrize("threshold", [0.4, 0.9])
def test_decoding_with_a_cache_is_decoding_without(peer, wide, options, threshold):
    from megatron_dtrpo.inference.decoder import make_decoder

    class Words:
        vocab_size, mask_id, eos_id = 61, MASK, 59

    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 59, (n,), generator=generator).tolist() for n in (1, 3, 4, 5, 7, 8, 9, 12, 13)]
    options = {"threshold": threshold, "small_block_size": B, "max_new_tokens": 11, **options}
    decoder = make_decoder(wide, MODEL, Words)
    known = {"block_size": B, "mask_id": MASK, "end_id": 59, "vocab_size": 61, "shift": 0}
    with torch.no_grad():
        expected = [oracles.decode_without_cache(peer, prompt, **known, **options) for prompt in prompts]
    for batch_size in (1, 4):
        found = decoder.decode(prompts, DecodingOptions(**options), batch_size=batch_size)
        assert [(one.tokens, one.steps) for one in found] == expected
    lengths = [len(tokens) for tokens, _ in expected]
    assert min(lengths) < 11 and 11 in lengths  # some end early, some do not
    if threshold < 0.5:
        assert any(len(set(steps)) < len(steps) for _, steps in expected)


SURE = 0.45  # above it are now more, now fewer than the schedule asks for


@torch.no_grad()
@pytest.mark.parametrize("prompt_length", [2, 4])
@pytest.mark.parametrize(
    "rule, remasking",
    [
        ("static", "low_confidence_static"),
        ("dynamic", "low_confidence_dynamic"),
        ("leftmost", "sequential"),
    ],
)
def test_decoding_is_sdars_published_rule(peer, wide, rule, remasking, prompt_length):
    """Token for token and step for step, also where a prompt ends inside a block: the block's share is the same."""
    from megatron_dtrpo.inference.decoder import make_decoder

    class Endless:
        vocab_size, mask_id, eos_id = 61, MASK, MASK

    generator = torch.Generator().manual_seed(prompt_length)
    prompts = [torch.randint(0, 59, (prompt_length + more,), generator=generator).tolist() for more in (0, B)]
    total, reads = round_up(prompt_length, B) + 3 * B, RULES[rule].reads
    found_several = False
    for steps in (2, 3):
        options = DecodingOptions(
            max_new_tokens=total - prompt_length,
            rule=rule,
            small_block_size=B,
            denoising_steps=steps,
            threshold=SURE if "threshold" in reads else None,
        )
        found = make_decoder(wide, MODEL, Endless).decode(prompts, options, batch_size=2)
        for prompt, one in zip(prompts, found, strict=True):
            known = {"block_size": B, "steps": steps, "remasking": remasking, "threshold": SURE, "mask_id": MASK}
            end = len(prompt) + total - prompt_length
            assert (one.tokens, one.steps) == oracles.decode_as_sdar(peer, prompt, total=end, **known)
            found_several |= max(one.steps.count(step) for step in one.steps) > -(-B // steps)
    assert found_several == (rule == "dynamic")  # more at once than the schedule asks for


def test_an_export_computes_what_the_checkpoint_does(tmp_path, alone, peer):
    """Logits of the trained weights, as training loads them, and of transformers' Qwen3 on their export."""
    from safetensors.torch import load_file, save_file
    from transformers import Qwen3ForCausalLM

    from megatron_dtrpo.checkpoint import distributed as checkpoint
    from megatron_dtrpo.model.attention import attention_width, plan_attention
    from megatron_dtrpo.model.provider import build_model

    source = folders.write_folder(tmp_path / "hf", folders.SDAR)
    shape = dict(layers=2, hidden=32, ffn=48, heads=4, groups=2, width=12, vocabulary=61)
    config = folders.config(folders.SDAR, shape=shape, mask_token_id=60)
    (source / CONFIG).write_text(json.dumps(config))
    save_file({n: p.float().contiguous() for n, p in peer.state_dict().items()}, source / "model.safetensors")
    import_checkpoint(source, tmp_path / "megatron", ImportOptions(tokenizer=False, **QUIET))
    settings = checkpoint_folder.load_model_config(tmp_path / "megatron")
    model = build_model(settings, ParallelSettings())
    checkpoint.load(tmp_path / "megatron", 0, model)
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET))

    theirs = Qwen3ForCausalLM(peer.config).float().eval()
    theirs.load_state_dict(load_file(tmp_path / "back" / "model.safetensors"))
    tokens, position = torch.arange(3, 15), torch.arange(12)
    zeros = torch.zeros(12, dtype=torch.long)
    at = Coordinates(zeros, zeros, zeros, position // B)
    attention = plan_attention(at, B, "sdpa", attention_width(model.config))
    with torch.no_grad():
        logits = model.logits(model(tokens, position, attention)[:, 0])[:, :61]
        expected = oracles.qwen2_logits(theirs, tokens, position, oracles.block_causal(12, B))
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
