"""Preference pairs of a policy's own answers: which answer is preferred to which, and the rows that say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_dtrpo.data.json_line import json_line
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.files import write_atomically
from megatron_dtrpo.inference.recording import discarded_rows

if TYPE_CHECKING:
    from megatron_dtrpo.data.prompts import Prompt


class Rewarded(NamedTuple):
    """An answer, its text and its reward; right is one above 0."""

    completion: Completion
    text: str
    reward: float


def different(completions: Sequence[Completion]) -> list[int]:
    """The place of the first of each group of equal answers."""
    places = {tuple(completions[place].tokens): place for place in reversed(range(len(completions)))}
    return list(places.values())[::-1]


def preferences(answers: Sequence[Rewarded]) -> list[tuple[Rewarded, Rewarded]]:
    """Chosen and rejected, the best with the worst, the next best with the next worst, no answer twice; of equal ones
    the first come first. An answer that never ends is no example to follow, and makes no pair where it is right."""
    ended = [answer for answer in answers if answer.completion.ended]
    wrong = [answer for answer in answers if answer.completion.ended or answer.reward <= 0]
    pairs = zip(sorted(ended, key=lambda a: -a.reward), sorted(wrong, key=lambda a: a.reward), strict=False)
    return list(takewhile(lambda pair: pair[0].reward > pair[1].reward, pairs))


@dataclass
class Pairs:
    """Pairs of the answers to some prompts, at most ``most`` of each, as lines of a file; and counts of different
    answers, of those that are right, and of those of these that never end; of prompts, and of those that have a
    pair."""

    most: int
    lines: list[str] = field(default_factory=list)
    answers: int = 0
    right: int = 0
    endless: int = 0
    prompts: int = 0
    paired: int = 0

    def add(self, prompt: Prompt, answers: Sequence[Rewarded]) -> None:
        """``answers``: all of a prompt's that differ and have a reward."""
        right = [answer for answer in answers if answer.reward > 0]
        self.prompts, self.answers, self.right = self.prompts + 1, self.answers + len(answers), self.right + len(right)
        self.endless += sum(not answer.completion.ended for answer in right)
        pairs = preferences(answers)[: self.most]
        self.paired += bool(pairs)
        self.lines += [json_line(pair_row(prompt, *pair)) for pair in pairs]

    @property
    def counts(self) -> str:
        without_end = f", of which {self.endless} have no end token and make no pair" if self.endless else ""
        return f"{self.right} right{without_end}, {self.answers - self.right} wrong"

    def write(self, path: Path) -> None:
        """Raises UserError."""
        try:
            write_atomically(path, "".join(self.lines))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def pair_row(prompt: Prompt, chosen: Rewarded, rejected: Rewarded) -> dict:
    """A preference row: the prompt's own row, both answers as text, and exactly as they were decoded, with the
    log-likelihood of everything that was written."""
    row = {key: value for key, value in prompt.row.items() if key not in ("messages", "completion")}
    row |= {"prompt": prompt.asked, "prompt_ids": prompt.ids}
    for name, (completion, text, _) in (("chosen", chosen), ("rejected", rejected)):
        row[name] = [{"role": "assistant", "content": text}] if isinstance(prompt.asked, list) else text
        row |= {f"{name}_ids": completion.tokens, f"{name}_steps": completion.steps}
        row[f"{name}_discarded"] = discarded_rows(completion)
        row[f"{name}_log_likelihood"] = completion.log_likelihood()
    return row
