"""What is wrong with a checkpoint that does not load, in one line that names the file and the tensor.

megatron-core and torch raise what they like over a damaged file, and torch compares no checksum. Reading goes through
`explained`, which compares them and looks for the file that is to blame.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed import DistError
from torch.distributed.checkpoint.api import CheckpointException

from megatron_dtrpo.checkpoint.checksums import DIFFERS, is_as_written
from megatron_dtrpo.checkpoint.iterations import damaged
from megatron_dtrpo.checkpoint.torch_dist import Window, read_metadata
from megatron_dtrpo.errors import StopRequest, UserError, one_line
from megatron_dtrpo.runtime import torch_reader, versions


def require_described(folder: Path) -> list[str]:
    """The keys that ``.metadata`` describes. Raises UserError unless it describes tensors and objects and nothing else:
    torch's reader would run its code."""
    try:
        json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise damaged(folder, f"metadata.json is not JSON ({error})") from None
    try:
        described = read_metadata(folder)
    except UserError as error:
        detail = str(error).removeprefix(f"{folder}{os.sep}").removeprefix(".metadata: damaged: ")
        raise damaged(folder, f".metadata: {detail.removeprefix('.metadata: ')}") from None
    keys = list(described.state_dict_metadata)
    versions.require_readable(folder, keys)
    return keys


def _checksums_compared(folder: Path):
    """Inside, torch's reader compares the checksum of each piece of a tensor that it reads, once. A process reads its
    own share only."""
    checked = set()

    def check(reader: Any, file: Any, info: Any) -> None:
        if (info.relative_path, info.offset) in checked:
            return
        if not is_as_written(io.BufferedReader(Window(file.fileno(), info.offset, info.length))):
            key = next(index.fqn for index, other in reader.storage_data.items() if other == info)
            raise damaged(folder, f"{info.relative_path}: {key}: {DIFFERS}")
        checked.add((info.relative_path, info.offset))

    return torch_reader.before_each_piece(check)


def _require_as_written(folder: Path, file: str) -> None:
    with (folder / file).open("rb") as stream:
        if not is_as_written(stream):
            raise damaged(folder, f"{file}: {DIFFERS}")


def explained(folder: Path, read: Callable, file: str = ""):
    """Turns what megatron-core and torch raise into one line: about keys and shapes, or about a damaged ``file``."""
    try:
        with torch_reader.no_code_of_pickles(), _checksums_compared(folder):
            if file and (folder / file).is_file():
                _require_as_written(folder, file)
            return read()
    except (Exception, CheckpointException) as error:  # a damaged file raises what it likes; torch's is no Exception
        failures = getattr(error, "failures", None)  # torch wraps each rank's error, traceback and all
        cause = next(iter(failures.values()))[0] if failures else error
        if isinstance(cause, (UserError, StopRequest)):
            raise cause from None
        if _is_of_a_lost_process(cause):  # reading is collective from 0.19 on
            raise UserError(f"{folder}: another process ended while this one read it, and says why") from error
        reason = "it is missing" if file and not (folder / file).exists() else _in_one_line(cause)
        broken = "" if file else _broken_file(folder)
        if broken:
            raise damaged(folder, broken) from error
        if not file and isinstance(cause, (CheckpointingException, CheckpointException, KeyError, ValueError)):
            raise UserError(f"{folder}: does not load into this model: {reason}") from error
        raise damaged(folder, f"{file}{': ' if file else ''}{reason}") from error


def _is_of_a_lost_process(error: BaseException) -> bool:
    """Whether a collective ended because a process is gone; gloo has no exception of its own."""
    return isinstance(error, DistError) or "gloo/transport" in str(error)


_SMALL = 4096  # bytes; larger parts of an archive are a tensor's values, which torch.load does not compare either


def _broken_file(folder: Path) -> str:
    """Which file with tensors or objects is missing, too short or damaged, and at which of them; empty where all look
    whole. Reads a few hundred bytes of each."""
    described = read_metadata(folder)
    pieces: dict[str, dict[tuple[int, int], str]] = {}
    for index, info in described.storage_data.items():
        pieces.setdefault(info.relative_path, {})[info.offset, info.length] = index.fqn
    for name, tensors in sorted(pieces.items()):
        try:
            with (folder / name).open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                end = max(offset + length for offset, length in tensors)
                if size < end:
                    return f"{name}: has {size} bytes of {end}"
                broken = [key for span, key in sorted(tensors.items()) if not _is_archive(file.fileno(), *span)]
        except FileNotFoundError:
            return f"{name}: it is missing"
        except OSError as error:
            return f"{name}: {one_line(error)}"
        if broken:
            others = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            return f"{name}: {broken[0]}{others}: not what torch.save writes"
    return ""


def _is_archive(descriptor: int, offset: int, length: int) -> bool:
    """Whether a stretch of a file looks like what torch.save writes, as far as its small parts and the heads of the
    others tell."""
    try:
        with zipfile.ZipFile(io.BufferedReader(Window(descriptor, offset, length))) as archive:
            for part in archive.infolist():
                with archive.open(part) as stream:  # which compares the head, and at the end the checksum
                    stream.read() if part.file_size <= _SMALL else None
            return any(part.filename.endswith("data.pkl") for part in archive.infolist())
    except OSError:
        raise
    except Exception:  # a damaged archive raises what it likes
        return False


def _in_one_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    if isinstance(error, pickle.UnpicklingError):  # torch advises at length how to run the code all the same
        named = re.search(r"GLOBAL (\S+)", text)
        return f"it names {named[1]}; code in a checkpoint is never run" if named else "not what torch.save writes"
    return one_line(error)
