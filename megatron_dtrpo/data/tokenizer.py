"""Text to token ids and back, with the two ids that block diffusion needs.

The libraries of `data.tokenizer_libraries` tokenize. This adds what training needs on top: a mask id and an end id
that are certain to exist, prompts and responses rendered the way TRL renders them, and a folder that a checkpoint can
carry. Nothing is ever downloaded.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_dtrpo.data import chat
from megatron_dtrpo.data.chat import Ends, Piece, TemplateForm
from megatron_dtrpo.data.record import TEMPLATE_SETTINGS, Messages, TemplateInputs
from megatron_dtrpo.data.tokenizer_libraries import LIBRARIES, Library
from megatron_dtrpo.errors import UserError, one_line

METADATA_FILE = "tokenizer_metadata.json"  # the name megatron-core looks for
# Megatron-LM's name of a tokenizer: megatron-core's name of the library behind it.
_MEGATRON_LIBRARIES = {
    "HuggingFaceTokenizer": "huggingface",
    "SentencePieceTokenizer": "sentencepiece",
    "ByteLevelTokenizer": "byte-level",
}
TOKENIZER_TYPES = tuple(LIBRARIES)
NO_MASK = -1  # the mask id of a tokenizer without a mask token, as autoregressive models have: the id of no token


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """One tokenizer and the ids that training needs. Build it with ``build_tokenizer`` or ``load_tokenizer``.

    ``vocab_size`` counts every token, added ones included, without padding for tensor parallelism. ``eos_id`` closes
    every response. ``mask_id`` is the noise token, `NO_MASK` where there is none. ``files`` are what the tokenizer was
    read from.
    """

    tokenizer_type: str
    backend: Library
    vocab_size: int
    eos_id: int
    mask_id: int
    eos_token: str
    mask_token: str | None
    special_ids: frozenset[int]
    files: tuple[Path, ...]

    @property
    def _library(self) -> Any:
        """The transformers or SentencePiece object; None for bytes."""
        return self.backend.library

    @property
    def _chat_template(self) -> str | None:
        return getattr(self._library, "chat_template", None)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._chat_template)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``; no token is added before or after it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text. One call for many texts lets a Hugging Face tokenizer use every core."""
        return self.backend.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``. Special tokens, the mask included, and ids of a padded vocabulary have no text."""
        return self.backend.decode([i for i in map(int, ids) if self._has_text(i)])

    def _has_text(self, token: int) -> bool:
        return 0 <= token < self.vocab_size and token not in self.special_ids

    def token_id(self, token: str) -> int | None:
        """The id of one token by its name in the vocabulary, special ones included; None if there is no such token."""
        return self.backend.token_id(token)

    @functools.cached_property
    def special_names(self) -> dict[int, str]:
        """Names of the special tokens of a Hugging Face vocabulary, by id; other libraries write none from text."""
        added = getattr(self._library, "added_tokens_decoder", {})
        return {number: str(token) for number, token in added.items() if token.special}

    def token_texts(self, ids: Sequence[int], start: int = 0) -> list[str]:
        """The text that each of ``ids`` from place ``start`` on adds; from 0 on they join to ``decode(ids)``. Tokens
        without text add ''.

        A character belongs to the token that completes it. Tokens cannot be decoded one by one, because the bytes of
        a character may be spread over several; so all tokens up to each are. The time is quadratic in the number of
        tokens with text: 0.1 s for a thousand.
        """
        whole, texts = self.decode(ids), [""] * (len(ids) - start)
        read = [token for token in map(int, ids[:start]) if self._has_text(token)]
        end = len(os.path.commonprefix([self.backend.decode(read), whole]))
        for place, token in enumerate(map(int, ids[start:])):
            if self._has_text(token):
                read.append(token)
                agreed = len(os.path.commonprefix([self.backend.decode(read), whole]))
                texts[place], end = whole[end:agreed], max(end, agreed)
        return texts

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
        form = self.template_form() if self._chat_template else None
        return chat.render_response(
            self._apply_template, self._ends(), response, prompt, apply_chat_template, inputs, form.tail if form else ""
        )

    def unwritten_keys(self, messages: Messages, inputs: TemplateInputs) -> list[str]:
        """Keys of ``messages`` that the chat template does not write (see `chat.unwritten_keys`)."""
        keys, form = chat.unusual_keys(messages), self.template_form()
        if not keys:
            return []
        words = _words(str(self._chat_template)) | chat.MESSAGE_KEYS  # transformers gives a thought under every name
        unread = keys - words if form and not form.writes_keys else set()
        return chat.unwritten_keys(self._apply_template, messages, inputs, unread)

    def template_form(self) -> TemplateForm | None:
        """How the chat template writes an exchange; None where it refuses one. Raises UserError where it is damaged."""
        form = _form(self, str(self._chat_template))
        if isinstance(form, UserError):
            raise form
        return form

    def _ends(self) -> Ends:
        """What may end an answer: no token that a message begins with."""
        form = self.template_form() if self._chat_template else None
        return Ends(self.eos_token, frozenset(s for s in self.special_names.values() if form and s not in form.start))

    def note_on_end(self) -> str | None:
        """A line for the user where the chat template does not end an answer with the end token."""
        try:
            form = self.template_form() if self._chat_template else None
        except UserError:  # rows that it refuses are errors of their own
            return None
        if form is None or self.eos_token in form.tail:
            return None
        kept = self._ends().of_answer(form.tail)
        rest = form.tail[len(kept) :].strip()
        left_out = f"; {rest!r} behind it is not learned" if rest else ""
        name = max((s for s in self.special_names.values() if kept.endswith(s)), key=len, default=None)
        if name is not None:
            return (
                f"the chat template ends an answer with {name}, the end token is {self.eos_token}: answers as messages "
                f"end with both; --eos-token '{name}' ends them with {name} alone{left_out}"
            )
        if not rest:
            return None
        return f"the chat template writes no end of an answer: answers as messages end with {self.eos_token}{left_out}"

    def _apply_template(self, messages: Messages, **how: Any) -> str:
        """``how``: the settings of `chat.Template`, and the template's own variables."""
        if not self._chat_template:
            raise UserError(f"this {self.tokenizer_type} has no chat template; give prompts and responses as text")
        self._check_variables(how.keys() - TEMPLATE_SETTINGS)
        self.template_form()
        return self._render(messages, **how)

    def _render(self, messages: Messages, **how: Any) -> str:
        import jinja2

        try:
            return self._library.apply_chat_template(messages, tokenize=False, **how)
        except jinja2.TemplateSyntaxError as error:
            raise _DamagedTemplate(
                f"the chat template is damaged, line {error.lineno}: {one_line(error.message)}; fetch its file again"
            ) from None
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            raise UserError(f"the chat template refuses these messages: {one_line(error)}") from None

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
            "library": _MEGATRON_LIBRARIES[self.tokenizer_type],  # what megatron-core reads; the rest is ours
            "tokenizer_type": self.tokenizer_type,
            "mask_token": self.mask_token,
            "eos_token": self.eos_token,
        }
        (directory / METADATA_FILE).write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


