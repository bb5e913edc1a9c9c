"""The CPU's linear layer against float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_dtrpo.cpu import linear as cpu_linear

CASES = {
    "by oneDNN": (torch.float32, 96, 64, 256, 1e-5),
    "small, by MKL": (torch.float32, 3, 4, 5, 1e-5),
    "float64": (torch.float64, 96, 64, 256, 1e-13),
    "no rows": (torch.float32, 0, 64, 256, 0.0),
}


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_linear(case: str, bias: bool, monkeypatch):
    monkeypatch.setattr(cpu_linear, "_INTEL", False)
    dtype, rows, inputs, outputs, tolerance = CASES[case]
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, 1, inputs), (outputs, inputs)] + [(outputs,)] * bias
    given = [torch.randn(s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for s in shapes]
    grad = torch.randn(rows, 1, outputs, dtype=torch.float64, generator=generator).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in given]
    expected = F.linear(*exact)
    ours = _linear(*given)
    found = [ours, *torch.autograd.grad(ours, given, grad)]
    for value, oracle in zip(found, [expected, *torch.autograd.grad(expected, exact, grad.double())], strict=True):
        assert value.dtype is dtype
        scale = float(oracle.detach().norm()) or 1.0
        assert float((value.double() - oracle).detach().norm()) <= tolerance * scale


@pytest.mark.parametrize("vendor, name", [("AuthenticAMD", "onednn"), ("GenuineIntel", "mkl")])
def test_the_processor_chooses_the_library(tmp_path, monkeypatch, vendor, name):
    about = tmp_path / "cpuinfo"
    about.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    monkeypatch.setattr(cpu_linear, "_INTEL", cpu_linear._is_intel(about))
    factors = torch.randn(96, 256), torch.randn(64, 256)
    assert cpu_linear._faster_by_onednn(*factors) == (name == "onednn" and torch.backends.mkldnn.is_available())
    assert not cpu_linear._is_intel(tmp_path / "absent")


def test_frozen_weight_keeps_no_input():
    input, weight = torch.randn(96, 1, 64, requires_grad=True), torch.randn(256, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = _linear(input, weight)
    assert kept == [weight.data_ptr()]
    grad = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, input, grad)[0], (grad @ weight), rtol=1e-4, atol=1e-4)


def _linear(input, weight, bias=None):
    return cpu_linear.linear(
        input,
        weight,
        bias,
        gradient_accumulation_fusion=False,
        allreduce_dgrad=False,
        sequence_parallel=False,
        tp_group=None,
    )
