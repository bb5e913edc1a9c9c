"""megatron-core on a CPU: what is redirected, and what must stay as it was. Each test is a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

CASES = {
    "cuda literals mean the CPU": """
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.tensor([1], device=torch.cuda.current_device()).device.type == "cpu"
assert torch.ones(1).cuda().device.type == "cpu"
""",
    "device contexts still work": """
with torch.device("meta"):
    assert torch.empty(2).is_meta and torch.arange(3).is_meta and torch.nn.Linear(2, 2).weight.is_meta
""",
    "other devices are left alone": """
assert torch.zeros(2, device="meta").is_meta
assert torch.zeros(2).type() == "torch.cuda.FloatTensor" and torch.zeros(2).type(torch.int32).dtype == torch.int32
""",
    "enabling twice is enabling once": """
from megatron_dtrpo.cpu import shim as cpu
zeros = torch.zeros
cpu.enable()
assert torch.zeros is zeros
""",
    "Adam takes the steps of torch's AdamW": """
from megatron_dtrpo.cpu.adam import CpuAdam
torch.manual_seed(0)
start = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
mine, theirs = ([t.clone().requires_grad_() for t in start] for _ in range(2))
options = dict(lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3)
optimizers = CpuAdam(mine, adam_w_mode=True, **options), torch.optim.AdamW(theirs, **options)
for _ in range(5):
    gradients = [torch.randn_like(t) for t in start]
    for parameters, optimizer in zip((mine, theirs), optimizers):
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.clone()
        optimizer.step()
for a, b in zip(mine, theirs):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
""",
}


@pytest.mark.parametrize("name", CASES)
def test_cpu_runtime(name):
    script = "import torch\nfrom megatron_dtrpo.cpu import shim as cpu\ncpu.enable()\n" + CASES[name]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


GPU_ONLY = """
import torch
from megatron.core import optimizer
from megatron.core.optimizer import clip_grads, distrib_optimizer

def refuse(*args, **kwargs):
    raise RuntimeError("wants a GPU")

# What an import leaves where Transformer Engine is installed.
optimizer.Adam = distrib_optimizer.Adam = refuse
optimizer.USING_PYTORCH_OPTIMIZER = False
for module in (clip_grads, optimizer.optimizer):
    module.multi_tensor_applier = module.multi_tensor_scale_impl = refuse
clip_grads.l2_norm_impl = clip_grads.multi_tensor_scale_tensor_impl = refuse
from megatron_dtrpo.cpu import shim
shim.enable()
parameter = torch.nn.Parameter(torch.zeros(2))
parameter.grad = torch.tensor([3.0, 4.0])
parameter.main_grad = parameter.grad
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
norm = clip_grads.get_grad_norm_fp32([parameter.grad], grad_stats_parallel_group=torch.distributed.group.WORLD)
clip_grads.clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=norm)
optimizer.Adam([parameter], lr=0.1).step()
assert norm == 5 and torch.allclose(parameter.grad, torch.tensor([0.6, 0.8])), (norm, parameter.grad)
assert (parameter < 0).all()
"""


def test_a_cpu_does_without_what_transformer_engine_brings():
    """A machine without a GPU, or whose GPUs are hidden, may have it installed all the same."""
    done = subprocess.run([sys.executable, "-c", GPU_ONLY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
