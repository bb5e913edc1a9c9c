"""Runs the trainer many times without importing torch and megatron-core, six seconds a process, each time.

Imports them once and forks the ranks of every run from there, with the environment that torchrun would give them. Reads
one job a line, ``{"arguments": [...], "processes": 2, "log": FILE}``, and answers with the ranks' process ids, and at
their end with their exit statuses.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback

from megatron_dtrpo import train
from megatron_dtrpo.runtime import initialize


def main() -> None:
    initialize.enable_device()
    import torch.utils.tensorboard  # noqa: F401
    from megatron.core import dist_checkpointing  # noqa: F401

    import megatron_dtrpo.training.loop  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        port = _free_port()
        children = [_fork(rank, job, port) for rank in range(job["processes"])]
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


def _fork(rank: int, job: dict, port: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if job["processes"] > 1:
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"]}
            os.environ |= {key: str(value) for key, value in world.items()}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        status = train.main(job["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
