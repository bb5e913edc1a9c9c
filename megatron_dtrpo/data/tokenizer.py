"""Text to token ids and back, over megatron-core's tokenizers, with the two ids that block diffusion needs.

megatron-core wraps Hugging Face, SentencePiece and byte-level tokenizers behind one interface. This adds what
training needs on top: a mask id and an end id that are certain to exist, prompts and responses rendered the way TRL
renders them, and a folder that a checkpoint can carry. Nothing is ever downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dtrpo.data import chat
from megatron_dtrpo.data.chat import Messages, Piece, TemplateInputs
from megatron_dtrpo.data.pieces import split_text
from megatron_dtrpo.errors import UserError

METADATA_FILE = "tokenizer_metadata.json"  # the name megatron-core looks for
# Megatron-LM's name of a tokenizer: megatron-core's name of the library behind it.
_LIBRARIES = {
    "HuggingFaceTokenizer": "huggingface",
    "SentencePieceTokenizer": "sentencepiece",
    "ByteLevelTokenizer": "byte-level",
}
TOKENIZER_TYPES = tuple(_LIBRARIES)
# Bytes are their own ids. megatron's defaults (end 0, pad 1) would collide with bytes 0 and 1, so ours follow them.
_BYTE_SPECIALS = {"<eos>": 256, "<pad>": 257, "<mask>": 258}
# Beside the vocabulary files, whose names the tokenizer's class knows.
_HF_FILES = {"chat_template.jinja", "tokenizer.model"} | {
    f"{name}.json" for name in ("added_tokens", "special_tokens_map", "tokenizer", "tokenizer_config")
}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """One tokenizer and the ids that training needs. Build it with ``build_tokenizer`` or ``load_tokenizer``.

    ``vocab_size`` counts every token, added ones included, without padding for tensor parallelism. ``eos_id`` closes
    every response. ``mask_id`` is the noise token. ``files`` are what the tokenizer was read from.
    """

    tokenizer_type: str
    megatron: Any  # megatron.core.tokenizers.base_tokenizer.MegatronTokenizerBase
    vocab_size: int
    eos_id: int
    mask_id: int
    eos_token: str
    mask_token: str
    special_ids: frozenset[int]
    files: tuple[Path, ...]

    @property
    def _library(self) -> Any:
        """The tokenizer that megatron-core wraps: a transformers or SentencePiece object, or megatron's own."""
        wrapper = self.megatron._tokenizer
        return wrapper if self.tokenizer_type == "ByteLevelTokenizer" else wrapper.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no token is added before or after it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. One call for many texts lets a Hugging Face tokenizer use every core."""
        if self.tokenizer_type == "HuggingFaceTokenizer":
            # megatron's tokenize() takes one text at a time and goes through token strings.
            return self._library(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        return [self.megatron.tokenize(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``. Special tokens, the mask included, and ids of a padded vocabulary have no text."""
        kept = [i for i in map(int, ids) if 0 <= i < self.vocab_size and i not in self.special_ids]
        if self.tokenizer_type == "HuggingFaceTokenizer":
            # megatron's detokenize() raises TypeError on ids that have no token and looks special tokens up in a list.
            return self._library.decode(kept, skip_special_tokens=True)
        if self.tokenizer_type == "ByteLevelTokenizer":
            # megatron's detokenize() strips white space from the end and hides broken UTF-8.
            return bytes(kept).decode("utf-8", errors="replace")
        return self.megatron.detokenize(kept)

    def token_id(self, token: str) -> int | None:
        """The id of one token by its name in the vocabulary, special ones included; None if there is no such token."""
        library = self._library
        if self.tokenizer_type == "HuggingFaceTokenizer":
            return library.get_vocab().get(token)
        if self.tokenizer_type == "ByteLevelTokenizer":
            return _BYTE_SPECIALS.get(token, token.encode()[0] if len(token.encode()) == 1 else None)
        return _sentencepiece_id(library, token)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each of ``ids`` adds; joined they are ``decode(ids)``. Tokens without text add ''."""
        return split_text(self.decode, ids, self.special_ids)

    def encode_prompt(self, prompt: str | Messages, apply_chat_template: bool = False) -> list[int]:
        """Token ids of a prompt: text as it is, or messages up to where the assistant begins to speak."""
        return self.encode(self.render_prompt(prompt, apply_chat_template))

    def encode_response(
        self, response: str | Messages, prompt: str | Messages | None = None, apply_chat_template: bool = False
    ) -> list[int]:
        """Token ids of a response, text or the assistant's message, or several with replies of tools between them; the
        end token comes last and once.

        Give the ``prompt`` where there is one: chat templates may write an answer differently after another.
        """
        pieces = self.render_response(response, prompt, apply_chat_template)
        return self.close([token for ids in self.encode_batch([piece.text for piece in pieces]) for token in ids])

    def close(self, ids: list[int]) -> list[int]:
        """``ids`` with the end token appended unless it is already there."""
        return ids if ids and ids[-1] == self.eos_id else [*ids, self.eos_id]

    def render_prompt(
        self, prompt: str | Messages, apply_chat_template: bool = False, inputs: TemplateInputs | None = None
    ) -> str:
        """The text that ``encode_prompt`` encodes. Raises UserError where a chat template is needed and fails."""
        return chat.render_prompt(self._apply_template, prompt, apply_chat_template, inputs)

    def render_response(
        self,
        response: str | Messages,
        prompt: str | Messages | None = None,
        apply_chat_template: bool = False,
        inputs: TemplateInputs | None = None,
    ) -> list[Piece]:
        """What ``encode_response`` encodes, before the end token is made certain. Raises UserError too."""
        return chat.render_response(self._apply_template, self.eos_token, response, prompt, apply_chat_template, inputs)

    def unwritten_keys(self, messages: Messages, inputs: TemplateInputs) -> list[str]:
        """Keys of ``messages`` that hold text which the chat template does not write (see `chat.unwritten_keys`)."""
        return chat.unwritten_keys(self._apply_template, messages, inputs)

    def note_on_end(self) -> str | None:
        """A line for the user where the chat template ends an answer with a special token that is not the end token."""
        if self.tokenizer_type != "HuggingFaceTokenizer" or not self.megatron.chat_template:
            return None
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            behind = self.encode(self._apply_template(messages, add_generation_prompt=False).rpartition("answer")[2])
        except UserError:  # rows that it refuses are errors of their own
            return None
        special = {number: str(token) for number, token in self._library.added_tokens_decoder.items() if token.special}
        name = next((special[number] for number in behind if number in special), self.eos_token)
        if name == self.eos_token:
            return None
        return (
            f"the chat template ends an answer with {name}, the end token is {self.eos_token}: answers as messages "
            f"end with both; --eos-token '{name}' ends them with {name} alone"
        )

    def _apply_template(self, messages: Messages, **how: Any) -> str:
        """``how``: the settings of `chat.Template`, and the template's own variables."""
        if not self.megatron.chat_template:
            raise UserError(f"this {self.tokenizer_type} has no chat template; give prompts and responses as text")
        self._check_variables(how.keys() - chat.TEMPLATE_SETTINGS)
        import jinja2

        try:
            # Rendered as text: with transformers 5, asking megatron's wrapper for ids returns a BatchEncoding.
            return self._library.apply_chat_template(messages, tokenize=False, **how)
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"the chat template refuses these messages: {reason}") from None

    def _check_variables(self, names: set[str]) -> None:
        """Refuses variables that the chat template does not read, which would change nothing in silence."""
        if not names:
            return
        template = str(self._library.chat_template)
        reserved = inspect.signature(self._library.apply_chat_template).parameters
        for name in sorted(names):
            if name in reserved or name in ("messages", "bos_token", "eos_token"):
                raise UserError(f"chat_template_kwargs: {name!r} is no variable for a row to set; take it out")
            if name not in _variables(template):
                raise UserError(f"chat_template_kwargs: the chat template has no variable {name!r}; take it out")

    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that decides the ids: the type, the special tokens and the files' contents."""
        digest = hashlib.sha256()
        for part in (self.tokenizer_type, self.eos_token, self.eos_id, self.mask_token, self.mask_id, self.vocab_size):
            digest.update(f"{part}\n".encode())
        for file in self.files:
            # A SentencePiece model may have any name; it is saved under one, and must keep its fingerprint there.
            digest.update(f"{self._saved_name(file)}\n".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
        return digest.hexdigest()

    def _saved_name(self, file: Path) -> str:
        return "tokenizer.model" if self.tokenizer_type == "SentencePieceTokenizer" else file.name

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files and its metadata into ``directory`` for ``load_tokenizer``."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for file in self.files:
            target = directory / self._saved_name(file)
            if not (target.exists() and target.samefile(file)):
                shutil.copyfile(file, target)
        metadata = {
            "library": _LIBRARIES[self.tokenizer_type],  # what megatron-core reads; the rest is ours
            "tokenizer_type": self.tokenizer_type,
            "mask_token": self.mask_token,
            "eos_token": self.eos_token,
        }
        (directory / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


@functools.lru_cache
def _variables(template: str) -> set[str]:
    """The names that a chat template reads and does not set itself; of one that only transformers can parse, all its
    words."""
    import jinja2
    from jinja2 import meta

    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError:
        return set(re.findall(r"\w+", template))
    return meta.find_undeclared_variables(parsed)


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | Path | None = None,
    mask_token: str | None = None,
    eos_token: str | None = None,
) -> Tokenizer:
    """Build a tokenizer by Megatron-LM's name for it.

    ``HuggingFaceTokenizer`` takes a folder, ``SentencePieceTokenizer`` a ``.model`` file, ``ByteLevelTokenizer``
    nothing. The mask token defaults to Fast-dLLM's ``|<MASK>|``, then to the tokenizer's own, or for SentencePiece to
    the symbol ``[MASK]``; the end token to the tokenizer's own. Raises UserError where a file or token is missing.
    """
    if tokenizer_type == "HuggingFaceTokenizer":
        return _build_huggingface(_existing(tokenizer_type, tokenizer_model, folder=True), mask_token, eos_token)
    if tokenizer_type == "SentencePieceTokenizer":
        return _build_sentencepiece(_existing(tokenizer_type, tokenizer_model, folder=False), mask_token, eos_token)
    if tokenizer_type == "ByteLevelTokenizer":
        return _build_byte_level(mask_token, eos_token)
    raise UserError(f"tokenizer_type: unknown {tokenizer_type!r}; use one of {', '.join(TOKENIZER_TYPES)}")


def load_tokenizer(directory: str | Path, mask_token: str | None = None, eos_token: str | None = None) -> Tokenizer:
    """Rebuild the tokenizer that ``Tokenizer.save`` wrote into ``directory``, with other special tokens where given.

    Raises UserError if it is not there, or lacks one of the tokens.
    """
    file = Path(directory) / METADATA_FILE
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
        kind, *saved = (metadata[key] for key in ("tokenizer_type", "mask_token", "eos_token"))
    except OSError:
        raise UserError(f"{file}: no such file; give a folder that holds a saved tokenizer") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file}: not the metadata of a saved tokenizer; save the tokenizer again") from None
    model = Path(directory) / "tokenizer.model" if kind == "SentencePieceTokenizer" else Path(directory)
    mask_token, eos_token = (
        theirs if given is None else given for given, theirs in zip((mask_token, eos_token), saved, strict=True)
    )
    return build_tokenizer(kind, model, mask_token, eos_token)


