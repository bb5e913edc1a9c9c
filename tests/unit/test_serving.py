"""Parts of the server without HTTP: text while it is written, which job gets which slot, metrics."""

from __future__ import annotations

import math
import re
import threading

import pytest

pytest.importorskip("pydantic")
from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.diffusion.decoding import Completion
from megatron_dtrpo.serving import replies
from megatron_dtrpo.serving.answer import LEAST, Answer
from megatron_dtrpo.serving.scheduler import QueueFull, Scheduler, Stopping
from megatron_dtrpo.serving.worker import Admission, Commands, Progress

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
        return [Progress(job, 3, [1], [1.0], Completion([1], [0], [1.0], [0], 3, True, [])) for job in done]


def admission(**settings) -> Admission:
    return Admission(-1, 0, 0, [1], DecodingOptions(), 0, (0, 0), **settings)


def test_jobs_get_slots_in_turn_and_give_them_back():
    worker = Loop()
    scheduler = Scheduler(worker, models=1, slots=1, limit=2)
    said: list[tuple[int, object]] = []
    jobs = scheduler.submit([admission()] * 4, lambda place, what: said.append((place, what)))
    with pytest.raises(QueueFull):
        scheduler.submit([admission()], lambda *_: None)
    scheduler.cancel([jobs[1]])
    rounds = iter([False] * 8)
    scheduler.run(lambda: next(rounds, True), grace=5)
    admitted = [(one.job, one.replica) for each in worker.heard if each for one in each.admitted]
    assert admitted == [(jobs[0], 0), (jobs[2], 1), (jobs[3], 0)]
    assert [place for place, _ in said] == [0, 2, 3] and worker.heard[-1] is None
    assert (scheduler.running, scheduler.waiting, scheduler.counters.cancelled) == (0, 0, 1)
    with pytest.raises(Stopping):
        scheduler.submit([admission()], lambda *_: None)


def test_a_cancelled_job_is_released_on_all_processes_and_heard_of_no_more():
    worker = Loop()
    scheduler = Scheduler(worker, models=1, slots=1, limit=9)
    said, jobs = [], []
    jobs += scheduler.submit([admission()], lambda place, what: said.append(what))
    once = threading.Event()

    def asked() -> bool:
        if scheduler.running and not once.is_set():
            once.set()
            scheduler.cancel(jobs)
        return once.is_set() and len(worker.heard) > 1

    scheduler.run(asked, grace=5)
    assert [each.released for each in worker.heard[:2]] == [[], jobs] and said == []


def test_who_waits_when_the_server_stops_is_told():
    scheduler = Scheduler(Loop(), models=1, slots=1, limit=9)
    said = []
    scheduler.submit([admission()] * 2, lambda place, what: said.append(what))
    scheduler.run(lambda: True, grace=5)
    assert [type(one) for one in said] == [Stopping, Stopping]


def test_metrics_are_prometheus_text():
    text = replies.metrics([("x_total", "counter", "Words.", lambda: 3), ("y", "gauge", "More.", lambda: 0.5)])
    assert re.fullmatch(r"(# HELP \w+ [\w.]+\n# TYPE \w+ (counter|gauge)\n\w+ [\d.]+\n){2}", text)
