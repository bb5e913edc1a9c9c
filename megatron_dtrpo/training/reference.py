"""The frozen reference policy, live beside the policy.

It is the policy's own modules with the starting values of the trained tensors swapped in: whatever is frozen is
shared, nothing is built twice, and only trained tensors are copied.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from megatron_dtrpo.config import Config
from megatron_dtrpo.errors import UserError
from megatron_dtrpo.model.gpt import BlockDiffusionGPTModel
from megatron_dtrpo.model.initialization import global_parameter_names, initialize_weights
from megatron_dtrpo.model.provider import build_model
from megatron_dtrpo.training import checkpoint


def starting_model(config: Config, device: torch.device) -> BlockDiffusionGPTModel:
    """This rank's stage of what a run starts from, ``load`` or the seed, which also is its reference; collective."""
    model = build_model(config.model, config.parallel).to(device)
    if config.run.load is None:
        initialize_weights(model, config.optimizer.seed)
    else:
        checkpoint.load(config.run.load, checkpoint.require_latest(config.run.load), model)
    return model


def select_trainable(model: torch.nn.Module, patterns: Sequence[str] | None) -> set[str]:
    """Freezes every parameter whose name contains none of ``patterns`` (shell wildcards allowed; ``None``: train all).

    Returns:
        The patterns that matched something on this pipeline stage.
    """
    if patterns is None:
        return set()
    matched = set()
    for name, parameter in global_parameter_names(model).items():
        hits = {pattern for pattern in patterns if fnmatch.fnmatchcase(name, f"*{pattern}*")}
        parameter.requires_grad_(bool(hits))
        matched |= hits
    return matched


def check_patterns(patterns: Sequence[str] | None, matched: set[str]) -> None:
    """Raises UserError for a pattern that matched no parameter on any stage."""
    for pattern in patterns or ():
        if pattern not in matched:
            raise UserError(f"trainable_modules: {pattern!r} matches no parameter: try mlp, linear_proj or linear_qkv")


class ReferencePolicy:
    """Starting values of a model's trainable parameters."""

    def __init__(self, model: torch.nn.Module):
        self.frozen = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

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
