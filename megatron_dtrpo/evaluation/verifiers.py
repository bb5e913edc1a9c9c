"""Who says whether a completion is right: a program, the built-in one or the user's.

A verifier is a function ``(row, completion text) -> bool``, where ``row`` is the prompt's row of the data file.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any

from megatron_dtrpo.errors import UserError

NAMED_FAILURES = 5

Verifier = Callable[[dict[str, Any], str], bool]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")
_MARKED = re.compile(r"(?:####|[Aa]nswer(?:\s+is)?\s*[:=]?|\\boxed\{)\s*\$?\s*(-?\.?\d[\d,]*(?:\.\d+)?)")


def final_number(text: str) -> Decimal | None:
    """The number a text ends in: the last one marked as the answer (``####``, ``Answer:``, ``\\boxed{``), else the last
    number of all; None where there is none. Thousands separators are left out."""
    found = _MARKED.findall(text) or _NUMBER.findall(text)
    try:
        return Decimal(found[-1].replace(",", "").rstrip(".")) if found else None
    except InvalidOperation:
        return None


def numeric(row: dict[str, Any], completion: str, field: str = "answer") -> bool:
    """Whether the completion's final number is that of the row's ``answer`` (a number, or a text that ends in one).

    Raises UserError where the row has no such answer.
    """
    if row.get(field) is None:
        raise UserError(f"the row has no {field!r} to compare with")
    expected = final_number(str(row[field]))
    if expected is None:
        raise UserError(f"its {field!r} holds no number")
    return final_number(completion) == expected


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
    return found


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

    def report(self) -> None:
        """Says on standard error what could not be judged: the first failures by name, and how many there are."""
        for failure in self.failures[:NAMED_FAILURES]:
            print(f"warning: {failure}", file=sys.stderr)
        if self.failures:
            print(f"warning: {len(self.failures)} responses could not be judged and are left out", file=sys.stderr)


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}" if text else type(error).__name__
