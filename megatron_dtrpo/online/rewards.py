"""What rewards an answer: built-in functions, or the user's, ``(row, text)`` to a number or truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.evaluation.final_answer import final_number, last_boxed
from megatron_dtrpo.evaluation.verifiers import VERIFIERS, load_verifier


class Answer(NamedTuple):
    """An answer and what decoding it cost: the prompt's ``row``, its ``text``, ``tokens``, forward ``passes``, whether
    an end token ``ended`` it, and the longest that it could have been."""

    row: dict[str, Any]
    text: str
    tokens: int
    passes: int
    ended: bool
    longest: int


Reward = Callable[[Answer], float]


def well_formed(answer: Answer) -> float:
    """1 for an answer that ended by itself and states a final result, a boxed one or a number; else 0."""
    states = last_boxed(answer.text) is not None or final_number(answer.text) is not None
    return float(answer.ended and states)


def short(answer: Answer) -> float:
    """Minus the share of the longest answer that it used up: 0 to -1."""
    return -answer.tokens / answer.longest


def fast(answer: Answer) -> float:
    """Tokens that a forward pass wrote, on average (LightningRL)."""
    return answer.tokens / max(answer.passes, 1)


REWARDS: dict[str, Reward] = {"format": well_formed, "length": short, "speed": fast}


def load_reward(name: str) -> Reward:
    """A built-in reward or verifier by name, or ``module:function``. Raises UserError."""
    if name in REWARDS:
        return REWARDS[name]
    if name not in VERIFIERS and ":" not in name:
        raise UserError(f"rewards: {name!r}: give {', '.join([*VERIFIERS, *REWARDS])}, or module:function")
    return partial(_by_text, load_verifier(name))


def _by_text(function: Callable, answer: Answer) -> float:
    return function(answer.row, answer.text)


def reward_of(rewards: Sequence[Reward], answer: Answer) -> list[float]:
    """The values of all ``rewards``. Raises whatever one of them raises, and UserError for one that is no number."""
    values = []
    for reward in rewards:
        value = reward(answer)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise UserError(f"the reward is a {type(value).__name__}, not a number") from None
        if not math.isfinite(number):
            raise UserError(f"the reward is {number}")
        values.append(number)
    return values


def require_answers(names: Sequence[str], prompts: Sequence) -> None:
    """Raises UserError naming the first of ``prompts`` that lacks what a built-in verifier compares with."""
    for name in set(names) & set(VERIFIERS):
        for prompt in prompts:
            try:
                VERIFIERS[name](prompt.row, "")
            except UserError as error:
                raise UserError(f"{prompt.location}: reward {name}: {error}") from None
