"""The command line and the YAML file, both generated from the dataclasses in `config`."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Iterable

from megatron_dtrpo.config.command_line import Parser, command_parser, parse_flags
from megatron_dtrpo.config.settings import GROUPS, Config
from megatron_dtrpo.config.yaml_file import TYPES, read_yaml

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
