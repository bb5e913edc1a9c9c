"""Parts of the server without HTTP: text while it is written, which job gets which slot, metrics."""

from __future__ import annotations

import asyncio
import math
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.serving import replies
from megatron_dtrpo.serving.answer import LEAST, Answer
from megatron_dtrpo.serving.app import SHORT, _read
from megatron_dtrpo.serving.desk import Desk, QueueFull, Stopping
from megatron_dtrpo.serving.gathered import _Gathered
from megatron_dtrpo.serving.messages import Admission, Commands, Counters, Ended, Progress, Report, Request
from megatron_dtrpo.serving.scheduler import Scheduler
from megatron_dtrpo.serving.wire import Frames, framed

BYTES = build_tokenizer("ByteLevelTokenizer")


def take(answer: Answer, text: bytes, ended: bool | None = None) -> str:
    return answer.take(list(text), [0.5] * len(text), 1, ended)[0]


def test_a_character_is_shown_when_it_is_whole():
    answer, text = Answer(BYTES), "a\u4e2d\U0001f600".encode()
    shown = [take(answer, text[:count]) for count in range(1, len(text) + 1)]
    assert shown == ["a", "", "", "\u4e2d", "", "", "", "\U0001f600"]
    assert take(answer, text + b"\xf0", ended=False) == "\ufffd" and answer.finish == "length"


def test_what_may_become_a_stop_string_is_held_back():
    answer = Answer(BYTES, ["END", "NOW"])
    assert [take(answer, b"wordE"), take(answer, b"wordEN"), take(answer, b"wordEN?")] == ["word", "", "EN?"]
    assert take(answer, b"wordEN?NO") == ""
    assert take(answer, b"wordEN?NOW and END") == "" and answer.finish == "stop"
    assert answer.text == "wordEN?" and answer.count == 18


def test_what_was_held_back_is_shown_at_the_end():
    answer = Answer(BYTES, ["END"])
    assert [take(answer, b"wEN"), take(answer, b"wEN", ended=True)] == ["w", "EN"]
    assert answer.finish == "stop"


def test_scores_go_with_the_text_and_fit_into_json():
    answer = Answer(BYTES, ["!"], scored=True)
    _, first = answer.take(list("a\u00e9".encode()[:2]), [1.0, 0.25], 1)
    _, rest = answer.take([*"a\u00e9bc!d".encode()], [1.0, 0.25, 0.0, 0.5, 1.0000001, 0.5, 0.5], 2)
    assert [score.text for score in (*first, *rest)] == ["a", "", "\u00e9", "b", "c"]
    assert [score.logprob for score in answer.scores] == [0.0, math.log(0.25), LEAST, math.log(0.5), 0.0]
    assert [score.offset for score in answer.scores] == [0, 1, 1, 2, 3]


class Loop:
    """A worker that finishes each job in the round after that of its admission, and keeps what it was told."""

    replicas, seconds = 2, 0.0

    def __init__(self):
        self.heard: list[Commands | None] = []
        self.active: list[int] = []

    def run(self, commands):
        self.heard.append(commands)
        if commands is None:
            return []
        done = [job for job in self.active if job not in commands.released]
        self.active = [one.job for one in commands.admitted]
        return [finished(job) for job in done]


class Script:
    """Clients that ask ``requests``, one after the other, and keep what they hear."""

    is_gone = False

    def __init__(self, *requests: Request | None):
        self.script, self.reports = list(requests), []

    def requests(self, seconds: float) -> list[Request]:
        found = self.script.pop(0) if self.script else None
        return [] if found is None else [found]

    def report(self, report: Report) -> None:
        self.reports.append(report)

    def heard_of(self) -> list[int]:
        return [one.job for report in self.reports for one in report.progress]


def finished(job: int) -> Progress:
    return Progress(job, 3, [1], [1.0], Completion([1], [0], [1.0], [0], 3, True, []))


def admission(job: int = -1, **settings) -> Admission:
    return Admission(job, 0, 0, [1], DecodingOptions(), 0, (0, 0), **settings)


def run(clients: Script, rounds: int = 8) -> tuple[Loop, Scheduler]:
    """Runs until the script is over and nothing is left to do."""
    worker = Loop()
    scheduler = Scheduler(worker, models=1, slots=1, clients=clients)
    left = iter(range(rounds))
    scheduler.run(lambda: next(left, None) is None, grace=5)
    return worker, scheduler


def test_jobs_get_slots_in_turn_and_give_them_back():
    clients = Script(Request([admission(job) for job in range(4)], cancelled=[1]), None, Request(measure=True))
    worker, scheduler = run(clients)
    admitted = [(one.job, one.replica) for each in worker.heard if each for one in each.admitted]
    assert admitted == [(0, 0), (2, 1), (3, 0)]
    assert clients.heard_of() == [0, 2, 3] and worker.heard[-1] is None
    (counted,) = [report.counters for report in clients.reports if report.counters]
    assert (counted.running, counted.waiting, counted.cancelled, counted.finished) == (0, 1, 1, 2)
    assert (scheduler.counters.finished, scheduler.counters.passes, scheduler.counters.tokens) == (3, 9, 3)


def test_a_cancelled_job_is_released_on_all_processes_and_heard_of_no_more():
    clients = Script(Request([admission(5)]), Request(cancelled=[5]), Request(cancelled=[5]))
    worker, scheduler = run(clients)
    assert [each.released for each in worker.heard if each] == [[], [5]]
    assert clients.heard_of() == [] and scheduler.counters.cancelled == 1
    assert scheduler.counters.rounds == 1  # to give a slot back is no pass


