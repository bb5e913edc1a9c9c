"""Checkpoints in Megatron's ``torch_dist`` layout, self-contained and never half-written.

`folder` says what stands in the folder of a run. An iteration is written to ``iter_0000010.partial`` and renamed when
every process has finished: a folder with the final name is complete, and only then does the tracker file name it.
"""

from __future__ import annotations

import functools
import os
import pickle
import queue
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.validation import StrictHandling
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dtrpo.checkpoint.damage import explained, require_described
from megatron_dtrpo.checkpoint.iterations import TRACKER, complete_iterations, damaged, iteration_folder
from megatron_dtrpo.config.settings import RunSettings
from megatron_dtrpo.errors import SharedError, UserError, one_line
from megatron_dtrpo.files import partial_name, publish_folder, remove_folder, write_atomically
from megatron_dtrpo.model.chunks import chunks_of
from megatron_dtrpo.model.lora import has_adapters, is_adapter
from megatron_dtrpo.runtime import objects, versions
from megatron_dtrpo.runtime.fp8 import keep_exact_value

# How tensors are laid out in a checkpoint; recorded in it, where Megatron-LM's loader looks for it too.
_SHARDING = {
    # The distributed optimizer's state in the shape of the model's own tensors: reloads under any TP, PP and DP.
    "distrib_optim_sharding_type": "fully_reshardable",
    # One key per layer instead of one for all: with trainable_modules only some layers have optimizer state.
    "non_homogeneous_layers": True,
}


_DISTRIBUTED = "use_distributed_optimizer"
_COMMON = "common.pt"


def _by_key(model) -> dict:
    """Stages under the names that Megatron-LM gives them. A tensor's key in a checkpoint is its name in the whole
    model, whatever holds it here."""
    chunks = chunks_of(model)
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{n}": chunk for n, chunk in enumerate(chunks)}


def _sharded_state(model, optimizer, sharding: dict, is_loading: bool, adapters: bool = False) -> dict:
    """``adapters``: the weights of adapters alone; else all others."""
    state = {}
    for key, chunk in _by_key(model).items():
        own = chunk.sharded_state_dict(metadata=sharding)
        state[key] = {name: each for name, each in own.items() if is_adapter(name) == adapters}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=sharding)
    return state


class Writer:
    """Writes a run's checkpoints, each by all processes together.

    Every process writes its share of what the data-parallel processes have in common, and its own share of the
    optimizer's state (`optimizer_state`). With ``async_save`` a process forked from each writes while the run goes on.
    """

    def __init__(self, run: RunSettings, say: Callable[[str], None]):
        """``say``: told about each checkpoint that is complete or deleted, on rank zero."""
        self.directory, self.run, self.say = Path(run.save), run, say
        self.pending = AsyncCallsQueue()

    def save(self, iteration: int, model, optimizer, scheduler, progress: dict) -> None:
        """Saves one iteration, of a model with adapters these alone; collective. ``model`` is the bare stage or a list
        of virtual ones, ``progress`` plain values. With ``async_save`` the weights may change when it returns; `finish`
        completes the checkpoint."""
        self.finish()
        final = iteration_folder(self.directory, iteration)
        partial = partial_name(final)
        if dist.get_rank() == 0:
            for leftover in (partial, final):  # of a run that was killed while saving, or resumed from before it
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
        objects.barrier()
        adapters = has_adapters(chunks_of(model))
        state = _sharded_state(model, optimizer, _SHARDING, is_loading=False, adapters=adapters)
        state["scheduler"] = scheduler.state_dict()
        state["progress"] = {**progress, _DISTRIBUTED: _is_distributed(optimizer)}
        filesystem_async._results_queue = _Results()
        request = dist_checkpointing.save(
            state,
            str(partial),
            _parallel_save(),
            async_sharded_save=True,
            content_metadata=_SHARDING,
            **versions.save_options(),
        )
        request.add_finalize_fn(functools.partial(self._complete, iteration))
        if self.run.async_save:
            self.pending.schedule_async_request(request)
        else:
            try:
                with _write_errors(partial):
                    request.execute_sync()
            finally:  # what could not be written is no result of the next save in this process
                filesystem_async._results_queue = None

    def finish(self, wait: bool = True) -> None:
        """Completes an asynchronous checkpoint that every process has written, or, to ``wait``, all; collective."""
        self.pending.maybe_finalize_async_calls(blocking=wait)

    def _complete(self, iteration: int) -> None:
        """Gives the folder its name and then the tracker its number; only then may older ones go."""
        if dist.get_rank() == 0:
            final = iteration_folder(self.directory, iteration)
            publish_folder(partial_name(final), final)
            write_atomically(self.directory / TRACKER, str(iteration))
            self.say(f"saved {final}")
            self._delete_older(iteration)
        objects.barrier()

    def _delete_older(self, iteration: int) -> None:
        if self.run.keep_last is None:
            return
        older = [n for n in complete_iterations(self.directory) if n < iteration]
        for number in older[: max(0, len(older) + 1 - self.run.keep_last)]:
            folder = iteration_folder(self.directory, number)
            remove_folder(folder)
            self.say(f"deleted {folder}: keep_last is {self.run.keep_last}")


@contextmanager
def _write_errors(partial: Path) -> Iterator[None]:
    """Turns what megatron-core raises where a file cannot be written, as on a full disk, into one line."""
    try:
        yield
    except CheckpointException as error:
        causes = [one_line(cause) for cause, _ in error.failures.values()]
        free = shutil.disk_usage(partial).free >> 20
        raise UserError(
            f"{partial}: cannot be written: {causes[0]}; {free} MiB are free there: make room and start the same "
            "command again, which goes on from the last complete checkpoint"
        ) from error


