"""Block size 1: an autoregressive model is block diffusion with nothing to mask. Import without a mask token, the
likelihood, and decoding, against transformers' Qwen2, Qwen3 and Llama in float64."""

from __future__ import annotations

import argparse
import dataclasses
import functools

import pytest
import torch

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.cli.decoding_flags import add_decoding_flags, decoding_options
from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.config.rules import validate
from megatron_dtrpo.config.settings import Config, ModelSettings
from megatron_dtrpo.conversion.inspection import inspect
from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.tokenizer import NO_MASK, load_tokenizer
from megatron_dtrpo.diffusion.estimators import noise_generator
from megatron_dtrpo.diffusion.layout import CLEAN, concatenate
from megatron_dtrpo.errors import UserError
from tests.support import conversion_folders as folders
from tests.support import oracles
from tests.support.same_weights import with_weights_of

QUIET = dict(progress=False)
QWEN2 = ModelSettings(
    family="qwen2",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    rotary_base=10000.0,
    vocab_size=61,
    make_vocab_size_divisible_by=1,
    block_size=1,
)
QWEN3 = dataclasses.replace(QWEN2, family="qwen3", add_qkv_bias=False, qk_layernorm=True, kv_channels=12)
LLAMA = dataclasses.replace(QWEN2, family="llama", add_qkv_bias=False, rotary_base=500000.0, norm_epsilon=1e-5)
END = 59
# (prompt length, lengths of both responses).
SHAPES = [(1, 1, 3), (5, 9, 2), (8, 4, 12)]


@pytest.mark.parametrize("architecture", [folders.QWEN2, folders.QWEN3, folders.LLAMA])
def test_an_import_with_block_size_1_asks_for_no_mask_token(tmp_path, architecture):
    source = folders.write_folder(tmp_path / "hf", architecture, mask=False)
    asks = (
        "its tokenizer has no mask token: --add-mask-token adds .*, --mask-token names .*; --block-size 1 needs none$"
    )
    with pytest.raises(UserError, match=asks):
        import_checkpoint(source, tmp_path / "refused", ImportOptions(block_size=8, **QUIET))
    assert inspect(source)["mask token"] == "none (import it with --add-mask-token, or with --block-size 1)"
    with pytest.raises(
        UserError, match="the end token 'no such' is not in the vocabulary; name one that is with --eos-token$"
    ):
        import_checkpoint(source, tmp_path / "refused", ImportOptions(block_size=1, eos_token="no such", **QUIET))
    model = import_checkpoint(source, tmp_path / "megatron", ImportOptions(block_size=1, **QUIET))
    assert (model.block_size, model.vocab_size) == (1, folders.SHAPE["vocabulary"])
    tokenizer = load_tokenizer(tmp_path / "megatron" / checkpoint_folder.TOKENIZER)
    assert (tokenizer.mask_id, tokenizer.mask_token) == (NO_MASK, None)
    assert tokenizer.decode([104, 105, tokenizer.eos_id]) == "hi" and NO_MASK not in tokenizer.special_ids
    described = inspect(tmp_path / "megatron")
    assert (described["mask token"], described["block size"]) == ("none", "1")
    assert export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET)) == []
    folders.assert_same_weights(tmp_path / "back", source)
    again = import_checkpoint(tmp_path / "back", tmp_path / "again", ImportOptions(**QUIET))
    assert again == model  # the export says that it predicts token by token
    blocks = ImportOptions(block_size=8, add_mask_token=True, **QUIET)  # and may be trained to predict by blocks
    assert import_checkpoint(tmp_path / "back", tmp_path / "blocks", blocks) == dataclasses.replace(model, block_size=8)
    with pytest.raises(UserError, match="is 8: it cannot be imported with --block-size 1"):
        export_checkpoint(tmp_path / "blocks", tmp_path / "back8", ExportOptions(**QUIET))
        import_checkpoint(tmp_path / "back8", tmp_path / "refused", ImportOptions(block_size=1, **QUIET))


