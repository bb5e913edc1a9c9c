"""Rows of every kind of file, and the words for what can be wrong with one."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import sys
import tracemalloc

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
    (tmp_path / "a.txt").write_text("a,b\n")
    (tmp_path / "folder").mkdir()
    assert "no such file" in message_of(lambda: open_rows(tmp_path / "none.jsonl"))
    assert "holds no rows" in message_of(lambda: open_rows(tmp_path / "empty.jsonl"))
    assert "'.txt'" in message_of(lambda: open_rows(tmp_path / "a.txt"))
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


@pytest.mark.parametrize("name, pack", [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_text(tmp_path, name, pack):
    plain = write_lines(tmp_path / "a.jsonl", ROWS).read_bytes()
    path = tmp_path / f"b.jsonl.{name}"
    path.write_bytes(pack(plain))
    rows = open_rows(path)
    assert list(rows) == ROWS and rows.location(3) == f"{path}:4"
    path.write_bytes(pack(plain)[:-20])
    assert message_of(lambda: open_rows(path)).startswith(f"{path}: cannot be ")
    path.write_bytes(plain)
    assert message_of(lambda: open_rows(path)).startswith(f"{path}: is not packed; take .{name} off")


@pytest.mark.parametrize("indent", [None, 2])
def test_json_array(tmp_path, indent):
    tricky = [*ROWS, {"text": 'a "quote\\" ], {', "nested": [[1, []], {"a": {}}], "\u4e2d": "]"}, {}]
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf \n" + json.dumps(tricky, indent=indent, ensure_ascii=False).encode() + b"\n")
    rows = open_rows(path)
    assert list(rows) == tricky and rows.location(5) == f"{path} row 5"


def test_json_arrays_that_are_none(tmp_path):
    path = tmp_path / "a.json"
    for text, words in (
        ("[]", "holds no rows"),
        (" [ \n ] ", "holds no rows"),
        ('[{"a": 1}, {"b": "', "is not closed"),
        ('[{"a": 1}, {"b": 2}', "is not closed"),
        ('[{"a": 1}] {"a": 2}', "goes on behind"),
    ):
        path.write_text(text)
        message = message_of(lambda: open_rows(path))
        assert message.startswith(f"{path}: ") and words in message
    path.write_text('[{"a": 1}, 7, {"b" 2}, {"c": 3}, ]')
    rows = open_rows(path)
    assert rows[0] == {"a": 1} and rows[3] == {"c": 3}
    for bad, words in ((1, "must be a JSON object"), (2, "not valid JSON"), (4, "not valid JSON")):
        message = message_of(lambda bad=bad: rows[bad])
        assert message.startswith(f"{path} row {bad}: ") and words in message


def write_csv(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


@pytest.mark.parametrize("name, delimiter", [("a.csv", ","), ("a.tsv", "\t")])
def test_csv(tmp_path, name, delimiter):
    """Cells are the text that they are: a number, a date, a word for nothing, several lines."""
    names = ["prompt", "chosen", "answer"]
    cells = [["NA", "042", "2024-01-01"], ['a, "b"\nc\n\nd', "null", ""], ["\u4e2d\t", "x" * 200_000, "nan"]]
    path = write_csv(tmp_path / name, [names, *cells], delimiter)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    rows = open_rows(path)
    expected = [dict(zip(names, [cell or None for cell in row], strict=True)) for row in cells]
    assert list(rows) == expected and rows[1] == expected[1]
    assert [rows.location(i) for i in range(3)] == [f"{path}:{line}" for line in (2, 3, 7)]


def test_csv_with_a_mark_before_a_quoted_name(tmp_path):
    """As pandas writes it for spreadsheets."""
    path = tmp_path / "pairs.csv"
    path.write_text('"prompt, short","chosen"\n"Hi","Ho"\n', encoding="utf-8-sig")
    assert list(open_rows(path)) == [{"prompt, short": "Hi", "chosen": "Ho"}]


def test_csv_with_lists(tmp_path):
    messages = [{"role": "user", "content": 'a "b"'}]
    names = ["prompt", "prompt_ids", "chosen_steps", "rejected"]
    row = [json.dumps(messages), "[1, 2]", "[0]", "[1] is a footnote"]
    rows = open_rows(
        write_csv(tmp_path / "a.csv", [names, row, [repr(messages), *row[1:]], [row[0], "[1 2]", *row[2:]]])
    )
    assert rows[0] == {"prompt": messages, "prompt_ids": [1, 2], "chosen_steps": [0], "rejected": row[3]}
    for bad, name in ((1, "prompt"), (2, "prompt_ids")):
        words = f"{rows.location(bad)}: {name}: is a list that is not JSON"
        assert message_of(lambda bad=bad: rows[bad]).startswith(words)


def test_bad_csv_rows_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b'a,b\n1,2\n\n1\n1,2,3\n"1"x,2\n\xff,2\n3,4\n')
    rows = open_rows(path)
    assert (rows[0], rows[5]) == ({"a": "1", "b": "2"}, {"a": "3", "b": "4"})
    problems = {1: (4, "1 cells under 2"), 2: (5, "3 cells under 2"), 3: (6, "not valid CSV"), 4: (7, "not UTF-8")}
    for bad, (line, words) in problems.items():
        message = message_of(lambda bad=bad: rows[bad])
        assert message.startswith(f"{path}:{line}: ") and words in message
    for text, line, words in (('a,b\n1,2\n"3,4\n5,6\n', 3, "never closes"), ("a,b,a\n1,2,3\n", 1, "two columns")):
        path.write_text(text)
        message = message_of(lambda: open_rows(path))
        assert message.startswith(f"{path}:{line}: ") and words in message


def test_a_folder_of_lines_keeps_little_in_memory(tmp_path):
    for number in range(3):
        write_lines(tmp_path / f"{number}.jsonl", [{"n": number, "text": "x" * 10_000}] * 300)
    tracemalloc.start()
    rows = open_rows(tmp_path)
    assert [row["n"] for row in rows] == [0] * 300 + [1] * 300 + [2] * 300
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000 and rows.location(601) == f"{tmp_path / '2.jsonl'}:2"


def test_a_parquet_row_that_cannot_be_decoded_is_named_alone(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    damaged = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    )
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"prompt": damaged}), path)
    rows = open_rows(path)
    assert rows[0] == {"prompt": "a"}
    assert message_of(lambda: rows[1]).startswith(f"{path} row 1: cannot be read")


TOOLS = [{"type": "function", "function": {"name": n, "parameters": {n: {"x": [1, n]}}}} for n in "fg"]
RICH = [
    {"prompt": "2024-01-01", "messages": [{"role": "user", "content": "x"}], "tools": TOOLS[:1], "n": 1},
    {"prompt": "b", "messages": [{"role": "assistant", "tool_calls": [{"a": {"b": "c"}}]}], "tools": TOOLS[1:], "n": 2},
]


@pytest.fixture
def rich():
    """A data set with JSON columns, messages of different keys, and a number."""
    datasets = pytest.importorskip("datasets")
    features = {"prompt": datasets.Value("string"), "messages": datasets.List(datasets.Json())}
    features |= {"tools": datasets.List(datasets.Json()), "n": datasets.Value("int64")}
    return datasets.Dataset.from_list(RICH, features=datasets.Features(features))


def test_json_columns_in_every_file_that_datasets_writes(tmp_path, rich):
    rich.to_parquet(str(tmp_path / "a.parquet"))
    rich.to_json(str(tmp_path / "a.jsonl"))
    rich.to_json(str(tmp_path / "a.jsonl.gz"), compression="gzip")
    rich.to_json(str(tmp_path / "a.json"), lines=False)
    rich.to_json(str(tmp_path / "b.json"), lines=False, indent=2)
    rich.save_to_disk(str(tmp_path / "set"))
    (arrow,) = (tmp_path / "set").glob("*.arrow")
    for name in ("a.parquet", "a.jsonl", "a.jsonl.gz", "a.json", "b.json", "set", arrow):
        rows = open_rows(tmp_path / name)
        assert list(rows) == RICH, name
        assert rows.location(1).startswith(str(tmp_path / name)), name


@pytest.mark.parametrize("look", [None, "torch", "numpy", "pandas", "arrow"])
@pytest.mark.parametrize("columns", [None, ["n"]])
def test_a_saved_data_set_is_read_whole_whatever_its_format(tmp_path, rich, look, columns):
    rich.with_format(look, columns=columns).save_to_disk(str(tmp_path / "set"))
    rows = open_rows(tmp_path / "set")
    assert list(rows) == RICH and rows[1] == RICH[1] and type(rows[0]["n"]) is int
    assert rows.location(1) == f"{tmp_path / 'set'} row 1"


def test_keys_that_arrow_adds_to_messages_are_taken_away(tmp_path):
    """Arrow gives the structs of a column all keys that any of them has."""
    datasets = pytest.importorskip("datasets")
    simple = [{"messages": row["messages"]} for row in RICH]
    datasets.Dataset.from_list(simple).to_parquet(str(tmp_path / "a.parquet"))
    assert list(open_rows(tmp_path / "a.parquet")) == simple


def test_a_feather_file(tmp_path):
    pyarrow, feather = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.feather")
    path = tmp_path / "a.arrow"
    feather.write_feather(pyarrow.Table.from_pylist(ROWS), str(path))
    assert list(open_rows(path)) == ROWS
    path.write_bytes(b"ARROW1 but not really")
    assert message_of(lambda: open_rows(path)).startswith(f"{path}: not a readable Arrow file")


def fake_data_set(path):
    path.mkdir()
    for name in ("dataset_info.json", "state.json"):
        (path / name).write_text("{}")
    return path


def test_a_damaged_saved_data_set(tmp_path):
    pytest.importorskip("datasets")
    folder = fake_data_set(tmp_path / "set")
    assert message_of(lambda: open_rows(folder)).startswith(f"{folder}: not a readable Hugging Face data set")


def test_missing_libraries_say_what_to_install(tmp_path, monkeypatch):
    for name in ("datasets", "pyarrow", "pyarrow.parquet", "pyarrow.ipc"):
        monkeypatch.setitem(sys.modules, name, None)
    folder = fake_data_set(tmp_path / "set")
    (tmp_path / "a.parquet").write_text("")
    (tmp_path / "a.arrow").write_text("")
    assert "pip install datasets" in message_of(lambda: open_rows(folder))
    assert "pip install pyarrow" in message_of(lambda: open_rows(tmp_path / "a.parquet"))
    assert "pip install pyarrow" in message_of(lambda: open_rows(tmp_path / "a.arrow"))
    assert list(open_rows(write_csv(tmp_path / "a.csv", [["a"], ["b"]]))) == [{"a": "b"}]  # needs neither
