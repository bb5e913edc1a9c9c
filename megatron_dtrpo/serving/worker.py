"""What every process of a server does: a pass of all sequences, and then the next commands of rank zero's.

Rank zero alone hears of clients. Before each pass it tells all processes which prompts come and which slots are given
back; after it, it gets what was written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron.core import parallel_state

from megatron_dtrpo.config.decoding import DecodingOptions
from megatron_dtrpo.diffusion.decoding import Decoding
from megatron_dtrpo.runtime import objects
from megatron_dtrpo.serving.messages import Admission, Commands, Progress

if TYPE_CHECKING:
    from megatron_dtrpo.training.engine import Engine


class Worker:
    """This process's part in serving ``engines``. All processes make the same calls."""

    def __init__(self, engines: Sequence[Engine], options: Sequence[DecodingOptions], count: int, positions: list[int]):
        """``options``: of each engine, see `BlockDecoder.slots`. ``count``: slots on each data-parallel process.
        ``positions``: tokens of a slot, of each engine."""
        self.slots = [
            engine.decoder().slots(count, length, one)
            for engine, one, length in zip(engines, options, positions, strict=True)
        ]
        self.replica, self.replicas = engines[0].replica, engines[0].replicas
        # Of the processes that hold the same, which are tensor-, context- and pipeline-parallel, one.
        self._speaks = parallel_state.get_tensor_model_parallel_rank() == 0
        self._speaks &= parallel_state.get_context_parallel_rank() == 0
        self._speaks &= parallel_state.get_pipeline_model_parallel_rank() == 0
        self._model: dict[int, int] = {}  # of the jobs that are here
        self._watched: dict[int, int] = {}  # where the unfinished block of a watched job begins
        self._spent = [0.0] * len(self.slots)  # seconds in passes of each model
        self._since: dict[int, float] = {}  # what was spent when a watched job was admitted

    @property
    def seconds(self) -> float:
        """Spent in passes."""
        return sum(self._spent)

    def run(self, commands: Commands | None) -> list[Progress]:
        """On rank zero: one round on all processes, and what it wrote. None lets the others go."""
        objects.broadcast(commands)
        return [] if commands is None else self._round(commands)

    def follow(self) -> None:
        """On the other processes: takes part until rank zero lets go."""
        while (commands := objects.broadcast(None)) is not None:
            self._round(commands)

    def _round(self, commands: Commands) -> list[Progress]:
        for job in commands.released:
            self._release(job)
        for one in commands.admitted:
            self._admit(one)
        mine = [progress for model, slots in enumerate(self.slots) if slots for progress in self._step(model)]
        if self.replicas == 1:
            return mine
        return [progress for part in objects.gather(mine if self._speaks else []) for progress in part]

    def _admit(self, one: Admission) -> None:
        if one.replica != self.replica:
            return
        slots = self.slots[one.model]
        slots.admit(one.job, one.prompt, one.options, one.seed, one.key, one.end_ids)
        self._model[one.job] = one.model
        if one.watched:
            decoding = slots.decoding(one.job)
            self._watched[one.job] = max(decoding.block, decoding.prompt_length)
            self._since[one.job] = self._spent[one.model]

    def _release(self, job: int) -> None:
        model = self._model.pop(job, None)  # that of another replica, or finished by itself
        self._watched.pop(job, None)
        self._since.pop(job, None)
        if model is not None:
            self.slots[model].release(job)

    def _step(self, model: int) -> list[Progress]:
        slots, started = self.slots[model], time.perf_counter()
        reached = {slot.name: slot.decoding for slot in slots.step()}
        self._spent[model] += time.perf_counter() - started
        found = [self._timed(self._progress(job, decoding)) for job, decoding in reached.items()]
        for job in [job for job, decoding in reached.items() if decoding.finished]:
            self._release(job)
        watched = [job for job in self._watched if job in slots and job not in reached]
        return found + [self._timed(self._view(job, slots.decoding(job))) for job in watched]

    def _timed(self, progress: Progress) -> Progress:
        job = progress.job
        if job not in self._since:
            return progress
        return progress._replace(seconds=self._spent[self._model[job]] - self._since[job])

    def _progress(self, job: int, decoding: Decoding) -> Progress:
        if decoding.finished:
            completion = decoding.completion()
            confidence = completion.confidence[: len(completion.answer)]
            return Progress(job, decoding.passes, completion.answer, confidence, completion)
        written = slice(decoding.prompt_length, decoding.block)
        if job in self._watched:
            self._watched[job] = max(decoding.block, decoding.prompt_length)
        return Progress(job, decoding.passes, decoding.tokens[written], decoding.confidence[written])

    def _view(self, job: int, decoding: Decoding) -> Progress:
        first = self._watched[job]
        places = range(first, min(len(decoding.tokens), decoding.limit))
        block = [
            None if decoding.steps[place] is None else (decoding.tokens[place], decoding.confidence[place])
            for place in places
        ]
        return Progress(job, decoding.passes, block=(first - decoding.prompt_length, block))
