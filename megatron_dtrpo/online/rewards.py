"""What rewards an answer: built-in functions, or the user's, ``(row, text)`` to a number or truth."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from megatron_dtrpo.errors import UserError, one_line
from megatron_dtrpo.evaluation.final_answer import final_number, last_boxed
from megatron_dtrpo.evaluation.verifiers import VERIFIERS, load_verifier, missing_answer


class Answer(NamedTuple):
    """An answer and what decoding it cost: the prompt's ``row``, its ``text`` and ``tokens``, forward ``passes``,
    whether an end token ``ended`` it, the longest that it could have been, and all tokens that were ``written``: under
    full attention those behind its end too."""

    row: dict[str, Any]
    text: str
    tokens: int
    passes: int
    ended: bool
    longest: int
    written: int


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
    return answer.written / max(answer.passes, 1)


REWARDS: dict[str, Reward] = {"format": well_formed, "length": short, "speed": fast}


def load_reward(name: str) -> Reward:
    """A built-in reward or verifier by name, or ``module:function``. Raises UserError."""
    if name in REWARDS:
        return REWARDS[name]
    if name not in VERIFIERS and ":" not in name:
        raise UserError(f"rewards: {name!r}: give {', '.join([*VERIFIERS, *REWARDS])}, or module:function")
    try:
        return partial(_by_text, load_verifier(name))
    except UserError as error:
        raise UserError(f"rewards: {str(error).removeprefix('verifier ')}") from None


def _by_text(function: Callable, answer: Answer) -> float:
    return function(answer.row, answer.text)


def reward_of(rewards: Mapping[str, Reward], answer: Answer) -> list[float]:
    """The values of all ``rewards``. Raises UserError naming the first that has none, and why."""
    return [_value(name, reward, answer) for name, reward in rewards.items()]


def _value(name: str, reward: Reward, answer: Answer) -> float:
    try:
        value = reward(answer)
    except UserError as error:
        raise UserError(f"reward {name}: {error}") from None
    except Exception as error:  # the user's code
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        raise UserError(f"reward {name} raised {type(error).__name__} in {where}: {one_line(error)}") from None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise UserError(f"reward {name} is a {type(value).__name__}, not a number") from None
    if not math.isfinite(number):
        raise UserError(f"reward {name} is {number}")
    return number


def without_answer(names: Sequence[str], row: dict[str, Any]) -> str | None:
    """Why a built-in verifier among ``names`` has nothing to compare with in a prompt's ``row``; None where it has."""
    problems = {name: missing_answer(name, row) for name in names}
    return next((f"reward {name}: {problem}" for name, problem in problems.items() if problem), None)
