"""Clients of a server, each with one connection, on which it streams one response after the other.

All in one event loop: a machine that they share with the server is to be the server's.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import uvloop

LONGEST = 2**26  # bytes of a stream


@dataclass
class Heard:
    """What clients got, of all that were asked with it. ``failed``: streams that were lost or cut. ``differ``: texts
    other than the one that the same seed gave before. ``seconds``: from the first request to the last stream's end."""

    tokens: int = 0
    responses: int = 0
    failed: int = 0
    differ: int = 0
    given_up: int = 0
    seconds: float = 0.0
    texts: dict[int, str] = field(default_factory=dict)


def ask(heard: Heard, port: int, prompts: Sequence[str], clients: int, seconds: float, given_up: int) -> None:
    """``clients`` ask for ``seconds``, and wait for what they asked for. ``given_up``: so many requests are left in
    mid-stream."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_Spell(heard, port, prompts, seconds, given_up).run(clients))


class _Spell:
    def __init__(self, heard: Heard, port: int, prompts: Sequence[str], seconds: float, given_up: int):
        self.heard, self.port, self.prompts, self.seconds, self.given_up = heard, port, prompts, seconds, given_up

    async def run(self, clients: int) -> None:
        started = time.monotonic()
        await asyncio.gather(
            *(self._client(random.Random(number), started + self.seconds) for number in range(clients))
        )
        self.heard.seconds += time.monotonic() - started

    async def _client(self, rng: random.Random, until: float) -> None:
        connection = None
        while time.monotonic() < until:
            gives_up = self.given_up > 0
            self.given_up -= gives_up
            try:
                connection = connection or await asyncio.open_connection("127.0.0.1", self.port, limit=LONGEST)
                await self._ask(*connection, rng.randrange(len(self.prompts)), gives_up)
            except (OSError, EOFError, ValueError, LookupError):
                self.heard.failed += 1
                gives_up = True
            if gives_up and connection:
                connection[1].close()
                connection = None
        if connection:
            connection[1].close()

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int, gives_up: bool
    ) -> None:
        asked = {"prompt": self.prompts[number], "seed": number, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        if gives_up:
            asked["temperature"] = 2.0  # a long response
        writer.write(_request("/v1/completions", asked))
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200 "):
            raise ValueError(head)
        if gives_up:
            self.heard.given_up += 1
            return
        lines = _joined(await reader.readuntil(b"\r\n0\r\n\r\n")).decode().splitlines()
        if lines[-2:] != ["data: [DONE]", ""]:
            raise ValueError("the stream is not whole")
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        self.heard.responses += 1
        self.heard.tokens += events[-1]["usage"]["completion_tokens"]
        self.heard.differ += self.heard.texts.setdefault(number, text) != text


def _request(path: str, body: dict) -> bytes:
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + data


def _joined(chunks: bytes) -> bytes:
    """The body of chunks, each behind its length."""
    body, place = b"", 0
    while True:
        end = chunks.index(b"\r\n", place)
        length = int(chunks[place:end], 16)
        if not length:
            return body
        body += chunks[end + 2 : end + 2 + length]
        place = end + 4 + length
