"""``python -m megatron_dtrpo.train --config FILE [--flag value ...]``, alone or under torchrun."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from megatron_dtrpo.errors import SharedError, StopRequest, UserError
from megatron_dtrpo.runtime import stop


def run_command(command: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Runs a command line; returns the exit status, having said in one line what the user can fix.

    One of several processes does not return from an error that the others may not have: it says it and ends at once.
    Nothing that waits for another process is in its way, and its launcher ends the others.
    """
    # megatron-core reports at import which optional kernels it does without, once per process and kernel.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", module=r"torch\.distributed.*", category=FutureWarning)
    warnings.filterwarnings("ignore", module=r"transformers.*", category=FutureWarning)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        command(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
    except StopRequest as request:
        if _rank() == 0:
            print(f"stopped by {request} before the first step; start the same command again", flush=True)
    except SharedError as error:
        if _rank() == 0:
            _print_error(error)
        return 2
    except UserError as error:
        if not _rank_zero_said_it():
            _print_error(error)
        return _leave(2)
    except BrokenPipeError:  # who reads the output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _leave(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return _leave(130)
    except Exception:
        if not _is_among_others():
            raise
        print(f"rank {_rank()}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        return _leave(1)
    return 0


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _is_among_others() -> bool:
    """Whether this process is still in groups with others; those were left in order that could be."""
    distributed = sys.modules.get("torch.distributed")  # whose import takes seconds
    return distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1


def _print_error(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def _rank_zero_said_it(seconds: float = 10.0) -> bool:
    """Most mistakes in files and flags meet every process, and one of them is to say it: rank 0 does, exits, and its
    launcher ends the rest while they wait here. A process that outlives the wait has met an error of its own."""
    return _rank() > 0 and stop.wait(seconds)


def _leave(status: int) -> int:
    """``status``, to exit with. A process among others exits here, without a destructor, an exit handler or a thread's
    end: each of them may wait for a process that waits for this one."""
    if _is_among_others():
        for child in multiprocessing.active_children():  # nobody would end them
            child.kill()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


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
    """Trains; returns the exit status. SIGTERM and SIGUSR1 save and end it with 0, from here on."""
    with stop.listening():
        return run_command(_train, argv)


def _train(argv: list[str]) -> None:
    from megatron_dtrpo.runtime import environment

    environment.set_defaults()  # before anything imports torch
    from megatron_dtrpo.config.parser import build_parser, parse_command

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
    with initialize.process_groups(config.parallel, config.optimizer.seed):
        from megatron_dtrpo.evaluation.periodic import periodic_evaluation
        from megatron_dtrpo.runtime import objects
        from megatron_dtrpo.training.trainer import Trainer

        objects.stop_together()
        evaluation = periodic_evaluation(config, tokenizer, data_parallel_size)
        Trainer(config, tokenizer, data_parallel_size, evaluation).run()


def program(argv: list[str] | None = None) -> NoReturn:
    """`main` as all that a process does: the signals that ask it to stop cannot spoil its end either."""
    stop.block()
    sys.exit(main(argv))


if __name__ == "__main__":
    program()
