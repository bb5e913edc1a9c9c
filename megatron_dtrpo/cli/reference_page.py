"""docs/commands.md, made of the parsers: ``python -m megatron_dtrpo.cli.reference_page > docs/commands.md``.

It reads the parsers' actions, because the text of ``--help`` differs between versions of Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from importlib import import_module

from megatron_dtrpo.cli.main import VERBS
from megatron_dtrpo.config.command_line import Parser
from megatron_dtrpo.config.parser import settings_parser
from megatron_dtrpo.config.settings import GROUPS

HEAD = """# Commands

Made of the commands' own help; a test keeps it in step. To write it anew:
`python -m megatron_dtrpo.cli.reference_page > docs/commands.md`

`megatron-dtrpo VERB`, or `python -m megatron_dtrpo VERB` from a checkout, or `torchrun ... -m megatron_dtrpo VERB` for
several processes. A mistake is one line, `error: ...`, and exit status 2.

| verb | |
|---|---|"""


def page() -> str:
    verbs = [f"| [`{verb}`](#megatron-dtrpo-{verb}) | {summary} |" for verb, (_, summary) in VERBS.items()]
    parts = [HEAD + "\n" + "\n".join(verbs)]
    for module, _ in VERBS.values():
        parts += command(import_module(module).build_parser(), "##")
    return "\n\n".join([*parts, *settings()]) + "\n"


def command(parser: Parser, heading: str) -> Iterator[str]:
    """Paragraphs about a command, and about those below it."""
    yield f"{heading} {parser.prog}"
    yield parser.about
    yield "```bash\n" + "\n".join(line.strip() for line in parser.examples.splitlines()) + "\n```"
    own = (action for group in parser._action_groups if group.title not in GROUPS for action in group._group_actions)
    yield from table(own)
    if parser.groups:
        these = "all" if set(parser.groups) == set(GROUPS) else "those of " + ", ".join(parser.groups)
        yield f"And [settings](#settings): {these}."
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from command(below, heading + "#")


def settings() -> Iterator[str]:
    yield "## Settings"
    yield "Each is a flag and, with underscores for hyphens, a key of the YAML file that `--config` names. Flags win."
    for group in settings_parser("", "")._action_groups:
        if group.title in GROUPS:
            yield f"### {group.title}"
            yield str(group.description)
            yield from table(group._group_actions)


def table(actions: Iterable[argparse.Action]) -> Iterator[str]:
    rows = [row(action) for action in actions if shown(action)]
    if rows:
        yield "\n".join(["| flag | |", "|---|---|", *rows])


def shown(action: argparse.Action) -> bool:
    hidden = (argparse._HelpAction, argparse._SubParsersAction)
    return action.help != argparse.SUPPRESS and not isinstance(action, hidden)


def row(action: argparse.Action) -> str:
    text = ((action.help or "") % vars(action)).replace("|", r"\|").replace("<", r"\<")
    required = " Required." if action.required and action.option_strings else ""
    return f"| `{flag(action)}` | {text}{required} |"


def flag(action: argparse.Action) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        return action.option_strings[0].replace("--", "--[no-]", 1)
    choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    words = [*action.option_strings[:1], *([str(action.metavar or choices)] if action.nargs != 0 else [])]
    return " ".join(words) + (" ..." if action.nargs == "+" else "")


if __name__ == "__main__":
    print(page(), end="")
