"""Validates and tokenizes every example once, into a store of `stored_examples`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_dtrpo.data.examples import Encoded, Turn, encode_records, note_line, note_lines
from megatron_dtrpo.data.record import Record, TokenRecord
from megatron_dtrpo.data.records import READERS, read_row
from megatron_dtrpo.data.rows import Rows, open_rows
from megatron_dtrpo.data.source import stored_files
from megatron_dtrpo.data.stored_examples import (
    DISCARDED,
    ENDS,
    FORMAT_VERSION,
    META,
    RESPONSES,
    ROWS,
    STEPS,
    TOKENS,
    TURNS,
    TokenStore,
    file_crc32,
)
from megatron_dtrpo.data.tally import Tally, bad_rows_error
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.files import first_to_finish
from megatron_dtrpo.runtime import stop

_BATCH = 512  # rows tokenized in one call


def build_token_store(
    path: str | Path,
    kind: str,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    apply_chat_template: bool = False,
    progress: bool = False,
    split: str | None = None,
    bad_rows: str = "error",
    assistant_turns: str = "last",
    verify: bool = True,
    response_multiple: int = 1,
) -> TokenStore:
    """Open the store of data file ``path``, building it first where ``cache_dir`` does not hold it yet.

    ``kind`` is ``preference`` or ``sft``, ``split`` one of those that ``path`` holds; ``assistant_turns`` as of
    `records.read_row`. Several processes may build at once: each writes a folder of its own and the first to finish
    wins. Rows that cannot be used are left out where ``bad_rows`` is ``skip`` (`TokenStore.bad_rows` names them).
    ``verify``: read a store that is there whole, to see that it is as it was written. ``response_multiple``: as of
    `examples.encode_records`.

    Raises:
        UserError: naming file and line of rows that cannot be used, each kind of problem once: with ``bad_rows``
            ``error``, or where no row is left.
    """
    if kind not in READERS:
        raise UserError(f"kind: unknown {kind!r}; use one of {', '.join(READERS)}")
    files = stored_files(path, split)
    target = Path(cache_dir) / _fingerprint(
        files, kind, tokenizer, apply_chat_template, assistant_turns, response_multiple
    )
    if target.exists():
        store = TokenStore(target)
        if verify:
            store.require_whole()
        return _accepted(store, bad_rows)
    rows = open_rows(path, split)
    with contextlib.ExitStack() as stack:
        try:
            building = stack.enter_context(first_to_finish(target))
        except OSError as error:
            raise UserError(
                f"{cache_dir}: the cache folder cannot be written ({error.strerror}); give another"
            ) from None
        bad = Tally()
        examples = _examples(
            rows, kind, tokenizer, apply_chat_template, assistant_turns, response_multiple, bad, progress
        )
        _write(building, (str(path), split), rows, kind, examples, bad)
        if bad.rows and (bad_rows == "error" or bad.rows == len(rows)):
            raise bad_rows_error(bad, len(rows))
    return _accepted(TokenStore(target), bad_rows)


def _accepted(store: TokenStore, bad_rows: str) -> TokenStore:
    """``store``, which a run that skips bad rows may have built. Raises UserError where there are some and this run
    does not skip them."""
    if store.bad_rows.rows and bad_rows == "error":
        raise bad_rows_error(store.bad_rows, store.source_rows)
    return store


def _fingerprint(
    files: list[Path],
    kind: str,
    tokenizer: Tokenizer,
    apply_chat_template: bool,
    assistant_turns: str,
    response_multiple: int,
) -> str:
    """Hex name of the store that these inputs make."""
    stats = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    parts = [FORMAT_VERSION, stats, kind, tokenizer.fingerprint(), apply_chat_template, assistant_turns]
    parts += [response_multiple] * (response_multiple > 1)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write(
    directory: Path,
    source: tuple[str, str | None],
    rows: Rows,
    kind: str,
    examples: Iterable[tuple[int, Encoded]],
    bad: Tally,
) -> None:
    """Write the files of a store, of all ``examples``, which name their rows and find the ``bad`` ones; the tokens go
    straight to disk, 8 bytes a part stay in memory."""
    ends, row_numbers, turns = array("q"), array("q"), array("q")
    end = 0
    content = hashlib.sha256(kind.encode())
    notes: dict[str, list[int]] = {}  # note -> the rows that it is about
    recorded, first_incomplete = False, None
    thrown: list[int] = []
    with (directory / TOKENS).open("wb") as tokens_file, (directory / STEPS).open("wb") as steps_file:
        for row, example in examples:
            row_numbers.append(row)
            parts = (example.prompt, *example.responses)
            begin = end + len(parts[0])
            inner = _inner_turns(example)
            for number, ids in enumerate(parts):
                for turn in inner[number]:
                    turns.extend((len(ends), *turn))
                end += len(ids)
                ends.append(end)
            tokens = np.asarray([token for ids in parts for token in ids], dtype=np.int32).tobytes()
            tokens_file.write(tokens)
            steps = _steps_bytes(example)
            if steps:
                recorded = True
                steps_file.seek(begin * 4)  # what is skipped reads as 0
                steps_file.write(steps)
                if example.discarded is None and first_incomplete is None:
                    first_incomplete = len(row_numbers) - 1
            discarded = _discarded_rows(example, len(row_numbers) - 1)
            thrown += discarded
            content.update(struct.pack(f"<{len(parts)}q?", *map(len, parts), bool(steps)) + tokens + steps)
            content.update(struct.pack(f"<{len(discarded)}i", *discarded))
            content.update(json.dumps(inner).encode() if any(inner) else b"")
            for note in example.notes:
                notes.setdefault(note, []).append(row)
        steps_file.truncate(end * 4)
    if not recorded:
        (directory / STEPS).unlink()
    for name, values in ((ENDS, ends), (ROWS, row_numbers), (TURNS, turns)):
        (directory / name).write_bytes(values.tobytes())
    np.asarray(thrown, dtype=np.int32).tofile(directory / DISCARDED)
    meta = {
        "kind": kind,
        "source": os.path.abspath(source[0]),
        "split": source[1],
        "rows": len(rows),
        "examples": len(row_numbers),
        "bad_rows": bad.as_list(),
        "steps": recorded,
        "first_incomplete": first_incomplete,
        "content": content.hexdigest(),
        "crc32": {file.name: file_crc32(file) for file in sorted(directory.iterdir())},
        "notes": _file_notes(rows) + note_lines(notes, rows.location) + _several(row_numbers),
    }
    (directory / META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _file_notes(rows: Rows) -> list[str]:
    """Notes about how the file was read."""
    return [note_line(note, len(rows), rows.location(0)) for note in rows.notes]


def _several(row_numbers: Sequence[int]) -> list[str]:
    rows = len(set(row_numbers))
    if rows == len(row_numbers):
        return []
    return [f"note: {rows} rows are {len(row_numbers)} examples, one for each of the assistant's messages"]


def _inner_turns(example: Encoded) -> list[tuple[Turn, ...]]:
    """Of the prompt and each response, the turns where they are not the whole."""
    whole = [((0, len(response)),) for response in example.responses]
    return [(), *(() if turns == all_of_it else turns for turns, all_of_it in zip(example.turns, whole, strict=True))]


def _steps_bytes(example: Encoded) -> bytes:
    if example.steps is None:
        return b""
    return (np.asarray([step for steps in example.steps for step in steps], dtype=np.int32) + 1).tobytes()


def _discarded_rows(example: Encoded, number: int) -> list[int]:
    """The rows that `TokenStore.discarded` gives, end to end; ``number`` is the example's."""
    return [
        value
        for response, tokens in enumerate(example.discarded or ())
        for token in tokens
        for value in (number, response, *token)
    ]


