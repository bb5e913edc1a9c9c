"""Runs the trainer, or another verb, many times without importing torch and megatron-core each time: six seconds.

Imports them once and forks the ranks of every run from there, with the environment that torchrun would give them. Reads
one job a line, ``{"arguments": [...], "processes": 2, "log": FILE}``, and answers with the ranks' process ids, and at
their end with their exit statuses. As torchrun does, it asks the others to end when one has failed, and kills them
half a minute later.

A job may name another ``verb``, e.g. ``generate``, or a ``module`` whose ``main(*arguments)`` is called instead, and
``events``: what happens to which ranks in the middle of it, each ``[before, call, action, ranks]``: before that call,
from 1, of the function ``module:name``.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback

from megatron_dtrpo.cli.main import VERBS
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import initialize

GRACE = 30.0  # torchrun's


def main() -> None:
    initialize.enable_device()
    import torch.utils.tensorboard  # noqa: F401
    from megatron.core import dist_checkpointing  # noqa: F401

    import megatron_dtrpo.training.trainer  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        port = _free_port()
        children = [_fork(rank, job, port) for rank in range(job["processes"])]
        print(json.dumps(children), flush=True)
        print(json.dumps(_statuses(children)), flush=True)


def _statuses(children: list[int]) -> list[int]:
    """Waits for all; ends the others once one has failed."""
    statuses: dict[int, int] = {}
    killing: threading.Timer | None = None
    while len(statuses) < len(children):
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
        if statuses[child] != 0 and killing is None:
            _signal(children, statuses, signal.SIGTERM)
            killing = threading.Timer(GRACE, lambda: _signal(children, statuses, signal.SIGKILL))
            killing.start()
    if killing is not None:
        killing.cancel()
    return [statuses[child] for child in children]


def _signal(children: list[int], ended: dict[int, int], number: signal.Signals) -> None:
    for child in children:
        if child not in ended:
            os.kill(child, number)


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
        for before, call, action, ranks in job.get("events", ()):
            if rank in ranks:
                _before(before, call, ACTIONS[action])
        status = _run(job)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _run(job: dict) -> int:
    if "module" in job:
        return importlib.import_module(job["module"]).main(*job["arguments"]) or 0
    return importlib.import_module(VERBS[job.get("verb", "train")][0]).main(job["arguments"])


def _before(name: str, call: int, action) -> None:
    module, _, path = name.partition(":")
    *owners, last = path.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), itertools.count(1)

    @functools.wraps(original)  # the package looks at signatures
    def replacement(*args, **kwargs):
        if next(calls) == call:
            action()
        return original(*args, **kwargs)

    setattr(owner, last, replacement)


def _fail() -> None:
    raise RuntimeError("a fault of this test")


def _refuse() -> None:
    raise UserError("a mistake of this test")


def _hang() -> None:
    """As NCCL does where a process waits for another that is gone."""
    time.sleep(1000)


ACTIONS = {
    "hang": _hang,
    "fail": _fail,
    "refuse": _refuse,
    **{
        name: lambda name=name: os.kill(os.getpid(), signal.Signals[name]) for name in ("SIGKILL", "SIGTERM", "SIGUSR1")
    },
}


# Below those that the system gives to connections: one of theirs may be taken before rank zero listens on it. Servers
# begin at different places.
_PORTS = itertools.islice(itertools.cycle(range(20_000, 32_000)), os.getpid() * 61 % 12_000, None)


def _free_port() -> int:
    return next(port for port in _PORTS if _is_free(port))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


if __name__ == "__main__":
    main()
