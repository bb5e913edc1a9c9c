"""The speed on a CPU is one switch and changes numbers by rounding only; modules may be imported in any order."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from megatron_dtrpo.cpu.speed import SWITCH

# Log-probabilities of a packed pair and the gradients that they give a model, built after everything was imported.
PROGRAM = """
import json, os, sys
import megatron.core.models.gpt, megatron.core.optimizer
from megatron.core.transformer import mlp
import torch
from megatron_dtrpo.config.settings import ParallelSettings
from megatron_dtrpo.cpu import kernels
from megatron_dtrpo.model.attention import attention_width, plan_attention
from megatron_dtrpo.model.initialization import initialize_weights
from megatron_dtrpo.model.provider import build_model
from megatron_dtrpo.runtime import initialize
from tests.unit.test_step import MODEL, micro_batch

with initialize.process_groups(ParallelSettings(), 1):
    MODEL.hidden_size, MODEL.ffn_hidden_size = 128, 256
    model = build_model(MODEL, ParallelSettings())
    initialize_weights(model, 1)
    sequence = micro_batch("dtrpo", 2).sequence
    attention = plan_attention(sequence.coordinates(), MODEL.block_size, "sdpa", attention_width(model.config))
    target = sequence.target_row, sequence.target_token
    log_probs = model(sequence.tokens, sequence.position, attention, *target)
    log_probs.sum().backward()
    gradients = {name: p.grad.norm().item() for name, p in model.named_parameters()}
    fast = mlp.bias_swiglu_impl is kernels.bias_swiglu_impl, "THP_MEM_ALLOC_ENABLE" in os.environ
    print(json.dumps([fast, log_probs.tolist(), gradients]))
"""


def outcome(speed: str) -> tuple[list, torch.Tensor, dict]:
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"} | {SWITCH: speed}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    fast, log_probs, gradients = json.loads(done.stdout.splitlines()[-1])
    return fast, torch.tensor(log_probs), gradients


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU stands in for a GPU only where there is none")
def test_the_speed_is_a_switch_and_changes_numbers_by_rounding_only():
    (fast, *numbers), (slow, *expected) = outcome("1"), outcome("0")
    assert fast == [True, True] and slow == [False, False]
    torch.testing.assert_close(numbers[0], expected[0], rtol=1e-5, atol=1e-5)
    assert numbers[1].keys() == expected[1].keys()
    for name, norm in expected[1].items():
        assert norm > 0 and numbers[1][name] == pytest.approx(norm, rel=1e-4), name
