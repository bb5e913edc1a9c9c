"""Rewards in processes of their own: one that raises, hangs or dies costs its answer, and not the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from megatron_dtrpo.errors import StopRequest, UserError
from megatron_dtrpo.online.rewards import Answer, load_reward, reward_of
from megatron_dtrpo.runtime import stop

_START = 120.0  # seconds in which a process must have imported the user's modules
_TICK = 0.5  # seconds between looks at the clock and at requests to stop
_HOPELESS = 4  # answers that cost each process its life, before the first value, after which the others are not tried


def _work(connection: Connection, names: Sequence[str], folder: str) -> None:
    """A worker: answers in, values out, or the words of what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the run says what happens
    sys.path.insert(0, folder)
    rewards = {name: load_reward(name) for name in names}
    connection.send(None)
    while True:
        try:
            answer = connection.recv()
        except EOFError:  # the run is gone
            return
        try:
            connection.send(reward_of(rewards, answer))
        except UserError as error:
            connection.send(str(error))


@dataclass
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    deadline: float
    answer: int | None = None  # the one it works on
    ready: bool = False


class RewardWorkers:
    """Some processes, and `score`. They are started when they are first needed, and end with `close`."""

    def __init__(self, names: Sequence[str], count: int, timeout: float):
        """``timeout``: seconds for all rewards of one answer."""
        self.names, self.count, self.timeout = list(names), count, timeout
        self.workers: list[_Worker] = []

    def score(self, answers: Sequence[Answer]) -> list[list[float] | str]:
        """The values of each answer's rewards, or why there are none. Raises StopRequest where the run is asked to
        stop."""
        found: list[list[float] | str | None] = [None] * len(answers)
        waiting, lost = list(range(len(answers)))[::-1], 0
        while any(one is None for one in found):
            while len(self.workers) < min(self.count, len(answers)):
                self.workers.append(self._start())
            for worker in self.workers:
                if worker.ready and worker.answer is None and waiting:
                    worker.answer, worker.deadline = waiting.pop(), time.monotonic() + self.timeout
                    worker.connection.send(answers[worker.answer])
            for worker in self._with_news():
                place = worker.answer
                try:
                    result = worker.connection.recv()
                except (EOFError, OSError):
                    result, lost = f"the process of {self._named} ended", lost + 1
                    self._replace(worker)
                if place is not None:
                    found[place], worker.answer = result, None
                elif result is None:
                    worker.ready = True
                else:
                    raise UserError(f"{self._named}: the process ended before it was ready")
            for worker in [one for one in self.workers if time.monotonic() > one.deadline and self._is_due(one)]:
                if worker.answer is None:
                    raise UserError(f"{self._named}: importing took longer than {_START:.0f} s")
                found[worker.answer], lost = f"{self._named} took longer than {self.timeout:g} s", lost + 1
                self._replace(worker)
            if lost >= _HOPELESS * self.count and not any(isinstance(one, list) for one in found):
                self.close()
                reason = f"not tried: {lost} answers before took too long or ended the process of {self._named}"
                return [reason if one is None else one for one in found]
            if (name := stop.requested()) is not None:
                raise StopRequest(name)
        return [one for one in found if one is not None]

    @property
    def _named(self) -> str:
        return f"reward{'s' * (len(self.names) > 1)} {', '.join(self.names)}"

    def close(self) -> None:
        for worker in self.workers:
            worker.process.kill()
            worker.process.join()
            worker.connection.close()
        self.workers = []

    def _is_due(self, worker: _Worker) -> bool:
        return worker.answer is not None or not worker.ready

    def _with_news(self) -> list[_Worker]:
        ready = wait([worker.connection for worker in self.workers], timeout=_TICK)
        return [worker for worker in self.workers if worker.connection in ready]

    def _replace(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        self.workers[self.workers.index(worker)] = self._start()

    def _start(self) -> _Worker:
        # Not forked: the run has threads, and perhaps a GPU.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.names, os.getcwd()), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours, time.monotonic() + _START)
