"""A flat YAML file of settings, each brought to its setting's type."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from pathlib import Path

import yaml

from megatron_dtrpo.config.command_line import unknown
from megatron_dtrpo.config.settings import FIELDS, GROUPS
from megatron_dtrpo.errors import UserError


def _base_type(kind: type) -> dict:
    """Key -> the type of one value (``list[str]`` stays a list; ``X | None`` becomes X)."""
    types_of = {}
    for name, hint in typing.get_type_hints(kind).items():
        if isinstance(hint, types.UnionType):
            hint = next(t for t in typing.get_args(hint) if t is not type(None))
        types_of[name] = hint
    return types_of


TYPES = {key: hint for kind in GROUPS.values() for key, hint in _base_type(kind).items()}


def read_yaml(path: str | Path, update: Callable[[dict], dict] = dict) -> dict:
    """Reads and type-checks a flat YAML file of settings; ``update`` turns what an earlier version wrote into what this
    one reads. Raises UserError naming file and key."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as a configuration file: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected 'key: value' lines")
    values = update(values)
    for key in values:
        if key not in TYPES:
            raise unknown(f"key in {path}:", str(key), TYPES)
    return {key: _coerce(path, key, value) for key, value in values.items()}


def _coerce(path: Path, key: str, value):
    """YAML reads ``1e-4`` as text and ``1`` as an integer: bring a value to its setting's type."""
    hint, field = TYPES[key], FIELDS[key]
    if value is None:
        if field.default is None:
            return None
        raise UserError(f"{path}: {key} has no value")
    if typing.get_origin(hint) is list:
        return _coerce_list(path, key, value)
    mistake = UserError(f"{path}: {key} is {value!r}: it must be {hint.__name__}")
    if isinstance(value, bool) != (hint is bool) or isinstance(value, (list, dict)):
        raise mistake
    if hint is int and isinstance(value, float) and not value.is_integer():
        raise mistake
    try:
        converted = hint(value)
    except (TypeError, ValueError, OverflowError):
        raise mistake from None
    _check_choice(path, key, converted)
    return converted


def _coerce_list(path: Path, key: str, value) -> list:
    """A single value is a list of one, as TRL has it."""
    (item,) = typing.get_args(TYPES[key])
    values = value if isinstance(value, list) else [value]
    kinds, words = {str: ((str,), "texts"), float: ((int, float, str), "numbers")}[item]
    mistake = UserError(f"{path}: {key} is {value!r}: it must be a list of {words}")
    if not values or any(isinstance(v, bool) or not isinstance(v, kinds) for v in values):
        raise mistake
    try:
        converted = [item(v) for v in values]
    except ValueError:
        raise mistake from None
    for each in converted:
        _check_choice(path, key, each)
    return converted


def _check_choice(path: Path, key: str, value) -> None:
    choices = FIELDS[key].metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"{path}: {key} is {value!r}: choose one of {', '.join(choices)}")
