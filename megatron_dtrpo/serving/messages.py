"""What the process that talks to clients, and those that have the model, tell each other.

Clients' process: Admissions, and jobs that end early. Rank zero: Reports. Rank zero to the other ranks: Commands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.diffusion.decoding import Completion


@dataclass(frozen=True)
class Admission:
    """A prompt that gets a slot of ``model`` on the data-parallel process ``replica``. ``seed, key, end_ids``: of
    `Slots.admit`. ``watched``: every pass of it is reported, not only its finished blocks."""

    job: int
    model: int
    replica: int
    prompt: Sequence[int]
    options: DecodingOptions
    seed: int
    key: tuple[int, int]
    end_ids: frozenset[int] = frozenset()
    watched: bool = False


@dataclass(frozen=True)
class Commands:
    """Of one round: the jobs that lose their slots, and those that get one."""

    released: list[int] = field(default_factory=list)
    admitted: list[Admission] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.released or self.admitted)


class Progress(NamedTuple):
    """How far a job is after a pass.

    ``tokens, confidence``: of the blocks that are finished, from the response's first token on; None where this pass
    finished none. ``completion``: the whole of it, once it is finished. ``block``: of a watched job, its unfinished
    block: the place of its first token in the response and per place (token, confidence), None where it is masked.
    ``seconds``: of a watched job, those that passes of its own model took since it was admitted.
    """

    job: int
    passes: int
    tokens: list[int] | None = None
    confidence: list[float] | None = None
    completion: Completion | None = None
    block: tuple[int, list[tuple[int, float] | None]] | None = None
    seconds: float = 0.0


class Ended(NamedTuple):
    """A job that a stop string ended, with what was written of it until then."""

    job: int
    tokens: int
    passes: int


class Request(NamedTuple):
    """From the clients' process. ``measure``: asks for a report of `Counters`."""

    admissions: Sequence[Admission] = ()
    cancelled: Sequence[int] = ()
    measure: bool = False
    ended: Sequence[Ended] = ()


@dataclass
class Counters:
    """What the server does, and did since it began."""

    running: int = 0
    waiting: int = 0
    finished: int = 0
    cancelled: int = 0
    rounds: int = 0
    passes: int = 0  # of finished responses
    tokens: int = 0
    seconds: float = 0.0  # spent in passes, on rank zero


class Report(NamedTuple):
    """To the clients' process. ``refused``: jobs that will not be decoded, for the server stops."""

    progress: Sequence[Progress] = ()
    refused: Sequence[int] = ()
    stopping: bool = False
    counters: Counters | None = None
