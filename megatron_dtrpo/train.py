"""``python -m megatron_dtrpo.train --config FILE [--flag value ...]``, alone or under torchrun."""

from __future__ import annotations

import argparse
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
        sys.stdout.flush()
    except UserError as error:
        _wait_for_rank_zero()
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:  # who reads the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


def _wait_for_rank_zero(seconds: float = 20.0) -> None:
    """Most errors meet every process and one of them is to say it: rank 0 does, exits, and its launcher ends the rest
    while they wait here. A process that outlives the wait has met an error of its own."""
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(seconds)


def _add_dry_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("dry run", "Looks at a run instead of starting it.")
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="Check the settings, build the model of every pipeline stage without memory, print parameters and the "
        "memory plan; needs no GPU, no data and no checkpoint.",
    )
    group.add_argument(
        "--world-size",
        type=int,
        metavar="INT",
        help="Processes of the run that is looked at. Default: as many as are here, or as the layout needs at least.",
    )
    group.add_argument("--gpu-memory", type=float, metavar="GIB", help="Memory of one GPU. Default: 80.")


def main(argv: list[str] | None = None) -> int:
    return run_command(_train, argv)


def _train(argv: list[str]) -> None:
    from megatron_dtrpo.runtime import environment

    environment.set_defaults()  # before anything imports torch
    from megatron_dtrpo.arguments import build_parser, parse_command

    parser = build_parser(prog="python -m megatron_dtrpo.train", description=__doc__)
    _add_dry_run(parser)
    own, config, given = parse_command(parser, argv)

    from megatron_dtrpo.runtime import initialize

    if own.dry_run and initialize.rank() != 0:
        return  # one process looks and speaks for all
    initialize.enable_device()
    if own.dry_run:
        from megatron_dtrpo.training.dry_run import dry_run

        dry_run(config, given, own.world_size, own.gpu_memory)
        return
    if own.world_size is not None or own.gpu_memory is not None:
        raise UserError("--world-size and --gpu-memory go with --dry-run: the launcher starts the processes of a run")
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
