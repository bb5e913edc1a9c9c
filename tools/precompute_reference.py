#!/usr/bin/env python3
"""Scores every pair of a training run under its reference policy, before the run.

    python tools/precompute_reference.py --config run.yaml --output scores
    python -m megatron_dtrpo.train --config run.yaml --reference-cache scores

Takes the run's own settings and flags, for the scores depend on them: data, estimator, seed, --load, --train-iters or
--num-epochs. The run then keeps no copy of the reference's weights and makes one forward pass less a step. Under the
same layout and packing its numbers are the same to the last bit, under another they agree as layouts do. Runs under
torchrun as well.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from megatron_dtrpo.config.parser import parse
from megatron_dtrpo.config.rules import validate_precomputing
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.train import run_command


def _precompute(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="precompute_reference.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="Folder to write; it must not exist yet.")
    arguments, rest = parser.parse_known_args(argv)
    config, given = parse(rest, parser.prog, __doc__)
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

            said = precompute(config, tokenizer, data_parallel, output)
    if initialize.rank() == 0:
        print(said)


if __name__ == "__main__":
    sys.exit(run_command(_precompute))
