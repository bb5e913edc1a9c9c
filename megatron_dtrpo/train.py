"""``python -m megatron_dtrpo.train --config FILE [--flag value ...]``, alone or under torchrun."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable

from megatron_dtrpo.errors import UserError


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status, having said in one line what the user can mend."""
    # megatron-core reports at import which optional kernels it does without, once per process and kernel.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint.*", category=FutureWarning)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    try:
        command(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        # Every process meets the same error; one of them says it.
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    return run_command(_train, argv)


def _train(argv: list[str]) -> None:
    from megatron_dtrpo.arguments import parse

    config, _ = parse(argv, prog="python -m megatron_dtrpo.train", description=__doc__)

    from megatron_dtrpo.runtime import initialize

    initialize.enable_device()
    from megatron_dtrpo.training.setup import prepare

    tokenizer, data_parallel_size = prepare(config)
    initialize.start(config.parallel, config.optimizer.seed)
    try:
        from megatron_dtrpo.training.loop import Trainer

        Trainer(config, tokenizer, data_parallel_size).run()
    finally:
        initialize.stop()


if __name__ == "__main__":
    sys.exit(main())
