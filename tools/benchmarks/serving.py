"""Times a server under many streaming clients beside `generate` on the same prompts, and looks for what it loses.

The machine's speed changes from minute to minute: the clients ask in spells, and `generate` runs with the same options
before, between and after them, while the server waits. Every client streams one response after the other, each with a
seed of its prompt's; every text is compared with the one that the same seed gave before. A share of the requests is
given up in the middle. Prints tokens per second of both, memory of both processes of the server after each spell, slots
that are not free at the end (0), and texts that differ (0).
"""

from __future__ import annotations

import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from megatron_dtrpo.cli.process import run_command
from megatron_dtrpo.config.command_line import Parser, command_parser, parse_flags
from megatron_dtrpo.errors import UserError
from tools.benchmarks.stream_clients import Heard, ask

EXAMPLES = "\n  python -m tools.benchmarks.serving --checkpoint RUN --prompts problems.jsonl --seconds 300\n"


def build_parser() -> Parser:
    parser = command_parser("python -m tools.benchmarks.serving", __doc__, EXAMPLES)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="Run folder.")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="JSONL file of text prompts.")
    parser.add_argument("--clients", type=int, default=64, help="At once. Default: %(default)s.")
    parser.add_argument("--batch-size", type=int, default=16, help="Of serve and of generate. Default: %(default)s.")
    parser.add_argument("--seconds", type=float, default=60, help="How long they ask. Default: %(default)s.")
    parser.add_argument("--spells", type=int, default=4, help="In how many parts. Default: %(default)s.")
    parser.add_argument(
        "--given-up", type=int, default=0, metavar="N", help="Requests to give up. Default: %(default)s."
    )
    parser.add_argument(
        "--responses", type=int, default=4096, help="Of generate, each time that it runs. Default: %(default)s."
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="torch's, of serve and of generate alike. Default: each takes what it takes, on a CPU serve leaves a core "
        "to its clients.",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="Of a response. Default: %(default)s.")
    parser.add_argument("--temperature", type=float, default=1.0, help="Default: %(default)s.")
    return parser


def main(argv: list[str] | None = None) -> int:
    return run_command(_main, argv)


def _main(argv: list[str]) -> None:
    arguments = parse_flags(build_parser(), argv)
    prompts = [json.loads(line)["prompt"] for line in Path(arguments.prompts).open(encoding="utf-8")]
    shared = ["--checkpoint", arguments.checkpoint, "--batch-size", str(arguments.batch_size)]
    shared += ["--max-new-tokens", str(arguments.max_new_tokens), "--temperature", str(arguments.temperature)]
    for name in ("clients", "spells", "responses"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: it must be at least 1")
    if arguments.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    heard, spells = Heard(), arguments.spells
    served, memory = [], []
    with tempfile.TemporaryDirectory() as folder, _server(shared, Path(folder)) as (server, port):
        generated = [_generate(shared, arguments.responses, prompts, Path(folder))]
        for number in range(spells):
            tokens, seconds = heard.tokens, heard.seconds
            give_up = arguments.given_up * (number + 1) // spells - arguments.given_up * number // spells
            ask(heard, port, prompts, arguments.clients, arguments.seconds / spells, give_up)
            served.append((heard.tokens - tokens) / (heard.seconds - seconds))
            memory.append(sum(one.memory_info().rss for one in (server, *server.children())) / 2**20)
            generated.append(_generate(shared, arguments.responses, prompts, Path(folder)))
        taken = _taken(port)
    ratio = statistics.mean(served) / statistics.mean(generated)
    print("tokens per second, of generate and serve in turn: " + _in_turn(generated, served))
    print(f"serve has {ratio:.3f} of generate's: {statistics.mean(served):.0f} of {statistics.mean(generated):.0f}")
    print(f"{heard.responses} responses in {heard.seconds:.0f} seconds, {arguments.clients} clients")
    print(f"texts that differ {heard.differ}, requests that failed {heard.failed}, given up {heard.given_up}")
    print("slots     " + taken)
    print("memory    " + ", ".join(f"{size:.0f}" for size in memory) + " MiB")


def _in_turn(generated: list[float], served: list[float]) -> str:
    pairs = [f"{one:.0f} [{other:.0f}]" for one, other in zip(generated, served, strict=False)]
    return " ".join([*pairs, f"{generated[-1]:.0f}"])


@contextmanager
def _server(shared: list[str], folder: Path) -> Iterator[tuple[psutil.Process, int]]:
    """Its process and port."""
    log = folder / "serve.log"
    with log.open("wb") as file:
        words = [sys.executable, "-m", "megatron_dtrpo", "serve", "--port", "0", *shared]
        server = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
    try:
        while not (found := re.search(r" at http://\S+:(\d+)", log.read_text())):
            if server.poll() is not None:
                raise RuntimeError(log.read_text())
            time.sleep(0.1)
        yield psutil.Process(server.pid), int(found[1])
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