class _DamagedTemplate(UserError):
    """A chat template that writes no messages whatever."""


@functools.lru_cache
def _form(tokenizer: Tokenizer, chat_template: str) -> TemplateForm | UserError | None:
    """What `Tokenizer.template_form` gives or raises, of the ``chat_template`` that the tokenizer has now."""
    try:
        form = chat.form_of(tokenizer._render)
    except _DamagedTemplate as error:
        return error
    except UserError:
        return None
    if form.unwritten:
        roles = " and the ".join(form.unwritten)
        return UserError(f"the chat template does not write the words of the {roles}; fetch its file again")
    return form


@functools.lru_cache
def _words(template: str) -> set[str]:
    return set(re.findall(r"\w+", template))


@functools.lru_cache
def _variables(template: str) -> set[str]:
    """The names that a chat template reads and does not set itself; of one that only transformers can parse, all its
    words."""
    import jinja2
    from jinja2 import meta

    try:
        parsed = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError:
        return _words(template)
    return meta.find_undeclared_variables(parsed)


def build_tokenizer(
    tokenizer_type: str,
    tokenizer_model: str | Path | None = None,
    mask_token: str | None = None,
    eos_token: str | None = None,
    needs_mask: bool = True,
) -> Tokenizer:
    """Build a tokenizer by Megatron-LM's name for it.

    ``HuggingFaceTokenizer`` takes a folder, ``SentencePieceTokenizer`` a ``.model`` file, ``ByteLevelTokenizer``
    nothing. The mask token defaults to a family's that is in the vocabulary (``|<MASK>|``, ``<MASK>``), then to the
    tokenizer's own, or for SentencePiece to the symbol ``[MASK]``; the end token to the tokenizer's own. Without
    ``needs_mask`` a tokenizer may have no mask token. Raises UserError where a file or token is missing.
    """
    if tokenizer_type not in LIBRARIES:
        raise UserError(f"tokenizer_type: unknown {tokenizer_type!r}; use one of {', '.join(TOKENIZER_TYPES)}")
    path = _existing(tokenizer_type, tokenizer_model)
    try:
        backend = LIBRARIES[tokenizer_type](path)
    except UserError:
        raise
    except Exception as error:  # transformers and SentencePiece raise what they like
        raise UserError(f"{path}: cannot be loaded as a {tokenizer_type} ({one_line(error)})") from error
    if mask_token is None and (needs_mask or backend.token_id(backend.mask_token or "") is not None):
        mask_token = backend.mask_token
    eos_token = backend.eos_token if eos_token is None else eos_token
    where = str(path or tokenizer_type)
    has_mask = needs_mask or mask_token is not None
    mask_id = _known_id(backend, mask_token, "mask", where) if has_mask else NO_MASK
    eos_id = _known_id(backend, eos_token, "end", where)
    if mask_id == eos_id:
        raise UserError(f"{where}: {mask_token!r} is both mask and end token; name another with --mask-token")
    special_ids = backend.special_ids | ({mask_id, eos_id} - {NO_MASK})
    return Tokenizer(
        tokenizer_type, backend, backend.vocab_size, eos_id, mask_id, eos_token, mask_token, special_ids, backend.files
    )


