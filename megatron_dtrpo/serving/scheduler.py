"""Rank zero's loop: which waiting job gets which slot, pass by pass."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Protocol

from megatron_dtrpo.serving.messages import Admission, Commands, Counters, Progress, Report, Request
from megatron_dtrpo.serving.worker import Worker

POLL = 0.1  # seconds between looks for a request to stop, while nothing is decoded
HEARTBEAT = 3600.0  # seconds after which idle processes are called, so that no wait of theirs ends in an error


class Clients(Protocol):
    """Who asks, and is told. ``is_gone``: nobody is there any more."""

    is_gone: bool

    def requests(self, seconds: float) -> Sequence[Request]:
        """What was asked since the last call; waits so long for it."""

    def report(self, report: Report) -> None: ...


class Scheduler:
    """``slots``: of each of ``models`` on each data-parallel process."""

    def __init__(self, worker: Worker, models: int, slots: int, clients: Clients):
        self.worker, self.clients = worker, clients
        self.counters = Counters()
        self._waiting: list[deque[Admission]] = [deque() for _ in range(models)]
        self._running: dict[int, Admission] = {}
        self._released: list[int] = []
        self._free = [[slots] * worker.replicas for _ in range(models)]
        self._stopping = False

    def run(self, asked_to_stop: Callable[[], bool], grace: float) -> None:
        """Serves until ``asked_to_stop()``; then what is being written has ``grace`` seconds to be finished. Ends at
        once when the clients are gone."""
        deadline, called = None, time.monotonic()
        try:
            while not self.clients.is_gone:
                if deadline is None and asked_to_stop():
                    deadline = time.monotonic() + grace
                    self._refuse_waiting()
                if deadline is not None and (not self._running or time.monotonic() > deadline):
                    break
                for request in self.clients.requests(0.0 if self._running else POLL):
                    self._take(request)
                commands = Commands(self._released, self._admissions())
                self._released = []
                if commands or self._running or time.monotonic() - called > HEARTBEAT:
                    self.counters.rounds += bool(self._running)  # else it is no pass: slots are given back, or nothing
                    self._deliver(self.worker.run(commands))
                    called = time.monotonic()
            self.worker.run(None)
        finally:
            self._refuse_waiting()

    def _take(self, request: Request) -> None:
        for one in request.admissions:
            self._waiting[one.model].append(one)
        if request.cancelled:
            self._cancel(set(request.cancelled))
        for job, tokens, passes in request.ended:
            if job in self._running:
                self._release(job)
                self._count(tokens, passes)
        if self._stopping:
            self._refuse_waiting()
        if request.measure:
            counts = {"running": len(self._running), "waiting": sum(map(len, self._waiting))}
            self.clients.report(Report(counters=replace(self.counters, seconds=self.worker.seconds, **counts)))

    def _cancel(self, gone: Collection[int]) -> None:
        """Forgets jobs, those that are finished already too."""
        for model, queue in enumerate(self._waiting):
            self._waiting[model] = deque(one for one in queue if one.job not in gone)
            self.counters.cancelled += len(queue) - len(self._waiting[model])
        for job in [job for job in gone if job in self._running]:
            self._release(job)
            self.counters.cancelled += 1

    def _release(self, job: int) -> None:
        self._give_back(job)
        self._released.append(job)

    def _count(self, tokens: int, passes: int) -> None:
        """A finished response."""
        self.counters.finished += 1
        self.counters.passes += passes
        self.counters.tokens += tokens

    def _refuse_waiting(self) -> None:
        self._stopping = True
        refused = [one.job for queue in self._waiting for one in queue]
        for queue in self._waiting:
            queue.clear()
        self.clients.report(Report(refused=refused, stopping=True))

    def _admissions(self) -> list[Admission]:
        """Waiting jobs, the first ones first, each to the replica with the most free slots."""
        admitted = []
        for free, queue in zip(self._free, self._waiting, strict=True):
            while queue and any(free):
                replica = max(range(len(free)), key=lambda number: (free[number], -number))
                one = replace(queue.popleft(), replica=replica)
                free[replica] -= 1
                self._running[one.job] = one
                admitted.append(one)
        return admitted

    def _deliver(self, found: Sequence[Progress]) -> None:
        for progress in found:
            if progress.completion is not None:
                self._give_back(progress.job)
                self._count(len(progress.completion.tokens), progress.passes)
        if found:
            self.clients.report(Report(found))

    def _give_back(self, job: int) -> None:
        one = self._running.pop(job)
        self._free[one.model][one.replica] += 1
