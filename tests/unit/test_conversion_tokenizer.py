"""Exported tokenizers, loaded by transformers, against ours, SentencePiece itself and bytes."""

from __future__ import annotations

import io
import itertools
import json
import random
import shutil

import pytest

import train_tokenizer
from megatron_dtrpo.conversion.tokenizer_export import export_tokenizer
from megatron_dtrpo.conversion.tokenizer_files import import_tokenizer
from megatron_dtrpo.data.tokenizer import build_tokenizer, load_tokenizer
from tests.support import conversion_folders as folders
from tests.support.conversion_folders import run_tool

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
PARTS = [
    *SYMBOLS,
    "</s>",
    "<s>",
    "<unk>",
    "<0x41>",
    "<0x0A>",
    " ",
    "  ",
    "\n",
    "\t",
    "\u2581",
    "\u3000",
    "\u00a0",
    "a",
    "ab",
    "aaab",
    "12",
    " plus",
    "makes",
    "e\u0301",
    "\u00e9",
    "\u4e2d",
    "\u0e01",
    "\U0001f600",
    "\x00",
    "\ufeff",
    "Z",
    "<",
    "/s>",
    "0x41",
    "return",
    " x",
    ".",
]


def train(file, **settings):
    """A SentencePiece model with a mask, which normalizes nothing unless asked to."""
    model = io.BytesIO()
    default = dict(
        vocab_size=420,
        hard_vocab_limit=False,
        user_defined_symbols=SYMBOLS,
        num_threads=1,
        minloglevel=2,
        normalization_rule_name="identity",
        character_coverage=1.0,
    )
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


def test_sentencepiece_is_exported_as_its_own_file(tmp_path):
    """Imported again it is the same tokenizer, with whatever mask token it is given."""
    file = train(tmp_path / "m.model", model_type="unigram", normalization_rule_name="nmt_nfkc")
    build_tokenizer("SentencePieceTokenizer", file, mask_token="<x>").save(tmp_path / "saved")
    target = tmp_path / "hf"
    target.mkdir()
    (target / "config.json").write_text(json.dumps(folders.config(folders.QWEN2)))
    (note,) = export_tokenizer(tmp_path / "saved", target)
    assert "tokenizer.model" in note and "AutoTokenizer does not" in note
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "tokenizer.model"]
    assert (target / "tokenizer.model").read_bytes() == file.read_bytes()
    again = import_tokenizer(target, tmp_path / "again", "<x>", False, None, "|<MASK>|")
    assert again.fingerprint() == load_tokenizer(tmp_path / "saved").fingerprint()
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(file))
    texts = random_texts(100)
    assert load_tokenizer(tmp_path / "again").encode_batch(texts) == [oracle.encode_as_ids(text) for text in texts]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a tokenizer that examples/train_tokenizer.py made."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in CORPUS))
    words = ["--input", folder / "texts.jsonl", "--output", folder / "tokenizer", "--vocab-size", 300]
    assert train_tokenizer.main([*map(str, words)]) == 0
    return folder / "tokenizer"


def test_the_trained_tokenizer(trained, tmp_path, capsys):
    """Digits one by one, no text unknown, a text and its parts the same tokens, and a token for the mask."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained)
    assert len(tokenizer) == 300 and (tokenizer.eos_token, tokenizer.mask_token) == ("<|endoftext|>", "[MASK]")
    digits = [tokenizer.convert_ids_to_tokens(i) for i in tokenizer("12+345=357")["input_ids"]]
    assert digits == list("12+345=357")
    assert len(tokenizer(" plus")["input_ids"]) < 5, "words of the data are merged"
    assert tokenizer("[MASK]")["input_ids"] == [tokenizer.mask_token_id]
    for text in map("".join, itertools.product(["7+8=", "x ", "\n"], ["15", "\u4e2d\U0001f600", "  \t"])):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("7+8=")["input_ids"] + tokenizer("15")["input_ids"] == tokenizer("7+8=15")["input_ids"]
    words = ["--input", tmp_path / "a.jsonl", "--output", tmp_path / "out", "--vocab-size", 257]
    (tmp_path / "a.jsonl").write_text('{"prompt": "1"}\n')
    assert train_tokenizer.main([*map(str, words)]) == 2
    assert capsys.readouterr().err.startswith("error: --vocab-size 257: it must be at least 258")
    assert not (tmp_path / "out").exists()


def test_leaving_the_tokenizer_out(tmp_path, capsys, good_megatron):
    run = tmp_path / "run"
    shutil.copytree(good_megatron, run)
    shutil.rmtree(run / "tokenizer")
    build_tokenizer("ByteLevelTokenizer").save(run / "tokenizer")
    shutil.rmtree(run / "huggingface")  # as a run from nothing
    words = ("export", "--megatron-path", run, "--hf-path", tmp_path / "hf")
    assert run_tool(capsys, *words, "--no-tokenizer") == (0, "")
    assert not list((tmp_path / "hf").glob("*token*"))


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


@pytest.mark.parametrize("kind", ["HuggingFaceTokenizer", "ByteLevelTokenizer"])
@pytest.mark.parametrize("architecture", [folders.QWEN2, folders.FAST_DLLM])
def test_exported_and_imported(tmp_path, trained, kind, architecture):
    """Beside Fast-dLLM's configuration too, whose code is not run for it."""
    ours = build_tokenizer(kind, trained if kind == "HuggingFaceTokenizer" else None)
    theirs, notes = exported(ours, tmp_path, folders.config(architecture))
    import_tokenizer(tmp_path / "hf", tmp_path / "again", None, False, None, "|<MASK>|")
    again = load_tokenizer(tmp_path / "again")
    assert again.tokenizer_type == "HuggingFaceTokenizer" and notes == []
    assert (again.mask_id, again.eos_id, again.vocab_size) == (ours.mask_id, ours.eos_id, ours.vocab_size)
    assert (theirs.mask_token_id, theirs.eos_token_id, len(theirs)) == (ours.mask_id, ours.eos_id, ours.vocab_size)
    texts = random_texts(300)
    ids = ours.encode_batch(texts)
    assert theirs(texts)["input_ids"] == again.encode_batch(texts) == ids
    assert [again.decode([*one, ours.mask_id]) for one in ids] == [ours.decode(one) for one in ids]
    assert again.encode_response("4") == ours.encode_response("4")
