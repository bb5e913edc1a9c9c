"""Rows of a data file by number, whatever the file is, and where each row came from.

Text files (`text_files`), Arrow tables (`table_files`) and several of either become the same thing: a sequence of
dictionaries that stays on disk, plus ``location(i)``, the words that an error message about row ``i`` begins with.
"""

from __future__ import annotations

from pathlib import Path

from megatron_dtrpo.data import file_signs, source, table_files, text_files
from megatron_dtrpo.data.file_sets import copies
from megatron_dtrpo.data.row_sequence import Concatenated, Row, Rows
from megatron_dtrpo.errors import UserError

__all__ = ["Row", "Rows", "open_rows"]
_NAMED = 3  # files in a message


def open_rows(path: str | Path, split: str | None = None) -> Rows:
    """Open what ``path`` means (see `source.data_files`): a file, a folder or glob of files, a saved data set.

    Nothing is ever downloaded. Raises UserError for a path that does not exist, is of another kind, or holds no rows; a
    malformed row raises when it is read.
    """
    files = source.data_files(path, split)
    parts = [_open_one(file) for file in files]
    rows = parts[0] if len(parts) == 1 else Concatenated(parts, _notes(files, parts))
    if len(rows) == 0:
        raise UserError(f"{path}: holds no rows; give a data file with at least one")
    return rows


def _notes(files: list[Path], parts: list[Rows]) -> tuple[str, ...]:
    """Notes about several files that are read together."""
    empty = [file.name for file, part in zip(files, parts, strict=True) if len(part) == 0]
    twice = [f"{copy.name} (as {original.name})" for copy, original in copies(files)]
    return (
        *[f"warning: {_listed(empty)} without rows beside the {{count}} rows of the others"] * bool(empty),
        *[f"warning: {_listed(twice)} among the {{count}} rows twice: the same bytes"] * bool(twice),
    )


def _listed(names: list[str]) -> str:
    """The first of the files' ``names``, for a message that is formatted later."""
    more = f", {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (", ".join(names[:_NAMED]) + more).replace("{", "{{").replace("}", "}}")


def _open_one(path: Path) -> Rows:
    if path.is_dir():
        for file in sorted(path.glob("*.arrow")):
            file_signs.refuse_other_files(file, is_text=False, compression="")
        return table_files.SavedDataSet(path)
    kind, compression = file_signs.kind_of(path)
    if kind in source.TEXT_KINDS:
        file_signs.refuse_other_files(path, is_text=True, compression=compression)
        return text_files.READERS[kind](path)
    if kind in source.TABLE_KINDS and not compression:
        file_signs.refuse_other_files(path, is_text=False, compression="")
        return table_files.READERS[kind](path)
    raise UserError(f"{path}: unknown kind of file {''.join(path.suffixes[-2:])!r}; give {source.KINDS}")
