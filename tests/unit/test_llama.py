"""Llama as a starting point: conversion, bad input, and by blocks on megatron-core against transformers' Llama in
float64. Block size 1 is in `test_autoregressive`."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.config.estimators import EstimatorOptions
from megatron_dtrpo.config.settings import ModelSettings
from megatron_dtrpo.conversion.hf_config import CONFIG, model_settings
from megatron_dtrpo.conversion.inspection import inspect
from megatron_dtrpo.conversion.roundtrip import roundtrip
from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.tokenizer import load_tokenizer
from megatron_dtrpo.diffusion.layout import concatenate
from tests.support import conversion_folders as folders
from tests.support import oracles
from tests.support.same_weights import with_weights_of

QUIET = dict(progress=False)
B, MASK, END = 4, 60, 59


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_there_and_back(tmp_path, tied):
    source = folders.write_folder(tmp_path / "hf", folders.LLAMA, torch.bfloat16, tied, shards=2, mask=False)
    model = import_checkpoint(source, tmp_path / "megatron", ImportOptions(add_mask_token=True, **QUIET))
    assert (model.family, model.block_size, model.untie_embeddings_and_output_weights) == ("llama", 32, not tied)
    assert (model.add_qkv_bias, model.qk_layernorm) == (False, False)
    folders.assert_same_model(tmp_path / "megatron", source)
    assert load_tokenizer(tmp_path / "megatron" / checkpoint_folder.TOKENIZER).mask_token == "<|mask|>"
    parameters = sum(w.numel() for w in folders.read_weights(source).values())
    for folder in (source, tmp_path / "megatron"):
        found = inspect(folder)
        assert (found["architecture"], found["parameters"]) == (folders.LLAMA, f"{parameters:,}")
        assert found["family"] == "llama, prediction shift 1, attention block_causal"
    assert export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET)) == []
    folders.assert_same_weights(source, tmp_path / "back")
    exported, original = (json.loads((f / CONFIG).read_text()) for f in (tmp_path / "back", source))
    assert exported == original | {"block_size": 32}
    assert all(row.equal for row in roundtrip(source, ImportOptions(**QUIET), tmp_path))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"attention_bias": True}, "attention_bias is true: the model here has no biases on Llama's projections"),
        ({"mlp_bias": True}, "mlp_bias is true: the model here has no biases on Llama's projections"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "rope_scaling is {'rope_type': 'llama3', 'factor': 8.0}: the model here does not compute that",
        ),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}},
            "rope_parameters is {'rope_type': 'llama3', 'rope_theta': 10000.0, 'factor': 8.0}: the model here does not",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu': the model here does not compute that"),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, changes, words):
    source = folders.write_folder(tmp_path / "hf", folders.LLAMA, **changes)
    folders.import_refused(capsys, source, words, "--block-size", "1")


def test_a_model_from_before_there_were_groups_of_heads():
    config = folders.config(folders.LLAMA)
    for without in ({"num_key_value_heads": None}, {}):
        del config["num_key_value_heads"]
        config |= without
        model = model_settings(config, CONFIG, block_size=1)
        assert model.num_query_groups == model.num_attention_heads == folders.SHAPE["heads"]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def both(request, alone):
    """transformers' Llama with groups of heads, ours with its weights, and our settings; float64."""

    peer = oracles.llama(groups=2, tied=request.param, seed=3)
    with torch.no_grad():
        peer.model.norm.weight.mul_(3.0)  # sure of some tokens and not of others
    settings = ModelSettings(
        family="llama",
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        rotary_base=500000.0,
        norm_epsilon=1e-5,
        vocab_size=61,
        make_vocab_size_divisible_by=1,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=not request.param,
        block_size=B,
    )
    return peer, with_weights_of(peer, settings), settings


@torch.no_grad()
def test_every_row_is_transformers_under_the_packed_mask(both):
    from megatron_dtrpo.model.attention import attention_width, plan_attention

    peer, model, _ = both
    generator = torch.Generator().manual_seed(0)
    noising = Noising("dtrpo", EstimatorOptions(), 2, "clean", B, MASK, seed=1, shift=1)
    shapes = [(2, 1, 3), (3, 9, 2), (4, 4, 8), (9, 3, 13)]
    words = [[torch.randint(0, END, (n,), generator=generator) for n in shape] for shape in shapes]
    packed = concatenate([noising.document(Sample(0, n), prompt, two) for n, (prompt, *two) in enumerate(words)])
    attention = plan_attention(packed.coordinates(), B, "sdpa", attention_width(model.config))
    hidden = model(packed.tokens, packed.position, attention)[:, 0]
    sees = oracles.sees_by_description(packed.document, packed.branch, packed.view, packed.position, B)
    additive = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, -torch.inf)
    asked = dict(input_ids=packed.tokens[None], position_ids=packed.position[None], use_cache=False)
    expected = peer(**asked, attention_mask=additive[None, None], output_hidden_states=True)
    assert (hidden - expected.hidden_states[-1][0]).abs().max() < 1e-9
    assert (model.logits(hidden) - expected.logits[0]).abs().max() < 1e-9 and len(packed) > 100


@torch.no_grad()
def test_decoding_by_blocks_is_decoding_without_a_cache(both):
    from megatron_dtrpo.inference.decoder import make_decoder

    class Words:
        vocab_size, mask_id, eos_id = 61, MASK, END

    peer, model, settings = both
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, END, (n,), generator=generator).tolist() for n in (1, 4, 5, 9)]
    how = dict(threshold=0.3, small_block_size=2, max_new_tokens=11)
    known = dict(block_size=B, mask_id=MASK, end_id=END, vocab_size=61)
    expected = [oracles.decode_without_cache(peer, prompt, **known, **how) for prompt in prompts]
    found = make_decoder(model, settings, Words).decode(prompts, DecodingOptions(**how), batch_size=3)
    assert [(one.tokens, one.steps) for one in found] == expected
    assert any(len(set(steps)) < len(steps) for _, steps in expected)  # several tokens in a step
