"""Every example validated and tokenized once, then read from disk by number.

A store is a folder ``cache_dir/<fingerprint>/`` of files: all token ids end to end, where each prompt and response
ends, which row each example comes from, which parts of a response are learned if not all of it, which tokens recorded
decodings threw away, and what all was made from; and one more, at the tokens' places, if decoding steps were recorded
(step plus one, 0 where there is none). It is memory-mapped, so a million pairs take no more memory than ten, and
all lengths are known before training begins. The fingerprint covers data file, tokenizer and settings: change one and
the next run builds another folder.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_dtrpo.config.blocks import FULL
from megatron_dtrpo.data.rows import Rows, open_rows
from megatron_dtrpo.data.tally import Tally
from megatron_dtrpo.errors import UserError

if TYPE_CHECKING:
    from megatron_dtrpo.data.examples import Turn

# Of the files, and of the rules by which rows become tokens. Who raises it says so in tests/golden/record.json too.
FORMAT_VERSION = 11
RESPONSES = {"preference": ("chosen", "rejected"), "sft": ("completion",)}

_BLOCK = 1 << 22  # bytes whose checksum is taken in one call
TOKENS, STEPS, ENDS, META = "tokens.int32", "steps.int32", "ends.int64", "meta.json"
DISCARDED = "discarded.int32"
DISCARDED_COLUMNS = 6  # number of the example and of the response; place, token, step, until
ROWS, TURNS = "rows.int64", "turns.int64"


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
            meta = json.loads((self.directory / META).read_text(encoding="utf-8"))
            self._ends = np.memmap(self.directory / ENDS, dtype=np.int64, mode="r")
            self._tokens = np.memmap(self.directory / TOKENS, dtype=np.int32, mode="r")
            self._row_numbers = np.memmap(self.directory / ROWS, dtype=np.int64, mode="r")
            # Few responses have turns: [number of the part, begin, end] in order; all others are learned as a whole.
            self._turns = np.fromfile(self.directory / TURNS, dtype=np.int64).reshape(-1, 3)
            steps = self.directory / STEPS
            self._steps = np.memmap(steps, dtype=np.int32, mode="r") if meta["steps"] else None
            self._discarded = _mapped(self.directory / DISCARDED).reshape(-1, DISCARDED_COLUMNS)
            self._discarded_by = np.array(self._discarded[:, 0])  # searched for every example: a copy, close together
            self.kind: str = meta["kind"]
            self.source: tuple[str, str | None] = (meta["source"], meta["split"])
            self.content: str = meta["content"]
            self.first_incomplete: int | None = meta["first_incomplete"]
            self.bad_rows = Tally(meta["bad_rows"])
            self.source_rows: int = meta["rows"]
            self.notes: tuple[str, ...] = tuple(meta["notes"])
            self._crc32: dict[str, int] = meta["crc32"]
            self._size: int = meta["examples"]
            self._parts = 1 + len(RESPONSES[self.kind])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{self.directory}: not a finished token store; delete the folder and run again") from None
        sizes = {len(self._tokens), self._ends[-1], len(self._tokens if self._steps is None else self._steps)}
        if len(self._ends) != self._size * self._parts or len(self._row_numbers) != self._size or len(sizes) > 1:
            raise UserError(f"{self.directory}: the token store is damaged; delete the folder and run again")

    def require_whole(self) -> None:
        """Raises UserError where a file is not as it was written. Reads every byte: a second or less per gigabyte that
        is in memory, else as long as the disk takes."""
        for name, crc32 in self._crc32.items():
            path = self.directory / name
            if not path.is_file() or file_crc32(path) != crc32:
                raise UserError(f"{path}: damaged; delete the folder and run again to build it anew")

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


def file_crc32(path: Path) -> int:
    """The checksum of a file's bytes."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            value = zlib.crc32(block, value)
    return value


def _mapped(path: Path) -> np.ndarray:
    """int32 of a file, which may be empty: nothing can be mapped then."""
    return np.memmap(path, dtype=np.int32, mode="r") if path.stat().st_size else np.zeros(0, np.int32)


def turn_block_counts(store: TokenStore, block_size: int) -> np.ndarray:
    """How many blocks of ``block_size`` the turns of each response have; with `FULL` how many tokens, for each turn of
    all up to its end: int64 [n, responses]."""
    prompts, responses = (lengths.astype(np.int64) for lengths in store.lengths)

    def count(first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return last + 1 if block_size == FULL else last // block_size + 1 - first // block_size

    counts = count(prompts[:, None], prompts[:, None] + responses - 1)
    example, response, begin, end = store.turns.T
    counts[example, response] = 0
    np.add.at(counts, (example, response), count(prompts[example] + begin, prompts[example] + end - 1))
    return counts
