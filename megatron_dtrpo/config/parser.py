"""The command line and the YAML file, both generated from the dataclasses in `config`."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from megatron_dtrpo.config.command_line import Parser, command_parser, parse_flags, unknown
from megatron_dtrpo.config.settings import FIELDS, GROUPS, Config
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
# Two ways to say one thing: a flag replaces what the file says in the other way.
_ALTERNATIVES = (("train_iters", "num_epochs"), ("num_epochs", "train_iters"))


def settings_parser(prog: str, about: str, examples: str = "") -> Parser:
    """A parser of every setting, and of the file that gives some of them; commands add flags of their own."""
    parser = command_parser(prog, about, examples)
    parser.add_argument("--config", metavar="FILE", help="YAML file of the settings below, underscores for hyphens.")
    add_settings(parser, GROUPS)
    return parser


def add_settings(parser: Parser, groups: Iterable[str]) -> None:
    """Makes the settings of ``groups`` flags of ``parser``."""
    parser.groups = tuple(groups)
    for group in parser.groups:
        kind = GROUPS[group]
        section = parser.add_argument_group(group, " ".join(kind.__doc__.split()))
        for f in dataclasses.fields(kind):
            hint, flag = TYPES[f.name], "--" + f.name.replace("_", "-")
            suffix = "" if f.default is None else f" Default: {f.default}."
            common = {
                "dest": f.name,
                "default": argparse.SUPPRESS,
                "help": f.metadata["help"].replace("%", "%%") + suffix,
            }
            if hint is bool:
                section.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
            elif typing.get_origin(hint) is list:
                (item,) = typing.get_args(hint)
                choices = f.metadata["choices"] or None
                shown = None if choices else "PATTERN" if item is str else item.__name__.upper()
                section.add_argument(flag, nargs="+", type=item, choices=choices, metavar=shown, **common)
            else:
                section.add_argument(
                    flag,
                    type=hint,
                    choices=f.metadata["choices"] or None,
                    metavar=None if f.metadata["choices"] else hint.__name__.upper(),
                    **common,
                )


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


def parse(argv: list[str], prog: str, about: str) -> tuple[Config, set[str]]:
    """Reads ``argv`` and its ``--config`` file; flags win over the file.

    Returns:
        The configuration, not yet validated, and the keys that were given explicitly.
    """
    _, config, given = parse_command(settings_parser(prog, about), argv)
    return config, given


def parse_command(
    parser: Parser, argv: list[str], adapt: Callable[[Config, set[str], object], None] = lambda *_: None
) -> tuple[argparse.Namespace, Config, set[str]]:
    """Reads the flags of a parser that has settings among them.

    Args:
        adapt: called with the configuration, the settings that were given as flags and the file of the others.

    Returns:
        The command's own flags; a configuration, not yet validated, whose other settings have their defaults; the
        settings that were given explicitly, as flags or in the file that ``--config`` names.
    """
    flags = vars(parse_flags(parser, argv))
    keys = [f.name for group in parser.groups for f in dataclasses.fields(GROUPS[group])]
    given = {key: flags.pop(key) for key in keys if key in flags}
    config_file = flags.pop("config", None)
    values = read_yaml(config_file) if config_file else {}
    for key, other in _ALTERNATIVES:
        if key in given and other not in given:
            values.pop(other, None)
    values |= given
    config = Config.from_flat(values)
    adapt(config, set(given), config_file)
    return argparse.Namespace(**flags), config, set(values)
