"""A SentencePiece model as a tokenizer of the `tokenizers` library, whose ids for any text are the same.

transformers' own converters come close, not all the way: theirs read `</s>` and `<0x0A>` written in a text as the
tokens of that name, lose the dummy prefix before a user-defined symbol, and merge in another order where two merges
make the same piece. What is different here:

* User-defined symbols are cut out of the text before the model sees it, not made added tokens. Added tokens are
  found before the text is normalized, too early.
* Special tokens are never looked for in a text. That is a setting of transformers', `split_special_tokens`.
* The pieces that SentencePiece itself never finds in a text (control symbols, bytes) are kept from being found.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from megatron_dtrpo.errors import UserError

SPACE = "\u2581"  # SentencePiece writes a space so
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # kinds of pieces
_UNIGRAM, _BPE = 1, 2  # kinds of models
# For pieces that no text may become. Lower than any text's score, and few enough digits that a sum stays exact.
_NEVER = -1e4


def read_model(file: Path) -> Any:
    """The model's protocol buffer. Raises UserError."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"{file}: not a SentencePiece model ({' '.join(str(error).split())})") from None
    return model


def control_pieces(model: Any) -> list[str]:
    return [piece.piece for piece in model.pieces if piece.type == _CONTROL]


def is_unigram(model: Any) -> bool:
    return model.trainer_spec.model_type == _UNIGRAM


def tokenizer_from_sentencepiece(model: Any, where: str | Path) -> Any:
    """The `tokenizers.Tokenizer` of a model, without added tokens.

    Raises:
        UserError: naming ``where`` and what of the model cannot be carried over exactly.
    """
    from tokenizers import Regex, Tokenizer, pre_tokenizers

    _refuse_what_is_not_exact(model, where)
    pieces, cuts = _MODELS[model.trainer_spec.model_type](model)
    tokenizer = Tokenizer(pieces)
    tokenizer.normalizer = _normalizer(model)
    tokenizer.decoder = _decoder(model)
    symbols = sorted((p.piece for p in model.pieces if p.type == _USER_DEFINED), key=len, reverse=True)
    # Of several symbols the longest that fits, as SentencePiece does.
    patterns = [*(["|".join(map(re.escape, symbols))] if symbols else []), *cuts]
    if patterns:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        )
    return tokenizer


def _refuse_what_is_not_exact(model: Any, where: str | Path) -> None:
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    lacking = {
        "its kind is neither BPE nor unigram": trainer.model_type not in _MODELS,
        f"it normalizes text ({normalizer.name}), which only the normalization 'identity' does not": bool(
            normalizer.precompiled_charsmap or model.denormalizer_spec.precompiled_charsmap
        ),
        "it leaves spaces as they are (escape_whitespaces is false)": not normalizer.escape_whitespaces,
        "it appends spaces (treat_whitespace_as_suffix)": trainer.treat_whitespace_as_suffix,
        "it has unused pieces": any(piece.type == _UNUSED for piece in model.pieces),
        "a character of a piece is no piece itself": is_unigram(model)
        and not _letters(model).issuperset("".join(piece.piece for piece in model.pieces if piece.type == _NORMAL)),
    }
    for reason, is_lacking in lacking.items():
        if is_lacking:
            raise UserError(
                f"{where}: no exact equivalent for transformers: {reason}; leave the tokenizer out with --no-tokenizer"
            )


def _normalizer(model: Any) -> Any:
    """In SentencePiece's order: it strips spaces before the dummy prefix is there, and its own sign for one after."""
    from tokenizers import Regex, normalizers

    spec, replace = model.normalizer_spec, normalizers.Replace
    steps = [replace(Regex(r"\A +"), ""), replace(Regex(" {2,}"), " ")] if spec.remove_extra_whitespaces else []
    steps += [replace(" ", SPACE)]
    steps += [normalizers.Prepend(SPACE)] if spec.add_dummy_prefix else []  # an empty text stays empty
    steps += [replace(Regex(rf"{SPACE}+\z"), "")] if spec.remove_extra_whitespaces else []
    return normalizers.Sequence(steps)


