"""The three libraries that tokenize, behind one interface: transformers, SentencePiece, and Python's own bytes.

Each class loads a tokenizer from its file or folder and has

* ``encode_batch(texts)``: ids of each text, with no token added before or after it;
* ``decode(ids)``: the text of ids that are in the vocabulary and are no special tokens;
* ``token_id(token)``: the id of a token by its name, special ones included, or None;
* ``vocab_size``, ``special_ids``, ``mask_token`` and ``eos_token`` (names, or None), ``files`` (the files it was read
  from) and ``library`` (the object that does the work, or None).

A library is imported where it is used: transformers takes seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_dtrpo.errors import UserError, one_line
from megatron_dtrpo.families.registry import mask_tokens

# Beside the vocabulary files, whose names the tokenizer's class knows.
_HF_FILES = {"chat_template.jinja", "tokenizer.model"} | {
    f"{name}.json" for name in ("added_tokens", "special_tokens_map", "tokenizer", "tokenizer_config")
}


# Classes that are code beside a model, and transformers' own whose files theirs are.
_CLASSES = {"DreamTokenizer": "Qwen2Tokenizer"}


class HuggingFace:
    """``AutoTokenizer`` of a folder. Nothing is downloaded, and no code of the folder is run."""

    def __init__(self, folder: Path) -> None:
        transformers = _imported("transformers")
        kind = getattr(transformers, _CLASSES.get(_class_named(folder), "AutoTokenizer"))
        try:
            self.library = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except ValueError:  # also of a file that is no JSON, which it does not name
            _require_json(folder)
            raise
        vocabulary = self.library.get_vocab()
        self._ids = vocabulary
        # len() is too small for a vocabulary with holes, and ids beyond it would fall outside the embedding.
        self.vocab_size = max(vocabulary.values()) + 1
        self.special_ids = frozenset(self.library.all_special_ids)
        undeclared = (token for token in mask_tokens() if token in vocabulary)
        self.mask_token = next(undeclared, self.library.mask_token)
        self.eos_token = self.library.eos_token
        names = _HF_FILES | set(self.library.vocab_files_names.values())
        names |= set() if _names_its_class(folder) else {"config.json"}
        self.files = tuple(folder / name for name in sorted(names) if (folder / name).is_file())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.library(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def decode(self, ids: list[int]) -> str:
        # transformers 4 tidies spaces where a folder says so, as Llama 3's: no text of tokens would be final.
        return self.library.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token_id(self, token: str) -> int | None:
        return self._ids.get(token)


class SentencePiece:
    """A SentencePiece model. Its mask token is the symbol ``[MASK]``."""

    mask_token = "[MASK]"

    def __init__(self, file: Path) -> None:
        self.library = _imported("sentencepiece").SentencePieceProcessor(model_file=str(file))
        self.vocab_size = self.library.get_piece_size()
        self.special_ids = frozenset(i for i in range(self.vocab_size) if self.library.is_control(i))
        end = self.library.eos_id()
        self.eos_token = self.library.id_to_piece(end) if end >= 0 else None
        self.files = (file,)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.library.encode(text) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return self.library.decode(ids)

    def token_id(self, token: str) -> int | None:
        found = self.library.piece_to_id(token)
        return None if found == self.library.unk_id() else found


class ByteLevel:
    """Bytes of UTF-8, which are their own ids. The special tokens follow them."""

    specials = {"<eos>": 256, "<pad>": 257, "<mask>": 258}
    library: Any = None
    vocab_size = 259
    special_ids = frozenset(specials.values())
    mask_token, eos_token = "<mask>", "<eos>"
    files: tuple[Path, ...] = ()

    def __init__(self, _: None) -> None:
        """There is nothing to load."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")

    def token_id(self, token: str) -> int | None:
        code = token.encode()
        return self.specials.get(token, code[0] if len(code) == 1 else None)


Library = HuggingFace | SentencePiece | ByteLevel
# By Megatron-LM's names.
LIBRARIES: dict[str, Any] = {
    "HuggingFaceTokenizer": HuggingFace,
    "SentencePieceTokenizer": SentencePiece,
    "ByteLevelTokenizer": ByteLevel,
}


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"tokenizer_type: this tokenizer is read with {name}; pip install {name}") from None


def _require_json(folder: Path) -> None:
    """Raises UserError where a .json file of ``folder`` is none."""
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: not valid JSON ({one_line(error)}); fetch the file again") from None


def _names_its_class(folder: Path) -> bool:
    """Whether tokenizer_config.json names the tokenizer's class; otherwise transformers asks config.json."""
    return _class_named(folder) is not None


def _class_named(folder: Path) -> str | None:
    file = folder / "tokenizer_config.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):  # loading says what is wrong with it
        return json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class")
    return None
