"""Every example validated and tokenized once, then read from disk by number.

A store is a folder ``cache_dir/<fingerprint>/`` of files: all token ids end to end, where each prompt and response
ends, which row each example comes from, which parts of a response are learned if not all of it, which tokens recorded
decodings threw away, and what all was made from; and one more, at the tokens' places, if decoding steps were recorded
(step plus one, 0 where there is none). It is memory-mapped, so a million pairs take no more memory than ten, and
all lengths are known before training begins. The fingerprint covers data file, tokenizer and settings: change one and
the next run builds another folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from megatron_dtrpo.data.examples import Encoded, Turn, encode_records, note_line
from megatron_dtrpo.data.records import READERS, Record, TokenRecord, read_row
from megatron_dtrpo.data.rows import Rows, open_rows
from megatron_dtrpo.data.source import stored_files
from megatron_dtrpo.data.tally import Tally, bad_rows_error
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.runtime import stop

FORMAT_VERSION = 8
RESPONSES = {"preference": ("chosen", "rejected"), "sft": ("completion",)}

_BATCH = 512  # rows tokenized in one call
_TOKENS, _STEPS, _ENDS, _META = "tokens.int32", "steps.int32", "ends.int64", "meta.json"
_DISCARDED = "discarded.int32"
_DISCARDED_COLUMNS = 6  # number of the example and of the response; place, token, step, until
_ROWS, _TURNS = "rows.int64", "turns.int64"


@dataclass(frozen=True)
class Example:
    """Token ids: ``prompt`` int32 [P], ``responses`` int32 [R] each, their end token included.

    Preferences have two responses, (chosen, rejected); fine-tuning has one. ``turns``: of each response the parts,
    first token and last plus one, that the assistant writes, which are learned. ``steps``, int32 [R] each, are the
    decoding steps at which the responses' tokens were unmasked, or None if the row has none. ``discarded``, int32
    [d, 4] each, are the (place, token, step, until) of tokens that were thrown away (`diffusion.decoding.Discarded`).
    Tokens are read-only.
    """

    index: int
    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    turns: tuple[tuple[Turn, ...], ...]
    steps: tuple[np.ndarray, ...] | None = None
    discarded: tuple[np.ndarray, ...] | None = None


class TokenStore:
    """A finished store, opened for reading. ``build_token_store`` makes or finds one; ``store[i]`` is an Example.

    ``content`` is a fingerprint of every token and step in it, wherever the data file lies. ``first_incomplete`` is the
    first example with steps whose row does not say which tokens were thrown away. ``bad_rows`` says which of the
    ``source_rows`` rows of the file are no example, and why; ``notes`` are lines about the others that the owner of the
    data should read.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open the store in ``directory``. Raises UserError where it is missing or damaged."""
        self.directory = Path(directory)
        try:
            meta = json.loads((self.directory / _META).read_text(encoding="utf-8"))
            self._ends = np.memmap(self.directory / _ENDS, dtype=np.int64, mode="r")
            self._tokens = np.memmap(self.directory / _TOKENS, dtype=np.int32, mode="r")
            self._row_numbers = np.memmap(self.directory / _ROWS, dtype=np.int64, mode="r")
            # Few responses have turns: [number of the part, begin, end] in order; all others are learned as a whole.
            self._turns = np.fromfile(self.directory / _TURNS, dtype=np.int64).reshape(-1, 3)
            steps = self.directory / _STEPS
            self._steps = np.memmap(steps, dtype=np.int32, mode="r") if meta["steps"] else None
            self._discarded = _mapped(self.directory / _DISCARDED).reshape(-1, _DISCARDED_COLUMNS)
            self._discarded_by = np.array(self._discarded[:, 0])  # searched for every example: a copy, close together
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.directory}: not a finished token store; delete the folder and run again") from None
        self.kind: str = meta["kind"]
        self.source: tuple[str, str | None] = (meta["source"], meta["split"])
        self.content: str = meta["content"]
        self.first_incomplete: int | None = meta["first_incomplete"]
        self.bad_rows = Tally(meta["bad_rows"])
        self.source_rows: int = meta["rows"]
        self.notes: tuple[str, ...] = tuple(meta["notes"])
        self._size: int = meta["examples"]
        self._parts = 1 + len(RESPONSES[self.kind])
        sizes = {len(self._tokens), self._ends[-1], len(self._tokens if self._steps is None else self._steps)}
        if len(self._ends) != self._size * self._parts or len(self._row_numbers) != self._size or len(sizes) > 1:
            raise UserError(f"{self.directory}: the token store is damaged; delete the folder and run again")

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        """Example ``index``, 0 .. len - 1; its arrays are views of the file."""
        if not 0 <= index < self._size:
            raise IndexError(f"example {index} of {self._size}")
        first = index * self._parts
        ends = self._ends[first : first + self._parts].tolist()
        spans = [slice(begin, end) for begin, end in pairwise(ends)]
        prompt = np.asarray(self._tokens[int(self._ends[first - 1]) if first else 0 : ends[0]])
        responses = tuple(np.asarray(self._tokens[span]) for span in spans)
        turns = self._turns_of(first + 1, responses)
        if self._steps is None or not self._steps[ends[0]]:
            return Example(int(index), prompt, responses, turns)
        steps = tuple(self._steps[span] - 1 for span in spans)
        thrown = self.discarded(index, index + 1)
        discarded = tuple(thrown[thrown[:, 1] == r, 2:] for r in range(len(spans)))
        return Example(int(index), prompt, responses, turns, steps, discarded)

    def discarded(self, first: int, stop: int) -> np.ndarray:
        """Tokens that the decodings of examples ``first .. stop - 1`` threw away, int32 [d, 6]: number of the example,
        number of the response, place, token, step, until."""
        return self._discarded[slice(*np.searchsorted(self._discarded_by, (first, stop)))]

    def recorded(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Of examples ``first .. stop - 1``, all recorded: the steps of all their parts end to end, int32, -1 for
        a prompt's tokens; and the length of each part, int64 [examples, 1 + responses]."""
        ends = self._ends[first * self._parts : stop * self._parts]
        begin = int(self._ends[first * self._parts - 1]) if first else 0
        return self._steps[begin : ends[-1]] - 1, np.diff(ends, prepend=begin).reshape(-1, self._parts)

    def _turns_of(self, part: int, responses: Sequence[np.ndarray]) -> tuple[tuple[Turn, ...], ...]:
        """Of the responses whose parts are numbered from ``part``."""
        if not len(self._turns):
            return tuple(((0, len(response)),) for response in responses)
        begins = np.searchsorted(self._turns[:, 0], np.arange(part, part + len(responses) + 1)).tolist()
        found = [tuple(map(tuple, self._turns[b:e, 1:].tolist())) for b, e in pairwise(begins)]
        return tuple(turns or ((0, len(r)),) for turns, r in zip(found, responses, strict=True))

    @cached_property
    def turns(self) -> np.ndarray:
        """The turns of responses that are not learned as a whole, int64 [m, 4]: number of the example and of the
        response, first token and last plus one."""
        part, spans = self._turns[:, 0], self._turns[:, 1:]
        return np.column_stack([part // self._parts, part % self._parts - 1, spans])

    def first_without_steps(self) -> int | None:
        """The first example whose decoding was not recorded, or None where all were."""
        if self._steps is None:
            return 0
        missing = np.flatnonzero(self._steps[self._ends[:: self._parts]] == 0)
        return int(missing[0]) if len(missing) else None

    @cached_property
    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens in each prompt, int32 [n], and in each response, int32 [n, responses]."""
        sizes = np.diff(self._ends, prepend=0).astype(np.int32).reshape(self._size, self._parts)
        return sizes[:, 0], sizes[:, 1:]

    def location(self, index: int) -> str:
        """Where example ``index`` was read, as error messages name it: ``pairs.jsonl:17``."""
        return self._rows.location(self.row_number(index))

    def row_number(self, index: int) -> int:
        """Which row of the data file example ``index`` was made of, from 0."""
        return int(self._row_numbers[index])

    def row(self, index: int) -> dict:
        """The row that example ``index`` was made of, as it is."""
        return self._rows[self.row_number(index)]

    @cached_property
    def _rows(self) -> Rows:
        # Training asks for no row, and errors alone for locations: the data file is not read again before one does.
        return open_rows(*self.source)


def _mapped(path: Path) -> np.ndarray:
    """int32 of a file, which may be empty: nothing can be mapped then."""
    return np.memmap(path, dtype=np.int32, mode="r") if path.stat().st_size else np.zeros(0, np.int32)


def turn_block_counts(store: TokenStore, block_size: int) -> np.ndarray:
    """How many blocks of ``block_size`` the turns of each response have: int64 [n, responses]."""
    prompts, responses = (lengths.astype(np.int64) for lengths in store.lengths)

    def count(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return last // block_size + 1 - first // block_size

    counts = count(prompts[:, None], prompts[:, None] + responses - 1)
    example, response, begin, end = store.turns.T
    counts[example, response] = 0
    np.add.at(counts, (example, response), count(prompts[example] + begin, prompts[example] + end - 1))
    return counts


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
) -> TokenStore:
    """Open the store of data file ``path``, building it first where ``cache_dir`` does not hold it yet.

    ``kind`` is ``preference`` or ``sft``, ``split`` one of those that ``path`` holds; ``assistant_turns`` as of
    `records.read_row`. Several processes may build at once: each writes a folder of its own and the first to finish
    wins. Rows that cannot be used are left out where ``bad_rows`` is ``skip`` (`TokenStore.bad_rows` names them).

    Raises:
        UserError: naming file and line of rows that cannot be used, each kind of problem once: with ``bad_rows``
            ``error``, or where no row is left.
    """
    if kind not in READERS:
        raise UserError(f"kind: unknown {kind!r}; use one of {', '.join(READERS)}")
    files = stored_files(path, split)
    target = Path(cache_dir) / _fingerprint(files, kind, tokenizer, apply_chat_template, assistant_turns)
    if target.exists():
        return _accepted(TokenStore(target), bad_rows)
    rows = open_rows(path, split)
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".building-{target.name[:8]}-", dir=cache_dir))
    except OSError as error:
        raise UserError(f"{cache_dir}: the cache folder cannot be written ({error.strerror}); give another") from None
    try:
        bad = Tally()
        examples = _examples(rows, kind, tokenizer, apply_chat_template, assistant_turns, bad, progress)
        _write(building, (str(path), split), rows, kind, examples, bad)
        if bad.rows and (bad_rows == "error" or bad.rows == len(rows)):
            raise bad_rows_error(bad, len(rows))
        building.chmod(0o755)  # mkdtemp's folders are private to their user; a cache is shared
        try:
            building.rename(target)
        except OSError:
            if not target.exists():  # otherwise another process finished the same store first
                raise
        return _accepted(TokenStore(target), bad_rows)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _accepted(store: TokenStore, bad_rows: str) -> TokenStore:
    """``store``, which a run that skips bad rows may have built. Raises UserError where there are some and this run
    does not skip them."""
    if store.bad_rows.rows and bad_rows == "error":
        raise bad_rows_error(store.bad_rows, store.source_rows)
    return store


def _fingerprint(
    files: list[Path], kind: str, tokenizer: Tokenizer, apply_chat_template: bool, assistant_turns: str
) -> str:
    """Hex name of the store that these inputs make."""
    stats = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    parts = [FORMAT_VERSION, stats, kind, tokenizer.fingerprint(), apply_chat_template, assistant_turns]
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
    with (directory / _TOKENS).open("wb") as tokens_file, (directory / _STEPS).open("wb") as steps_file:
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
        (directory / _STEPS).unlink()
    for name, values in ((_ENDS, ends), (_ROWS, row_numbers), (_TURNS, turns)):
        (directory / name).write_bytes(values.tobytes())
    np.asarray(thrown, dtype=np.int32).tofile(directory / _DISCARDED)
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
        "notes": _lines(notes, rows) + _several(row_numbers),
    }
    (directory / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


def _lines(notes: dict[str, list[int]], rows: Rows) -> list[str]:
    """What to say of the rows that each note is about."""
    return [note_line(note, len(set(about)), rows.location(about[0])) for note, about in notes.items()]


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
    bad: Tally,
    progress: bool,
) -> Iterator[tuple[int, Encoded]]:
    """(number of the row, example) of every example of rows that can be used; the others are ``bad``."""
    for numbered in _record_batches(rows, kind, assistant_turns, bad, progress):
        encoded = encode_records([record for _, record in numbered], RESPONSES[kind], tokenizer, apply_chat_template)
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
