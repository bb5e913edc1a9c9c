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
from megatron_dtrpo.model.provider import build_chunks
from megatron_dtrpo.training import checkpoint


def starting_model(config: Config, device: torch.device) -> list[BlockDiffusionGPTModel]:
    """This rank's stages of what a run starts from, ``load`` or the seed, which also is its reference; collective."""
    chunks = [chunk.to(device) for chunk in build_chunks(config.model, config.parallel)]
    if config.run.load is None:
        for chunk in chunks:
            initialize_weights(chunk, config.optimizer.seed)
    else:
        checkpoint.load(config.run.load, checkpoint.require_latest(config.run.load), chunks)
    return chunks


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
        if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
            name = "embedding.word_embeddings.weight"  # the last stage's copy of a tied matrix
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
    """Starting values of the trainable parameters of this rank's stages."""

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        parameters = (p for chunk in chunks for p in chunk.parameters())
        self.frozen = [(p, p.detach().clone()) for p in parameters if p.requires_grad]

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
