"""Full attention, one block for prompt and response: layout, packing and attention; the families LLaDA and Dream, on
megatron-core against transformers' Llama and Qwen2 in float64; the limit in which ``elbo`` is LLaDA's likelihood."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import shutil
import types

import pytest
import torch

from megatron_dtrpo.checkpoint import folder as checkpoint_folder
from megatron_dtrpo.cli.decoding_flags import add_decoding_flags, decoding_options
from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.config.decoding import CACHES, RULES, DecodingOptions
from megatron_dtrpo.config.estimators import ESTIMATORS, EstimatorOptions
from megatron_dtrpo.config.rules import validate
from megatron_dtrpo.config.settings import Config, ModelSettings
from megatron_dtrpo.conversion.hf_config import CONFIG, model_settings, read_config
from megatron_dtrpo.conversion.inspection import inspect
from megatron_dtrpo.conversion.roundtrip import roundtrip
from megatron_dtrpo.conversion.to_huggingface import ExportOptions, export_checkpoint
from megatron_dtrpo.conversion.to_megatron import ImportOptions, import_checkpoint
from megatron_dtrpo.data.batches import BatchBuilder, Decoded, Noising
from megatron_dtrpo.data.micro_batch import Sample
from megatron_dtrpo.data.sampler import SampleOrder
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer, load_tokenizer
from megatron_dtrpo.diffusion import estimators, sampling
from megatron_dtrpo.diffusion.estimators import NoiseRequest, noise_generator
from megatron_dtrpo.diffusion.layout import Blocks, concatenate, packed_length, pad_to, visible
from megatron_dtrpo.diffusion.sharding import work
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.families.registry import family_named, family_of
from tests.support import conversion_folders as folders
from tests.support import oracles
from tests.support.same_weights import with_weights_of
from tests.unit.test_attention import NARROW, WIDE, attend, random_qkv
from tests.unit.test_sharding import assigned, attend_as

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

QUIET = dict(progress=False)
MASK = 60
MASKING = [name for name, row in ESTIMATORS.items() if not row.autoregressive]
SIZES = dict(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    kv_channels=8,
    vocab_size=61,
    make_vocab_size_divisible_by=1,
    block_size=FULL,
)
LLADA = dict(SIZES, family="llada", num_query_groups=4, rotary_base=500000.0, norm_epsilon=1e-5, add_qkv_bias=False)
DREAM = dict(SIZES, family="dream", num_query_groups=2, rotary_base=10000.0)
MODELS = {"llada": LLADA, "dream": DREAM}
# (prompt length, lengths of the responses)
SHAPES = [(2, (1, 4)), (5, (9,)), (4, (4, 2)), (1, (13, 6))]


def noising(estimator: str = "vrpo", views: int = 2, shift: int = 0, **options) -> Noising:
    return Noising(estimator, EstimatorOptions(**options), views, None, FULL, MASK, seed=1, shift=shift)


def words(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> torch.Tensor:
        return torch.randint(0, 59, (length,), generator=generator)

    return [(draw(prompt), [draw(n) for n in responses]) for prompt, responses in shapes]


def random_sequence(padding: int = 0, shift: int = 0):
    """Documents whose blocks have different lengths, packed."""
    documents = [noising(shift=shift).document(Sample(0, n), *each) for n, each in enumerate(words())]
    sequence = concatenate(documents)
    return pad_to(sequence, len(sequence) + padding, pad_id=0)


def sees_all_of_its_view(sequence) -> torch.Tensor:
    """Who sees whom by description: a token sees its own view of its own response, and nothing else."""
    of = torch.stack([sequence.document, sequence.branch, sequence.view], 1)
    sees = (of[:, None] == of[None]).all(2)
    padding = sequence.document == -1
    sees[padding] = False
    sees[padding, padding] = True
    return sees


@pytest.mark.parametrize("estimator", [name for name in MASKING if not ESTIMATORS[name].needs_steps])
@pytest.mark.parametrize("shift", [0, 1])
def test_the_layout_is_a_view_after_the_other(estimator, shift):
    for number, (prompt, responses) in enumerate(words()):
        P, lengths = len(prompt), [len(r) for r in responses]
        mine = noising(estimator, views=2 if ESTIMATORS[estimator].is_random else 1, shift=shift)
        document = mine.document(Sample(0, number), prompt, responses)
        assert len(document) == mine.packed_length(P, lengths)
        assert not (document.view == 0).any() and not (document.branch == 0).any() and not document.block.any()
        views = int(document.view.max())
        parts = document.tokens.split([P + n for n in lengths for _ in range(views)])
        places = document.position.split([len(part) for part in parts])
        for part, place, (response, view) in zip(
            parts, places, itertools.product(range(len(responses)), range(views)), strict=True
        ):
            whole = torch.cat([prompt, responses[response]])
            assert place.tolist() == list(range(len(whole)))
            hidden = part == MASK
            assert torch.equal(part[~hidden], whole[~hidden]) and not hidden[:P].any()
            rows = (document.branch == response + 1) & (document.view == view + 1)
            read = rows[document.target_row]
            position = document.position[document.target_row][read] + shift
            assert hidden[position].all() and torch.equal(whole[position], document.target_token[read])
            if estimator in ("elbo", "vrpo"):
                assert read.sum() == hidden.sum()
                torch.testing.assert_close(
                    document.target_weight[read] * views,
                    torch.full((int(read.sum()),), len(whole) - P).double() / hidden.sum(),
                )


def test_turns_end_where_the_assistant_has_spoken():
    prompt, (response,) = words([(3, (9,))])[0]
    turns = [(0, 2), (5, 9)]
    document = noising("mean_field", 1).document(Sample(0, 0), prompt, [response], turns=[turns])
    first = [*prompt.tolist(), MASK, MASK]
    second = [*prompt.tolist(), *response[:5].tolist(), *[MASK] * 4]
    assert document.tokens.tolist() == first + second
    assert document.position.tolist() == [*range(5), *range(12)]
    assert document.target_token.tolist() == response[[0, 1, 5, 6, 7, 8]].tolist()
    assert document.target_row.tolist() == [3, 4, 13, 14, 15, 16]
    assert packed_length(3, [9], FULL, 0, [5 + 12]) == len(document)


def test_the_predicate_the_work_and_the_padding():
    sequence = random_sequence(padding=5)
    sees = sees_all_of_its_view(sequence)
    coordinates = sequence.coordinates()
    assert torch.equal(
        visible(coordinates.at((slice(None), None)), coordinates.at((None, slice(None)))),
        sees | torch.eye(len(sequence)).bool(),
    )
    assert torch.equal(work(coordinates, 1)[:-5], sees.sum(1)[:-5])


@pytest.mark.parametrize("backend, width", [("sdpa", NARROW), ("sdpa", WIDE), ("flex", NARROW)])
def test_attention_is_the_dense_softmax(backend, width):
    sequence = random_sequence(padding=3)
    sees = sees_all_of_its_view(sequence) | torch.eye(len(sequence)).bool()
    ours, theirs = (random_qkv(len(sequence), 4, 2, width=16) for _ in range(2))
    if backend == "flex":  # which has no backward pass on a CPU
        ours = [t.detach() for t in ours]
    out, expected = attend(sequence, *ours, backend=backend, width=width), oracles.dense_attention(*theirs, sees, 0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    if backend == "sdpa":
        for mine, right in zip(
            torch.autograd.grad(out.sin().sum(), ours), torch.autograd.grad(expected.sin().sum(), theirs), strict=True
        ):
            torch.testing.assert_close(mine, right, rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend, width", [("sdpa", NARROW), ("sdpa", WIDE), ("flex", NARROW)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_context_parallel_ranks_cut_through_blocks(backend, width, ranks):
    sequence, rows = assigned(random_sequence(), ranks, unit=4)
    sees = sees_all_of_its_view(sequence) | torch.eye(len(sequence)).bool()
    inputs = [t.detach() for t in random_qkv(len(sequence), 4, 2, width=16)]
    expected = oracles.dense_attention(*inputs, sees, 0.3)
    for rank in range(ranks):
        out = attend_as(rank, sequence, rows, *inputs, backend, width)
        torch.testing.assert_close(out, expected[rows[rank]], rtol=0, atol=1e-10)


def test_recorded_decodings_are_steps_of_the_whole_response():
    """Every step sees the whole response as it was, end tokens that fill it included."""
    prompt, (response,) = words([(3, (6,))])[0]
    steps = torch.tensor([1, 0, 2, 1, 0, 2])
    decoded = [Decoded(steps, torch.zeros(0, 4, dtype=torch.long))]
    document = noising("exact_trajectory", 1).document(Sample(0, 0), prompt, [response], decoded)
    shown = [
        [MASK if written >= step else token for written, token in zip(steps, response, strict=True)]
        for step in range(3)
    ]
    assert document.tokens.tolist() == [each for view in shown for each in [*prompt.tolist(), *map(int, view)]]
    assert document.target_step.tolist() == [0, 0, 1, 1, 2, 2] and document.target_weight.tolist() == [1] * 6
    assert document.target_row.tolist() == [4, 7, 9 + 3, 9 + 6, 18 + 5, 18 + 8]
    sampled = noising("trajectory", 2).document(Sample(0, 0), prompt, [response], decoded)
    assert len(sampled) == 18 and set(sampled.target_weight.tolist()) == {1.5}


@pytest.mark.parametrize("steps", [3, 100])
def test_dtrpo_has_steps_of_the_whole_response(steps):
    maskable = Blocks(4, 20, 24).maskable(None)
    generators = [noise_generator(0, 0, n, 1, 1) for n in range(50)]
    masked, weight = estimators.dtrpo(NoiseRequest(maskable, generators, EstimatorOptions(steps_per_block=steps)))
    T = min(steps, 20)
    assert not masked[:, :, :4].any() and set((weight[weight > 0] * 50).tolist()) == {float(T)}
    assert {int(count) for count in (weight > 0).sum((1, 2))} == ({6, 7} if steps == 3 else {1})


def test_sft_may_weigh_as_lladas():
    maskable = Blocks(4, 40, 44).maskable(None)
    generators = [noise_generator(0, 0, n, 1, 1) for n in range(4000)]
    options = EstimatorOptions(complementary=False, sft_weighting="elbo")
    masked, weight = estimators.sft(NoiseRequest(maskable, generators, options))
    assert torch.equal(weight > 0, masked)
    for n in range(9):
        t = torch.rand(1, generator=noise_generator(0, 0, n, 1, 1), dtype=torch.float64)
        p = (1 - 1e-3) * t + 1e-3  # LLaDA's
        torch.testing.assert_close(weight[n] * 4000, masked[n] / p, rtol=1e-12, atol=0)
    assert weight[:, 0, 4:].sum(0).mean().item() == pytest.approx(1, abs=0.02)
    assert not weight[:, 0, :4].any()


def test_responses_are_filled_with_end_tokens(tmp_path):
    rows = [{"prompt": "ab", "chosen": "c" * n, "rejected": "de"} for n in (1, 6, 7, 8)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    end = tokenizer.eos_id
    plain = build_token_store(data, "preference", tokenizer, tmp_path / "cache")
    filled = build_token_store(data, "preference", tokenizer, tmp_path / "cache", response_multiple=8)
    assert filled.directory != plain.directory and filled.notes == plain.notes
    for n, (mine, theirs) in enumerate(zip(filled, plain, strict=True)):
        for ids, short, turns in zip(mine.responses, theirs.responses, mine.turns, strict=True):
            assert len(ids) == -(-len(short) // 8) * 8 and ids[: len(short)].tolist() == short.tolist()
            assert set(ids[len(short) :].tolist()) <= {end} and turns == ((0, len(ids)),)
        assert len(mine.responses[0]) == (8, 8, 8, 16)[n]
    builder = BatchBuilder(
        filled,
        SampleOrder(range(4), 0, False),
        noising(),
        global_batch_size=4,
        micro_batch_size=4,
        seq_length=999,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    (batch,) = builder.step(0)
    assert sorted(batch.response_length.tolist()) == [8, 8, 8, 8, 8, 8, 8, 16]
    assert len(batch.sequence) == sum(builder.packed_lengths) == 2 * (7 * 10 + 18)


def test_an_answer_that_ends_in_filling_is_not_text_behind_its_end(tmp_path):
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    end, data = tokenizer.eos_id, tmp_path / "rows.jsonl"
    rows = [
        {"prompt_ids": [97], "completion_ids": [98, end, end, end], "completion_steps": [0, 1, 1, 0]},
        {"prompt_ids": [97], "completion_ids": [98, end, 99, end], "completion_steps": [0, 1, 1, 0]},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    store = build_token_store(data, "sft", tokenizer, tmp_path / "cache", response_multiple=8)
    assert [len(example.responses[0]) for example in store] == [4, 4]  # recorded ones stay as they are
    assert any("1 rows have text behind an end token" in note for note in store.notes)
    exact = noising("exact_trajectory", 1)
    assert exact.packed_lengths(store).tolist() == [10, 10]  # a prompt of one and four tokens, in two steps
    decoded = [Decoded(torch.tensor([0, 1, 1, 0]), torch.zeros(0, 4, dtype=torch.long))]
    example = [torch.from_numpy(ids.astype("int64")) for ids in (store[0].prompt, *store[0].responses)]
    assert len(exact.document(Sample(0, 0), example[0], example[1:], decoded)) == 10


def config_of(base: str, **settings) -> Config:
    return Config.from_flat(MODELS[base] | settings)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("estimator", MASKING)
def test_every_estimator_is_there_and_has_no_block_start(family, estimator):
    settings = dict(estimator=estimator, objective=ESTIMATORS[estimator].objectives[0])
    spread = dict(tensor_model_parallel_size=2, sequence_parallel=True, make_vocab_size_divisible_by=2)
    config = config_of(family, **settings, **spread)
    validate(config, 2)
    mine = Noising.from_config(config, MASK)
    assert (mine.shift, mine.block_start, mine.block_size) == (int(family == "dream"), None, FULL)
    expected = (
        f"^block_start clean: a model of family {family} predicts no block's first token from another block: leave"
    )
    with pytest.raises(UserError, match=expected):
        validate(config_of(family, **settings, block_start="clean"), 1)


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"block_size": 32},
            "^block_size is 32, in family llada it is 0, for full attention: change block_size or family$",
        ),
        (
            {"family": "sdar", "qk_layernorm": True},
            "^block_size is 0, for full attention, which family sdar has not: change",
        ),
        ({"add_qkv_bias": True}, "^add_qkv_bias is true, in family llada it is false"),
        (
            {"objective": "sft", "sft_weighting": "elbo"},
            "^sft_weighting elbo weighs .*: give --no-complementary with it$",
        ),
        ({"sft_weighting": "elbo"}, "^sft_weighting belongs to estimator sft: leave it out with dtrpo$"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(settings, words):
    with pytest.raises(UserError, match=words):
        validate(config_of("llada", **settings), 1)


@pytest.mark.parametrize(
    "architecture, name, tied",
    [(folders.LLADA, "llada", False), (folders.LLADA, "llada", True), (folders.DREAM, "dream", False)],
)
def test_there_and_back(tmp_path, architecture, name, tied):
    source = folders.write_folder(tmp_path / "hf", architecture, torch.bfloat16, tied, shards=2)
    model = import_checkpoint(source, tmp_path / "megatron", ImportOptions(**QUIET))
    shift = family_of(model).prediction_shift
    assert (model.family, model.block_size, shift) == (name, FULL, int(name == "dream"))
    assert (model.norm_epsilon, model.rotary_base) == ((1e-5, 500000.0) if name == "llada" else (1e-6, 10000.0))
    folders.assert_same_model(tmp_path / "megatron", source)
    tokenizer = load_tokenizer(tmp_path / "megatron" / checkpoint_folder.TOKENIZER)
    assert (tokenizer.mask_token, tokenizer.mask_id) == (folders.MASKS[architecture], 259)
    for folder in (source, tmp_path / "megatron"):
        found = inspect(folder)
        assert found["family"] == f"{name}, prediction shift {shift}, attention full"
        assert found["block size"] == "the whole sequence"
    notes = export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET))
    assert len(notes) == 1 and f"modeling_{name}.py" in notes[0]
    folders.assert_same_weights(source, tmp_path / "back")
    same = ("config.json", "generation_config.json", "tokenizer_config.json", "added_tokens.json", "vocab.json")
    assert all((tmp_path / "back" / n).read_bytes() == (source / n).read_bytes() for n in same)
    assert all(row.equal for row in roundtrip(source, ImportOptions(**QUIET), tmp_path))


@pytest.mark.parametrize(
    "changes, flags, words",
    [
        (
            {},
            ("--block-size", "8"),
            "a model of family llada has full attention: it cannot be imported with --block-size 8",
        ),
        ({"include_qkv_bias": True}, (), "include_qkv_bias is True: the model here does not compute that"),
        ({"block_type": "sequential"}, (), "block_type is 'sequential': the model here does not compute that"),
        ({"n_kv_heads": 3}, (), "n_heads 28 is not divisible by n_kv_heads 3"),
        ({"embedding_size": 200}, (), "embedding_size 200 is less than vocab_size 272"),
        ({"mask_token_id": 258}, (), "mask_token_id is 258, the tokenizer's mask token <|mdm_mask|> has the id 259"),
        (
            {"mask": False},
            (),
            "has no mask token: --add-mask-token adds <|mdm_mask|>, --mask-token names one that it has",
        ),
    ],
)
def test_bad_input_is_one_line(tmp_path, capsys, changes, flags, words):
    source = folders.write_folder(tmp_path / "hf", folders.LLADA, **changes)
    folders.import_refused(capsys, source, words, *flags)


def test_the_real_configurations_and_dreams_tokenizer(shared_dir, tmp_path):
    llada = shared_dir / "data" / "llada_8b_instruct"
    model = model_settings(read_config(llada), llada / CONFIG)
    assert (model.family, model.block_size, model.vocab_size, model.kv_channels) == ("llada", FULL, 126464, 128)
    assert (model.num_query_groups, model.rotary_base, model.norm_epsilon) == (32, 500000.0, 1e-5)
    index = json.loads((llada / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == _names(model)

    dream = shared_dir / "data" / "dream_7b_instruct"
    model = model_settings(read_config(dream), dream / CONFIG)
    assert (model.family, model.block_size, model.num_query_groups) == ("dream", FULL, 4)
    assert set(json.loads((dream / "model.safetensors.index.json").read_text())["weight_map"]) == _names(model)
    source = tmp_path / "hf"
    shutil.copytree(dream, source)
    (source / "model.safetensors.index.json").unlink()
    small = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    (source / CONFIG).write_text(json.dumps(read_config(dream) | small | {"num_key_value_heads": 1}))
    shape = dict(layers=1, hidden=16, ffn=8, heads=2, groups=1, width=8, vocabulary=152064)
    folders.write_weights(source, folders.random_weights(torch.bfloat16, shape=shape, architecture=folders.DREAM))
    import_checkpoint(source, tmp_path / "megatron", ImportOptions(**QUIET))
    tokenizer = load_tokenizer(tmp_path / "megatron" / checkpoint_folder.TOKENIZER)
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.token_id("<|im_end|>")) == (151666, 151643, 151645)
    assert tokenizer.decode(tokenizer.encode("Full attention.")) == "Full attention."
    assert tokenizer.encode("<|im_start|>") == [151644]
    export_checkpoint(tmp_path / "megatron", tmp_path / "back", ExportOptions(**QUIET))
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes(), file.name


def _names(model: ModelSettings) -> set[str]:
    from megatron_dtrpo.conversion import mapping

    return set(mapping.huggingface_tensors(mapping.megatron_tensors(model, model.vocab_size)))


@pytest.fixture(scope="module")
def pairs(alone):
    """Transformers' models and the same weights on megatron-core, both in float64, by family."""
    made = {}
    for family, peer in (("llada", oracles.llama(seed=4)), ("dream", oracles.qwen2(seed=4))):
        with torch.no_grad():
            peer.lm_head.weight.mul_(3.0)  # sure of some tokens and not of others
        made[family] = (peer, with_weights_of(peer, ModelSettings(**MODELS[family])))
    return made


