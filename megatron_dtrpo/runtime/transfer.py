"""Host tensors to the device without waiting for it.

A copy from ordinary host memory first waits for all the work that the device was given before. One from page-locked
memory is queued behind that work.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` in page-locked memory (itself if it is), where ``device`` is a GPU. May be called on any thread."""
    if device.type != "cuda":
        return tensor
    with torch.cuda.device(device):  # a new thread starts on the first GPU, and would open it for every process
        return tensor.pin_memory()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a host ``tensor`` on ``device`` (itself where that is the host), in the order of the current stream."""
    return pinned(tensor, device).to(device, non_blocking=True)


def send_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of small host tensors, int64 and float64 of any shapes, on ``device``, in one message for all, because
    a message costs as much whatever its size."""
    parts = to_device(torch.cat([t.reshape(-1).view(torch.int64) for t in tensors]), device)
    parts = parts.split([t.numel() for t in tensors])
    return [part.view(t.dtype).view(t.shape) for part, t in zip(parts, tensors, strict=True)]
