"""Runs the trainer as a user does, alone or under torchrun, and reads what it leaves behind.

Output goes to a file, never to a pipe, and a run past its time is killed with all its children: a process stuck in a
collective would otherwise keep its pipe, and the test with it, for the ten minutes of gloo's timeout.
"""

from __future__ import annotations

import json
import os
import random
import signal
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[2]

# Large enough for TP2 x PP2 and for two query groups, small enough that a step takes about 0.1 s.
TINY_MODEL = {
    "num_layers": 4,
    "hidden_size": 32,
    "ffn_hidden_size": 64,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "block_size": 8,
    "tokenizer_type": "ByteLevelTokenizer",
}

# Settings of torchrun's that a test process may have inherited.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def verb(name: str) -> list[str]:
    """Python's arguments for a verb of ``megatron-dtrpo``."""
    return ["-m", "megatron_dtrpo", name]


def flags(settings: dict) -> list[str]:
    """``{"train_iters": 5, "bf16": True}`` as the command line has it."""
    words = []
    for key, value in settings.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return words


def uneven_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Writes ``count`` preference pairs of random letters; the longest is many times the shortest, so that micro-batch
    size, packing budget and the number of processes each pack a step differently."""
    rng = random.Random(seed)

    def text(most: int) -> str:
        return "".join(rng.choices(string.ascii_lowercase + " ", k=rng.randint(most // 20 + 1, most))) + "."

    pairs = []
    for _ in range(count):
        most = rng.choice((10, 40, 120))
        pairs.append({"prompt": text(most), "chosen": text(most), "rejected": text(most)})
    return write_lines(path, pairs)


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def read_metrics(save: Path) -> list[dict]:
    return [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]


def latest_iteration(save: Path) -> int:
    return int((save / "latest_checkpointed_iteration.txt").read_text())


@dataclass(frozen=True)
class Result:
    """A finished run; a negative ``status`` is the signal that ended it."""

    status: int
    output: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error:")]


def _environment(core: str | None = None) -> dict[str, str]:
    """``core``: folder of another megatron-core, before the one that is installed."""
    inherited = {key: value for key, value in os.environ.items() if key not in _TORCHRUN}
    path = os.pathsep.join(filter(None, [core, str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def _kill_tree(process: subprocess.Popen) -> None:
    """Ends a process that we started and all that it started, and nothing else."""
    try:
        own = psutil.Process(process.pid)
        family = [*own.children(recursive=True), own]
    except psutil.NoSuchProcess:
        return
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            pass
    process.wait()


class Job:
    """A run of the trainer, or of another command, in processes of its own."""

    def __init__(self, settings: dict, log: Path, processes: int = 1, command: list[str] | None = None):
        """``command``: Python's arguments instead of ``verb("train")``, e.g. a script."""
        self.log, self.processes = log, processes
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        words = (launcher if processes > 1 else []) + (command or verb("train")) + flags(settings)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words], stdout=file, stderr=subprocess.STDOUT, env=_environment(), cwd=REPOSITORY
            )

    def wait(self, timeout: float = 120) -> Result:
        """Waits for the end; a run that takes longer is killed and fails the test with its output."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self._output()}") from None
        return Result(status, self._output())

    def wait_until(self, condition: Callable[[], bool], timeout: float = 120) -> None:
        """Returns as soon as ``condition()`` holds; fails the test if the run ends or the time passes before."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"ended or timed out before what was waited for:\n{self._output()}")
            time.sleep(0.005)

    def trainers(self) -> list[psutil.Process]:
        """The processes that train: torchrun's children, or the only process."""
        own = psutil.Process(self.process.pid)
        return own.children() if self.processes > 1 else [own]

    def kill(self) -> None:
        _kill_tree(self.process)

    def _output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def run(settings: dict, log: Path, processes: int = 1, timeout: float = 120) -> Result:
    return Job(settings, log, processes).wait(timeout)


def train(settings: dict, processes: int = 1, timeout: float = 120) -> list[dict]:
    """Runs to the end, which must be a good one, and returns the metrics; the output is beside the run folder."""
    save = Path(settings["save"])
    result = run(settings, save.with_name(save.name + ".log"), processes, timeout)
    assert result.status == 0, result.output
    return read_metrics(save)