def hidden_rows(model, packed):
    from megatron_dtrpo.model.attention import attention_width, plan_attention

    attention = plan_attention(packed.coordinates(), packed.block_size, "sdpa", attention_width(model.config))
    return model(packed.tokens, packed.position, attention)[:, 0]


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_every_row_is_transformers(pairs, family):
    """Each view by itself, unpacked, through transformers' model with full attention."""
    peer, model = pairs[family]
    shift = int(family == "dream")
    packed = random_sequence(shift=shift)
    hidden = hidden_rows(model, packed)
    of_view = torch.stack([packed.document, packed.branch, packed.view])
    starts = [0, *((of_view[:, 1:] != of_view[:, :-1]).any(0).nonzero().squeeze(1) + 1).tolist(), len(packed)]
    assert len(starts) == 15
    for start, stop in itertools.pairwise(starts):
        tokens = packed.tokens[start:stop]
        expected = oracles.full_hidden(peer, tokens)
        assert (hidden[start:stop] - expected).abs().max() < 1e-9
    log_probs = torch.log_softmax(model.logits(hidden), -1)[packed.target_row, packed.target_token]
    expected = torch.stack(
        [
            torch.log_softmax(oracles.full_logits(peer, packed.tokens[a:b]), -1)[row - a, token]
            for row, token in zip(packed.target_row.tolist(), packed.target_token.tolist(), strict=True)
            for a, b in itertools.pairwise(starts)
            if a <= row < b
        ]
    )
    assert (log_probs - expected).abs().max() < 1e-9 and len(log_probs) > 40


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_the_full_limit_is_lladas_likelihood(pairs, family, monkeypatch):
    """``elbo``'s expectation over all its draws, every level and every order of five tokens, on megatron-core; LLaDA's
    mean over all masks, by transformers, a mask at a time."""
    peer, model = pairs[family]
    shift = int(family == "dream")
    (prompt, (response,)) = words([(3, (5,))])[0]
    whole = torch.cat([prompt, response])

    def cost(masked) -> dict[int, float]:
        tokens = whole.clone()
        tokens[[3 + place for place in masked]] = MASK
        log_probs = torch.log_softmax(oracles.full_logits(peer, tokens), -1)
        return {place: log_probs[3 + place - shift, response[place]].item() for place in masked}

    known = {masked: cost(masked) for k in range(1, 6) for masked in itertools.combinations(range(5), k)}
    expected = oracles.llada_log_likelihood(known.__getitem__, 5)

    found: dict[tuple, torch.Tensor] = {}
    total, draws = 0.0, 0
    for level in range(5):
        for order in itertools.permutations(range(5)):
            values = iter(
                [torch.tensor([(level + 0.5) / 5]).double(), torch.tensor([[0.0] * 3 + list(order)]).double()]
            )
            monkeypatch.setattr(estimators.torch, "rand", lambda *shape, **how: next(values))  # noqa: B023
            document = noising("elbo", 1, shift).document(Sample(0, 0), prompt, [response])
            monkeypatch.undo()
            key = tuple(document.tokens.tolist())
            if key not in found:
                logits = model.logits(hidden_rows(model, document))
                found[key] = torch.log_softmax(logits, -1)
            total += (found[key][document.target_row, document.target_token] * document.target_weight).sum().item()
            draws += 1
    assert len(found) == 31 and total / draws == pytest.approx(expected, abs=1e-9)