def _build_huggingface(folder: Path, mask_token: str | None, eos_token: str | None) -> Tokenizer:
    megatron = _from_megatron("HuggingFaceTokenizer", folder, use_fast=True)
    library = megatron._tokenizer.tokenizer
    vocab = library.get_vocab()
    if mask_token is None:
        mask_token = "|<MASK>|" if "|<MASK>|" in vocab else library.mask_token
    if eos_token is None:
        eos_token = library.eos_token
    names = _HF_FILES | set(library.vocab_files_names.values())
    if not _names_its_class(folder):
        names.add("config.json")
    return _checked_tokenizer(
        "HuggingFaceTokenizer",
        megatron,
        where=str(folder),
        # len() is too small for a vocabulary with holes, and ids beyond it would fall outside the embedding.
        vocab_size=max(vocab.values()) + 1,
        mask=(mask_token, vocab.get(mask_token)),
        eos=(eos_token, vocab.get(eos_token)),
        special_ids=library.all_special_ids,
        files=tuple(folder / name for name in sorted(names) if (folder / name).is_file()),
    )


def _build_sentencepiece(file: Path, mask_token: str | None, eos_token: str | None) -> Tokenizer:
    megatron = _from_megatron("SentencePieceTokenizer", file)
    library = megatron._tokenizer.tokenizer
    if eos_token is None and library.eos_id() >= 0:
        eos_token = library.id_to_piece(library.eos_id())

    def known(token: str | None) -> int | None:
        return None if token is None else _sentencepiece_id(library, token)

    mask_token = "[MASK]" if mask_token is None else mask_token
    return _checked_tokenizer(
        "SentencePieceTokenizer",
        megatron,
        where=str(file),
        vocab_size=library.get_piece_size(),
        mask=(mask_token, known(mask_token)),
        eos=(eos_token, known(eos_token)),
        special_ids=[i for i in range(library.get_piece_size()) if library.is_control(i)],
        files=(file,),
    )


