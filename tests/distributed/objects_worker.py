"""One process of `test_objects.py`."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from megatron_dtrpo.config.settings import ParallelSettings
from megatron_dtrpo.errors import SharedError, StopRequest, UserError
from megatron_dtrpo.runtime import initialize, objects, stop

SECONDS = 3.0  # with less, a busy machine does not start two processes in time


def main() -> None:
    with stop.listening(), initialize.process_groups(ParallelSettings(distributed_timeout_minutes=SECONDS / 60), 1):
        rank = dist.get_rank()
        assert objects.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
        assert objects.broadcast(f"of {rank}") == "of 0"
        objects.raise_together(None)
        objects.stop_together()

        problem = [None, UserError("file:3: bad")][rank]
        assert _raised(lambda: objects.raise_together(problem)) == (SharedError, "file:3: bad")
        both = [StopRequest("SIGTERM"), UserError("the worse of two")][rank]
        assert _raised(lambda: objects.raise_together(both)) == (SharedError, "the worse of two")
        request = [StopRequest("SIGTERM"), None][rank]
        assert _raised(lambda: objects.raise_together(request)) == (StopRequest, "SIGTERM")
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        assert _raised(objects.stop_together) == (StopRequest, "SIGUSR1")

        if rank == 0:  # busy for longer than a collective of the default group may take
            time.sleep(2 * SECONDS)
        assert objects.broadcast(rank) == 0
        if rank == 1:
            time.sleep(2 * SECONDS)
        objects.barrier()
        if rank == 0:
            began = time.monotonic()
            kind, _ = _raised(lambda: dist.all_reduce(torch.zeros(1)))
            assert kind is RuntimeError and time.monotonic() - began < 2 * SECONDS
        else:
            time.sleep(3 * SECONDS)
        print(f"rank {rank} is done", flush=True)
    sys.exit(0)


def _raised(call) -> tuple[type, str]:
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return type(None), ""


if __name__ == "__main__":
    main()
