"""Lets megatron-core run on CPU and gloo. Does nothing where CUDA is available.

This is what is needed; `speed` is what is wanted besides.

megatron-core 0.16 names CUDA in places that have nothing to do with computing on it: device literals, streams, the
random-number tracker, and type names in the optimizer. Each is pointed at its CPU equivalent here, once, so that no
other module needs to know on what it runs.
"""

from __future__ import annotations

import functools

import megatron.core.optimizer as optimizer
import megatron.core.optimizer.distrib_optimizer as distrib_optimizer
import torch
from megatron.core import utils
from megatron.core.optimizer import clip_grads
from megatron.core.tensor_parallel import random
from torch.utils import _device

from megatron_dtrpo.cpu import speed
from megatron_dtrpo.cpu.adam import CpuAdam

# Functions that megatron-core calls with device="cuda" or device=torch.cuda.current_device().
_FACTORIES = (
    "tensor",
    "as_tensor",
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "rand",
    "randn",
    "empty_like",
    "zeros_like",
)
_enabled = False


def is_cpu() -> bool:
    return not torch.cuda.is_available()


def enable() -> None:
    """Points megatron-core at the CPU; before anything of megatron-core is built, and whatever is imported by then.
    Idempotent."""
    global _enabled
    if _enabled or not is_cpu():
        return
    _enabled = True
    _redirect_devices()
    _replace_streams()
    _redirect_random_state()
    _rename_types()
    _replace_adam()
    _replace_fused_functions()
    if speed.is_on():
        speed.replace_kernels()


def _on_cpu(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

    return wrapper


def _redirect_devices() -> None:
    # ``with torch.device(...)`` knows the functions that create tensors by identity, from a list made at first use: it
    # is made here, so that it holds torch's own and not our wrappers, which call them.
    _device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.set_device = lambda device: None
    torch.cuda.synchronize = lambda device=None: None


class _Stream:
    """Work on a CPU is already in order."""

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        return None

    def wait_stream(self, stream):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        pass

    def synchronize(self):
        pass


def _replace_streams() -> None:
    torch.cuda.Stream = _Stream
    for name in ("stream", "current_stream", "default_stream"):
        setattr(torch.cuda, name, _Stream)
    torch.cuda.nvtx.range_push = lambda message: None
    torch.cuda.nvtx.range_pop = lambda: None


def _redirect_random_state() -> None:
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _rename_types() -> None:
    """The optimizer and gradient clipping compare ``tensor.type()`` with names like ``torch.cuda.FloatTensor``."""
    original = torch.Tensor.type

    @functools.wraps(original)
    def type_(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    torch.Tensor.type = type_


def _replace_adam() -> None:
    """Transformer Engine's and Apex's Adam want a GPU. Without them megatron-core falls back to torch's AdamW, whose
    per-parameter ``step`` its distributed optimizer cannot reload; ours keeps ``step`` in the parameter group, as the
    fused Adams do."""
    optimizer.Adam = distrib_optimizer.Adam = CpuAdam
    optimizer.USING_PYTORCH_OPTIMIZER = distrib_optimizer.USING_TE_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _replace_fused_functions() -> None:
    """Clipping goes through Transformer Engine or Apex where they are installed, also for tensors of a CPU."""
    for module in (clip_grads, optimizer.optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    if hasattr(clip_grads, "multi_tensor_scale_tensor_impl"):  # from megatron-core 0.17 on
        clip_grads.multi_tensor_scale_tensor_impl = None
