"""The frozen reference policy, live beside the policy.

It is the policy's own modules with the reference's tensors swapped in, where those differ or will differ: what is
frozen and equal is shared.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_dtrpo.errors import UserError
from megatron_dtrpo.model.initialization import global_parameter_names, shared_name
from megatron_dtrpo.model.lora import is_adapter


def select_trainable(chunks: Sequence[torch.nn.Module], patterns: Sequence[str] | None) -> set[str]:
    """Freezes every parameter that lies in no module that ``patterns`` name (``None``: train all). A pattern is one
    name or several with dots between, ``mlp`` or ``layers.0.mlp``, each of them whole or with shell wildcards.

    Returns:
        The patterns that matched something on this rank's stages.
    """
    if patterns is None:
        return set()
    matched = set()
    named = [(chunk, item) for chunk in chunks for item in global_parameter_names(chunk).items()]
    for chunk, (name, parameter) in named:
        name = shared_name(chunk, name)
        hits = {pattern for pattern in patterns if fnmatch.fnmatchcase(f".{name}.", f"*.{pattern}.*")}
        parameter.requires_grad_(bool(hits))
        matched |= hits
    return matched


def check_patterns(patterns: Sequence[str] | None, matched: set[str]) -> None:
    """Raises UserError for a pattern that matched no parameter on any stage."""
    for pattern in patterns or ():
        if pattern not in matched:
            raise UserError(
                f"trainable_modules: {pattern!r} names no module: give a whole name, mlp, linear_proj or linear_qkv "
                f"say, or wildcards: '*{pattern}*'"
            )


class ReferencePolicy:
    """The reference's values of those parameters of this rank's stages that it does not share with the policy. Adapters
    are the policy's alone: `Engine.as_reference` turns them off, and where nothing else is trained no value is kept."""

    def __init__(self, chunks: Sequence[torch.nn.Module], reference: Sequence[torch.nn.Module] | None = None):
        """``chunks``: the policy's stages, at their starting point. ``reference``: the same stages with the reference's
        values, whose tensors are kept and not copied; default: the starting point, whose trained tensors are copied."""
        policy = [p for chunk in chunks for name, p in chunk.named_parameters() if not is_adapter(name)]
        if reference is None:
            self.frozen = [(p, p.detach().clone()) for p in policy if p.requires_grad]
            return
        values = [parameter.detach() for chunk in reference for parameter in chunk.parameters()]
        pairs = zip(policy, values, strict=True)
        self.frozen = [(p, value) for p, value in pairs if p.requires_grad or not torch.equal(p, value)]

    @contextmanager
    def in_place_of_policy(self) -> Iterator[None]:
        """Inside, the model computes as the reference. For forward passes without gradient only."""
        policy = [parameter.data for parameter, _ in self.frozen]
        try:
            for parameter, value in self.frozen:
                parameter.data = value
            with torch.no_grad():
                yield
        finally:
            for (parameter, _), value in zip(self.frozen, policy, strict=True):
                parameter.data = value