class Words:
    vocab_size, mask_id, eos_id = 61, MASK, 59


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
def test_decoding_is_the_published_rule(pairs, family):
    """Greedy, token for token and step for step; many prompts at once, of different lengths."""
    from megatron_dtrpo.inference.decoder import make_decoder

    peer, model = pairs[family]
    settings, shift = ModelSettings(**MODELS[family]), int(family == "dream")
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 59, (n,), generator=generator).tolist() for n in (1, 4, 9)]
    decoder = make_decoder(model, settings, Words, end_ids=range(30, 59))  # many, so that some are written
    known = {"gen_length": 7, "mask_id": MASK, "shift": shift}
    cases = [
        (
            {"small_block_size": block, "rule": "static", "denoising_steps": steps},
            oracles.decode_as_llada,
            {"block_length": block, "steps": steps},
        )
        for block, steps in ((7, None), (4, 2), (7, 20))
    ]
    cases += [
        (
            {"small_block_size": 7, "rule": "maskgit_plus", "denoising_steps": steps},
            oracles.decode_as_dream,
            {"steps": steps},
        )
        for steps in (3, 20)
    ]
    cases += [
        (
            {"small_block_size": 7, "rule": alg, "denoising_steps": steps},
            oracles.decode_as_dream,
            {"steps": steps, "alg": alg},
        )
        for alg in ("entropy", "topk_margin")
        for steps in (3, 20)
    ]
    cases.append(
        (
            {"small_block_size": 4, "rule": "threshold", "threshold": 0.4},
            oracles.decode_as_llada,
            {"block_length": 4, "threshold": 0.4},
        )
    )
    ended = 0
    for options, oracle, how in cases:
        found = decoder.decode(prompts, DecodingOptions(max_new_tokens=7, **options), batch_size=2)
        for prompt, one in zip(prompts, found, strict=True):
            assert (one.tokens, one.steps) == oracle(peer, prompt, **how, **known)
            ends = [place for place, token in enumerate(one.tokens) if 30 <= token < 60]
            assert one.ended == bool(ends) and one.answer == one.tokens[: ends[0] + 1 if ends else 7]
            assert one.blocks == [0] * 7 and one.discarded == [] and one.passes == max(one.steps) + 1
            ended += one.ended
    assert ended


