"""Which token wrote which part of a text, found with nothing but the tokenizer's own ``decode``.

Tokens cannot be decoded one by one: the bytes of one character may be spread over several, and SentencePiece drops
the space that begins a text. Every piece is therefore a slice of the whole decoded text, so that the pieces join to
it whatever happens, and ends where the text of the tokens up to it stops agreeing with the whole. To find that place
a few tokens before it are decoded again; where such a window reads otherwise than the whole does, all tokens before
it are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterator, Sequence

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are not, or not yet, a character
_LONGEST = 4  # bytes of a character, so tokens that one may be spread over


def split_text(decode: Callable[[Sequence[int]], str], ids: Sequence[int], silent: Container[int] = ()) -> list[str]:
    """The part of ``decode(ids)`` that each id adds: one piece per id, joined they are ``decode(ids)``.

    A character belongs to the token that completes it. ``silent`` are the ids known to have no text: a response may
    end in thousands of them. The time is linear in the number of ids, and quadratic only in the length of a run of
    spaces that a SentencePiece model made to remove them would drop, were it the beginning of a text.
    """
    ids = [int(i) for i in ids]
    pieces = [""] * len(ids)
    speaking = [i for i, token in enumerate(ids) if token not in silent]
    for i, piece in zip(speaking, _slices(decode, [ids[i] for i in speaking]), strict=True):
        pieces[i] = piece
    return pieces


def _slices(decode: Callable[[Sequence[int]], str], ids: list[int]) -> Iterator[str]:
    """Consecutive slices of ``decode(ids)``, one per id."""
    text, end = decode(ids), 0  # text[:end] has been given to tokens
    # The window begins at ids[start]. Its tokens before ids[known] read as `head`, which ends at text[done].
    start = known = done = 0
    head = ""
    for i in range(len(ids)):
        window = decode(ids[start : i + 1])
        fresh = window[len(head) :]
        if not (window.startswith(head) and text.startswith(fresh.rstrip(UNFINISHED), done)):
            start, done, head = 0, 0, ""
            fresh = decode(ids[: i + 1])
        agreed = len(os.path.commonprefix([fresh, text[done : done + len(fresh)]]))
        until = len(text) if i + 1 == len(ids) else max(end, done + agreed)
        yield text[end:until]
        end = until
        # Move the window on, but never past a character that the next token may complete.
        settled = i + 1 - _LONGEST if fresh.endswith(UNFINISHED) else i + 1
        if agreed == len(fresh) and (settled == i + 1 or settled - known >= _LONGEST):
            done += len(decode(ids[start:settled])) - len(head)
            # Tokens that read as nothing cannot be a head: what follows them would count as the beginning of a text.
            starts = (known, max(start, known - _LONGEST), start)
            start, head = next(((s, h) for s in starts if (h := decode(ids[s:settled]))), (start, ""))
            known = settled
