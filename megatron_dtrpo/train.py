"""``python -m megatron_dtrpo.train --config FILE [--flag value ...]``, alone or under torchrun."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable

from megatron_dtrpo.errors import UserError


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status, having said in one line what the user can mend."""
    # megatron-core reports at import which optional kernels it does without, once per process and kernel.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", module=r"torch\.distributed.*", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"transformers.*", category=FutureWarning)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        command(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        _wait_for_rank_zero()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


def _wait_for_rank_zero(seconds: float = 20.0) -> None:
    """Most errors meet every process and one of them is to say it: rank 0 does, exits, and its launcher ends the rest
    while they wait here. A process that outlives the wait has met an error of its own."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(seconds)


def main(argv: list[str] | None = None) -> int:
    return run_command(_train, argv)


def _train(argv: list[str]) -> None:
    from megatron_dtrpo.arguments import parse

    config, given = parse(argv, prog="python -m megatron_dtrpo.train", description=__doc__)

    from megatron_dtrpo.runtime import initialize

    initialize.enable_device()
    from megatron_dtrpo.training.setup import prepare

    tokenizer, data_parallel_size = prepare(config, given)
    initialize.start(config.parallel, config.optimizer.seed)
    try:
        from megatron_dtrpo.evaluation.periodic import periodic_evaluation
        from megatron_dtrpo.training.loop import Trainer

        evaluation = periodic_evaluation(config, tokenizer, data_parallel_size)
        Trainer(config, tokenizer, data_parallel_size, evaluation).run()
    finally:
        initialize.stop()


if __name__ == "__main__":
    sys.exit(main())
