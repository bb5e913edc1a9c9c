"""Scores every pair of a training run under its reference policy, before the run.

Give it the run's own settings and flags, for the scores depend on them: data, estimator, seed, --load, --train-iters or
--num-epochs. Then give its folder to the run, as --reference-cache. The run then keeps no copy of the reference's
weights and makes one forward pass less a step. Under the same layout and packing its numbers are the same to the last
bit, under another they agree as layouts do. Runs under torchrun as well.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.cli.settings import parse_settings
from megatron_dtrpo.config.command_line import Parser
from megatron_dtrpo.config.parser import settings_parser
from megatron_dtrpo.config.rules import validate_precomputing
from megatron_dtrpo.errors import UserError

EXAMPLES = """
  megatron-dtrpo reference --config run.yaml --output scores
  megatron-dtrpo train --config run.yaml --reference-cache scores
"""


def build_parser() -> Parser:
    parser = settings_parser("megatron-dtrpo reference", __doc__, EXAMPLES)
    parser.add_argument("--output", required=True, metavar="DIR", help="Folder to write; it must not exist yet.")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_command(_precompute, argv)


def _precompute(argv: list[str]) -> None:
    arguments, config, given = parse_settings(build_parser(), argv)
    output = Path(arguments.output)
    if output.exists():
        raise UserError(f"--output {output}: exists already: remove it or give another folder")

    from megatron_dtrpo.runtime import initialize

    initialize.enable_device()
    from megatron_dtrpo.training.setup import prepare

    tokenizer, data_parallel = prepare(config, given, training=False)
    validate_precomputing(config, data_parallel)
    with tempfile.TemporaryDirectory() as scratch:
        if config.run.save is None:  # otherwise the run itself will read what is tokenized here
            config.data.data_cache_path = config.data.data_cache_path or scratch
        with initialize.process_groups(config.parallel, config.optimizer.seed):
            from megatron_dtrpo.training.precompute import precompute

            summary = precompute(config, tokenizer, data_parallel, output)
    if initialize.rank() == 0:
        print(summary)
