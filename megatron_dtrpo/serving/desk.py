"""The clients' side of the scheduler: takes jobs to it, and what it says to those who wait. Of the event loop's thread.

Which jobs are finished is known here as well, so that a request which is too much is refused without asking.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from megatron_dtrpo.serving.messages import Admission, Counters, Ended, Progress, Report, Request
from megatron_dtrpo.serving.wire import Frames, framed


class QueueFull(Exception):
    """More jobs would wait than may."""


class Stopping(Exception):
    """The server stops and takes no jobs."""


class Ticket:
    """Jobs of one request, all of one model, and what is heard of them."""

    def __init__(self, desk: Desk, model: int, jobs: Sequence[int]):
        self.model, self.jobs = model, jobs
        self._desk = desk
        self._heard: asyncio.Queue[tuple[int, Progress | None]] = asyncio.Queue()

    def hear(self, job: int, said: Progress | None) -> None:
        """None: the server stops, and no more will be heard."""
        self._heard.put_nowait((job - self.jobs[0], said))

    async def next(self) -> tuple[int, Progress]:
        """The place of a job, and how far it is. Raises Stopping."""
        place, said = await self._heard.get()
        if said is None:
            raise Stopping
        return place, said

    def cancel(self, places: Sequence[int] | None = None) -> None:
        """Gives up the jobs at ``places``, default: all."""
        self._desk.cancel(self.jobs if places is None else [self.jobs[place] for place in places])

    def end(self, place: int, tokens: int, passes: int) -> None:
        """The job at ``place`` is finished as it is: a stop string is among its ``tokens``."""
        self._desk.end(Ended(self.jobs[place], tokens, passes))


class Desk:
    """``places``: slots of each model. ``limit``: jobs that may wait for one.

    Attributes:
        stopping: no jobs are taken any more.
        refused: jobs that were not taken, as too many waited.
    """

    def __init__(self, places: int, limit: int):
        self.places, self.limit = places, limit
        self.stopping, self.refused = False, 0
        self._numbers = itertools.count()
        self._tickets: dict[int, Ticket] = {}  # of the jobs that are not finished
        self._outstanding: Counter[int] = Counter()  # of each model's jobs
        self._asked: deque[asyncio.Future[Counters]] = deque()
        self._wire: asyncio.Transport
        self._closed: Callable[[], None]

    @property
    def most(self) -> int:
        """Jobs that one request may have."""
        return self.limit + self.places

    async def open(self, sock: socket.socket, closed: Callable[[], None]) -> bool:
        """Returns once the scheduler is ready, or False: it will not be. ``sock``: to the scheduler. ``closed`` is
        called once there is nobody to listen to any more."""
        begun = asyncio.get_running_loop().create_future()
        self._closed = closed
        self._wire, _ = await asyncio.get_running_loop().create_connection(lambda: _Wire(self, begun), sock=sock)
        return await begun

    def close(self) -> None:
        """Nothing more will be heard."""
        self.hear(Report(refused=list(self._tickets), stopping=True))
        for answer in self._asked:
            if not answer.done():
                answer.set_exception(Stopping())
        self._closed()

    def hear(self, report: Report) -> None:
        self.stopping |= report.stopping
        for progress in report.progress:
            ticket = self._tickets.get(progress.job)
            if ticket is None:  # given up
                continue
            if progress.completion is not None:
                self._forget(progress.job)
            ticket.hear(progress.job, progress)
        for job in report.refused:
            if job in self._tickets:
                self._forget(job).hear(job, None)
        if report.counters is not None:
            answer = self._asked.popleft()
            if not answer.done():
                answer.set_result(report.counters)

    def _forget(self, job: int) -> Ticket:
        ticket = self._tickets.pop(job)
        self._outstanding[ticket.model] -= 1
        return ticket

    def submit(self, admissions: Sequence[Admission]) -> Ticket:
        """Queues all ``admissions``, of one model, or none. Their jobs are numbered here.

        Raises:
            QueueFull, Stopping.
        """
        if self.stopping:
            raise Stopping
        model = admissions[0].model
        after = self._outstanding + Counter({model: len(admissions)})
        if sum(max(0, count - self.places) for count in after.values()) > self.limit:
            self.refused += len(admissions)
            raise QueueFull
        numbered = [replace(one, job=next(self._numbers)) for one in admissions]
        ticket = Ticket(self, model, [one.job for one in numbered])
        self._outstanding = after
        self._tickets |= dict.fromkeys(ticket.jobs, ticket)
        self._send(Request(numbered))
        return ticket

    def cancel(self, jobs: Sequence[int]) -> None:
        """Gives ``jobs`` up; those that are finished stay so."""
        gone = [job for job in jobs if job in self._tickets]
        for job in gone:
            self._forget(job)
        if gone:
            self._send(Request(cancelled=gone))

    def end(self, one: Ended) -> None:
        if one.job in self._tickets:
            self._forget(one.job)
            self._send(Request(ended=[one]))

    def _send(self, request: Request) -> None:
        if not self._wire.is_closing():
            self._wire.write(framed(request))

    async def counters(self) -> Counters:
        """What the scheduler counts. Raises Stopping."""
        if self._wire.is_closing():
            raise Stopping
        answer = asyncio.get_running_loop().create_future()
        self._asked.append(answer)
        self._send(Request(measure=True))
        return await answer


class _Wire(asyncio.Protocol):
    """``begun``: whether anything was ever heard."""

    def __init__(self, desk: Desk, begun: asyncio.Future[bool]):
        self._desk, self._begun, self._frames = desk, begun, Frames()

    def data_received(self, data: bytes) -> None:
        for report in self._frames.feed(data):
            if not self._begun.done():
                self._begun.set_result(True)
            self._desk.hear(report)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._begun.done():
            self._begun.set_result(False)
        self._desk.close()
