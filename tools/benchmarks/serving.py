"""Times a server under many streaming clients beside `generate` on the same prompts, and looks for what it loses.

Runs `generate`, `serve` and `generate` again with the same options. Every client streams one prompt after the other,
with a seed of its own number; every text is compared with the one that the same seed gave before. A share of the
requests is given up in the middle. Prints tokens per second of both, memory of both processes of the server meanwhile,
slots that are not free at the end (0), and texts that differ (0).
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser, parse_flags

EXAMPLES = "\n  python -m tools.benchmarks.serving --checkpoint RUN --prompts problems.jsonl --seconds 300\n"


def build_parser() -> Parser:
    parser = command_parser("python -m tools.benchmarks.serving", __doc__, EXAMPLES)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="Run folder.")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSONL file of text prompts.")
    parser.add_argument("--clients", type=int, default=64, help="At once. Default: %(default)s.")
    parser.add_argument("--batch-size", type=int, default=16, help="Of serve and of generate. Default: %(default)s.")
    parser.add_argument("--seconds", type=float, default=60, help="How long they ask. Default: %(default)s.")
    parser.add_argument(
        "--given-up", type=int, default=0, metavar="N", help="Requests to give up. Default: %(default)s."
    )
    parser.add_argument(
        "--responses", type=int, default=4096, help="Of generate, once before and once after. Default: %(default)s."
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="Of a response. Default: %(default)s.")
    parser.add_argument("--temperature", type=float, default=1.0, help="Default: %(default)s.")
    return parser


class Clients:
    """What all clients share, under one lock."""

    def __init__(self, port: int, prompts: list[str], arguments: argparse.Namespace):
        self.port, self.prompts, self.arguments = port, prompts, arguments
        self.lock = threading.Lock()
        self.texts: dict[int, str] = {}
        self.tokens = self.requests = self.differ = self.failed = 0
        self.given_up = arguments.given_up
        self.until = time.monotonic() + arguments.seconds

    def run(self, number: int) -> None:
        rng, connection = random.Random(number), http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        while time.monotonic() < self.until:
            with self.lock:
                gives_up = self.given_up > 0
                self.given_up -= gives_up
            try:
                self._ask(connection, rng.randrange(len(self.prompts)), gives_up)
            except (OSError, http.client.HTTPException, ValueError, KeyError):
                connection.close()
                with self.lock:
                    self.failed += 1

    def _ask(self, connection: http.client.HTTPConnection, number: int, gives_up: bool) -> None:
        asked = {"prompt": self.prompts[number], "seed": number, "stream": True}
        asked["stream_options"] = {"include_usage": True}
        if gives_up:
            asked["temperature"] = 2.0  # a long response
        connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if gives_up:
            answer.readline()
            answer.close()
            connection.close()
            return
        lines = answer.read().decode().splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        if lines[-2:] != ["data: [DONE]", ""]:
            raise ValueError("the stream is not whole")
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        with self.lock:
            self.requests += 1
            self.tokens += events[-1]["usage"]["completion_tokens"]
            self.differ += self.texts.setdefault(number, text) != text


def main(argv: list[str] | None = None) -> int:
    return run_command(_main, argv)


def _main(argv: list[str]) -> None:
    arguments = parse_flags(build_parser(), argv)
    rows = [json.loads(line) for line in Path(arguments.prompts).open(encoding="utf-8")]
    prompts = [row["prompt"] for row in rows]
    shared = ["--checkpoint", arguments.checkpoint, "--batch-size", str(arguments.batch_size)]
    shared += ["--max-new-tokens", str(arguments.max_new_tokens), "--temperature", str(arguments.temperature)]
    with tempfile.TemporaryDirectory() as folder:
        before = _generate(shared, arguments.responses, prompts, Path(folder))
        served = _serve(shared, prompts, arguments, Path(folder))
        after = _generate(shared, arguments.responses, prompts, Path(folder))
    rate = served.tokens / arguments.seconds
    print(f"serve     {rate:.1f} tokens per second, {served.requests} responses, {arguments.clients} clients")
    print(f"generate  {before:.1f} and {after:.1f}; serve has {2 * rate / (before + after):.2f} of their mean")
    print(f"texts that differ {served.differ}, requests that failed {served.failed}")


def _serve(shared: list[str], prompts: list[str], arguments: argparse.Namespace, folder: Path) -> Clients:
    log = folder / "serve.log"
    with log.open("wb") as file:
        words = [sys.executable, "-m", "megatron_dtrpo", "serve", "--port", "0", *shared]
        server = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    try:
        while not (found := re.search(r" at http://\S+:(\d+)", log.read_text())):
            if server.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        clients, process = Clients(int(found[1]), prompts, arguments), psutil.Process(server.pid)
        threads = [threading.Thread(target=clients.run, args=(n,)) for n in range(arguments.clients)]
        for thread in threads:
            thread.start()
        memory = []
        while any(thread.is_alive() for thread in threads):
            time.sleep(max(1.0, arguments.seconds / 10))
            memory.append(sum(one.memory_info().rss for one in (process, *process.children())) / 2**20)
        print("memory    " + ", ".join(f"{size:.0f}" for size in memory) + " MiB")
        print("slots     " + _taken(clients.port))
        return clients
    finally:
        server.terminate()
        server.wait(60)


def _taken(port: int) -> str:
    time.sleep(1)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    found = (line.removeprefix("megatron_dtrpo_") for line in lines if not line.startswith("#"))
    return ", ".join(line for line in found if "cancelled" in line or "running" in line)


def _generate(shared: list[str], count: int, prompts: list[str], folder: Path) -> float:
    """Tokens per second for as many responses."""
    rows = [{"prompt": prompts[number % len(prompts)]} for number in range(count)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["--prompts", str(folder / "prompts.jsonl"), "--output", str(folder / "out.jsonl")]
    words = [sys.executable, "-m", "megatron_dtrpo", "generate", *shared, *files, "--no-progress"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(re.search(r"([\d.]+) tokens per second", done.stderr)[1])


if __name__ == "__main__":
    sys.exit(main())
