"""docs/data.md shows rows: those that it says are used are, and the others are refused in the words that it gives."""

from __future__ import annotations

import itertools
import json
import re

import pytest

from megatron_dtrpo.data.prompts import read_prompts
from megatron_dtrpo.data.token_store import build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError
from tests.conftest import REPOSITORY
from tests.support.chat_tokenizer import save_chat_tokenizer

KINDS = {"**Preferences**": "preference", "**SFT**": "sft", "**Prompts": "prompts", "**Refused**": "refused"}


def rows_of_the_page() -> list[tuple[str, str, str]]:
    """(what the row is for, the row, what the table says of it) of every line of a table that shows a row."""
    found, kind = [], ""
    for line in (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8").splitlines():
        kind = next((kind for start, kind in KINDS.items() if line.startswith(start)), kind)
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
        if line.startswith("| `{"):
            found.append((kind, cells[1], cells[2]))
    return found


def parsed(cell: str) -> dict:
    """The row in ``cell``: ``user`` stands for a message, ``...`` for something."""
    number = itertools.count()
    text = re.match(r"`(.*?)`", cell)[1].replace("[...]", "[1, 2]").replace(": ...", ': "2+2="')

    def message(match: re.Match) -> str:
        said = 0 if match[0] == "user" else next(number)
        return json.dumps({"role": match[0], "content": f"says {said}"})

    text = re.sub(r"(?<=[\[ ])(system|user|assistant)(?=[,\]])", message, text)
    row = json.loads(text)
    for name, field in row.items():
        if name.endswith("_ids") and field == [1, 2] and name != "prompt_ids":
            row[name] = [3 + len(name), 4]
    return row


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return build_tokenizer("HuggingFaceTokenizer", save_chat_tokenizer(tmp_path_factory.mktemp("tokenizer")))


PAGE = rows_of_the_page()


def test_the_page_has_rows_of_every_kind():
    counts = {kind: sum(row[0] == kind for row in PAGE) for kind in KINDS.values()}
    assert min(counts.values()) >= 4 and counts["refused"] >= 15, counts


@pytest.mark.parametrize("kind, cell, words", PAGE, ids=[f"{kind} {cell[:60]}" for kind, cell, _ in PAGE])
def test_a_row_of_the_page(tmp_path, tokenizer, kind, cell, words):
    path = tmp_path / "row.jsonl"
    path.write_text(json.dumps(parsed(cell)) + "\n")
    if kind == "prompts":
        assert len(read_prompts(path, tokenizer, 1000)) == 1
    elif kind == "refused":
        with pytest.raises(UserError) as caught:
            if "to decode" in cell:
                read_prompts(path, tokenizer, 1000)
            build_token_store(path, "sft" if "for SFT" in cell else "preference", tokenizer, tmp_path / "cache")
        assert str(caught.value).startswith(f"{path}:1: ") and words.strip("`") in str(caught.value)
    else:
        assert len(build_token_store(path, kind, tokenizer, tmp_path / "cache")) == 1
