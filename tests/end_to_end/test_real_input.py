"""Real preference pairs, the real tokenizer, and the layout that a small cluster would use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch import train, write_lines

pytestmark = [pytest.mark.end_to_end, pytest.mark.distributed, pytest.mark.slow]

PAIRS = 32
SETTINGS = {
    "num_layers": 4,
    "hidden_size": 64,
    "ffn_hidden_size": 176,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "block_size": 8,
    "steps_per_block": 2,  # every other token is read: at 8 the noise of one draw hides the progress of 12 steps
    "tokenizer_type": "HuggingFaceTokenizer",
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "seq_length": 2048,
    "micro_batch_size": 16,
    "global_batch_size": PAIRS,
    "train_iters": 12,
    "lr": 4e-3,
}


def short_pairs(source: Path, count: int) -> list[dict]:
    """The first ``count`` pairs of different prompts with fewer than 450 letters in all."""
    chosen: dict[str, dict] = {}
    with source.open(encoding="utf-8") as lines:
        for pair in map(json.loads, lines):
            if sum(map(len, pair.values())) < 450:
                chosen.setdefault(pair["prompt"], pair)
            if len(chosen) == count:
                break
    return list(chosen.values())


def test_overfits_32_real_pairs(shared_dir, tmp_path):
    data = write_lines(tmp_path / "pairs.jsonl", short_pairs(shared_dir / "data" / "gsm8k_preferences.jsonl", PAIRS))
    tokenizer = shared_dir / "data" / "fast_dllm_v2_7b"
    settings = {**SETTINGS, "data_path": data, "tokenizer_model": tokenizer, "save": tmp_path / "run"}
    rows = train(settings, processes=4, timeout=400)
    assert 0.69314 < rows[0]["loss"] < 0.69316
    assert rows[0]["rewards/accuracies"] == 0.5  # a tie counts half
    # Every step draws new noise, so the last two are two independent measurements.
    assert [row["rewards/accuracies"] for row in rows[-2:]] == [1.0, 1.0], rows
    assert rows[-1]["loss"] < 0.05
