"""Files of every kind, whole and damaged: the rows that were written, or one line; nothing else is learned."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import random
from collections import Counter
from pathlib import Path

import pytest

from megatron_dtrpo.data.rows import open_rows
from megatron_dtrpo.data.source import stored_files
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError
from tests.support.chat_tokenizer import save_chat_tokenizer
from tests.unit.test_row_schemas import _is_said

pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
parquet = pytest.importorskip("pyarrow.parquet")

WORDS = ("2+2=", "4", "a b", "c, d", 'say "x"', "line\nbreak", "\u4e2d\u6587", "x;y", "[1]", "{", "\ttab", "NA", "01")
ROUNDS, ROWS_IN_A_FILE = 180, 15


def texts(rng: random.Random, *names: str) -> dict:
    return {name: f"{rng.choice(WORDS)} {rng.randrange(10**6)}" for name in names}


def conversation(rng: random.Random, *names: str) -> dict:
    asked = {"role": "user", "content": f"{rng.choice(WORDS)} {rng.randrange(10**6)}"}
    return {name: [asked, {"role": "assistant", "content": f"{name} {rng.choice(WORDS)}"}] for name in names}


def share_gpt(rng: random.Random) -> dict:
    (turns,) = conversation(rng, "messages").values()
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]}


SCHEMAS = {
    "pairs": lambda rng: texts(rng, "prompt", "chosen", "rejected"),
    "completions": lambda rng: texts(rng, "prompt", "completion"),
    "dialogues": lambda rng: conversation(rng, "chosen", "rejected"),
    "messages": lambda rng: conversation(rng, "messages"),
    "ShareGPT": share_gpt,
    "no rows of ours": lambda rng: texts(rng, "left", "right"),
}


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(path, rows, delimiter):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(rows[0])
        writer.writerows([v if isinstance(v, str) else json.dumps(v) for v in row.values()] for row in rows)


def saved(path, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


def arrow(path, rows):
    data = pyarrow.Table.from_pylist(rows)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, data.schema) as stream:
        stream.write_table(data)


KINDS = {
    "a.jsonl": lambda path, rows: path.write_bytes(lines(rows)),
    "b.jsonl": lambda path, rows: path.write_bytes(b"\xef\xbb\xbf" + lines(rows).replace(b"\n", b"\r\n\n")),
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8"),
    "b.json": lambda path, rows: path.write_text(json.dumps({"n": 1, "data": rows}), encoding="utf-8"),
    "c.json": lambda path, rows: path.write_bytes(lines(rows)),
    "a.csv": lambda path, rows: table(path, rows, ","),
    "b.csv": lambda path, rows: table(path, rows, ";"),
    "a.tsv": lambda path, rows: table(path, rows, "\t"),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress(lines(rows))),
    "a.jsonl.bz2": lambda path, rows: path.write_bytes(bz2.compress(lines(rows))),
    "a.jsonl.xz": lambda path, rows: path.write_bytes(lzma.compress(lines(rows))),
    "a.jsonl.zst": lambda path, rows: path.write_bytes(pyarrow.compress(lines(rows), codec="zstd", asbytes=True)),
    "a.parquet": lambda path, rows: parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4),
    "a.arrow": arrow,
    "saved": saved,
}


def cut(rng, data):
    return data[: rng.randrange(len(data))]


def flip(rng, data):
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def other(rng, data):
    return rng.choice(
        [
            b"",
            b"\x00" * 40,
            rng.randbytes(300),
            b"<html>",
            data[len(data) // 2 :],
            data.decode("latin1").encode("utf-16"),
        ]
    )


DAMAGES = (cut, flip, other)


def leaves(value) -> list[str]:
    """All texts of a row, in order; messages in CSV are JSON text."""
    if isinstance(value, str) and value.startswith('[{"'):
        return leaves(json.loads(value))
    if isinstance(value, (dict, list)):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in leaves(item)]
    return [str(value)]


def check(path: Path, rows: list[dict] | None, kind: str, tokenizer, cache: Path) -> str:
    """How it ended. ``rows`` that the file was written from, or None where it was damaged since."""
    try:
        read = open_rows(path)
        assert rows is None or len(read) == len(rows)
        store = build_token_store(path, kind, tokenizer, cache, bad_rows="skip")
    except UserError as error:
        message = str(error)
        assert "\n" not in message and str(path) in message, message
        return "refused"
    assert len(store) + store.bad_rows.rows == store.source_rows == len(read)
    for index in range(len(store)):
        row = store.row(index)
        for part in (store[index].prompt, *store[index].responses):
            assert _is_said(tokenizer.decode(part), row), (tokenizer.decode(part), row)
        assert rows is None or leaves(row) == leaves(rows[store.row_number(index)])
    return "used" if len(store) else "refused"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer("HuggingFaceTokenizer", save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("is_damaged", [False, True], ids=["whole", "damaged"])
def test_files_of_every_kind(tmp_path, tokenizer, is_damaged):
    rng = random.Random(int(is_damaged))
    found, tried = Counter(), 0
    for number in range(ROUNDS):
        name = list(KINDS)[number % len(KINDS)]
        schema = rng.choice(list(SCHEMAS))
        rows = [SCHEMAS[schema](rng) for _ in range(ROWS_IN_A_FILE)]
        path = tmp_path / str(number) / name
        path.parent.mkdir()
        KINDS[name](path, rows)
        if is_damaged:
            file = rng.choice(stored_files(path)) if path.is_dir() else path
            file.write_bytes(rng.choice(DAMAGES)(rng, file.read_bytes()))
        tried += len(rows)
        kind = rng.choice(["preference", "sft"])
        ended = check(path, None if is_damaged else rows, kind, tokenizer, tmp_path / "cache")
        found[ended] += 1
        fits = {"preference": ("pairs", "dialogues"), "sft": ("completions", "messages", "ShareGPT")}[kind]
        if not is_damaged:
            is_read = name != "b.csv" or schema in ("messages", "ShareGPT")  # one column has no separators
            assert (ended == "used") == (schema in fits and is_read), (name, schema, kind)
    assert tried >= 2000 and min(found.values()) > 20, (tried, found)
