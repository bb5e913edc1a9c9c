"""A server of `megatron-dtrpo serve` in processes of its own, and requests to it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.launch import Job, verb


class Server:
    """A running server. ``post`` and ``get`` return status and body, JSON where it is some."""

    def __init__(self, job: Job, port: int):
        self.job, self.port = job, port

    def request(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **(headers or {})})
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        is_json = answer.getheader("Content-Type", "").startswith("application/json")
        return answer.status, json.loads(text) if is_json else text

    def post(self, path: str, headers: dict | None = None, **body):
        return self.request("POST", path, json.dumps(body).encode(), headers)

    def get(self, path: str, headers: dict | None = None):
        return self.request("GET", path, headers=headers)

    def metrics(self) -> dict[str, float]:
        _, text = self.get("/metrics")
        return {name: float(value) for name, value in re.findall(r"^megatron_dtrpo_(\w+) (\S+)$", text, re.MULTILINE)}

    def wait_until_idle(self, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while (now := self.metrics())["requests_running"] + now["requests_waiting"]:
            assert time.monotonic() < deadline, now
            time.sleep(0.02)

    def stream(self, path: str, **body) -> tuple[socket.socket, http.client.HTTPResponse]:
        """A connection whose first chunks can be read, and the reader."""
        connection = self.send(path, stream=True, **body)
        answer = connection.getresponse()
        assert answer.status == 200, answer.read()
        return connection, answer

    def send(self, path: str, **body) -> http.client.HTTPConnection:
        """Asks, and does not wait for the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return connection


def events(text: str) -> list:
    """The events of a stream, without its end mark."""
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(one) for one in found if one != "[DONE]"]


@contextmanager
def serving(log: Path, processes: int = 1, **settings) -> Iterator[Server]:
    job = Job({"port": 0, **settings}, log, processes, verb("serve"))
    try:
        job.wait_until(lambda: " at http://" in log.read_text())
        yield Server(job, int(re.search(r" at http://\S+:(\d+)", log.read_text())[1]))
    finally:
        job.kill()