def coin_of(drawn: torch.Tensor, first: int, place: int, time: float) -> float:
    """A fresh uniform number for a place at a time, where time has not come to the number that is drawn for it."""
    return 1 - float(drawn[place - first]) / time


@torch.no_grad()
def test_origin_writes_each_place_in_its_own_time(pairs):
    """Dream's: at time t a masked place is written where a fresh uniform number is below 1 - s / t."""
    from megatron_dtrpo.inference.decoder import make_decoder

    peer, model = pairs["dream"]
    prompts, steps = [[5, 6, 7], [8]], 4
    options = DecodingOptions(max_new_tokens=9, small_block_size=9, rule="origin", denoising_steps=steps)
    decoder = make_decoder(model, ModelSettings(**DREAM), Words)
    found = decoder.decode(prompts, options, batch_size=2, seed=3)
    for number, (prompt, one) in enumerate(zip(prompts, found, strict=True)):
        drawn = torch.rand(9, generator=noise_generator(3, -1, number, 0, 1), dtype=torch.float64)

        coin = functools.partial(coin_of, drawn, len(prompt))
        known = {"gen_length": 9, "steps": steps, "mask_id": MASK, "shift": 1, "alg": "origin", "coin": coin}
        assert (one.tokens, one.steps) == oracles.decode_as_dream(peer, prompt, **known)
    assert found[0].steps != found[1].steps
    (alone,) = decoder.decode(prompts[1:], options, batch_size=1, seed=3, keys=[(1, 0)])
    assert (alone.tokens, alone.steps) == (found[1].tokens, found[1].steps)  # its neighbours have no part in it


