"""A headless Chromium for tests, spoken to in the DevTools protocol over a pair of pipes.

``--remote-debugging-pipe`` makes the browser read commands from descriptor 3 and write replies and events to
descriptor 4: JSON messages, each closed by a NUL. No port is opened and no package is needed. Every wait has an end,
and the browser is gone when the ``with`` block is left.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
# The sandbox refuses to run as root; containers have no /dev/shm or a small one.
_FLAGS = (
    "--headless --no-sandbox --disable-dev-shm-usage --disable-gpu --no-first-run --disable-extensions "
    "--disable-background-networking --disable-component-update --disable-sync --disable-crash-reporter "
    "--disable-breakpad --window-size=1280,900 --remote-debugging-pipe"
).split()
_FIRST_FREE = 10  # our own ends of the pipes stay clear of the descriptors 3 and 4


def find() -> str | None:
    """The path of a Chromium or Chrome, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class BrowserError(Exception):
    """The browser refused a command, broke off or did not answer in time."""


class Page:
    """One tab. ``events`` are all events since it was opened, oldest first: ``{"method": ..., "params": {...}}``."""

    def __init__(self, commands: int, replies: int, timeout: float) -> None:
        """``commands`` and ``replies`` are the descriptors to write to and read from, ``timeout`` is in seconds."""
        self.events: list[dict[str, Any]] = []
        self._commands, self._replies, self._timeout = commands, replies, timeout
        self._received = b""
        self._last_id = 0
        self._session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command. Raises BrowserError if it fails or takes too long."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        deadline = time.monotonic() + self._timeout
        self._write(json.dumps(message).encode() + b"\0", deadline)
        while (reply := self._next_message(deadline, method)).get("id") != self._last_id:
            pass
        if "error" in reply:
            raise BrowserError(f"{method}: {reply['error']['message']}")
        return reply["result"]

    def open(self, url: str) -> None:
        """Go to ``url`` and wait until it is loaded."""
        seen = len(self.events)
        self.call("Page.navigate", url=url)
        deadline = time.monotonic() + self._timeout
        while not any(event["method"] == "Page.loadEventFired" for event in self.events[seen:]):
            self._next_message(deadline, f"loading {url}")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON brings it here. Raises BrowserError where it throws."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in reply:
            raise BrowserError(f"{expression}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Wait until a JavaScript expression is true."""
        deadline = time.monotonic() + self._timeout
        while not self.evaluate(expression):
            if time.monotonic() > deadline:
                raise BrowserError(f"not true after {self._timeout} s: {expression}")
            time.sleep(0.05)

    def press(self, key: str, code: str) -> None:
        """Press and release one key, given as KeyboardEvent's ``key`` and ``code``."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code)

    def _write(self, data: bytes, deadline: float) -> None:
        while data:
            if not select.select([], [self._commands], [], max(0, deadline - time.monotonic()))[1]:
                raise BrowserError("the browser takes no commands")
            try:
                data = data[os.write(self._commands, data) :]
            except BrokenPipeError:
                raise BrowserError("the browser is gone") from None

    def _next_message(self, deadline: float, waiting_for: str) -> dict[str, Any]:
        """The next reply or event; an event is also kept."""
        while b"\0" not in self._received:
            if not select.select([self._replies], [], [], max(0, deadline - time.monotonic()))[0]:
                raise BrowserError(f"no answer in {self._timeout} s: {waiting_for}")
            data = os.read(self._replies, 1 << 16)
            if not data:
                raise BrowserError(f"the browser is gone: {waiting_for}")
            self._received += data
        text, _, self._received = self._received.partition(b"\0")
        message = json.loads(text)
        if "id" not in message:
            self.events.append(message)
        return message


@contextlib.contextmanager
def browser(executable: str, folder: Path, timeout: float = 30.0) -> Iterator[Page]:
    """A fresh browser with one empty tab; it keeps its files in ``folder``. ``timeout`` of each wait, in seconds."""
    theirs_in, ours_out = _pipe()
    ours_in, theirs_out = _pipe()
    os.set_blocking(ours_out, False)
    # The shell gives the pipes the numbers that the browser expects, and then becomes the browser.
    shell = ["bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out} {theirs_in}<&- {theirs_out}>&-', "browser"]
    log = folder / "browser.log"
    with contextlib.ExitStack() as cleaning, log.open("wb") as output:
        for descriptor in (ours_in, ours_out):
            cleaning.callback(os.close, descriptor)
        try:
            process = subprocess.Popen(
                [*shell, executable, *_FLAGS, f"--user-data-dir={folder / 'profile'}"],
                pass_fds=(theirs_in, theirs_out),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)},
                start_new_session=True,
            )
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        cleaning.callback(_kill, process)
        try:
            yield Page(ours_out, ours_in, timeout)
        except BrowserError as error:
            raise BrowserError(f"{error}\n{log.read_text(errors='replace')[-2000:]}") from error


def _pipe() -> tuple[int, int]:
    """The reading and the writing end of a pipe."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE) for end in ends)
    for end in ends:
        os.close(end)
    return moved


def _kill(process: subprocess.Popen) -> None:
    """End the browser and the processes it started, which are in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)
