"""FP8's state on this process: passes of the reference, passes in bf16, weights kept in FP8.

megatron-core enters Transformer Engine's FP8 region in every forward pass of a block whose configuration says so: a
pass in bf16 is one whose configuration does not. Delayed scaling carries state from pass to pass in the modules, and
only the policy's training passes may write it. Attributes of Transformer Engine's modules that are used here:
``fp8_meta`` with ``scaling_fwd.amax_history`` and ``fp8_checkpoint``, and ``_high_precision_init_val`` of a parameter
that is kept in FP8.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def reference_pass(chunks: Sequence[torch.nn.Module], in_fp8: bool) -> Iterator[None]:
    """A forward pass of the reference through the policy's modules. In evaluation mode: without a backward pass there
    is nothing to recompute, and Transformer Engine would keep the scales of every pass that it is to recompute, for a
    backward pass that never comes, and hand them to the policy's.

    Args:
        chunks: this rank's bare stages.
        in_fp8: compute as the policy does; else in bf16.
    """
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with _history_kept(chunks) if in_fp8 else without_fp8(chunks):
            yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


@contextmanager
def without_fp8(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, the stages compute in bf16, or what they compute in without FP8."""
    config: Any = chunks[0].config  # one object for all stages
    before, config.fp8 = config.fp8, None
    # A bf16 pass makes a module forget that it has scales to save; a checkpoint may be written before the next one.
    flags = [(meta, meta["fp8_checkpoint"]) for meta in _fp8_states(chunks) if "fp8_checkpoint" in meta]
    try:
        yield
    finally:
        config.fp8 = before
        for meta, flag in flags:
            meta["fp8_checkpoint"] = flag


@contextmanager
def _history_kept(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, a pass uses delayed scaling's scales, and the maxima that it writes are taken back. In place: Transformer
    Engine updates the tensors through references of its own."""
    before = {id(history): history.clone() for history in _histories(chunks)}
    try:
        yield
    finally:
        for history in _histories(chunks):
            if id(history) in before:
                history.copy_(before[id(history)])
            else:  # made by this pass
                history.zero_()


def _fp8_states(chunks: Sequence[torch.nn.Module]) -> list[dict]:
    states = (getattr(module, "fp8_meta", None) for chunk in chunks for module in chunk.modules())
    return [state for state in states if isinstance(state, dict)]


def _histories(chunks: Sequence[torch.nn.Module]) -> list[Tensor]:
    states = [meta["scaling_fwd"] for meta in _fp8_states(chunks) if "scaling_fwd" in meta]
    return [state.amax_history for state in states if hasattr(state, "amax_history")]


def keep_exact_value(parameter: Any, value: Tensor) -> None:
    """Tells a parameter that is kept in FP8 the ``value`` it was given, for the optimizer's main weights to start from.
    Transformer Engine remembers the one it was built with, which here is none."""
    if hasattr(parameter, "get_high_precision_init_val"):
        parameter._high_precision_init_val = value.detach().cpu()