def test_origins_order_has_dreams_distribution():
    steps, places = 5, 200_000
    written = -sampling.PLACES["time"](places, steps, torch.Generator().manual_seed(0))
    time = torch.linspace(1, 1e-3, steps + 1)
    for step in range(steps):
        masked = written >= step
        share = 1.0 if step == steps - 1 else 1 - time[step + 1] / time[step]
        assert (written == step).sum() / masked.sum() == pytest.approx(float(share), abs=0.01)


@torch.no_grad()
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("cache", CACHES)
def test_caches_are_fast_dllms_approximation(pairs, family, cache, monkeypatch):
    """Token for token, by transformers with the kept tokens beside the ones that are computed anew; prompts of
    different lengths, more of them than slots. With the whole response as one sub-block the prompt alone is kept.
    Never more logits at once than there is room for."""
    from megatron_dtrpo.inference import predictor
    from megatron_dtrpo.inference.decoder import make_decoder

    peer, model = pairs[family]
    logits, at_once = model.logits, set()
    monkeypatch.setattr(predictor, "ROWS", 7)
    monkeypatch.setattr(model, "logits", lambda rows: at_once.add(len(rows)) or logits(rows))
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, 59, (n,), generator=generator).tolist() for n in (1, 9, 4)]
    decoder = make_decoder(model, ModelSettings(**MODELS[family]), Words)
    known = {"gen_length": 10, "mask_id": MASK}
    if family == "llada":
        cases = [("static", None, 2, 4), ("static", None, None, 10), ("threshold", 0.3, None, 5)]
    else:
        cases = [("entropy", None, 3, 4), ("maskgit_plus", None, 4, 10), ("topk_margin", None, 4, 5)]
    exact = 0
    for rule, threshold, steps, block in cases:
        how = {"small_block_size": block, "rule": rule, "denoising_steps": steps, "threshold": threshold}
        options = DecodingOptions(max_new_tokens=10, sub_block_cache=cache, **how)
        found = decoder.decode(prompts, options, batch_size=2)
        for prompt, one in zip(prompts, found, strict=True):
            theirs = {"steps": steps, "block_length": block, "cache": cache, **known}
            if family == "llada":
                expected = oracles.decode_as_llada(peer, prompt, threshold=threshold, **theirs)
            else:
                expected = oracles.decode_as_dream(peer, prompt, alg=rule, **theirs)
            assert (one.tokens, one.steps) == expected, (rule, block, prompt)
        whole = decoder.decode(prompts, dataclasses.replace(options, sub_block_cache=None), batch_size=2)
        exact += sum(one.tokens == other.tokens for one, other in zip(found, whole, strict=True))
    assert exact < 9  # an approximation, and it shows
    assert max(at_once) == 7


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_what_was_decoded_is_replayed(pairs, rule):
    """The log-likelihood of the recorded steps, by one packed forward, is what the decoder was sure of."""
    from megatron_dtrpo.inference.decoder import make_decoder

    _, model = pairs["dream"]
    decoder = make_decoder(model, ModelSettings(**DREAM), Words)
    steps = 2 if "denoising_steps" in RULES[rule].reads else None
    options = DecodingOptions(max_new_tokens=11, small_block_size=4, rule=rule, denoising_steps=steps)
    prompts = [[5, 6, 7], [8]]
    for prompt, one in zip(prompts, decoder.decode(prompts, options, batch_size=2), strict=True):
        decoded = [Decoded(torch.tensor(one.steps), torch.zeros(0, 4, dtype=torch.long))]
        mine = noising("exact_trajectory", 1, shift=1)
        document = mine.document(Sample(0, 0), torch.tensor(prompt), [torch.tensor(one.tokens)], decoded)
        log_probs = torch.log_softmax(model.logits(hidden_rows(model, document)), -1)
        total = (log_probs[document.target_row, document.target_token] * document.target_weight).sum().item()
        assert total == pytest.approx(one.log_likelihood(), abs=1e-9)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--denoising-steps", "0"], "--denoising-steps 0: it must be at least 1"),
        (
            ["--rule", "threshold", "--denoising-steps", "4"],
            "^--denoising-steps 4: --rule threshold does not read it; static, dynamic, .*origin do: leave it out$",
        ),
        (
            ["--threshold", "0.9"],
            "^--threshold 0.9: --rule static does not read it; threshold, dynamic do: leave it out$",
        ),
        (["--rule", "origin", "--threshold", "0"], "^--threshold 0.0: --rule origin does not read it"),
        (["--rule", "dynamic", "--threshold", "1.5"], "^--threshold 1.5: it must be from 0 to 1"),
    ],
)
def test_flags_of_decoding(flags, words):
    parser = argparse.ArgumentParser()
    add_decoding_flags(parser)
    with pytest.raises(UserError, match=words):
        decoding_options(parser.parse_args(flags), FULL, "static")
    assert decoding_options(parser.parse_args([]), FULL, "static").small_block_size == 32
    assert decoding_options(parser.parse_args([]), FULL, "maskgit_plus").small_block_size == 512
    assert decoding_options(parser.parse_args([]), FULL, "entropy").small_block_size == 512
    assert decoding_options(parser.parse_args([]), 32) == DecodingOptions(threshold=0.9)
    assert decoding_options(parser.parse_args([]), 32, "dynamic").small_block_size == 32
    assert decoding_options(parser.parse_args([]), 12).small_block_size == 12
    assert decoding_options(parser.parse_args([]), 4, family_named("sdar").rule).threshold == 0.85
    assert decoding_options(parser.parse_args(["--rule", "dynamic", "--threshold", "0.5"]), 4).threshold == 0.5
    given = parser.parse_args(["--sub-block-cache"])
    assert decoding_options(given, 32).sub_block_cache == decoding_options(given, FULL).sub_block_cache == "dual"
    with pytest.raises(UserError, match="^--sub-block-cache has no effect where a sub-block is the block of 4 tokens"):
        decoding_options(given, 4, "dynamic")


def test_a_harness_task_of_its_own_length_has_sub_blocks_of_that_length():
    """As the same length on the command line has; a --small-block-size stays."""
    pytest.importorskip("lm_eval")
    from megatron_dtrpo.evaluation.harness import HarnessModel, HarnessOptions

    parser = argparse.ArgumentParser()
    add_decoding_flags(parser, max_new_tokens=256)
    model = HarnessModel.__new__(HarnessModel)
    model.text, model.max_positions = build_tokenizer("ByteLevelTokenizer"), 4096
    model.truncated, model.unknown = 0, set()
    model.engine = types.SimpleNamespace(config=Config(model=ModelSettings(block_size=FULL)))
    for rule, length, expected in (("maskgit_plus", 1280, 1280), ("maskgit_plus", 9, 9), ("static", 1280, 32)):
        decoding = decoding_options(parser.parse_args([]), FULL, rule)
        for fits, small in ((True, expected), (False, decoding.small_block_size)):
            model.options = HarnessOptions(decoding, fits_length=fits)
            options = model._generation("x", {"until": [], "max_gen_toks": length}).options
            assert (options.max_new_tokens, options.small_block_size) == (length, small)
