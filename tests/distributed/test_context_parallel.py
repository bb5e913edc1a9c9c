"""Context parallelism changes where a packed sequence is computed and not one number of what comes out.

The attention across processes is compared with a dense softmax; whole runs with the same run on one process, as
`test_invariance.py` does for the other layouts.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.test_invariance import ELBO, PP2, PREFERENCE, RECOMPUTE, SELECTIVE, SFT, SHARDED, TP2, Layout
from tests.support import oracles
from tests.support.launch import disagreements, layout_metrics, uneven_pairs
from tests.unit.test_attention import oracle_mask, random_qkv, random_sequence
from tests.unit.test_sharding import assigned

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

CP2 = {"context_parallel_size": 2}
OVERLAPPED = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
ANCHOR, BF16 = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}, {"bf16": True}

LAYOUTS = {
    "one process": Layout(1, same_as=None),
    "CP2": Layout(2, CP2),
    "CP2, some ranks without a target": Layout(2, {**CP2, "micro_batch_size": 1, "seq_length": 1024}),
    "CP4": Layout(4, {"context_parallel_size": 4, "seq_length": 1280}),
    "CP2 x TP2 SP": Layout(4, {**CP2, **TP2, "sequence_parallel": True}),
    "CP2 x PP2, full recompute": Layout(4, {**CP2, **PP2, **RECOMPUTE}),
    "CP2 x DP2, overlapped": Layout(4, {**CP2, **OVERLAPPED}),
    "elbo and anchor": Layout(1, {**ELBO, **ANCHOR}, None),
    "elbo and anchor, CP2": Layout(2, {**ELBO, **ANCHOR, **CP2, **SELECTIVE}, "elbo and anchor"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("context_parallel")
    uneven_pairs(folder / "pairs.jsonl", 20)
    return folder


@pytest.fixture(scope="module")
def metrics_of(folder, server):
    return layout_metrics(server.train, folder, LAYOUTS, **PREFERENCE, overlong="error")


@pytest.mark.parametrize("name", [name for name, layout in LAYOUTS.items() if layout.same_as])
def test_metrics_do_not_depend_on_context_parallelism(metrics_of, name):
    assert disagreements(metrics_of(name), metrics_of(LAYOUTS[name].same_as)) == []


def test_the_runs_trained(metrics_of):
    rows = metrics_of("one process")
    assert all(abs(row["rewards/margins"]) > 1e-3 for row in rows[1:])
    assert disagreements(rows, metrics_of("elbo and anchor"))


def test_sft_counts_its_tokens_once(folder, server):
    data = folder / "sft.jsonl"
    data.write_text((folder / "pairs.jsonl").read_text().replace('"chosen"', '"completion"'))
    alone = server.train({**SFT, "data_path": data, "save": folder / "sft"})
    assert disagreements(server.train({**SFT, **CP2, "data_path": data, "save": folder / "sft_cp2"}, 2), alone) == []


def test_bf16_is_close(folder, server):
    files = {"data_path": folder / "pairs.jsonl"}
    alone = server.train({**PREFERENCE, **BF16, **files, "save": folder / "bf16"})
    rows = server.train({**PREFERENCE, **BF16, **CP2, **files, "save": folder / "bf16_cp2"}, 2)
    for key in ("loss", "logps/chosen", "grad_norm"):
        assert [row[key] for row in rows] == pytest.approx([row[key] for row in alone], rel=0.02)


def test_attention_across_processes_equals_the_dense_softmax(server, tmp_path):
    sequence, rows = assigned(random_sequence(2, padding=1), 2)
    ours = [t.detach() for t in random_qkv(len(sequence), 4, 2)]
    theirs = random_qkv(len(sequence), 4, 2)
    upstream = torch.randn(len(sequence), 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    case = {"rows": rows, "coordinates": sequence.coordinates(), "block_size": sequence.block_size, "qkv": ours}
    torch.save({**case, "upstream": upstream}, tmp_path / "case.pt")
    server.call("tests.distributed.context_worker", tmp_path / "case.pt", tmp_path / "result.pt", processes=2)
    result = torch.load(tmp_path / "result.pt")

    expected = oracles.dense_attention(*theirs, oracle_mask(sequence), 0.3)
    torch.testing.assert_close(result["out"], expected.detach(), rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(expected, theirs, upstream)
    for mine, right in zip(result["gradients"], gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=1e-11)
    assert result["total"].tolist() == [3.0] * 3  # 1 and 2
    assert result["gradient_of_parts"].tolist() == [1.0, 2.0, 3.0]  # once, whatever the number of ranks