def _sentencepiece_id(library: Any, token: str) -> int | None:
    found = library.piece_to_id(token)
    return None if found == library.unk_id() else found


def _build_byte_level(mask_token: str | None, eos_token: str | None) -> Tokenizer:
    mask_token = "<mask>" if mask_token is None else mask_token
    eos_token = "<eos>" if eos_token is None else eos_token
    # megatron hands out ids from the end of the vocabulary down.
    specials = sorted(_BYTE_SPECIALS, key=_BYTE_SPECIALS.get, reverse=True)
    ids = {"_eos_id": _BYTE_SPECIALS["<eos>"], "_pad_id": _BYTE_SPECIALS["<pad>"]}
    megatron = _from_megatron("ByteLevelTokenizer", None, vocab_size=256, special_tokens=specials, **ids)
    return _checked_tokenizer(
        "ByteLevelTokenizer",
        megatron,
        where="ByteLevelTokenizer",
        vocab_size=megatron.vocab_size,
        mask=(mask_token, _BYTE_SPECIALS.get(mask_token)),
        eos=(eos_token, _BYTE_SPECIALS.get(eos_token)),
        special_ids=_BYTE_SPECIALS.values(),
        files=(),
    )


def _checked_tokenizer(tokenizer_type, megatron, where, vocab_size, mask, eos, special_ids, files) -> Tokenizer:
    """Assemble a Tokenizer once its mask and end tokens, each ``(token, id or None)``, are known to exist."""
    for (token, token_id), name, flag in ((mask, "mask", "--mask-token"), (eos, "end", "--eos-token")):
        if token_id is None:
            missing = (
                f"the {name} token {token!r} is not in the vocabulary" if token is not None else f"has no {name} token"
            )
            raise UserError(f"{where}: {missing}; name one that is with {flag}")
    if mask[1] == eos[1]:
        raise UserError(f"{where}: {mask[0]!r} is both mask and end token; name another with --mask-token")
    special_ids = frozenset(special_ids) | {mask[1], eos[1]}
    return Tokenizer(tokenizer_type, megatron, vocab_size, eos[1], mask[1], eos[0], mask[0], special_ids, files)


