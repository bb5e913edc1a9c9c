"""Finds files that a set lacks or holds twice: a shard that was not fetched, a link to nothing, a copy."""

from __future__ import annotations

import filecmp
import re
from collections.abc import Sequence
from pathlib import Path

from megatron_dtrpo.errors import UserError

_SHARD = re.compile(r"(?P<begin>.+?[-_.])(?P<number>\d{5})-of-(?P<total>\d{5})(?P<end>.*)")
_NAMED = 3  # shards in a message


def require_all_shards(path: Path, files: Sequence[Path]) -> None:
    """Raises UserError where the files' names say that there are more shards than these."""
    found: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        match = _SHARD.match(file.name)
        if match:
            found.setdefault((file.parent, match["begin"], int(match["total"])), set()).add(int(match["number"]))
    for (_, begin, total), numbers in found.items():
        missing = sorted(set(range(total)) - numbers)
        if missing:
            named = ", ".join(f"{begin}{number:05}-of-{total:05}" for number in missing[:_NAMED])
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise UserError(f"{path}: lacks {named}{more}; fetch it, or give a glob of the files that are there")


def require_no_broken_link(files: Sequence[Path]) -> None:
    """Raises UserError for a link to a file that is not there, as an unfinished download of the hub's leaves it."""
    for file in files:
        if file.is_symlink() and not file.exists():
            raise UserError(f"{file}: is a link to {file.readlink()}, which is not there; fetch the file again")


def copies(files: Sequence[Path]) -> list[tuple[Path, Path]]:
    """(copy, original) of files with the same bytes, such as ``pairs (1).jsonl``. Reads only files of one size."""
    found = []
    of_size: dict[int, list[Path]] = {}
    for file in files:
        originals = of_size.setdefault(file.stat().st_size if file.is_file() else -1, [])
        same = next((original for original in originals if _is_same(file, original)), None)
        if same is None:
            originals.append(file)
        else:
            found.append((file, same))
    return found


def _is_same(file: Path, other: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0 and filecmp.cmp(file, other, shallow=False)
