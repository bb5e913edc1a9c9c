"""Exported tokenizers, loaded by transformers, against SentencePiece itself and against bytes."""

from __future__ import annotations

import io
import itertools
import json
import random
import shutil

import pytest

from megatron_dtrpo.conversion import sentencepiece_json
from megatron_dtrpo.conversion.sentencepiece_json import tokenizer_from_sentencepiece
from megatron_dtrpo.conversion.tokenizer_check import is_tie
from megatron_dtrpo.conversion.tokenizer_export import export_tokenizer
from megatron_dtrpo.conversion.tokenizer_files import import_tokenizer
from megatron_dtrpo.data.tokenizer import build_tokenizer, load_tokenizer
from megatron_dtrpo.errors import UserError
from tests.support import conversion_folders as folders
from tests.support.conversion_folders import refused, run_tool

transformers = pytest.importorskip("transformers")
sentencepiece = pytest.importorskip("sentencepiece")

good, good_megatron = folders.good, folders.good_megatron
CORPUS = [
    *(f"{a} plus {b} makes {a + b}.  What is {a}+{b}?\n" for a in range(5, 25) for b in range(15)),
    *["def f(x):\n    return x + 1  # </b>", "caf\u00e9 \u4e2d\u6587 na\u00efve", "ababab baba aaab abba"] * 5,
]
SYMBOLS = ["[MASK]", "<x>", "<x>>"]
# What the texts of the test are made of: tokens' names, spaces of all kinds, marks that a normalizer would move,
# letters that the corpus lacks.
PARTS = [*SYMBOLS, "</s>", "<s>", "<unk>", "<0x41>", "<0x0A>", " ", "  ", "\n", "\t", "\u2581", "\u3000", "\u00a0", "a",
         "ab", "aaab", "12", " plus", "makes", "e\u0301", "\u00e9", "\u4e2d", "\u0e01", "\U0001f600", "\x00", "\ufeff",
         "Z", "<", "/s>", "0x41", "return", " x", "."]  # fmt: skip
MODELS = list(itertools.product(["bpe", "unigram"], [True, False], [True, False], [True, False]))


def train(file, **settings):
    """A SentencePiece model with a mask, which normalizes nothing unless asked to."""
    model = io.BytesIO()
    default = dict(vocab_size=420, hard_vocab_limit=False, user_defined_symbols=SYMBOLS, num_threads=1, minloglevel=2,
                   normalization_rule_name="identity", character_coverage=1.0)  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, **{**default, **settings}
    )
    file.write_bytes(model.getvalue())
    return file


def exported(tokenizer, tmp_path, config=None):
    """The tokenizer as transformers loads it from a folder beside a Qwen2 model, and what the export said."""
    tokenizer.save(tmp_path / "saved")
    target = tmp_path / "hf"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(config or folders.config(folders.QWEN2)))
    notes = export_tokenizer(tmp_path / "saved", target)
    return transformers.AutoTokenizer.from_pretrained(target, trust_remote_code=False), notes


def random_texts(count, seed=1):
    rng = random.Random(seed)
    return ["", *("".join(rng.choices(PARTS, k=rng.randint(1, 12))) for _ in range(count))]


@pytest.mark.parametrize("kind, byte_fallback, add_dummy_prefix, remove_extra_whitespaces", MODELS)
def test_sentencepiece(tmp_path, kind, byte_fallback, add_dummy_prefix, remove_extra_whitespaces):
    file = train(tmp_path / "m.model", model_type=kind, byte_fallback=byte_fallback, add_dummy_prefix=add_dummy_prefix,
                 remove_extra_whitespaces=remove_extra_whitespaces)  # fmt: skip
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = build_tokenizer("SentencePieceTokenizer", file)
    theirs, notes = exported(ours, tmp_path)
    assert (theirs.eos_token, theirs.mask_token, len(theirs)) == ("</s>", "[MASK]", oracle.get_piece_size())
    assert (theirs.eos_token_id, theirs.mask_token_id) == (ours.eos_id, ours.mask_id)
    texts = random_texts(1000)
    for text, ids in zip(texts, theirs(texts)["input_ids"], strict=True):
        expected = oracle.encode_as_ids(text)
        assert ids == expected or (kind == "unigram" and notes and is_tie(ids, expected)), text
        assert theirs.decode(expected, skip_special_tokens=True) == ours.decode(expected), text
    assert all("equally good ways" in note for note in notes) and not (notes and kind == "bpe")
    rng = random.Random(2)  # a model may write what no text is encoded as
    numbers = [n for n in range(oracle.get_piece_size()) if not oracle.is_byte(n)]
    for _ in range(300):
        ids = rng.choices(numbers, k=rng.randint(0, 8))
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), ids


def test_names_of_tokens_are_text_and_the_mask_is_a_token(tmp_path):
    file = train(tmp_path / "m.model", model_type="bpe", byte_fallback=True)
    theirs, _ = exported(build_tokenizer("SentencePieceTokenizer", file), tmp_path)
    for text in ("</s>", "a</s>", "<s>", "<0x41>"):
        assert not set(theirs(text)["input_ids"]) & {0, 1, 2} and len(theirs(text)["input_ids"]) > 2, text
    space, mask = theirs.convert_tokens_to_ids(["\u2581", "[MASK]"])
    assert theirs("[MASK]")["input_ids"] == [space, mask]  # the dummy prefix, then the mask
    assert theirs.decode([space, mask]) == "[MASK]" and theirs.decode([mask], skip_special_tokens=True) == ""
    assert set(theirs.all_special_ids) == {1, 2, mask}