@pytest.mark.parametrize(
    "mask, key, block_size", [(False, {}, 1), (True, {}, 32), (True, {"block_size": 8}, 8)], ids=["none", "mask", "key"]
)
def test_a_folder_that_was_never_trained_by_blocks_decodes_token_by_token(tmp_path, mask, key, block_size):
    """`generate --checkpoint`, `evaluate` and `pairs` of a Hugging Face folder: nobody was asked for its block size."""
    from megatron_dtrpo.evaluation.session import locate_checkpoint

    source = folders.write_folder(tmp_path / "hf", folders.LLAMA, mask=mask, **key)
    with locate_checkpoint(source, Config(), lambda config: setattr(config.objective, "estimator", None)) as found:
        assert found.config.model.block_size == block_size


def test_a_mask_token_that_is_there_is_kept(tmp_path):
    source = folders.write_folder(tmp_path / "hf", folders.QWEN2)
    import_checkpoint(source, tmp_path / "megatron", ImportOptions(block_size=1, **QUIET))
    assert load_tokenizer(tmp_path / "megatron" / checkpoint_folder.TOKENIZER).mask_token == folders.MASK
    with pytest.raises(UserError, match="the mask token 'none such' is not in the vocabulary"):
        import_checkpoint(source, tmp_path / "o", ImportOptions(block_size=1, mask_token="none such", **QUIET))


def test_a_family_that_reads_a_token_at_its_own_row_has_no_exact_likelihood():
    config = Config()
    config.model = dataclasses.replace(QWEN3, family="sdar")
    config.objective.estimator = "exact"
    with pytest.raises(UserError, match="estimator exact is for block_size 1 in families that predict the next token"):
        validate(config, 1)
    config.objective.estimator = None
    validate(config, 1)
    assert config.objective.estimator == "dtrpo"  # one token a block, masked


@pytest.mark.parametrize(
    "words",
    [["--threshold", "0.5"], ["--sub-block-cache"], ["--small-block-size", "8"], ["--rule", "static"]],
)
def test_options_of_blocks_are_refused_where_a_block_is_a_token(words):
    parser = argparse.ArgumentParser()
    add_decoding_flags(parser)
    assert decoding_options(parser.parse_args([]), block_size=1).small_block_size == 1
    assert decoding_options(parser.parse_args([]), block_size=1).rule == "leftmost"
    decoding_options(parser.parse_args(words), block_size=16)
    with pytest.raises(UserError, match=f"^{words[0]}.*block.?size 1"):
        decoding_options(parser.parse_args(words), block_size=1)


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def both(request, alone):
    """transformers' model, ours with its weights, and our settings; float64."""
    peer, settings = {
        "qwen2": (oracles.qwen2, QWEN2),
        "qwen3": (oracles.qwen3, QWEN3),
        "llama": (functools.partial(oracles.llama, groups=2), LLAMA),
    }[request.param]
    peer = peer(seed=3)
    with torch.no_grad():
        peer.lm_head.weight.mul_(2.0)
        peer.lm_head.weight[END].mul_(1.5)  # which ends a response, sometimes
    return peer, with_weights_of(peer, settings), settings


def noising_of(settings: ModelSettings, objective: str) -> Noising:
    config = Config()
    config.model, config.objective.objective = settings, objective
    validate(config, 1)
    assert config.objective.estimator == "exact"
    return Noising.from_config(config, NO_MASK)


def likelihood(peer, prompt: torch.Tensor, response: torch.Tensor) -> torch.Tensor:
    """``log p`` of every token of ``response``, by transformers' own causal mask."""
    whole = torch.cat([prompt, response])
    log_probs = torch.log_softmax(peer(input_ids=whole[None], use_cache=False).logits[0], -1)
    places = torch.arange(len(prompt), len(whole))
    return log_probs[places - 1, whole[places]]


