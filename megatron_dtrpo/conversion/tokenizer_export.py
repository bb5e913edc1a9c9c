"""Export of a checkpoint's tokenizer: files that transformers reads, with the ids and texts of ours.

A Hugging Face tokenizer's files are copied, a SentencePiece model is exported as the file that it is, and the
byte-level tokenizer is written as a tokenizer.json.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_dtrpo.conversion.hf_config import CONFIG, read_json
from megatron_dtrpo.conversion.template import GENERATION_CONFIG
from megatron_dtrpo.conversion.tokenizer_files import vocabulary
from megatron_dtrpo.data.tokenizer import METADATA_FILE, load_tokenizer
from megatron_dtrpo.data.tokenizer_libraries import ByteLevel
from megatron_dtrpo.families.registry import mask_tokens

SETTINGS_FILE = "tokenizer_config.json"
# Of the byte-level tokenizer, beside the tokens' names. None stands for none: left out, classes of transformers fill
# in their own.
_BYTE_SETTINGS = {
    "bos_token": None,
    "unk_token": None,
    "clean_up_tokenization_spaces": False,
    # A text that says "</s>" means those four characters.
    "split_special_tokens": True,
    "tokenizer_class": "PreTrainedTokenizerFast",
    # Where config.json says qwen2, AutoTokenizer of transformers 5 takes Qwen's own class all the same. That
    # class keeps of tokenizer.json the vocabulary alone, unless told to trust the file. No code is run for it.
    "trust_remote_code": True,
}


def export_tokenizer(saved: Path, target: Path) -> list[str]:
    """Writes a checkpoint's tokenizer into a Hugging Face folder that has its config.json already. Returns what the
    user should know, a line each."""
    kind = read_json(saved / METADATA_FILE).get("tokenizer_type") if (saved / METADATA_FILE).is_file() else None
    if kind not in _EXPORTS:
        return ["no tokenizer was exported: the checkpoint has none that transformers reads"]
    return _EXPORTS[kind](saved, target)


def _copy(saved: Path, target: Path) -> list[str]:
    for file in sorted(saved.iterdir()):
        if file.is_file() and file.name not in (METADATA_FILE, CONFIG):
            shutil.copyfile(file, target / file.name)
    return [*_write_end_token(saved, target), *_write_mask_token(saved, target)]


def _write_end_token(saved: Path, target: Path) -> list[str]:
    """Where the run has another end token than the files it began with, puts it into each of them that names one."""
    token = read_json(saved / METADATA_FILE)["eos_token"]
    if token == _named(saved, "eos_token"):
        return []
    number = vocabulary(saved).get(token)
    _name_token(target, "eos_token", token)
    for name in (CONFIG, GENERATION_CONFIG):
        content = read_json(target / name) if (target / name).is_file() else {}
        old = content.get("eos_token_id")
        if old is not None and number is not None:
            content["eos_token_id"] = [number, *(n for n in old if n != number)] if isinstance(old, list) else number
            _dump(target / name, content)
    return [f"the end token is {token}, as in the run: written into the tokenizer and the generation settings"]


def _write_mask_token(saved: Path, target: Path) -> list[str]:
    token, default = read_json(saved / METADATA_FILE)["mask_token"], _named(saved, "mask_token")
    if token is None:  # an autoregressive model's
        return []
    ids = vocabulary(saved)
    usual = next((name for name in mask_tokens() if name in ids), None)
    next_time = usual or default
    if token == next_time or (token in ids and ids[token] == ids.get(next_time)):  # SDAR's files name a token twice
        return []
    _name_token(target, "mask_token", token)
    advice = f"; an import takes {usual} unless it is given --mask-token '{token}'" if usual else ""
    return [f"the mask token is {token}, as in the run: written into the tokenizer{advice}"]


def _named(folder: Path, key: str) -> str | None:
    """A special token that the files of a Hugging Face tokenizer name."""
    for name in (SETTINGS_FILE, "special_tokens_map.json"):
        token = read_json(folder / name).get(key) if (folder / name).is_file() else None
        if token is not None:
            return token["content"] if isinstance(token, dict) else token
    return None


def _name_token(folder: Path, key: str, token: str) -> None:
    settings = read_json(folder / SETTINGS_FILE) if (folder / SETTINGS_FILE).is_file() else {}
    _dump(folder / SETTINGS_FILE, {**settings, key: token})
    names = folder / "special_tokens_map.json"
    if names.is_file():
        _dump(names, {**read_json(names), key: token})


def _dump(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _sentencepiece(saved: Path, target: Path) -> list[str]:
    (file,) = load_tokenizer(saved).files
    shutil.copyfile(file, target / "tokenizer.model")
    return ["the tokenizer is exported as tokenizer.model: SentencePiece reads it, AutoTokenizer does not"]


def _byte_level(saved: Path, target: Path) -> list[str]:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    ours = load_tokenizer(saved)
    backend = Tokenizer(models.BPE({**{_letter(byte): byte for byte in range(256)}, **ByteLevel.specials}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ByteLevel.specials])
    backend.save(str(target / "tokenizer.json"))
    named = {"eos_token": ours.eos_token, "mask_token": ours.mask_token, "pad_token": "<pad>"}
    others = [token for token in ByteLevel.specials if token not in named.values()]
    _dump(target / SETTINGS_FILE, {**_BYTE_SETTINGS, **named, "additional_special_tokens": others})
    return []


def _letter(byte: int) -> str:
    """The letter that `tokenizers` writes for a byte: printable ones as they are, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return chr(byte) if byte in printable else chr(0x100 + sum(b not in printable for b in range(byte)))


_EXPORTS = {
    "HuggingFaceTokenizer": _copy,
    "SentencePieceTokenizer": _sentencepiece,
    "ByteLevelTokenizer": _byte_level,
}
