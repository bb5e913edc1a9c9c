"""Rank zero's loop: which waiting request gets which slot, pass by pass, and who hears what was written.

The loop runs on the main thread. Other threads hand it jobs and take them back.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megatron_dtrpo.serving.worker import Admission, Commands, Progress, Worker

POLL = 0.1  # seconds between looks for a request to stop, while nothing is decoded
HEARTBEAT = 3600.0  # seconds after which idle processes are called, so that no wait of theirs ends in an error


class QueueFull(Exception):
    """More jobs would wait than may."""


class Stopping(Exception):
    """The server stops and takes no jobs."""


@dataclass
class Counters:
    """What the server did since it began."""

    admitted: int = 0
    finished: int = 0
    cancelled: int = 0
    refused: int = 0
    rounds: int = 0
    passes: int = 0  # of finished responses
    tokens: int = 0


@dataclass
class _Job:
    admission: Admission
    tell: Callable[[Progress | Exception], None]


@dataclass
class Scheduler:
    """``slots``: of each model on each data-parallel process. ``limit``: jobs that may wait."""

    worker: Worker
    models: int
    slots: int
    limit: int
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self):
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._waiting: list[deque[_Job]] = [deque() for _ in range(self.models)]
        self._running: dict[int, _Job] = {}
        self._released: list[int] = []
        self._free = [[self.slots] * self.worker.replicas for _ in range(self.models)]
        self.stopping = False

    # On any thread.

    def submit(
        self, admissions: Sequence[Admission], tell: Callable[[int, Progress | Exception], None]
    ) -> Sequence[int]:
        """Queues all ``admissions``, or none. Their jobs and replicas are chosen here. ``tell``: called on the loop's
        thread with the place of one of them and what there is to say of it.

        Raises:
            QueueFull, Stopping.
        """
        with self._changed:
            if self.stopping:
                raise Stopping
            if self.waiting + len(admissions) > self.limit + self._room(admissions[0].model):
                self.counters.refused += len(admissions)
                raise QueueFull
            jobs = []
            for place, admission in enumerate(admissions):
                job = next(self._numbers)
                heard = _Job(replace(admission, job=job), functools.partial(tell, place))
                self._waiting[admission.model].append(heard)
                jobs.append(job)
            self._changed.notify()
        return jobs

    def cancel(self, jobs: Sequence[int]) -> None:
        """Forgets ``jobs``, those that are finished already too."""
        gone = set(jobs)
        with self._changed:
            for model, queue in enumerate(self._waiting):
                kept = deque(job for job in queue if job.admission.job not in gone)
                self.counters.cancelled += len(queue) - len(kept)
                self._waiting[model] = kept
            for number in gone & self._running.keys():
                self._give_back(number)
                self._released.append(number)
                self.counters.cancelled += 1
            self._changed.notify()

    @property
    def places(self) -> int:
        return self.models * self.slots * self.worker.replicas

    @property
    def most(self) -> int:
        """Jobs that one request may have."""
        return self.limit + self.slots * self.worker.replicas

    @property
    def waiting(self) -> int:
        return sum(map(len, self._waiting))

    @property
    def running(self) -> int:
        return len(self._running)

    def _room(self, model: int) -> int:
        return max(0, sum(self._free[model]) - len(self._waiting[model]))

    # On the loop's.

    def run(self, asked_to_stop: Callable[[], bool], grace: float) -> None:
        """Serves until ``asked_to_stop()``; then what is being written has ``grace`` seconds to be finished."""
        deadline = None
        try:
            while True:
                if deadline is None and asked_to_stop():
                    deadline = time.monotonic() + grace
                    self._refuse_waiting()
                if deadline is not None and (not self._running or time.monotonic() > deadline):
                    break
                commands = self._next_commands(asked_to_stop if deadline is None else lambda: True)
                if commands is not None:
                    for progress in self.worker.run(commands):
                        self._deliver(progress)
                    self.counters.rounds += 1
            self.worker.run(None)
        finally:
            self._end()

    def _next_commands(self, hurry: Callable[[], bool]) -> Commands | None:
        """Waits until there is something to do. None: only to look whether the server is to stop."""
        called = time.monotonic()
        with self._changed:
            while True:
                commands = Commands(self._released, self._admissions())
                self._released = []
                if commands or self._running or time.monotonic() - called > HEARTBEAT:
                    return commands
                if hurry():
                    return None
                self._changed.wait(POLL)

    def _admissions(self) -> list[Admission]:
        """Waiting jobs, the first ones first, each to the replica with the most free slots."""
        admitted = []
        for free, queue in zip(self._free, self._waiting, strict=True):
            while queue and any(free):
                job = queue.popleft()
                replica = max(range(len(free)), key=lambda number: (free[number], -number))
                free[replica] -= 1
                job.admission = replace(job.admission, replica=replica)
                self._running[job.admission.job] = job
                admitted.append(job.admission)
        self.counters.admitted += len(admitted)
        return admitted

    def _deliver(self, progress: Progress) -> None:
        with self._changed:
            job = self._running.get(progress.job)
            if job is None:  # its client is gone; the others hear of it with the next commands
                return
            if progress.completion is not None:
                self._give_back(progress.job)
                self.counters.finished += 1
                self.counters.passes += progress.passes
                self.counters.tokens += len(progress.completion.tokens)
        job.tell(progress)

    def _give_back(self, number: int) -> None:
        admission = self._running.pop(number).admission
        self._free[admission.model][admission.replica] += 1

    def _refuse_waiting(self) -> None:
        with self._changed:
            self.stopping = True
            refused = [job for queue in self._waiting for job in queue]
            for queue in self._waiting:
                queue.clear()
        for job in refused:
            job.tell(Stopping())

    def _end(self) -> None:
        self._refuse_waiting()
        with self._changed:
            running = list(self._running.values())
        for job in running:
            job.tell(Stopping())
