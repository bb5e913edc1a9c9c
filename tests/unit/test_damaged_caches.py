"""Damaged files of the caches beside a run: one line that names the folder and says what to do."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_dtrpo.data.token_store import TokenStore, build_token_store
from megatron_dtrpo.data.tokenizer import build_tokenizer
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.training.reference_cache import CacheWriter, ReferenceCache
from tests.support.launch import write_lines

DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "garbage": lambda file: file.write_bytes(random.Random(0).randbytes(501)),
    "a zip archive": lambda file: file.write_bytes(b"PK\x03\x04" + bytes(400)),
    "other JSON": lambda file: file.write_text("[1, 2]"),
    "an empty object": lambda file: file.write_text("{}"),
    "a pickle": lambda file: (
        np.save(file.with_suffix(""), np.array([{}], dtype=object), allow_pickle=True)
        if file.suffix == ".npy"
        else file.write_bytes(b"\x80\x04}.")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["scores.npy", "meta.json"])
def test_reference_cache(tmp_path, name, damage):
    writer = CacheWriter(tmp_path / "cache", {"seed": 1}, epochs=2, examples=3)
    writer.finish()
    ReferenceCache(tmp_path / "cache").require({"seed": 1})
    DAMAGES[damage](tmp_path / "cache" / name)
    with pytest.raises(UserError, match="megatron-dtrpo reference") as error:
        ReferenceCache(tmp_path / "cache")
    assert str(tmp_path / "cache") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["ends.int64", "meta.json", "tokens.int32"])
def test_token_store(tmp_path, name, damage):
    data = write_lines(
        tmp_path / "pairs.jsonl", [{"prompt": f"{n}+1=", "chosen": "2", "rejected": "3"} for n in range(9)]
    )
    store = build_token_store(data, "preference", build_tokenizer("ByteLevelTokenizer"), tmp_path / "cache")
    DAMAGES[damage](store.directory / name)
    with pytest.raises(UserError, match="delete the folder and run again") as error:
        TokenStore(store.directory)
    assert str(store.directory) in str(error.value)


def _overwrite(file: Path) -> None:
    """As many bytes as before, others."""
    file.write_bytes(random.Random(0).randbytes(file.stat().st_size))


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [_overwrite, _flip])
@pytest.mark.parametrize(
    "name", ["tokens.int32", "steps.int32", "ends.int64", "rows.int64", "discarded.int32", "turns.int64"]
)
def test_a_token_store_of_other_bytes(tmp_path, name, damage):
    """Every file of a store, with its length and without its content, is found when the store is found."""
    recorded = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5], "chosen_steps": [0, 1]}
    thrown = {"rejected_steps": [0], "chosen_discarded": [{"place": 2, "token": 9, "step": 0, "until": 1}]}
    tools = {"rejected_discarded": []}
    data = write_lines(tmp_path / "pairs.jsonl", [{**recorded, **thrown, **tools}] * 5)
    tokenizer = build_tokenizer("ByteLevelTokenizer")
    store = build_token_store(data, "preference", tokenizer, tmp_path / "cache")
    assert len(build_token_store(data, "preference", tokenizer, tmp_path / "cache")) == 5
    if not (store.directory / name).stat().st_size:
        (store.directory / name).write_bytes(bytes(24))
    else:
        damage(store.directory / name)
    with pytest.raises(UserError, match="delete the folder and run again") as error:
        build_token_store(data, "preference", tokenizer, tmp_path / "cache")
    assert str(error.value).startswith(f"{store.directory}") and "\n" not in str(error.value)