def _decoder(model: Any) -> Any:
    """Bytes that are no UTF-8 become another number of replacement characters than SentencePiece's."""
    from tokenizers import Regex, decoders

    trainer, spec = model.trainer_spec, model.normalizer_spec
    (unknown,) = [piece.piece for piece in model.pieces if piece.type == _UNKNOWN]
    surface = decoders.Replace(Regex(rf"\A{re.escape(unknown)}\z"), trainer.unk_surface)
    spaces, join = decoders.Replace(SPACE, " "), [decoders.ByteFallback(), decoders.Fuse()]
    if not (spec.add_dummy_prefix or spec.remove_extra_whitespaces):
        return decoders.Sequence([surface, spaces, *join])
    # The first piece loses one space; all of them, where extra spaces are removed.
    leading = f"{SPACE}+" if spec.remove_extra_whitespaces else SPACE
    return decoders.Sequence([surface, *join, decoders.Replace(Regex(rf"\A{leading}"), ""), spaces])


def _bpe(model: Any) -> tuple[Any, list[str]]:
    """The model and where to cut a text that as a whole is the name of a piece and must not become it."""
    from tokenizers.models import BPE

    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    arguments = {
        "vocab": vocabulary,
        "merges": _merges({p.piece: p.score for p in model.pieces if p.type == _NORMAL}),
        "unk_token": next(p.piece for p in model.pieces if p.type == _UNKNOWN),
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
    }
    merging = BPE(**arguments)
    cuts = {}  # a piece: where its first token ends
    for piece in (p.piece for p in model.pieces if p.type != _USER_DEFINED):
        end = merging.tokenize(piece)[0].offsets[1]  # in bytes
        begin = max(1, len(piece.encode()[:end].decode(errors="ignore")))
        if begin < len(piece):
            cuts[piece] = begin
    # A user-defined symbol has been isolated and cannot be merged from characters: it is looked up as a whole.
    return BPE(**arguments, ignore_merges=True), [_whole_texts(cuts)] * _passes(cuts)


def _whole_texts(cuts: dict[str, int]) -> str:
    begins = (f"{re.escape(piece[:begin])}(?={re.escape(piece[begin:])}\\z)" for piece, begin in cuts.items())
    return rf"\A(?:{'|'.join(begins)})"


def _passes(cuts: dict[str, int]) -> int:
    """How often to cut: what a cut leaves may be such a piece again."""
    passes, left = 0, set(cuts)
    while left:
        passes, left = passes + 1, {piece[cuts[piece] :] for piece in left} & cuts.keys()
    return passes


def _merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every way to join two pieces to a third, the best score first.

    Of equally good merges SentencePiece does the leftmost. They make the same piece, so they compete where one's right
    half is the other's left half: one whose left half also ends the piece comes after those that do not.
    """
    merges = []
    for piece in sorted(scores, key=scores.__getitem__, reverse=True):
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        halves = [(left, right) for left, right in halves if left in scores and right in scores]
        merges += sorted(halves, key=lambda pair: piece.endswith(pair[0]))
    return merges


def _unigram(model: Any) -> tuple[Any, list[str]]:
    """The model and where to cut the names of pieces that no text may become."""
    from tokenizers.models import Unigram

    pieces = [(p.piece, p.score if p.type == _NORMAL else 0.0 if p.type == _USER_DEFINED else _NEVER)
              for p in model.pieces]  # fmt: skip
    letters, cuts = _letters(model), []
    for piece in model.pieces:
        if piece.type not in (_NORMAL, _USER_DEFINED) and not letters.issuperset(piece.piece):
            # A letter without a piece costs more than _NEVER. But it is in no piece: a cut beside it changes nothing.
            known = [letter in letters for letter in piece.piece]
            begin = next((i for i in range(1, len(known)) if known[i - 1] != known[i]), 1)
            cuts.append(f"{re.escape(piece.piece[:begin])}(?={re.escape(piece.piece[begin:])})")
    (unknown,) = [number for number, piece in enumerate(model.pieces) if piece.type == _UNKNOWN]
    return Unigram(pieces, unknown, model.trainer_spec.byte_fallback), ["|".join(cuts)] * bool(cuts)


def _letters(model: Any) -> set[str]:
    return {piece.piece for piece in model.pieces if piece.type == _NORMAL and len(piece.piece) == 1}


_MODELS = {_UNIGRAM: _unigram, _BPE: _bpe}
