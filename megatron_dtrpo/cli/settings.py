"""The settings that a command is given, as flags and in a file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection

from megatron_dtrpo.config.choices import leave_out_misfits
from megatron_dtrpo.config.command_line import Parser
from megatron_dtrpo.config.parser import parse_command
from megatron_dtrpo.config.settings import Config
from megatron_dtrpo.runtime.environment import rank


def parse_settings(parser: Parser, argv: list[str]) -> tuple[argparse.Namespace, Config, set[str]]:
    """As `config.parser.parse_command`. What the file says and an objective, an estimator or losses that are flags do
    not read is left out, and named on stderr."""
    return parse_command(parser, argv, _adapt)


def _adapt(config: Config, flags: Collection[str], file: object) -> None:
    for line in leave_out_misfits(config, flags, file):
        if rank() == 0:
            print(line, file=sys.stderr)