class _Results:
    """Brings what a forked process says of its writing back to this one, through a file without a name.

    It stands for megatron-core's queue, which lives in a server process of its own: that takes seconds to start, and
    dies of the signal that asks a run to save and stop.
    """

    def __init__(self):
        self.file = tempfile.TemporaryFile(buffering=0)

    def put(self, results) -> None:
        with os.fdopen(os.dup(self.file.fileno()), "wb") as stream:
            pickle.dump(results, stream)

    def get_nowait(self):
        self.file.seek(0)
        try:
            return pickle.load(self.file)
        except EOFError:
            raise queue.Empty from None


def _replicas():
    """The processes that hold the same weights."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _parallel_save():
    """Divides among data-parallel processes the writing of what each of them has."""
    return FullyParallelSaveStrategyWrapper(get_default_save_sharded_strategy(), _replicas())


def _parallel_load(folder: Path):
    """Each data-parallel process reads a part of what all of them need, and they exchange it."""
    return FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(str(folder)), _replicas())


def load(directory: str | Path, iteration: int, model, optimizer=None, scheduler=None, adapters: bool = False) -> dict:
    """Loads weights, and optimizer and scheduler where given, under any layout; collective. Returns ``progress``.
    ``adapters``: the weights of adapters alone; else all others."""
    folder = iteration_folder(directory, iteration)
    require_described(folder)
    if optimizer is not None:
        _check_optimizer_kind(folder, optimizer)
    # Megatron-LM's checkpoints say here whether they keep one key per layer; old ones say nothing and do not.
    sharding = {**_SHARDING, "non_homogeneous_layers": False, **(_content_metadata(folder) or {})}
    wanted = _sharded_state(model, optimizer, sharding, is_loading=True, adapters=adapters)
    state, _, absent = explained(
        folder,
        lambda: dist_checkpointing.load(
            wanted, str(folder), _parallel_load(folder), strict=StrictHandling.RETURN_UNEXPECTED
        ),
    )
    _require_tensors(folder, absent)
    for key, chunk in _by_key(model).items():
        _load_stage(chunk, state[key], adapters)
    if optimizer is not None:
        for group in _parameter_groups(state["optimizer"]):
            # A resumed run follows its settings, as the scheduler does. Before loading: megatron-core 0.19 knows a
            # saved group by its rates.
            group["max_lr"], group["min_lr"] = optimizer.config.lr, optimizer.config.min_lr
        optimizer.load_state_dict(state["optimizer"])
    if scheduler is not None:
        scheduler.load_state_dict(state["scheduler"])
    return state.get("progress", {})


def _parameter_groups(state) -> Iterator[dict]:
    """The groups in an optimizer's state, which holds those of several optimizers where it is a chain of them."""
    for key, value in state.items() if isinstance(state, dict) else ():
        yield from value if key == "param_groups" else _parameter_groups(value)


# Transformer Engine's layers keep their FP8 scales under this name, and write it without FP8 too. megatron-core's own
# layers write nothing under it, the norms not even that: what lacks it starts with fresh scales.
_EXTRA_STATE = "_extra_state"


def _require_tensors(folder: Path, absent: set[str]) -> None:
    """Raises UserError on every process if some process's model needs more than the checkpoint has; collective.
    ``absent`` are keys that this one's model asked for in vain."""
    wanted = objects.gather([key for key in absent if not key.endswith(_EXTRA_STATE)])
    missing = sorted(set().union(*wanted))
    if missing:
        raise SharedError(
            f"{folder}: does not load into this model: {missing[0]} and {len(missing) - 1} more are not in it"
        )


def _load_stage(chunk, state: dict, adapters: bool = False) -> None:
    """Loads a stage's state, of the adapters or of all else; what may be missing, or there in vain, is Transformer
    Engine's extra state alone."""
    mismatch = chunk.load_state_dict(state, strict=False)
    for key in (*mismatch.missing_keys, *mismatch.unexpected_keys):
        if not key.endswith(_EXTRA_STATE) and is_adapter(key) == adapters:
            raise RuntimeError(f"{key} was loaded into a model without it, or not loaded into one with it")
    for name, parameter in chunk.named_parameters():
        if is_adapter(name) == adapters:
            keep_exact_value(parameter, state[name])


def _content_metadata(folder: Path) -> dict | None:
    return _plain_values(folder, lambda: dist_checkpointing.load_content_metadata(str(folder)))


def _is_distributed(optimizer) -> bool:
    return optimizer.config.use_distributed_optimizer


def load_progress(directory: str | Path, iteration: int) -> dict:
    """``progress`` of a run's checkpoint, without its tensors."""
    return _progress(iteration_folder(directory, iteration))


def _progress(folder: Path) -> dict:
    common = _plain_values(folder, lambda: dist_checkpointing.load_common_state_dict(str(folder)))
    progress = common.get("progress") if isinstance(common, dict) else None
    if not progress or _DISTRIBUTED not in progress:
        raise damaged(folder, f"{_COMMON}: it does not say how far training was")
    return progress


def _plain_values(folder: Path, read: Callable):
    """What ``read`` takes from a checkpoint's plain values. Where they are in its ``.distcp`` files, megatron-core asks
    ``.metadata`` for their place, and would run code in there: that is checked before."""
    if not (folder / _COMMON).is_file() and versions.holds_plain_values(require_described(folder)):
        return explained(folder, read)
    return explained(folder, read, _COMMON)


def _check_optimizer_kind(folder: Path, optimizer) -> None:
    progress = _progress(folder)
    if progress[_DISTRIBUTED] != _is_distributed(optimizer):
        kind = "with" if progress[_DISTRIBUTED] else "without"
        raise UserError(f"{folder}: written {kind} use_distributed_optimizer: resume it {kind} that setting")