def _examples(
    rows: Rows,
    kind: str,
    tokenizer: Tokenizer,
    apply_chat_template: bool,
    assistant_turns: str,
    response_multiple: int,
    bad: Tally,
    progress: bool,
) -> Iterator[tuple[int, Encoded]]:
    """(number of the row, example) of every example of rows that can be used; the others are ``bad``."""
    for numbered in _record_batches(rows, kind, assistant_turns, bad, progress):
        encoded = encode_records(
            [record for _, record in numbered], RESPONSES[kind], tokenizer, apply_chat_template, response_multiple
        )
        of_rows: dict[int, list[Encoded | UserError]] = {}
        for (row, _), example in zip(numbered, encoded, strict=True):
            of_rows.setdefault(row, []).append(example)
        for row, examples in of_rows.items():
            problem = next((example for example in examples if isinstance(example, UserError)), None)
            if problem is not None:
                bad.add(rows.location(row), str(problem))
            else:
                yield from ((row, example) for example in examples if not isinstance(example, UserError))


def _record_batches(
    rows: Rows, kind: str, assistant_turns: str, bad: Tally, progress: bool
) -> Iterator[list[tuple[int, Record | TokenRecord]]]:
    """(number of the row, validated record) of all records in up to ``_BATCH`` rows at a time; other rows are
    ``bad``."""
    numbers: Iterable[int] = range(len(rows))
    if progress:
        from tqdm import tqdm

        numbers = tqdm(numbers, desc="tokenizing", unit=" rows")
    numbers = iter(numbers)
    while batch := list(islice(numbers, _BATCH)):
        stop.raise_if_requested()
        records = []
        for index in batch:
            with bad.catching(rows, index):
                records += [(index, record) for record in read_row(kind, rows[index], assistant_turns)]
        yield records