def test_what_a_stop_string_ended_is_finished_and_counts():
    """Not given up by its client; and once, where it ended by itself before the scheduler heard of it."""
    clients = Script(Request([admission(5), admission(6)]), Request(ended=[Ended(5, 8, 2), Ended(6, 8, 2)]))
    clients.script += [None, Request(ended=[Ended(5, 8, 2)])]
    worker, scheduler = run(clients)
    assert [each.released for each in worker.heard if each] == [[], [5, 6]]
    counted = scheduler.counters
    assert (counted.finished, counted.tokens, counted.passes, counted.cancelled) == (2, 16, 4, 0)


def test_who_waits_when_the_server_stops_is_told_and_who_runs_is_finished():
    clients = Script(Request([admission(job) for job in range(3)]), Request([admission(3)]))
    run(clients, rounds=1)
    told = [report.refused for report in clients.reports if report.stopping]
    assert told[:2] == [[2], [3]] and clients.heard_of() == [0, 1]


def test_a_long_prompt_is_read_aside():
    service, go = SimpleNamespace(reader=ThreadPoolExecutor(1)), threading.Event()

    async def check():
        long = asyncio.ensure_future(_read(service, request(SHORT + 1), lambda: go.wait(30)))
        unknown = asyncio.ensure_future(_read(service, request(None), lambda: "after it"))
        assert await _read(service, request(SHORT), lambda: "at once") == "at once"
        assert not long.done() and not unknown.done()
        go.set()
        assert await long and await unknown == "after it"

    def request(size: int | None):
        return SimpleNamespace(headers={} if size is None else {"content-length": str(size)})

    asyncio.run(check())


@pytest.mark.parametrize("size", [1, 3, 10_000])
def test_messages_arrive_whole_however_they_are_cut(size):
    messages = [Report([finished(3)]), Request([admission(1)], cancelled=[2]), None, "x" * 5000]
    data, frames = b"".join(map(framed, messages)), Frames()
    found = [one for start in range(0, len(data), size) for one in frames.feed(data[start : start + size])]
    assert found == messages


class Wired:
    """A desk on an event loop, and the scheduler's end of its socket."""

    def __init__(self, places: int, limit: int):
        self.desk = Desk(places, limit)
        self.far, self.near = socket.socketpair()
        self.closed = asyncio.Event()
        self.frames = Frames()

    async def open(self) -> bool:
        self.far.sendall(framed(Report()))
        return await self.desk.open(self.near, self.closed.set)

    async def asked(self) -> list[Request]:
        await asyncio.sleep(0.01)
        return self.frames.feed(self.far.recv(2**16))


def test_the_desk_hands_jobs_on_and_their_tickets_what_is_said():
    async def check():
        wired = Wired(places=1, limit=2)
        assert await wired.open()
        first, second = wired.desk.submit([admission()]), wired.desk.submit([admission(), admission()])
        with pytest.raises(QueueFull):
            wired.desk.submit([admission()])
        assert [[one.job for one in request.admissions] for request in await wired.asked()] == [[0], [1, 2]]
        second.cancel([0])
        assert await wired.asked() == [Request(cancelled=[1])]
        cut = wired.desk.submit([admission()])
        cut.end(0, tokens=9, passes=2)
        cut.cancel()
        assert [request.ended for request in await wired.asked()] == [(), [Ended(3, 9, 2)]]
        third = wired.desk.submit([admission()])
        wired.far.sendall(framed(Report([Progress(0, 1), finished(0), finished(1), finished(2)])))
        assert [await first.next(), await first.next()] == [(0, Progress(0, 1)), (0, finished(0))]
        assert await second.next() == (1, finished(2))
        assert wired.desk.refused == 1
        asked = asyncio.ensure_future(wired.desk.counters())
        assert Request(measure=True) in await wired.asked()
        wired.far.sendall(framed(Report(counters=Counters(running=7))))
        assert (await asked).running == 7
        unanswered = asyncio.ensure_future(wired.desk.counters())
        await asyncio.sleep(0)
        wired.far.close()
        await wired.closed.wait()
        for what in (third.next(), unanswered, wired.desk.counters()):
            with pytest.raises(Stopping):
                await what
        with pytest.raises(Stopping):
            wired.desk.submit([admission()])

    asyncio.run(check())


def test_a_scheduler_that_never_begins_opens_no_desk():
    async def check():
        wired = Wired(places=1, limit=2)
        wired.far.close()
        assert not await wired.desk.open(wired.near, wired.closed.set) and wired.closed.is_set()

    asyncio.run(check())


class Transport:
    """Keeps what is written."""

    def __init__(self):
        self.written, self.closed = [], False

    def write(self, data):
        self.written.append(data)

    def is_closing(self):
        return self.closed

    def close(self):
        self.closed = True


def test_what_is_written_in_one_turn_goes_out_at_once():
    async def check():
        transport = Transport()
        gathered = _Gathered(transport, asyncio.get_running_loop())
        for data in (b"head ", b"first"):
            gathered.write(data)
        assert transport.written == []
        await asyncio.sleep(0)
        assert transport.written == [b"head first"] and not gathered.is_closing()
        await asyncio.sleep(0)
        gathered.write(b"last")
        gathered.close()
        assert transport.written == [b"head first", b"last"] and transport.closed
        gathered.write(b"late")
        await asyncio.sleep(0)
        assert len(transport.written) == 2

    asyncio.run(check())


def test_metrics_are_prometheus_text():
    text = replies.metrics([("x_total", "counter", "Words.", 3), ("y", "gauge", "More.", 0.5)])
    assert re.fullmatch(r"(# HELP \w+ [\w.]+\n# TYPE \w+ (counter|gauge)\n\w+ [\d.]+\n){2}", text)