def target_log_probs(model, packed, backend="sdpa") -> torch.Tensor:
    from megatron_dtrpo.model.attention import attention_width, plan_attention

    attention = plan_attention(packed.coordinates(), 1, backend, attention_width(model.config))
    hidden = model(packed.tokens, packed.position, attention)[:, 0]
    return torch.log_softmax(model.logits(hidden), -1)[packed.target_row, packed.target_token]


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
def test_the_likelihood_is_exact_and_lays_out_clean_tokens_once(both, backend):
    peer, model, settings = both
    noising = noising_of(settings, "preference")
    generator = torch.Generator().manual_seed(0)
    words = [[torch.randint(0, 61, (n,), generator=generator) for n in shape] for shape in SHAPES]
    documents = [noising.document(Sample(0, n), prompt, two) for n, (prompt, *two) in enumerate(words)]
    for (prompt, one, two), document in zip(SHAPES, documents, strict=True):
        assert len(document) == prompt + one + two - 2 == noising.packed_length(prompt, [one, two])
    packed = concatenate(documents)
    assert (packed.view == CLEAN).all() and (packed.target_weight == 1).all()
    log_probs = target_log_probs(model, packed, backend)
    expected = [likelihood(peer, prompt, response) for prompt, *two in words for response in two]
    assert (log_probs - torch.cat(expected)).abs().max() < 1e-9


@torch.no_grad()
def test_sft_learns_every_token_of_every_turn_of_the_assistant(both):
    peer, model, settings = both
    prompt, response = torch.arange(4), torch.arange(10, 22)
    turns = [(0, 3), (7, 12)]
    document = noising_of(settings, "sft").document(Sample(0, 0), prompt, [response], turns=[turns])
    expected = likelihood(peer, prompt, response)
    found = target_log_probs(model, document)
    assert (found - torch.cat([expected[begin:end] for begin, end in turns])).abs().max() < 1e-9


def decoder_of(model, settings):
    from megatron_dtrpo.inference.decoder import make_decoder

    class Words:
        vocab_size, mask_id, eos_id = 61, NO_MASK, END

    return make_decoder(model, settings, Words)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 59, (n,), generator=generator).tolist() for n in (1, 2, 5, 9, 3, 17, 4)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_greedy_decoding_is_transformers_own(both, batch_size):
    peer, model, settings = both
    found = decoder_of(model, settings).decode(prompts(), DecodingOptions(max_new_tokens=24), batch_size=batch_size)
    for prompt, completion in zip(prompts(), found, strict=True):
        ids = torch.tensor([prompt])
        how = dict(attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=END, pad_token_id=60)
        written = peer.generate(ids, max_new_tokens=24, **how)[0, len(prompt) :].tolist()
        assert completion.tokens == written
        assert completion.steps == list(range(len(written))) and completion.passes == len(written)  # one token a pass
        likely = likelihood(peer, torch.tensor(prompt), torch.tensor(written)).sum().item()
        assert completion.log_likelihood() == pytest.approx(likely, abs=1e-9)
    assert {completion.ended for completion in found} == {True, False}


@torch.no_grad()
def test_sampling_draws_from_the_models_distribution(both):
    """Token by token from the whole prefix, without a cache, under the same uniform numbers."""
    peer, model, settings = both
    options = DecodingOptions(max_new_tokens=12, temperature=0.7, top_p=1.0)
    found = decoder_of(model, settings).decode(prompts(), options, batch_size=3, seed=5)
    for number, (prompt, completion) in enumerate(zip(prompts(), found, strict=True)):
        generator, written = noise_generator(5, -1, number, 0, 0), []
        while len(written) < 12 and END not in written:
            logits = peer(input_ids=torch.tensor([prompt + written]), use_cache=False).logits[0, -1]
            uniform = torch.rand(1, generator=generator, dtype=torch.float64)
            written.append((torch.softmax(logits / 0.7, -1).cumsum(0) <= uniform).sum().item())
        assert completion.tokens == written