def load_tokenizer(directory: str | Path, mask_token: str | None = None, eos_token: str | None = None) -> Tokenizer:
    """Rebuild the tokenizer that ``Tokenizer.save`` wrote into ``directory``, with other special tokens where given. It
    may have no mask token if it had none.

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
    return build_tokenizer(kind, model, mask_token, eos_token, needs_mask=mask_token is not None)


def _known_id(backend: Library, token: str | None, name: str, where: str) -> int:
    """The id of the mask or end token. Raises UserError where there is none."""
    found = None if token is None else backend.token_id(token)
    if found is None:
        missing = f"has no {name} token" if token is None else f"the {name} token {token!r} is not in the vocabulary"
        flag = "--mask-token" if name == "mask" else "--eos-token"
        raise UserError(f"{where}: {missing}; name one that is with {flag}")
    return found


def _existing(tokenizer_type: str, model: str | Path | None) -> Path | None:
    """``model`` as a path that exists: transformers would take any other name for a hub repository and download it."""
    if tokenizer_type == "ByteLevelTokenizer":
        return None
    kind, exists = ("folder", Path.is_dir) if tokenizer_type == "HuggingFaceTokenizer" else ("file", Path.is_file)
    if model is None:
        raise UserError(f"tokenizer_model: {tokenizer_type} needs the {kind} of the tokenizer; give --tokenizer-model")
    if not exists(Path(model)):
        raise UserError(f"tokenizer_model: no {kind} {model}; give a local {kind}, nothing is downloaded")
    return Path(model)
