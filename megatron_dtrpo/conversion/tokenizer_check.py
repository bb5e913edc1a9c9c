"""Whether transformers reads an exported tokenizer as we read ours, tried on texts chosen to tell them apart."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import UserError

COUNT = 3000
ADVICE = "leave the tokenizer out with --no-tokenizer"
# Of one to four bytes, and marks that normalization would move.
_LETTERS = "ab019 \n\t<>/[]\u2581\u00e9\u0301\u4e2d\U0001f600\u00ad\ufeff\x00"


def check_tokenizer(folder: Path, ours: Tokenizer, where: str | Path, may_tie: bool = False) -> list[str]:
    """Compares the tokenizer in a Hugging Face folder with ours. Returns what the user should know, a line each.

    ``may_tie``: the same tokens in another order are said, not refused.

    Raises:
        UserError: naming ``where`` and the first text that is read otherwise.
    """
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if (theirs.eos_token_id, theirs.mask_token_id, len(theirs)) != (ours.eos_id, ours.mask_id, ours.vocab_size):
        raise UserError(f"{where}: transformers does not find the special tokens of this tokenizer; {ADVICE}")
    texts = sample_texts([ours.decode([number]) for number in range(ours.vocab_size)], sorted(theirs.get_vocab()))
    tied = []
    for text, mine, found in zip(texts, ours.encode_batch(texts), theirs(texts)["input_ids"], strict=True):
        if may_tie and mine != found and is_tie(mine, found):
            tied.append(text)
        elif mine != found or theirs.decode(mine, skip_special_tokens=True) != ours.decode(mine):
            raise UserError(f"{where}: transformers would read {text!r} otherwise than this tokenizer does; {ADVICE}")
    if not tied:
        return []
    return [
        f"the tokenizer has equally good ways to cut a text like {min(tied, key=len)!r}, and transformers may take "
        f"another one: it did for {len(tied)} of {len(texts)} texts tried"
    ]


def is_tie(mine: list[int], found: list[int]) -> bool:
    """Whether both are the same pieces in another order.

    A unigram model takes the pieces with the best sum of scores, which another order does not change: SentencePiece
    adds 32-bit numbers, `tokenizers` 64-bit ones, and rounding decides. It takes repetition: "aaaa" as "aaa" and "a".
    """
    return sorted(mine) == sorted(found)


def sample_texts(pieces: Sequence[str], names: Sequence[str], count: int = COUNT, seed: int = 0) -> list[str]:
    """``count`` texts: of the vocabulary's own ``pieces``, of single letters, of one letter many times over, and of
    the ``names`` of tokens, which are nothing special in a text unless the tokenizer says so."""
    rng = random.Random(seed)

    def some(of: Sequence[str], most: int) -> str:
        return "".join(rng.choices(of, k=rng.randint(1, most)))

    kinds = (
        lambda: some(pieces, 12),
        lambda: some(_LETTERS, 40),
        lambda: some(pieces, 3) + rng.choice(_LETTERS) * rng.randint(2, 30) + some(pieces, 3),
        lambda: some(names, 3),
        lambda: some(pieces, 2) + some(names, 2) + some(_LETTERS, 2),
        lambda: " " * rng.randint(0, 3) + some(pieces, 6) + " " * rng.randint(0, 3) + some(names, 1),
    )
    return ["", " ", "   ", *(kinds[number % len(kinds)]() for number in range(count))]
