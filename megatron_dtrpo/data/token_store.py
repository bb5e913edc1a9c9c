"""Every example validated and tokenized once, then read from disk by number.

A store is a folder ``cache_dir/<fingerprint>/`` of files: all token ids end to end, where each prompt and response
ends, what they were made from, and which tokens recorded decodings threw away; and one more, at the tokens' places, if
decoding steps were recorded (step plus one, 0 where there is none). It is memory-mapped, so a million pairs take no
more memory than ten, and
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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from megatron_dtrpo.data.records import READERS, Record, TokenRecord
from megatron_dtrpo.data.rows import Rows, open_rows
from megatron_dtrpo.data.source import stored_files
from megatron_dtrpo.data.tally import Tally, bad_rows_error
from megatron_dtrpo.data.tokenizer import Tokenizer
from megatron_dtrpo.errors import UserError

FORMAT_VERSION = 5
RESPONSES = {"preference": ("chosen", "rejected"), "sft": ("completion",)}

_BATCH = 512  # rows tokenized in one call
_TOKENS, _STEPS, _ENDS, _META = "tokens.int32", "steps.int32", "ends.int64", "meta.json"
_ROWS = "rows.int64"
_DISCARDED = "discarded.int32"
_DISCARDED_COLUMNS = 6  # number of the example and of the response; place, token, step, until


@dataclass(frozen=True)
class Example:
    """Token ids of one row: ``prompt`` int32 [P], ``responses`` int32 [R] each, their end token included.

    Preferences have two responses, (chosen, rejected); fine-tuning has one. ``steps``, int32 [R] each, are the decoding
    steps at which the responses' tokens were unmasked, or None if the row has none. ``discarded``, int32 [d, 4] each,
    are the (place, token, step, until) of tokens that were thrown away (`diffusion.decoding.Discarded`). Tokens are
    read-only.
    """

    index: int
    prompt: np.ndarray
    responses: tuple[np.ndarray, ...]
    steps: tuple[np.ndarray, ...] | None = None
    discarded: tuple[np.ndarray, ...] | None = None


class TokenStore:
    """A finished store, opened for reading. ``build_token_store`` makes or finds one; ``store[i]`` is an Example.

    ``content`` is a fingerprint of every token and step in it, wherever the data file lies. ``first_incomplete`` is the
    first example with steps whose row does not say which tokens were thrown away. ``bad_rows`` says which of the
    ``source_rows`` rows of the file are no example, and why.
    """

    def __init__(self, directory: str | Path) -> None:
        """Open the store in ``directory``. Raises UserError where it is missing or damaged."""
        self.directory = Path(directory)
        try:
            meta = json.loads((self.directory / _META).read_text(encoding="utf-8"))
            self._ends = np.memmap(self.directory / _ENDS, dtype=np.int64, mode="r")
            self._tokens = np.memmap(self.directory / _TOKENS, dtype=np.int32, mode="r")
            steps = self.directory / _STEPS
            self._steps = np.memmap(steps, dtype=np.int32, mode="r") if meta["steps"] else None
            self._discarded = _mapped(self.directory / _DISCARDED).reshape(-1, _DISCARDED_COLUMNS)
            self._discarded_by = np.array(self._discarded[:, 0])  # searched for every example: a copy, close together
        except (OSError, ValueError, KeyError):
            raise UserError(f"{self.directory}: not a finished token store; delete the folder and run again") from None
        self.kind: str = meta["kind"]
        self.source: tuple[str, str | None] = (meta["source"], meta["split"])
        self.content: str = meta["content"]
        self.first_incomplete: int | None = meta["first_incomplete"]
        self.bad_rows = Tally(meta["bad_rows"])
        self.source_rows: int = meta["rows"]
        self._numbers = np.fromfile(self.directory / _ROWS, dtype=np.int64) if meta["bad_rows"] else None
        self._size: int = meta["examples"]
        self._parts = 1 + len(RESPONSES[self.kind])
        sizes = {len(self._tokens), self._ends[-1], len(self._tokens if self._steps is None else self._steps)}
        if len(self._ends) != self._size * self._parts or len(sizes) > 1:
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
        if self._steps is None or not self._steps[ends[0]]:
            return Example(int(index), prompt, responses)
        steps = tuple(self._steps[span] - 1 for span in spans)
        thrown = self.discarded(index, index + 1)
        return Example(
            int(index), prompt, responses, steps, tuple(thrown[thrown[:, 1] == r, 2:] for r in range(len(spans)))
        )

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
        return self._rows.location(self._number(index))

    def row(self, index: int) -> dict:
        """Row ``index`` of the data file, as it is."""
        return self._rows[self._number(index)]

    def _number(self, index: int) -> int:
        """The row that example ``index`` was."""
        return index if self._numbers is None else int(self._numbers[index])

    @cached_property
    def _rows(self) -> Rows:
        # Training asks for no row, and errors alone for locations: the data file is not read again before one does.
        return open_rows(*self.source)


def _mapped(path: Path) -> np.ndarray:
    """int32 of a file, which may be empty: nothing can be mapped then."""
    return np.memmap(path, dtype=np.int32, mode="r") if path.stat().st_size else np.zeros(0, np.int32)


def build_token_store(
    path: str | Path,
    kind: str,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    apply_chat_template: bool = False,
    progress: bool = False,
    split: str | None = None,
    bad_rows: str = "error",
) -> TokenStore:
    """Open the store of data file ``path``, building it first where ``cache_dir`` does not hold it yet.

    ``kind`` is ``preference`` or ``sft``, ``split`` one of those that ``path`` holds. Several processes may build at
    once: each writes a folder of its own and the first to finish wins. Rows that cannot be used are left out where
    ``bad_rows`` is ``skip`` (`TokenStore.bad_rows` names them).

    Raises:
        UserError: naming file and line of rows that cannot be used, each kind of problem once: with ``bad_rows``
            ``error``, or where no row is left.
    """
    if kind not in READERS:
        raise UserError(f"kind: unknown {kind!r}; use one of {', '.join(READERS)}")
    target = Path(cache_dir) / _fingerprint(stored_files(path, split), kind, tokenizer, apply_chat_template)
    if target.exists():
        return _accepted(TokenStore(target), bad_rows)
    rows = open_rows(path, split)
    try:
        Path(cache_dir).mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".building-{target.name[:8]}-", dir=cache_dir))
    except OSError as error:
        raise UserError(f"{cache_dir}: the cache folder cannot be written ({error.strerror}); give another") from None
    try:
        bad = _write(building, (str(path), split), rows, kind, tokenizer, apply_chat_template, progress)
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


def _fingerprint(files: list[Path], kind: str, tokenizer: Tokenizer, apply_chat_template: bool) -> str:
    """Hex name of the store that these inputs make."""
    stats = [(str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    parts = [FORMAT_VERSION, stats, kind, tokenizer.fingerprint(), apply_chat_template]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write(
    directory: Path,
    source: tuple[str, str | None],
    rows: Rows,
    kind: str,
    tokenizer: Tokenizer,
    apply_chat_template: bool,
    progress: bool,
) -> Tally:
    """Write the files of a store, of every row that can be used, and return what is wrong with the others; the tokens
    go straight to disk, 8 bytes a part stay in memory."""
    ends = array("q")
    end = 0
    content = hashlib.sha256(kind.encode())
    recorded, first_incomplete, examples = False, None, 0
    bad, numbers = Tally(), array("q")
    thrown: list[int] = []
    with (directory / _TOKENS).open("wb") as tokens_file, (directory / _STEPS).open("wb") as steps_file:
        for records in _record_batches(rows, kind, bad, progress):
            for index, record, parts in _tokenize(rows, records, kind, tokenizer, apply_chat_template, bad):
                numbers.append(index)
                begin = end + len(parts[0])
                for ids in parts:
                    end += len(ids)
                    ends.append(end)
                tokens = np.asarray([token for ids in parts for token in ids], dtype=np.int32).tobytes()
                tokens_file.write(tokens)
                steps = _steps_bytes(record)
                if steps:
                    recorded = True
                    steps_file.seek(begin * 4)  # what is skipped reads as 0
                    steps_file.write(steps)
                    if record.discarded is None and first_incomplete is None:
                        first_incomplete = examples
                discarded = _discarded_rows(record, examples)
                thrown += discarded
                examples += 1
                content.update(struct.pack(f"<{len(parts)}q?", *map(len, parts), bool(steps)) + tokens + steps)
                content.update(struct.pack(f"<{len(discarded)}i", *discarded))
        steps_file.truncate(end * 4)
    if not recorded:
        (directory / _STEPS).unlink()
    (directory / _ENDS).write_bytes(ends.tobytes())
    if bad.rows:
        (directory / _ROWS).write_bytes(numbers.tobytes())
    np.asarray(thrown, dtype=np.int32).tofile(directory / _DISCARDED)
    meta = {
        "kind": kind,
        "source": os.path.abspath(source[0]),
        "split": source[1],
        "rows": len(rows),
        "examples": examples,
        "bad_rows": bad.as_list(),
        "steps": recorded,
        "first_incomplete": first_incomplete,
        "content": content.hexdigest(),
    }
    (directory / _META).write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    return bad


def _steps_bytes(record: Record | TokenRecord) -> bytes:
    if isinstance(record, Record) or record.steps is None:
        return b""
    return (np.asarray([step for steps in record.steps for step in steps], dtype=np.int32) + 1).tobytes()


def _discarded_rows(record: Record | TokenRecord, example: int) -> list[int]:
    """The rows that `TokenStore.discarded` gives, end to end."""
    if isinstance(record, Record) or record.discarded is None:
        return []
    return [
        value
        for response, tokens in enumerate(record.discarded)
        for token in tokens
        for value in (example, response, *token)
    ]


def _record_batches(
    rows: Rows, kind: str, bad: Tally, progress: bool
) -> Iterator[list[tuple[int, Record | TokenRecord]]]:
    """(number of the row, its validated record), up to ``_BATCH`` at a time; other rows are ``bad``."""
    numbers: Iterable[int] = range(len(rows))
    if progress:
        from tqdm import tqdm

        numbers = tqdm(numbers, desc="tokenizing", unit=" rows")
    numbers = iter(numbers)
    while batch := list(islice(numbers, _BATCH)):
        records = []
        for index in batch:
            with bad.catching(rows, index):
                records.append((index, READERS[kind](rows[index])))
        yield records


def _tokenize(
    rows: Rows,
    records: list[tuple[int, Record | TokenRecord]],
    kind: str,
    tokenizer: Tokenizer,
    apply_chat_template: bool,
    bad: Tally,
) -> list[tuple[int, Record | TokenRecord, list[list[int]]]]:
    """(number of the row, record, token ids of [prompt, *responses]); every text of the batch goes to the tokenizer in
    one call. Rows that show to be unusable here are ``bad``."""
    rendered: list[tuple[int, Record | TokenRecord, list[str]]] = []
    for index, record in records:
        with bad.catching(rows, index):
            rendered.append((index, record, _render(record, tokenizer, apply_chat_template)))
    encoded = iter(tokenizer.encode_batch([text for _, _, texts in rendered for text in texts]))
    tokenized = []
    for index, record, texts in rendered:
        ids = [next(encoded) for _ in texts]
        with bad.catching(rows, index):
            tokenized.append((index, record, _checked_parts(record, ids, kind, tokenizer)))
    return tokenized


def _render(record: Record | TokenRecord, tokenizer: Tokenizer, apply_chat_template: bool) -> list[str]:
    """The texts of a record that are still to be tokenized: [prompt, *responses], or none."""
    if isinstance(record, TokenRecord):
        return []
    prompt = tokenizer.render_prompt(record.prompt, apply_chat_template)
    return [prompt, *(tokenizer.render_response(r, record.prompt, apply_chat_template) for r in record.responses)]


def _checked_parts(
    record: Record | TokenRecord, encoded: list[list[int]], kind: str, tokenizer: Tokenizer
) -> list[list[int]]:
    """[prompt, *responses] of a record whose texts were ``encoded``. Raises UserError."""
    names = ("prompt", *RESPONSES[kind])
    if isinstance(record, Record):
        parts = [encoded[0], *map(tokenizer.close, encoded[1:])]
        _check_tokenized(parts, names, tokenizer)
    else:
        parts = [record.prompt, *record.responses]
        _check_given(parts, names, tokenizer)
        _check_discarded(record, RESPONSES[kind], tokenizer)
    _check_different(parts)
    return parts


def _check_tokenized(parts: list[list[int]], names: tuple[str, ...], tokenizer: Tokenizer) -> None:
    """Refuse what only shows once tokenized."""
    for name, ids in zip(names, parts, strict=True):
        if tokenizer.mask_id in ids:
            raise UserError(f"{name}: contains the mask token {tokenizer.mask_token!r}; remove it from the text")
        if len(ids) < (1 if name == "prompt" else 2):  # a response's end token does not count
            raise UserError(f"{name}: is empty once tokenized; give some text or take the row out")


def _check_given(parts: list[list[int]], names: tuple[str, ...], tokenizer: Tokenizer) -> None:
    """Refuse ids that are not text in this vocabulary."""
    for name, ids in zip(names, parts, strict=True):
        if tokenizer.mask_id in ids:
            place = ids.index(tokenizer.mask_id)
            raise UserError(f"{name}_ids[{place}]: is the mask token {tokenizer.mask_id}; only text has ids here")
        if max(ids) >= tokenizer.vocab_size:
            place = ids.index(max(ids))
            raise UserError(
                f"{name}_ids[{place}]: {ids[place]} is not in the vocabulary of {tokenizer.vocab_size} tokens; "
                "give ids of this tokenizer"
            )


def _check_discarded(record: TokenRecord, names: tuple[str, ...], tokenizer: Tokenizer) -> None:
    for name, discarded in zip(names, record.discarded or (), strict=False):
        for place, token, *_ in discarded:
            if token >= tokenizer.vocab_size or token == tokenizer.mask_id:
                raise UserError(f"{name}_discarded: token {token} at place {place} is not one that decoding writes")


def _check_different(parts: list[list[int]]) -> None:
    if len(parts) == 3 and parts[1] == parts[2]:
        raise UserError("chosen and rejected are the same; take the row out, it prefers nothing")
