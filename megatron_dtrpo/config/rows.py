"""The parts of the tables of choices: settings, and functions that are named and not yet imported.

A row of a table (`estimators`, `losses`, `objectives`, `backends`) holds the properties of a choice, and names its
function as ``module:function``, as entry points do: settings are read, checked and explained without torch, and the
function is imported when it is called for the first time.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Collection
from dataclasses import field
from typing import Any, TypeVar

Options = TypeVar("Options")


def setting(default, help: str, choices: Collection[str] = (), *, at_least=None, at_most=None):
    """A dataclass field that is a setting: the parser makes a flag and a YAML key of it, and `rules` checks the bounds,
    which are included."""
    metadata = {"help": help, "choices": choices, "at_least": at_least, "at_most": at_most}
    return field(default=default, metadata=metadata)


def options_of(kind: type[Options], settings: Options) -> Options:
    """The options of one ``kind``, a dataclass, among ``settings`` that inherit its fields."""
    declared: Any = kind
    return kind(**{f.name: getattr(settings, f.name) for f in dataclasses.fields(declared)})


@functools.cache
def function_named(name: str) -> Callable:
    """The function that ``module:function`` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)
