"""Rows of every kind of file, and the words for what can be wrong with one."""

from __future__ import annotations

import json
import sys
import types

import pytest

from megatron_dtrpo.data.rows import open_rows
from megatron_dtrpo.errors import UserError

ROWS = [{"prompt": f"p{i} \u00e9\u4e2d", "n": i, "list": [{"role": "user", "content": "x"}]} for i in range(7)]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def message_of(call) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_jsonl_rows_in_any_order(tmp_path):
    rows = open_rows(write_lines(tmp_path / "a.jsonl", ROWS))
    assert len(rows) == len(ROWS)
    assert [rows[i] for i in (6, 0, 3, 3)] == [ROWS[i] for i in (6, 0, 3, 3)]
    assert list(rows) == ROWS


def test_jsonl_blank_lines_bom_and_windows_newlines(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"n": 0}\r\n\r\n   \n{"n": 1}\n\n{"n": 2}')  # no newline at the end
    rows = open_rows(path)
    assert [row["n"] for row in rows] == [0, 1, 2]
    assert [rows.location(i) for i in range(3)] == [f"{path}:1", f"{path}:4", f"{path}:6"]


def test_index_outside_is_an_index_error(tmp_path):
    rows = open_rows(write_lines(tmp_path / "a.jsonl", ROWS))
    for index in (-1, len(ROWS)):
        with pytest.raises(IndexError):
            rows[index]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": 1', "not valid JSON"),
        (b"[1, 2]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b'{"a": 0}\n\n' + line + b"\n")
    rows = open_rows(path)
    assert rows[0] == {"a": 0}
    message = message_of(lambda: rows[1])
    assert message.startswith(f"{path}:3: ") and words in message


def test_missing_empty_and_unknown_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n  \n")
    (tmp_path / "a.csv").write_text("a,b\n")
    (tmp_path / "folder").mkdir()
    assert "no such file" in message_of(lambda: open_rows(tmp_path / "none.jsonl"))
    assert "holds no rows" in message_of(lambda: open_rows(tmp_path / "empty.jsonl"))
    assert "'.csv'" in message_of(lambda: open_rows(tmp_path / "a.csv"))
    assert "neither" in message_of(lambda: open_rows(tmp_path / "folder"))


def write_parquet(path, rows, row_group_size):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


def test_parquet_rows_across_row_groups(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ROWS, row_group_size=3)
    rows = open_rows(path)
    assert list(rows) == ROWS
    assert [rows[i] for i in (6, 0, 2, 3)] == [ROWS[i] for i in (6, 0, 2, 3)]
    assert rows.location(4) == f"{path} row 4"


def test_parquet_group_longer_than_a_window(tmp_path):
    many = [{"n": i} for i in range(2500)]
    rows = open_rows(write_parquet(tmp_path / "a.parquet", many, row_group_size=2100))
    assert [row["n"] for row in rows] == list(range(2500))
    assert [rows[i]["n"] for i in (2099, 2100, 1023, 1024)] == [2099, 2100, 1023, 1024]


def test_parquet_folder_is_read_in_order_of_name(tmp_path):
    write_parquet(tmp_path / "b.parquet", ROWS[4:], row_group_size=2)
    write_parquet(tmp_path / "a.parquet", ROWS[:4], row_group_size=2)
    rows = open_rows(tmp_path)
    assert list(rows) == ROWS
    assert rows.location(3) == f"{tmp_path / 'a.parquet'} row 3"
    assert rows.location(5) == f"{tmp_path / 'b.parquet'} row 1"


def test_parquet_that_is_none(tmp_path):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    path.write_text("hello")
    assert message_of(lambda: open_rows(path)).startswith(f"{path}: not a readable Parquet file")


def test_saved_data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "set"))
    rows = open_rows(tmp_path / "set")
    assert list(rows) == ROWS
    assert rows.location(2) == f"{tmp_path / 'set'} row 2"


def fake_data_set(path):
    path.mkdir()
    for name in ("dataset_info.json", "state.json"):
        (path / name).write_text("{}")
    return path


def test_saved_data_set_is_handed_to_the_datasets_library(tmp_path, monkeypatch):
    folder = fake_data_set(tmp_path / "set")
    loaded = types.SimpleNamespace(load_from_disk=lambda path: ROWS if path == str(folder) else None)
    monkeypatch.setitem(sys.modules, "datasets", loaded)
    assert list(open_rows(folder)) == ROWS


def test_missing_libraries_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    folder = fake_data_set(tmp_path / "set")
    (tmp_path / "a.parquet").write_text("")
    assert "pip install datasets" in message_of(lambda: open_rows(folder))
    assert "pip install pyarrow" in message_of(lambda: open_rows(tmp_path / "a.parquet"))


def test_a_data_set_of_several_splits_names_them(tmp_path):
    (tmp_path / "dataset_dict.json").write_text("{}")
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
    assert "test, train" in message_of(lambda: open_rows(tmp_path))