def model_of(pieces):
    """A BPE model of these pieces, the best first, with the letters a and b."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    kinds = [("<unk>", 0, 2), ("</s>", 0, 3), *((piece, -n, 1) for n, piece in enumerate([*pieces, "a", "b"]))]
    for piece, score, kind in kinds:
        model.pieces.add(piece=piece, score=score, type=kind)
    model.trainer_spec.model_type, model.trainer_spec.eos_id = 2, 1
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    return model


@pytest.mark.parametrize("seed", range(24))
def test_merges_that_overlap(seed):
    """Every text of a's and b's up to a length, with pieces that can be joined in several ways; in odd cases pieces
    that no text becomes, since what they are made of comes after them."""
    rng = random.Random(seed)
    pieces = ["a", "b"]
    while len(pieces) < 14:
        piece = rng.choice(pieces) + rng.choice(pieces)
        pieces += [piece] if piece not in pieces and len(piece) < 8 else []
    order = pieces[2:]
    if seed % 2:
        rng.shuffle(order)
    model = model_of(order)
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    theirs = tokenizer_from_sentencepiece(model, "here")
    texts = ["".join(letters) for length in range(1, 10) for letters in itertools.product("ab", repeat=length)]
    assert [encoding.ids for encoding in theirs.encode_batch(texts)] == [oracle.encode_as_ids(text) for text in texts]


@pytest.mark.parametrize("settings, reason", [
    ({"normalization_rule_name": "nmt_nfkc"}, "it normalizes text (nmt_nfkc)"),
    ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
    ({"model_type": "char"}, "neither BPE nor unigram"),
])  # fmt: skip
def test_what_has_no_exact_equivalent_is_refused(tmp_path, settings, reason):
    tokenizer = build_tokenizer("SentencePieceTokenizer", train(tmp_path / "m.model", **settings))
    with pytest.raises(UserError) as error:
        exported(tokenizer, tmp_path)
    assert reason in str(error.value) and "--no-tokenizer" in str(error.value) and "\n" not in str(error.value)


def test_leaving_the_tokenizer_out(tmp_path, capsys, good_megatron):
    run = tmp_path / "run"
    shutil.copytree(good_megatron, run)
    for name in ("tokenizer", "huggingface"):  # as a run from nothing
        shutil.rmtree(run / name)
    file = train(tmp_path / "m.model", normalization_rule_name="nmt_nfkc")
    build_tokenizer("SentencePieceTokenizer", file).save(run / "tokenizer")
    words = ("export", "--megatron-path", run, "--hf-path", tmp_path / "hf")
    refused(capsys, "--no-tokenizer", *words)
    assert not (tmp_path / "hf").exists()
    status, printed = run_tool(capsys, *words, "--no-tokenizer")
    assert (status, printed) == (0, "")
    assert not list((tmp_path / "hf").glob("*token*"))


def test_export_finds_a_wrong_conversion(tmp_path, monkeypatch):
    tokenizer = build_tokenizer("SentencePieceTokenizer", train(tmp_path / "m.model", model_type="bpe"))
    merges = sentencepiece_json._merges
    monkeypatch.setattr(sentencepiece_json, "_merges", lambda scores: merges(scores)[::-1])
    with pytest.raises(UserError, match="transformers would read .* otherwise .* --no-tokenizer"):
        exported(tokenizer, tmp_path)


def test_bytes(tmp_path):
    ours = build_tokenizer("ByteLevelTokenizer")
    theirs, notes = exported(ours, tmp_path)
    assert notes == [] and theirs.eos_token == "<eos>" and theirs.mask_token == "<mask>" and theirs.pad_token == "<pad>"
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id, len(theirs)) == (256, 257, 258, 259)
    for text in [*random_texts(1000), "a<mask>b<eos>", "".join(map(chr, range(0x250)))]:
        assert theirs(text)["input_ids"] == list(text.encode())
        assert theirs.decode(list(text.encode())) == text
    rng = random.Random(0)
    for _ in range(1000):  # not UTF-8
        ids = rng.choices(range(259), k=rng.randint(0, 12))
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), ids


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "ByteLevelTokenizer"])
@pytest.mark.parametrize("architecture", [folders.QWEN2, folders.FAST_DLLM])
def test_exported_and_imported(tmp_path, kind, architecture):
    """Beside Fast-dLLM's configuration too, whose code is not run for it."""
    ours = build_tokenizer(kind, train(tmp_path / "m.model", model_type="bpe") if "Piece" in kind else None)
    exported(ours, tmp_path, folders.config(architecture))
    import_tokenizer(tmp_path / "hf", tmp_path / "again", None, False)
    again = load_tokenizer(tmp_path / "again")
    assert again.tokenizer_type == "HuggingFaceTokenizer"
    assert (again.mask_id, again.eos_id, again.vocab_size) == (ours.mask_id, ours.eos_id, ours.vocab_size)
    texts = random_texts(300)
    ids = ours.encode_batch(texts)
    assert again.encode_batch(texts) == ids
    assert [again.decode([*one, ours.mask_id]) for one in ids] == [ours.decode(one) for one in ids]
    assert again.encode_response("4") == ours.encode_response("4")
