"""Who says whether a completion is right: a program, the built-in one or the user's.

A verifier is a function ``(row, completion text) -> bool``, where ``row`` is the prompt's row of the data file.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from megatron_dtrpo.errors import UserError, one_line
from megatron_dtrpo.evaluation import formulas
from megatron_dtrpo.evaluation.final_answer import final_number, last_boxed, read_number

NAMED_FAILURES = 5

Verifier = Callable[[dict[str, Any], str], bool]


def numeric(row: dict[str, Any], completion: str, field: str = "answer") -> bool:
    """Whether the completion's final number is that of the row's ``answer``: one number, or a worked solution that
    ends in ``#### 42``.

    An answer that is a formula is judged by math-verify where that is installed. Raises UserError for every other row:
    a guess at its answer would make wrong responses right ones.
    """
    answer = _stated_answer(row, field)
    expected = read_number(answer)
    if expected is not None:
        found = final_number(completion)
        return found is not None and expected.equals(found)
    if not formulas.is_formula(answer):
        raise UserError(f"its {field!r} is not one number: {answer[:40]!r}; give one number, or '... #### 42'")
    return formulas.same(answer, completion)


def _stated_answer(row: dict[str, Any], field: str) -> str:
    """The answer of a row as text, without the solution before it."""
    value = row.get(field)
    if value is None:
        raise UserError(f"the row has no {field!r} to compare with")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"its {field!r} is a {type(value).__name__}, not one number")
    text = str(value)
    boxed = None if "####" in text else last_boxed(text)
    return text.rpartition("####")[2].strip() if boxed is None else boxed.strip()


VERIFIERS: dict[str, Verifier] = {"numeric": numeric}


def load_verifier(name: str) -> Verifier:
    """A built-in verifier by name, or ``module:function`` of the user's, found from the current folder too."""
    if name in VERIFIERS:
        return VERIFIERS[name]
    module, separator, function = name.partition(":")
    if not separator or not module or not function:
        raise UserError(f"verifier {name!r}: give {' or '.join(VERIFIERS)}, or module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise UserError(f"verifier {name!r}: no module {error.name!r}; run from its folder or install it") from None
    except AttributeError:
        raise UserError(f"verifier {name!r}: module {module} has no {function!r}") from None
    except Exception as error:  # whatever the user's module does at import
        raise UserError(f"verifier {name!r}: importing {module} failed: {_short(error)}") from None
    if not callable(found):
        raise UserError(f"verifier {name!r}: {function} is not a function")
    if not _takes_row_and_text(found):
        raise UserError(f"verifier {name!r}: {function} must take two arguments, the row and the text of an answer")
    return found


def _takes_row_and_text(function: Callable) -> bool:
    """Whether it can be called so, as far as its signature says."""
    try:
        inspect.signature(function).bind({}, "")
    except TypeError:
        return False
    except ValueError:  # of a built-in function, that has none
        pass
    return True


def missing_answer(name: str, row: dict[str, Any]) -> str | None:
    """Why the built-in verifier ``name`` has nothing to compare with in a ``row``; None where it has, and of the user's
    own verifiers, which nobody else knows."""
    try:
        VERIFIERS[name](row, "")
    except KeyError:
        return None
    except UserError as error:
        return str(error)
    return None


def require_some_answer(name: str, prompts: Sequence[Any]) -> None:
    """Raises UserError, before anything is decoded, where no row of the ``prompts`` has what verifier ``name`` compares
    with."""
    problems = [missing_answer(name, prompt.row) for prompt in prompts]
    if problems and None not in problems:
        count = (
            f"none of the {len(prompts)} prompts can be judged" if len(prompts) > 1 else "the prompt cannot be judged"
        )
        raise UserError(f"--verifier {name}: {count}: {prompts[0].location}: {problems[0]}")


class Judge:
    """Applies a verifier and keeps count of what it could not judge."""

    def __init__(self, verifier: Verifier):
        self.verifier = verifier
        self.failures: list[str] = []

    def __call__(self, row: dict[str, Any], location: str, completion: str) -> bool | None:
        """Whether ``completion`` is right; None, noted in ``failures``, where the verifier raises."""
        try:
            verdict = self.verifier(row, completion)
        except UserError as error:
            self.failures.append(f"{location}: {error}")
            return None
        except Exception as error:  # a verifier is the user's code: one bad row must not end the run
            self.failures.append(f"{location}: the verifier raised {_short(error)}")
            return None
        if type(verdict).__name__ not in ("bool", "bool_") and verdict not in (0, 1):
            self.failures.append(f"{location}: the verifier returned a {type(verdict).__name__}, not True or False")
            return None
        return bool(verdict)

    def report(self, what_becomes_of_them: str = "are left out") -> None:
        """Says on standard error what could not be judged: the first failures by name, and how many there are."""
        for failure in self.failures[:NAMED_FAILURES]:
            print(f"warning: {failure}", file=sys.stderr)
        if self.failures:
            count = len(self.failures)
            print(f"warning: {count} responses could not be judged and {what_becomes_of_them}", file=sys.stderr)


def _short(error: Exception) -> str:
    text = one_line(error)
    return text if isinstance(error, UserError) or not str(error).strip() else f"{type(error).__name__}: {text}"
