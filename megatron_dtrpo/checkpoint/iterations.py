"""Which iterations of a run folder are complete, and which is the latest. Imports no torch."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import environment

TRACKER = "latest_checkpointed_iteration.txt"

_ITERATION = "iter_"
_ALWAYS_THERE = ("metadata.json", ".metadata")  # of an iteration: megatron-core writes them last


def iteration_folder(directory: str | Path, iteration: int) -> Path:
    return Path(directory) / f"{_ITERATION}{iteration:07d}"


def latest_iteration(directory: str | Path) -> int | None:
    """The iteration that the tracker file of ``directory`` names, or None where there is no such file. Where its folder
    was deleted, it is the latest that is left.

    Raises:
        UserError: if the tracker or that iteration is damaged.
    """
    tracker, known = Path(directory) / TRACKER, complete_iterations(directory)
    if not tracker.exists():
        if known:
            raise UserError(
                f"{directory}: no checkpoint to load: {TRACKER} is missing; write {known[-1]} into it, the "
                "latest of the iterations beside it"
            )
        return None
    try:
        text = tracker.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        text = "something else"
    if not text.isdecimal():
        advice = f"; write {known[-1]} into it, the latest of the iterations beside it" if known else ""
        raise UserError(f"{tracker}: expected an iteration number, found {text!r}{advice}")
    iteration = int(text)
    folder = iteration_folder(directory, iteration)
    if not folder.exists():
        earlier = [number for number in known if number < iteration]
        if not earlier:
            raise UserError(f"{tracker} names iteration {text}, but {folder} is missing")
        _say_once(f"warning: {tracker} names iteration {text}, which was deleted: iteration {earlier[-1]} is used")
        return earlier[-1]
    for name in _ALWAYS_THERE:
        if not (folder / name).is_file():
            raise damaged(folder, f"{tracker.name} names it, but {name} is missing")
    return iteration


def damaged(folder: Path, detail: str) -> UserError:
    """The error for an iteration's ``folder`` that cannot be read, with the way on if there is one."""
    here = int(folder.name.removeprefix(_ITERATION))
    earlier = [iteration for iteration in complete_iterations(folder.parent) if iteration < here]
    if earlier:
        advice = f"delete {folder.name} to go on from {iteration_folder('', earlier[-1])}"
    else:
        advice = "no earlier iteration is beside it: bring a copy back, or write it again"
    return UserError(f"{folder}: damaged: {detail}; {advice}")


@functools.cache
def _say_once(message: str) -> None:
    if environment.rank() == 0:
        print(message, file=sys.stderr, flush=True)


def require_latest(directory: str | Path) -> int:
    """The last complete iteration; raises UserError if there is none."""
    iteration = latest_iteration(directory)
    if not Path(directory).is_dir():
        raise UserError(f"{directory}: no such folder, so no checkpoint to load")
    foreign = any((Path(directory) / name).is_file() for name in ("config.json", "adapter_config.json"))
    if iteration is None and foreign:
        advice = "turn it into a checkpoint with megatron-dtrpo convert import"
        raise UserError(f"{directory}: a Hugging Face folder: {advice}")
    if iteration is None:
        advice = _advice_on_rounds(Path(directory))
        raise UserError(f"{directory}: no checkpoint to load: {TRACKER} is missing{advice}")
    return iteration


def _advice_on_rounds(directory: Path) -> str:
    """Where ``directory`` is that of rounds: the folder of the last one that has a checkpoint."""
    numbers = [folder.name.partition("-")[2] for folder in directory.glob("round-*") if (folder / TRACKER).is_file()]
    last = max((int(number) for number in numbers if number.isdecimal()), default=None)
    return "" if last is None else f"; it holds rounds, the last of which is {directory / f'round-{last}'}"


def complete_iterations(directory: str | Path) -> list[int]:
    """Iterations in ``directory`` whose folders are complete, the oldest first."""
    folders = {folder.name.removeprefix(_ITERATION): folder for folder in Path(directory).glob(f"{_ITERATION}*")}
    return sorted(
        int(number)
        for number, folder in folders.items()
        if number.isdecimal() and all((folder / name).is_file() for name in _ALWAYS_THERE)
    )
