"""Parsers of every command: each mistake is one line that names the nearest known flag.

Imports neither PyYAML nor torch, so that a command that looks for them can start without them.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Iterator
from pathlib import Path

from megatron_dtrpo.errors import UserError

# Names that users of TRL and transformers type first.
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
    # Scripts of before there was one command.
    "build_preferences": "pairs",
    "convert_checkpoint": "convert",
    "precompute_reference": "reference",
    "score_preferences": "score",
}
# Settings that are gone, and what does the same now.
_FORMER = {
    "rpo_alpha": "the likelihood anchor is a loss of its own: give loss_type sigmoid sft with loss_weights 1.0 ALPHA",
}


class Parser(argparse.ArgumentParser):
    """``about``: what the command does, with which the help starts; ``examples``: whole commands, which end it;
    ``groups``: the groups of settings that are flags here."""

    def __init__(self, about: str, examples: str, **kwargs):
        style = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=style, epilog=f"examples:\n{examples}", **kwargs)
        self.about, self.examples = about, examples
        self.groups: tuple[str, ...] = ()

    def format_help(self) -> str:
        if self.groups:  # hundreds of flags
            required = (f"{a.option_strings[0]} {a.metavar or a.dest.upper()} " for a in self._actions if a.required)
            self.usage = f"{self.prog} {''.join(required)}[--FLAG VALUE ...]"
        return f"{self.about}\n\n{super().format_help()}"

    def error(self, message):
        raise UserError(message)


def command_parser(prog: str, about: str, examples: str = "") -> Parser:
    """A parser for a command's own flags; `config.parser.add_settings` adds settings to it."""
    return Parser(prog=prog, about=about.strip(), examples=examples.strip("\n"))


def parse_flags(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Raises UserError for an unknown flag, naming the nearest known one, and for a stray argument."""
    known = list(_options(parser, argv))
    for word in argv:  # before a required flag is missed, which may be the one that is misspelled
        flag = word.split("=")[0]
        if flag.startswith("--") and " " not in word and flag not in known:  # as argparse tells flags from values
            raise unknown("flag", flag, known)
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        raise UserError(f"stray argument {rest[0]!r}: settings are given as --flag value")
    return arguments


def _options(parser: argparse.ArgumentParser, argv: list[str]) -> Iterator[str]:
    """The flags of ``parser``, and of the parser below it that ``argv`` names."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for name in set(argv) & action.choices.keys():
                yield from _options(action.choices[name], argv)


def unknown(kind: str, given: str, known: Collection[str]) -> UserError:
    """``kind``: flag, key or verb."""
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
