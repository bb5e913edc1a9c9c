"""Answers of several messages, with what the assistant reads between them: the same numbers under any layout."""

from __future__ import annotations

import random
from math import log

import pytest

from tests.support.chat_tokenizer import save_chat_tokenizer
from tests.support.launch import TINY_MODEL, ForkServer, disagreements, write_lines

pytestmark = pytest.mark.distributed


def message(role, content):
    return {"role": role, "content": content}


def exchange(rng: random.Random) -> list[dict]:
    """One to three messages of the assistant's, of any length, with replies between them."""
    spoken = [message("assistant", "a" * rng.randint(1, 30)) for _ in range(rng.randint(1, 3))]
    replies = [message("tool", "b" * rng.randint(1, 20)) for _ in spoken[1:]]
    return [each for pair in zip(spoken, replies, strict=False) for each in pair] + spoken[-1:]


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    folder, rng = tmp_path_factory.mktemp("turns"), random.Random(0)
    rows = [
        {"prompt": [message("user", "c" * rng.randint(1, 40))], "chosen": exchange(rng), "rejected": exchange(rng)}
        for _ in range(12)
    ]
    rows = [row for row in rows if row["chosen"] != row["rejected"]]
    return {
        **TINY_MODEL,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": save_chat_tokenizer(folder / "tokenizer"),
        "data_path": write_lines(folder / "pairs.jsonl", rows),
        "loss_type": ["sigmoid", "ipo"],  # ipo divides by how many tokens are learned
        "num_views": 2,
        "global_batch_size": 8,
        "micro_batch_size": 3,
        "train_iters": 3,
        "lr": 1e-3,
    }


def test_layouts_agree(settings, tmp_path):
    server = ForkServer(tmp_path / "server.log")
    try:
        alone = server.train({**settings, "save": tmp_path / "alone"})
        assert alone[0]["loss/sigmoid"] == pytest.approx(log(2), abs=1e-6)
        assert alone[2]["loss/sigmoid"] < alone[0]["loss/sigmoid"]
        for name, layout in (
            ("TP2", {"tensor_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 1}),
            ("CP2", {"context_parallel_size": 2}),
        ):
            other = server.train({**settings, **layout, "save": tmp_path / name}, 2)
            assert disagreements(other, alone) == []
    finally:
        server.close()
