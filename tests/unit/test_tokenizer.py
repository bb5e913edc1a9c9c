"""The tokenizer against transformers and SentencePiece themselves."""

from __future__ import annotations

import codecs
import json
import random
import socket
import sys

import pytest
from tokenizers.decoders import DecodeStream

from megatron_dtrpo.data.tokenizer import build_tokenizer, load_tokenizer
from megatron_dtrpo.errors import UserError
from tests.support.chat_tokenizer import save_chat_tokenizer

TEXTS = ["Hello  world", " leading", "trailing \n", "\u00e9\u4e2d\U0001f600", "37+58+6=101", "a<|im_end|>b", ""]
USER = [{"role": "user", "content": "What is 2+2?"}]
ANSWER = [{"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def folder(shared_dir):
    return shared_dir / "data" / "fast_dllm_v2_7b"


@pytest.fixture(scope="module")
def real(folder):
    return build_tokenizer("HuggingFaceTokenizer", folder)


@pytest.fixture(scope="module")
def oracle(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = tmp_path_factory.mktemp("sp")
    corpus = path / "corpus.txt"
    corpus.write_text("\n".join(f"{a} plus {b} makes {a + b}" for a in range(20) for b in range(20)))
    options = {"vocab_size": 80, "hard_vocab_limit": False, "minloglevel": 2}
    for name, symbols in (("masked", ["[MASK]", "<m>"]), ("plain", [])):
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_prefix=str(path / name), user_defined_symbols=symbols, **options
        )
    return path


@pytest.fixture(scope="module")
def spacious_model(sentencepiece_model):
    """A SentencePiece model that spells unknown characters in bytes and keeps every space."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        input=str(sentencepiece_model / "corpus.txt"),
        model_prefix=str(sentencepiece_model / "spacious"),
        user_defined_symbols=["[MASK]"],
        vocab_size=400,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece_model / "spacious.model"


@pytest.fixture(params=["real", "masked.model", "spacious.model", "bytes"])
def each(request):
    """One tokenizer of each type, two of SentencePiece's."""
    if request.param == "real":
        return request.getfixturevalue("real")
    if request.param == "bytes":
        return build_tokenizer("ByteLevelTokenizer")
    return build_tokenizer("SentencePieceTokenizer", request.getfixturevalue("spacious_model").parent / request.param)


def pieces_of_the_library(tokenizer, ids) -> list[str]:
    """The oracle of ``Tokenizer.token_texts`` for a text that is whole: what each library itself says of its tokens."""
    if tokenizer.tokenizer_type == "HuggingFaceTokenizer":
        stream = DecodeStream([], skip_special_tokens=True)
        return [stream.step(tokenizer._library.backend_tokenizer, i) or "" for i in ids]
    if tokenizer.tokenizer_type == "SentencePieceTokenizer":
        return [token_text.surface for token_text in tokenizer._library.decode(ids, return_type="proto").pieces]
    decoder = codecs.getincrementaldecoder("utf-8")()
    return [decoder.decode(bytes([i])) for i in ids]


def message_of(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_fast_dllm_ids(real, oracle):
    assert (real.vocab_size, real.eos_id, real.mask_id) == (151666, 151645, 151665)
    assert len(oracle) == real.vocab_size


@pytest.mark.parametrize("text", TEXTS)
def test_huggingface_encodes_and_decodes_as_transformers(real, oracle, text):
    ids = oracle(text, add_special_tokens=False)["input_ids"]
    assert real.encode(text) == ids
    assert real.decode(ids) == oracle.decode(ids, skip_special_tokens=True)


def test_batch_equals_one_by_one(real):
    assert real.encode_batch(TEXTS) == [real.encode(text) for text in TEXTS]
    assert real.encode_batch([]) == []


def test_decode_drops_special_and_padding_ids(real):
    ids = real.encode("Hello")
    assert real.decode([real.mask_id, *ids, real.vocab_size + 5, real.mask_id, real.eos_id]) == "Hello"


def test_messages_go_through_the_chat_template(real, oracle):
    rendered = oracle.apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith("<|im_start|>assistant\n")
    ids = oracle(rendered, add_special_tokens=False)["input_ids"]
    assert real.encode_prompt(USER) == ids
    assert real.encode_prompt(USER[0]["content"], apply_chat_template=True) == ids
    assert real.encode_prompt(USER[0]["content"]) == oracle(USER[0]["content"])["input_ids"]


def test_prompt_and_response_join_to_the_whole_conversation(real, oracle):
    whole = oracle.apply_chat_template(USER + ANSWER, tokenize=False)
    assert whole.endswith("<|im_end|>\n")
    expected = oracle(whole.rstrip("\n"), add_special_tokens=False)["input_ids"]
    assert real.encode_prompt(USER) + real.encode_response(ANSWER, USER) == expected


def test_response_ends_with_one_end_token(real):
    plain = [*real.encode("4"), real.eos_id]
    for response in ("4", "4<|im_end|>", "4<|im_end|>\n", ANSWER):
        assert real.encode_response(response) == plain
    assert real.encode_response("4", apply_chat_template=True) == plain
    assert real.encode_response("4\n") == [*real.encode("4\n"), real.eos_id]


def test_a_template_that_refuses_is_a_user_error(real):
    message = message_of(lambda: real.encode_prompt([{"role": "user", "content": None}]))
    assert message.startswith("the chat template refuses these messages: ")


def test_a_template_that_rewrites_the_prompt_is_a_user_error(real, monkeypatch):
    monkeypatch.setattr(real._library, "chat_template", "{{ messages | length }}:{{ messages[-1].content }}")
    assert "writes this prompt differently" in message_of(lambda: real.encode_response(ANSWER, USER))


def test_huggingface_saved_and_loaded(real, tmp_path):
    real.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    assert not (tmp_path / "a" / "config.json").exists()
    assert again.fingerprint() == real.fingerprint()
    assert (again.mask_id, again.eos_id, again.vocab_size) == (real.mask_id, real.eos_id, real.vocab_size)
    assert again.encode_batch(TEXTS) == real.encode_batch(TEXTS)
    assert again.encode_prompt(USER) == real.encode_prompt(USER)
    again.save(tmp_path / "a")  # onto itself
    assert load_tokenizer(tmp_path / "a").fingerprint() == real.fingerprint()


def test_megatron_core_loads_what_we_save(real, tmp_path):
    from megatron.core.tokenizers import MegatronTokenizer

    real.save(tmp_path)
    assert MegatronTokenizer.from_pretrained(str(tmp_path)).tokenize("Hello") == real.encode("Hello")


def test_fingerprint_follows_contents_and_tokens(folder, real, tmp_path):
    other = build_tokenizer("HuggingFaceTokenizer", folder, mask_token="<|fim_pad|>", eos_token="<|endoftext|>")
    assert (other.mask_id, other.eos_id) == (151662, 151643)
    assert other.fingerprint() != real.fingerprint()
    real.save(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert load_tokenizer(tmp_path).fingerprint() != real.fingerprint()


def test_huggingface_without_mask_token(folder, real, tmp_path):
    assert "'[M]'" in message_of(lambda: build_tokenizer("HuggingFaceTokenizer", folder, mask_token="[M]"))
    transformers = pytest.importorskip("transformers")
    vocab = {"a": 0, "b": 1, "<eos>": 2}
    plain = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], eos_token="<eos>", pad_token="<eos>", unk_token=None)
    plain.save_pretrained(tmp_path)
    message = message_of(lambda: build_tokenizer("HuggingFaceTokenizer", tmp_path))
    assert message.startswith(f"{tmp_path}: has no mask token") and "--mask-token" in message
    message = message_of(lambda: build_tokenizer("HuggingFaceTokenizer", tmp_path, mask_token="<eos>"))
    assert "both mask and end token" in message


def test_nothing_is_downloaded(folder, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    message = message_of(lambda: build_tokenizer("HuggingFaceTokenizer", "Qwen/Qwen2.5-7B-Instruct"))
    assert "no folder Qwen/Qwen2.5-7B-Instruct" in message
    message = message_of(lambda: build_tokenizer("HuggingFaceTokenizer", tmp_path))
    assert message.startswith(f"{tmp_path}: cannot be loaded") and "network" not in message
    assert build_tokenizer("HuggingFaceTokenizer", folder).mask_id == 151665


def test_sentencepiece_as_the_library(sentencepiece_model, tmp_path):
    import sentencepiece

    file = sentencepiece_model / "masked.model"
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ours = build_tokenizer("SentencePieceTokenizer", file)
    ids = oracle.encode("12 plus 7 makes 19")
    assert ours.encode("12 plus 7 makes 19") == ids
    assert ours.vocab_size == oracle.get_piece_size()
    assert (ours.mask_id, ours.eos_id) == (oracle.piece_to_id("[MASK]"), oracle.eos_id())
    assert ours.encode_response("7") == [*oracle.encode("7"), oracle.eos_id()]
    assert ours.decode([*ids, ours.mask_id, ours.eos_id, ours.vocab_size]) == "12 plus 7 makes 19"
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == ours.fingerprint() and again.encode("12 plus") == ours.encode("12 plus")
    assert build_tokenizer("SentencePieceTokenizer", file, mask_token="<m>").mask_id == oracle.piece_to_id("<m>")


def test_sentencepiece_errors(sentencepiece_model, tmp_path):
    plain = sentencepiece_model / "plain.model"
    message = message_of(lambda: build_tokenizer("SentencePieceTokenizer", plain))
    assert message.startswith(
        f"{plain}: the mask token '[MASK]' is not in the vocabulary; name one that is with --mask"
    )
    (tmp_path / "bad.model").write_text("no model")
    assert "cannot be loaded" in message_of(lambda: build_tokenizer("SentencePieceTokenizer", tmp_path / "bad.model"))
    assert "no file" in message_of(lambda: build_tokenizer("SentencePieceTokenizer", tmp_path / "none.model"))
    assert "needs the file" in message_of(lambda: build_tokenizer("SentencePieceTokenizer"))


def test_a_missing_library_says_what_to_install(sentencepiece_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    file = sentencepiece_model / "masked.model"
    assert "pip install sentencepiece" in message_of(lambda: build_tokenizer("SentencePieceTokenizer", file))


def test_byte_level_ids_are_bytes_and_specials_come_after(tmp_path):
    ours = build_tokenizer("ByteLevelTokenizer")
    assert (ours.vocab_size, ours.eos_id, ours.mask_id) == (259, 256, 258)
    every_byte = "\x00\x01 \u00e9\u4e2d \n"
    assert ours.encode(every_byte) == list(every_byte.encode())
    assert ours.decode([*ours.encode(every_byte), 258, 257, 256]) == every_byte
    assert ours.encode_response("ab") == [97, 98, 256]
    assert ours.decode([97, 0xC3]) == "a\ufffd"
    ours.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == ours.fingerprint() and again.mask_id == 258
    assert "no chat template" in message_of(lambda: ours.encode_prompt(USER))
    assert "--mask-token" in message_of(lambda: build_tokenizer("ByteLevelTokenizer", mask_token="[MASK]"))


def test_unknown_type_and_missing_metadata(tmp_path):
    assert "ByteLevelTokenizer" in message_of(lambda: build_tokenizer("GPT2BPETokenizer"))
    assert "no such file" in message_of(lambda: load_tokenizer(tmp_path))
    (tmp_path / "tokenizer_metadata.json").write_text('{"library": "huggingface"}')
    assert "not the metadata" in message_of(lambda: load_tokenizer(tmp_path))


def test_pieces_join_to_the_text_and_each_is_what_its_token_adds(each):
    generator = random.Random(0)
    spelled = "\u00e9\u4e2d\U0001f600\U00013000 12 plus\n  "
    texts = [*TEXTS, "a\ufffdb", *("".join(generator.choices(spelled, k=30)) for _ in range(50))]
    cases = [each.encode(text) for text in texts]
    for text, ids in zip(texts, cases, strict=True):
        if "\ufffd" not in text:  # which a stream takes for a character that is not whole yet
            assert each.token_texts(ids) == pieces_of_the_library(each, ids), text
    cases += [[*ids[:3], each.mask_id, *ids[3:], each.eos_id] for ids in cases]
    # Nonsense too: an untrained model breaks characters off.
    cases += [[generator.randrange(each.vocab_size + 3) for _ in range(60)] for _ in range(50)]
    for ids in cases:
        token_texts = each.token_texts(ids)
        assert "".join(token_texts) == each.decode(ids) and len(token_texts) == len(ids)
        assert not any(token_text for token_text, i in zip(token_texts, ids, strict=True) if i in each.special_ids)


def test_a_character_belongs_to_the_token_that_completes_it(real, spacious_model):
    for tokenizer in (build_tokenizer("ByteLevelTokenizer"), real):
        ids = tokenizer.encode("\U00013000")
        assert len(ids) > 1
        assert tokenizer.token_texts([*ids, tokenizer.eos_id]) == [*[""] * (len(ids) - 1), "\U00013000", ""]
    spacious = build_tokenizer("SentencePieceTokenizer", spacious_model)
    assert spacious.token_texts(spacious.encode("\u4e2d"))[-3:] == ["", "", "\u4e2d"]
    assert spacious.token_texts(spacious.encode("12 plus"))[0].startswith("1")


def test_no_space_is_tidied_away(tmp_path):
    """Llama 3's settings ask for it, and transformers 4 does it: a space before a sign or a quote would go, perhaps one
    that a client of the server has read already."""
    folder = save_chat_tokenizer(tmp_path)
    file = folder / "tokenizer_config.json"
    asked = {"clean_up_tokenization_spaces": True}
    asked["clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"] = True  # as transformers 4
    file.write_text(json.dumps(json.loads(file.read_text()) | asked))
    tokenizer, text = build_tokenizer("HuggingFaceTokenizer", folder), "print 'some' , it 's not"
    assert tokenizer.decode(tokenizer.encode(text)) == text