def _from_megatron(tokenizer_type: str, path: Path | None, **arguments: Any) -> Any:
    """megatron-core's tokenizer; imported here because importing megatron.core takes seconds."""
    from megatron.core.tokenizers import MegatronTokenizer

    try:
        return MegatronTokenizer.from_pretrained(
            tokenizer_path=None if path is None else str(path),
            metadata_path={"library": _LIBRARIES[tokenizer_type]},
            **arguments,
        )
    except Exception as error:  # megatron, transformers and SentencePiece each raise what they like
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: cannot be loaded as a {tokenizer_type} ({reason})") from error


def _existing(tokenizer_type: str, model: str | Path | None, folder: bool) -> Path:
    """``model`` as a path that exists: transformers would take any other name for a hub repository and download it."""
    kind = "folder" if folder else "file"
    if model is None:
        raise UserError(f"tokenizer_model: {tokenizer_type} needs the {kind} of the tokenizer; give --tokenizer-model")
    path = Path(model)
    if not (path.is_dir() if folder else path.is_file()):
        raise UserError(f"tokenizer_model: no {kind} {model}; give a local {kind}, nothing is downloaded")
    return path


def _names_its_class(folder: Path) -> bool:
    """Whether tokenizer_config.json names the tokenizer's class; otherwise transformers asks config.json."""
    file = folder / "tokenizer_config.json"
    return file.exists() and "tokenizer_class" in json.loads(file.read_text(encoding="utf-8"))