class ForkServer:
    """Trains as `train` does, in processes forked from one that has the slow imports behind it."""

    def __init__(self, log: Path, core: str | None = None):
        """``core``: see `_environment`."""
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.fork_server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=_environment(core),
                cwd=REPOSITORY,
            )

    def train(self, settings: dict, processes: int = 1, timeout: float = 120) -> list[dict]:
        save = Path(settings["save"])
        statuses, output = self.run(settings, save.with_name(save.name + ".log"), processes, timeout)
        assert statuses == [0] * processes, output
        return read_metrics(save)

    def kill(self, settings: dict, processes: int, moment: Callable[[], bool], delay: float) -> None:
        """Trains as `train` does until ``delay`` seconds after ``moment()`` holds, and then kills every process."""
        save = Path(settings["save"])
        statuses, output = self.run(settings, save.with_name(save.name + ".log"), processes, kill=(moment, delay))
        assert statuses == [-signal.SIGKILL] * processes, output

    def run(
        self,
        settings: dict,
        log: Path,
        processes: int = 1,
        timeout: float = 120,
        kill: tuple[Callable[[], bool], float] | None = None,
        **others,
    ) -> tuple[list[int], str]:
        """The ranks' exit statuses and what they printed.

        Args:
            kill: of `kill`; others: of a job, see `tests.support.fork_server`.
        """
        job = {"arguments": flags(settings), "processes": processes, "log": str(log), **others}
        watchdog = threading.Timer(timeout, self.close)
        watchdog.start()
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            ranks = json.loads(self.process.stdout.readline())
            if kill is not None:
                self._kill_when(*kill, ranks, timeout)
            answer = self.process.stdout.readline()
        finally:
            watchdog.cancel()
        output = log.read_text(encoding="utf-8", errors="replace")
        assert answer, f"no end within {timeout} s:\n{output}"
        return json.loads(answer), output

    def call(self, module: str, *arguments: Path | str, processes: int = 1, timeout: float = 240) -> None:
        """Calls ``main(*arguments)`` of a test's module in every rank. Output goes beside the last argument, a file."""
        log = Path(arguments[-1]).with_suffix(".log")
        words = {"module": module, "arguments": list(map(str, arguments))}
        statuses, output = self.run({}, log, processes, timeout, **words)
        assert statuses == [0] * processes, output

    def _kill_when(self, moment: Callable[[], bool], delay: float, ranks: list[int], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not moment() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(delay)
        for rank in ranks:
            os.kill(rank, signal.SIGKILL)

    def close(self) -> None:
        _kill_tree(self.process)


@dataclass(frozen=True)
class Layout:
    """``settings`` beside those that all runs share, on so many ``processes``; its numbers are those of the layout
    ``same_as``."""

    processes: int
    settings: dict = field(default_factory=dict)
    same_as: str | None = "one process"


def verb_runner(server, folder: Path) -> Callable[..., str]:
    """(name, settings): runs a verb to its end on a fork server, and returns what it printed."""

    def run(name: str, **settings) -> str:
        statuses, output = server.run(settings, folder / f"{name}.log", verb=name)
        assert statuses == [0], output
        return output

    return run


def read_rows(path: Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def layout_metrics(train: Callable, folder: Path, layouts: dict, **shared) -> Callable[[str], list[dict]]:
    """Name of a layout -> the metrics of its steps; every layout runs once.

    Args:
        train: (settings, processes) -> metrics, as `ForkServer.train`.
        folder: where ``pairs.jsonl`` is and the runs go.
        layouts: name -> `Layout`; ``shared`` settings hold for all.
    """
    done: dict[str, list[dict]] = {}

    def metrics(name: str) -> list[dict]:
        if name not in done:
            files = {"data_path": folder / "pairs.jsonl", "save": folder / name.replace(" ", "_").replace(",", "")}
            done[name] = train({**shared, **layouts[name].settings, **files}, layouts[name].processes)
        return done[name]

    return metrics


def disagreements(
    rows: list[dict], expected: list[dict], tolerance: float = 1e-4, floors: Mapping[str, float] = {}
) -> list[str]:
    """Where two runs' metrics differ by more than ``tolerance``, relatively; rates are not compared. ``floors``: what
    is allowed in any case, by name.

    Rewards and margins are differences of log-probabilities, which fp32 knows to some 1e-6 of their size. Near zero
    they have no relative precision of their own, so they may differ by that much.
    """
    if [row["iteration"] for row in rows] != [row["iteration"] for row in expected]:
        return [f"iterations {[r['iteration'] for r in rows]}, expected {[r['iteration'] for r in expected]}"]
    found = []
    for row, other in zip(rows, expected, strict=True):
        if row.keys() != other.keys():
            return [f"keys {list(row)}, expected {list(other)}"]
        size = max(abs(other.get(key, 0.0)) for key in ("logps/chosen", "logps/rejected"))
        for key, value in other.items():
            if key.endswith("_per_second"):
                continue
            floor = 1e-6 * size if key.startswith("rewards/") else floors.get(key, 0.0)
            if not abs(row[key] - value) <= max(tolerance * abs(value), floor):
                found.append(f"iteration {row['iteration']}: {key} is {row[key]!r}, expected {value!r}")
    return found
