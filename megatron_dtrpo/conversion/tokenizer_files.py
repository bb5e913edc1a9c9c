"""A tokenizer's files from a Hugging Face folder to a checkpoint, with a mask token added where it has none.

The token is written into the files themselves, in every place where a version of transformers looks, so that all else
in them stays as it was. Loading the result then has to agree.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from megatron_dtrpo.conversion.hf_config import CONFIG, read_json, refuse_lfs_pointer
from megatron_dtrpo.data.tokenizer import Tokenizer, build_tokenizer
from megatron_dtrpo.errors import UserError

_KIND = "HuggingFaceTokenizer"
_SPECIAL = "additional_special_tokens"
_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    CONFIG,
)


def import_tokenizer(
    folder: Path,
    target: Path,
    mask_token: str | None,
    add_mask_token: bool,
    eos_token: str | None,
    own_mask: str,
) -> Tokenizer:
    """Saves the tokenizer of a Hugging Face folder to ``target``, as training reads it. ``own_mask`` is the mask token
    of the model's family, which ``add_mask_token`` adds; otherwise there may be none. Raises UserError."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
        raise UserError(f"{folder}: no tokenizer: neither tokenizer.json nor vocab.json is there")
    for name in _FILES:
        refuse_lfs_pointer(folder / name)
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        # As an export writes it: transformers would read nothing of it.
        model = folder / "tokenizer.model"
        tokenizer = build_tokenizer("SentencePieceTokenizer", model, mask_token, eos_token, needs_mask=False)
        tokenizer.save(target)
        return tokenizer
    if not add_mask_token or own_mask in vocabulary(folder):
        tokenizer = build_tokenizer(_KIND, folder, mask_token, eos_token, needs_mask=False)
        tokenizer.save(target)
        return tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        expected = _add_mask_token(folder, Path(scratch), own_mask)
        tokenizer = build_tokenizer(_KIND, scratch, own_mask, eos_token)
        if (tokenizer.mask_id, tokenizer.vocab_size) != (expected, expected + 1):
            raise UserError(f"{folder}: {own_mask} cannot be added to this kind of tokenizer")
        tokenizer.save(target)
    return tokenizer


def vocabulary(folder: Path) -> dict[str, int]:
    """Every token and its id, from whichever files there are."""
    tokens: dict[str, int] = {}
    for name in ("vocab.json", "added_tokens.json"):
        if (folder / name).is_file():
            tokens.update(read_json(folder / name))
    if (folder / "tokenizer.json").is_file():
        tokenizer = read_json(folder / "tokenizer.json")
        vocabulary = tokenizer.get("model", {}).get("vocab", {})
        tokens.update(vocabulary if isinstance(vocabulary, dict) else {})
        tokens.update({token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []})
    if (folder / "tokenizer_config.json").is_file():
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        tokens.update({token["content"]: int(number) for number, token in decoder.items()})
    return tokens


def _add_mask_token(folder: Path, target: Path, token: str) -> int:
    """Copies the tokenizer's files to ``target`` and adds ``token`` behind the last one. Returns its id."""
    tokens = vocabulary(folder)
    if not tokens:
        raise UserError(f"{folder}: --add-mask-token needs the tokenizer as tokenizer.json or vocab.json")
    number = max(tokens.values()) + 1
    for name in _FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, target / name)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    description = {"content": token, **flags, "special": True}

    def edit(name: str, change) -> None:
        if (target / name).is_file():
            content = read_json(target / name)
            change(content)
            (target / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def in_tokenizer(content: dict) -> None:
        content["added_tokens"] = [*(content.get("added_tokens") or []), {"id": number, **description}]

    def in_config(content: dict) -> None:
        # A list of added tokens here is the whole list: begun with the mask alone, it would renumber the others.
        if "added_tokens_decoder" in content:
            content["added_tokens_decoder"][str(number)] = description
        in_special_tokens(content)

    def in_special_tokens(content: dict) -> None:
        # transformers 5 says "extra", and means something else by it where it is a dictionary.
        key = "extra_special_tokens" if isinstance(content.get("extra_special_tokens"), list) else _SPECIAL
        content[key] = [*(content.get(key) or []), token]

    edit("tokenizer.json", in_tokenizer)
    edit("tokenizer_config.json", in_config)
    edit("added_tokens.json", lambda content: content.update({token: number}))
    edit("special_tokens_map.json", in_special_tokens)
    return number
