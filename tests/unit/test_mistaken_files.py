"""Files that are not what their names say, JSON objects around rows, packed files: each is read, or one line says
what it is and what to do."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys

import pytest

from megatron_dtrpo.data.prompts import prompt_notes, read_prompts
from megatron_dtrpo.data.rows import open_rows
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError

ROWS = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": "7 \u00e9"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html>\n<html><body>404</body></html>\n"


def message_of(path) -> str:
    with pytest.raises(UserError) as caught:
        list(open_rows(path))
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path)) and len(message) < 400
    return message


def zstd(data: bytes) -> bytes:
    return pytest.importorskip("pyarrow").compress(data, codec="zstd", asbytes=True)


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("compression", PACKERS)
@pytest.mark.parametrize("kind", [".jsonl", ".json"])
def test_packed_files_and_those_that_are_not(tmp_path, kind, compression):
    pack = PACKERS[compression]
    path = tmp_path / f"a{kind}{compression}"
    path.write_bytes(pack(LINES[:60]) + pack(LINES[60:]))  # two parts, as parallel packers write
    assert list(open_rows(path)) == ROWS and open_rows(path).location(1) == f"{path}:2"
    path.write_bytes(pack(LINES * 50)[:-7])
    assert "cannot be unpacked" in message_of(path) and "complete?" in message_of(path)
    path.write_bytes(LINES)
    assert f"is not packed; take {compression} off its name" in message_of(path)
    path.write_bytes(POINTER)
    assert "git lfs pull" in message_of(path)
    path.write_bytes(pack(LINES.decode().encode("utf-16")))
    assert "is UTF-16" in message_of(path)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("compression", PACKERS)
def test_packed_data_under_a_plain_name(tmp_path, kind, compression):
    path = tmp_path / f"a{kind}"
    path.write_bytes(PACKERS[compression](LINES))
    assert f"name it a{kind}{compression}" in message_of(path)
    other = tmp_path / f"a{kind}.{'bz2' if compression == '.gz' else 'gz'}"
    other.write_bytes(PACKERS[compression](LINES))
    assert f"name it a{kind}{compression}" in message_of(other)


def test_zst_needs_a_library(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd(LINES))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in message_of(path)


KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".pq", ".feather")


@pytest.mark.parametrize("kind", KINDS)
def test_pointers_and_pages(tmp_path, kind):
    path = tmp_path / f"a{kind}"
    path.write_bytes(POINTER)
    assert "is a Git LFS pointer" in message_of(path) and "git lfs pull" in message_of(path)
    path.write_bytes(PAGE)
    assert "is an HTML page" in message_of(path) and "failed download" in message_of(path)


def test_a_pointer_inside_a_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS).save_to_disk(str(folder))
    (file,) = folder.glob("*.arrow")
    file.write_bytes(POINTER)
    assert message_of_file(folder, file)


def message_of_file(path, file) -> str:
    with pytest.raises(UserError, match="git lfs pull") as caught:
        open_rows(path)
    assert str(caught.value).startswith(f"{file}: ")
    return str(caught.value)


def test_tables_under_other_names(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name in ("a.pq", "a.parq"):
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name)
        assert list(open_rows(tmp_path / name)) == ROWS
    (tmp_path / "a.jsonl").write_bytes((tmp_path / "a.pq").read_bytes())
    assert "name it a.parquet" in message_of(tmp_path / "a.jsonl")
    (tmp_path / "b.csv").write_bytes(b"PK\x03\x04" + bytes(50))
    assert "is a zip archive; unpack it" in message_of(tmp_path / "b.csv")


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_wide_text(tmp_path, kind, encoding):
    path = tmp_path / f"a{kind}"
    path.write_bytes(("prompt,chosen,rejected\n1,2,3\n" if kind[1] in "ct" else LINES.decode()).encode(encoding))
    assert f"is UTF-{encoding[4:6]} text" in message_of(path) and "save it as UTF-8" in message_of(path)


@pytest.mark.parametrize("delimiter", ";\t|")
@pytest.mark.parametrize("quote", ["", '"'])
def test_csv_with_other_separators(tmp_path, delimiter, quote):
    lines = [delimiter.join(f"{quote}{cell}{quote}" for cell in cells) for cells in (ROWS[0], ["1,1", "2", "3"])]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines) + "\n")
    message = message_of(path)
    assert message.startswith(f"{path}:1: ") and f"separated by {delimiter!r}" in message
    assert ("name it a.tsv" if delimiter == "\t" else "save it with commas") in message


def test_tsv_with_commas_and_csv_of_one_column(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("prompt,chosen\n1,2\n")
    assert "separated by ','" in message_of(path) and "name it a.csv" in message_of(path)
    path = tmp_path / "a.csv"
    path.write_text('"prompt"\n"a;b"\n')
    assert list(open_rows(path)) == [{"prompt": "a;b"}]
    path.write_text('prompt,"a;b"\n1,2\n')
    assert list(open_rows(path)) == [{"prompt": "1", "a;b": "2"}]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("compression", ["", ".gz"])
def test_rows_under_a_key(tmp_path, indent, compression):
    value = {"version": {"data": [1]}, "note": "[{", "data": ROWS, "tags": ["a"], "empty": []}
    path = tmp_path / f"a.json{compression}"
    text = json.dumps(value, indent=indent).encode()
    path.write_bytes(gzip.compress(text) if compression else text)
    rows = open_rows(path)
    assert list(rows) == ROWS and rows.location(2) == f"{path} row 2 of 'data'"
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    store = build_token_store(path, "preference", tokenizer, tmp_path / "cache")
    (note,) = store.notes
    assert note.startswith("note: 3 rows are the list under the key 'data'") and str(path) in note
    assert build_token_store(path, "preference", tokenizer, tmp_path / "cache").notes == store.notes
    assert prompt_notes(read_prompts(path, tokenizer, 100)) == [note]


@pytest.mark.parametrize("indent", [None, 2])
def test_objects_that_hold_no_one_list(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"train": ROWS, "test": ROWS}, indent=indent))
    assert "holds several lists of objects (train, test)" in message_of(path)
    path.write_text(json.dumps({"{train}": ROWS, "{test}": ROWS}, indent=indent))
    assert "({train}, {test})" in message_of(path)
    # Rows of their own, whose messages are lists of objects too.
    conversation = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    for row in (conversation, ROWS[0]):
        path.write_text(json.dumps(row, indent=indent))
        if indent is None:
            assert list(open_rows(path)) == [row]
        else:
            assert "is one object over several lines; write it in one line, or in an array" in message_of(path)


def test_other_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps(row, indent=1) + "\n" for row in ROWS))
    assert "write one object per line" in message_of(path)
    path.write_text('{"data": [{"a": 1}, {"b"')
    assert message_of(path).startswith(f"{path}:1: not valid JSON")
    path.write_text('{"data": [{"prompt": 1}, {"b" 2}]}')
    assert message_of(path).startswith(f"{path} row 1 of 'data': not valid JSON")
    path.write_text('{"data": [{"prompt": 1}, 3]}')
    assert message_of(path).startswith(f"{path} row 1 of 'data': a row must be a JSON object")
