"""A command as a process: its exit status, its one line for a mistake, its end among other processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable

from megatron_dtrpo.errors import SharedError, StopRequest, UserError
from megatron_dtrpo.runtime import stop
from megatron_dtrpo.runtime.environment import rank


def run_command(command: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Runs a command on its words and returns the exit status: the command's own, or 0. A mistake of the user's is
    printed as one line.

    One of several processes does not return from an error that the others may not have: it prints it and ends at once.
    Nothing that waits for another process is in its way, and its launcher ends the others.
    """
    # megatron-core reports at import which optional kernels it does without, once per process and kernel.
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", module=r"torch\.distributed.*", category=FutureWarning)
    # Of how megatron-core 0.19 reads a checkpoint's plain values: on each process alone.
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint.*", category=UserWarning)
    warnings.filterwarnings("ignore", module=r"transformers.*", category=FutureWarning)
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    # That a CUDA build of torch finds no GPU; `doctor` says so where it matters.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        try:
            return command(sys.argv[1:] if argv is None else argv) or 0
        finally:
            sys.stdout.flush()  # here, where an end of the reader's is known; --help leaves by SystemExit
    except StopRequest as request:
        if rank() == 0:
            print(f"stopped by {request} before the first step; start the same command again", flush=True)
    except SharedError as error:
        if rank() == 0:
            _print_error(error)
        return 2
    except UserError as error:
        if not _rank_zero_prints_it():
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
        print(f"rank {rank()}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        return _leave(1)
    return 0


def _is_among_others() -> bool:
    """Whether this process is still in groups with others; those were left in order that could be."""
    distributed = sys.modules.get("torch.distributed")  # whose import takes seconds
    return distributed is not None and distributed.is_initialized() and distributed.get_world_size() > 1


def _print_error(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


def _rank_zero_prints_it(seconds: float = 10.0) -> bool:
    """Most mistakes in files and flags meet every process, and one of them is to print it: rank 0 does, exits, and its
    launcher ends the rest while they wait here. A process that outlives the wait has met an error of its own."""
    return rank() > 0 and stop.wait(seconds)


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
