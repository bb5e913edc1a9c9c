"""The command line and the YAML file, both generated from the dataclasses in `config`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml

from megatron_dtrpo.config.settings import GROUPS, Config
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
# What users of TRL and transformers type first.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "max_steps": "train_iters",
    "num_train_epochs": "num_epochs",
    "output_dir": "save",
    "per_device_train_batch_size": "micro_batch_size",
    "precompute_ref_log_probs": "reference_cache",
    "ref_model": "reference",
    "ref_model_name_or_path": "reference",
    "reference_model": "reference",
}
# Settings that are gone, and what does the same now.
_FORMER = {
    "rpo_alpha": "the likelihood anchor is a loss of its own: give loss_type sigmoid sft with loss_weights 1.0 ALPHA",
}
# Two ways to say one thing: a flag replaces what the file says in the other way.
_ALTERNATIVES = (("train_iters", "num_epochs"), ("num_epochs", "train_iters"))
FIELDS = {f.name: f for kind in GROUPS.values() for f in dataclasses.fields(kind)}


def _unknown(kind: str, given: str, known) -> UserError:
    name = given.lstrip("-").replace("-", "_")
    if name in _FORMER:
        return UserError(f"{kind} {given} is gone: {_FORMER[name]}")
    near = given.replace(given.lstrip("-"), _OTHER_NAMES.get(name, ""))
    near = near.replace("_", "-") if near.startswith("-") else near
    if near not in known:
        near = difflib.get_close_matches(given, list(known), n=1, cutoff=0)[0]
    return UserError(f"unknown {kind} {given}: the nearest known one is {near}")


def new_file(text: str) -> str:
    """argparse's type of a file that is written at the end: what would fail then fails now."""
    path = Path(text)
    if path.is_dir():
        raise UserError(f"{text}: is a folder, and a file is to be written")
    if not path.parent.is_dir():
        raise UserError(f"{text}: there is no folder {path.parent}; make it first")
    return text


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


def build_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser of every setting, and of the file that gives some of them."""
    parser = _Parser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file of the settings below, underscores for hyphens.")
    _add_settings(parser, GROUPS)
    return parser


def _add_settings(parser: argparse.ArgumentParser, groups: Iterable[str]) -> None:
    for group in groups:
        kind = GROUPS[group]
        section = parser.add_argument_group(group, kind.__doc__)
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
            raise _unknown(f"key in {path}:", str(key), TYPES)
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


def parse(argv: list[str], prog: str, description: str) -> tuple[Config, set[str]]:
    """Reads ``argv`` and its ``--config`` file; flags win over the file.

    Returns:
        The configuration, not yet validated, and the keys that were given explicitly.
    """
    _, config, given = parse_command(build_parser(prog, description), argv)
    return config, given


def parse_command(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, Config, set[str]]:
    """As `parse`, for a parser of `build_parser` that a command has added flags of its own to; these come first."""
    flags = _parse_known(parser, argv)
    own = argparse.Namespace(**{key: flags.pop(key) for key in list(flags) if key not in TYPES and key != "config"})
    config_file = flags.pop("config", None)
    values = read_yaml(config_file) if config_file else {}
    for key, other in _ALTERNATIVES:
        if key in flags and other not in flags:
            values.pop(other, None)
    values |= flags
    return own, Config.from_flat(values), set(values)


def tool_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser for a tool's own flags, whose mistakes are one line; `parse_tool` adds settings to it."""
    return _Parser(
        prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parse_tool(
    parser: argparse.ArgumentParser, argv: list[str], groups: Iterable[str]
) -> tuple[argparse.Namespace, Config, set[str]]:
    """Reads a tool's own flags and the settings of some ``groups``.

    Returns:
        The tool's flags, a configuration whose other settings have their defaults, and the settings that were given.
    """
    _add_settings(parser, groups)
    flags = _parse_known(parser, argv)
    keys = [f.name for group in groups for f in dataclasses.fields(GROUPS[group])]
    given = {key: flags.pop(key) for key in keys if key in flags}
    return argparse.Namespace(**flags), Config.from_flat(given), set(given)


def _parse_known(parser: argparse.ArgumentParser, argv: list[str]) -> dict:
    arguments, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("--"):
            known = [option for action in parser._actions for option in action.option_strings]
            raise _unknown("flag", word.split("=")[0], known)
        raise UserError(f"stray argument {word!r}: settings are given as --flag value")
    return vars(arguments)
