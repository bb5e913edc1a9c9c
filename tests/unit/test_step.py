"""What a step asks of the host: nothing that waits for the device, and no work that the prefetch thread can do."""

from __future__ import annotations

import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_dtrpo.config.estimators import EstimatorOptions
from megatron_dtrpo.config.settings import ModelSettings, ObjectiveSettings, ParallelSettings
from megatron_dtrpo.data.batches import Noising
from megatron_dtrpo.data.micro_batch import MicroBatch, Sample
from megatron_dtrpo.diffusion.layout import concatenate
from megatron_dtrpo.runtime import initialize

CPU = torch.device("cpu")
MODEL = ModelSettings(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=50,
    block_size=8,
)


class Waits(TorchDispatchMode):
    """Collects what in our code would wait for a GPU: numbers read from tensors, results of unknown size, and tensors
    made of Python numbers, which are copied from ordinary host memory."""

    KINDS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__
        by_mask = name.startswith("index") and any(
            torch.is_tensor(i) and i.dtype == torch.bool for a in args if isinstance(a, (list, tuple)) for i in a
        )
        if by_mask or name.split(".")[0] in self.KINDS:
            stack = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack() if "megatron" in f.filename]
            place = [line for line in stack if "cpu/shim.py" not in line][-1]
            if "megatron_dtrpo" in place:  # megatron-core makes a tensor that stays on the host
                self.found.append(f"{name} at {place}")
        return function(*args, **(kwargs or {}))


def micro_batch(estimator: str, responses: int) -> MicroBatch:
    noising = Noising(estimator, EstimatorOptions(), 1, "clean", MODEL.block_size, MODEL.vocab_size - 1, seed=0)
    words = torch.Generator().manual_seed(0)
    samples = [Sample(0, index) for index in range(3)]

    def text(length: int) -> torch.Tensor:
        return torch.randint(MODEL.vocab_size - 1, (length,), generator=words)

    documents = [noising.document(s, text(11), [text(9 + 5 * s.index) for _ in range(responses)]) for s in samples]
    return MicroBatch(concatenate(documents), samples, torch.tensor([9 + 5 * s.index for s in samples] * responses))


@pytest.mark.parametrize("objective, estimator, responses", [("preference", "dtrpo", 2), ("sft", "sft", 1)])
def test_no_micro_batch_waits_for_the_device(objective, estimator, responses):
    initialize.start(ParallelSettings(), seed=1)
    try:
        from megatron_dtrpo.config.objectives import OBJECTIVES
        from megatron_dtrpo.model.attention import attention_width
        from megatron_dtrpo.model.initialization import initialize_weights
        from megatron_dtrpo.model.provider import build_model
        from megatron_dtrpo.training.device_batch import DeviceBatch
        from megatron_dtrpo.training.passes import score, train_pass

        model = build_model(MODEL, ParallelSettings())
        initialize_weights(model, 1)
        model.config.finalize_model_grads_func = None
        batch = DeviceBatch(micro_batch(estimator, responses), CPU, "sdpa", attention_width(model.config))
        with Waits() as waits:
            batch.given = score(model, [batch])[0]
            (outcome,) = train_pass(model, [batch], OBJECTIVES[objective](ObjectiveSettings(objective=objective)))
        assert waits.found == []
        assert int(outcome.count) == (3 if objective == "preference" else batch.part.target_row.numel())
        assert model.decoder.layers[0].mlp.linear_fc1.weight.grad.abs().sum() > 0
    finally:
        initialize.stop()


def test_rows_are_assigned_before_the_step(monkeypatch):
    """Under context parallelism, on any thread; the step only copies."""
    initialize.enable_device()
    from megatron_dtrpo.runtime import simulated_rank
    from megatron_dtrpo.training import device_batch

    parallel = ParallelSettings(context_parallel_size=2)
    batch, expected = micro_batch("dtrpo", 2), []
    for rank in range(2):
        with simulated_rank.rank_of(parallel, rank, 2), ThreadPoolExecutor(1) as pool:
            expected.append(device_batch.DeviceBatch(batch, CPU, "sdpa", 32))
            host = pool.submit(device_batch.prepare, batch, CPU, "sdpa").result()
            assert host.tokens == len(batch.sequence) <= 2 * len(host.part)
            with monkeypatch.context() as patch:
                for name in ("assign_rows", "pad_to", "take_rows", "padded_length"):
                    patch.setattr(device_batch, name, None)
                sent: list[int] = []
                patch.setattr(device_batch, "to_device", lambda t, device, sent=sent: sent.append(t.numel()) or t)
                made = device_batch.DeviceBatch(host, CPU, "sdpa", 32)
            # This rank's rows and predictions, the coordinates of all keys, the lengths; the other rows stay behind.
            part = [value for value in vars(host.part).values() if torch.is_tensor(value)]
            assert sum(sent) == sum(map(torch.numel, (*part, *host.keys, batch.response_length)))
        targets = ("row", "token", "weight", "response", "block", "step")
        for field in ("tokens", "position", *(f"target_{name}" for name in targets)):
            assert torch.equal(getattr(made.part, field), getattr(expected[-1].part, field))
        assert made.attention.group.size() == 2
        assert len(made.attention.plan) == len(expected[-1].attention.plan)
    assert sum(each.part.target_row.numel() for each in expected) == batch.sequence.target_row.numel()
