"""The text of a response while it is written: what a client may see of it already, and where a stop string ends it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from megatron_dtrpo.data.tokenizer import Tokenizer

LEAST = -9999.0  # OpenAI's for a log-probability that JSON cannot hold


class TokenScore(NamedTuple):
    """A token's text, the log of the confidence with which it was written, and where its text begins."""

    text: str
    logprob: float
    offset: int


class Answer:
    """One response.

    Attributes:
        text: so far, without what may still become a stop string or a character.
        count: tokens of the finished blocks; passes: that they took.
        finish: None, ``stop`` (an end token or a stop string) or ``length``.
        scores: of the tokens of `text`, where they are asked for.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), scored: bool = False):
        self.tokenizer, self.stops, self.scored = tokenizer, stops, scored
        self.text, self.count, self.passes = "", 0, 0
        self.finish: str | None = None
        self.scores: list[TokenScore] = []

    def take(
        self, tokens: Sequence[int], confidence: Sequence[float], passes: int, ended: bool | None = None
    ) -> tuple[str, list[TokenScore]]:
        """Takes the response so far, of whole blocks, and returns what is new of its text and scores.

        Args:
            ended: by an end token, or not; None: it is not finished.
        """
        self.count, self.passes = len(tokens), passes
        text = self.tokenizer.decode(tokens)
        cut = min((place for place in map(text.find, self.stops) if place >= 0), default=None)
        if cut is not None:
            text, self.finish = text[:cut], "stop"
        elif ended is not None:
            self.finish = "stop" if ended else "length"
        else:
            text = text[: _certain(text, self.stops)]
        said, self.text = len(self.text), max(self.text, text, key=len)
        return self.text[said:], self._new_scores(tokens, confidence, cut is not None) if self.scored else []

    def _new_scores(self, tokens: Sequence[int], confidence: Sequence[float], is_cut: bool) -> list[TokenScore]:
        first, offset = len(self.scores), sum(len(score.text) for score in self.scores)
        new = []
        for place, text in enumerate(self.tokenizer.token_texts(tokens, first), first):
            is_shown = offset < len(self.text) if is_cut else self.finish or offset + len(text) <= len(self.text)
            if not is_shown:
                break
            new.append(TokenScore(text, _log(confidence[place]), offset))
            offset += len(text)
        self.scores += new
        return new


def _certain(text: str, stops: Sequence[str]) -> int:
    """Characters of ``text`` that stay whatever follows: neither bytes of an unfinished character, nor the beginning of
    a stop string."""
    end = len(text.rstrip("\ufffd"))
    held = (size for stop in stops for size in range(len(stop) - 1, 0, -1) if text[:end].endswith(stop[:size]))
    return end - max(held, default=0)


def _log(confidence: float) -> float:
    return max(math.log(min(confidence, 1.0)), LEAST) if confidence > 0 else LEAST
