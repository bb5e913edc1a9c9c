"""A rank's part of the model: one pipeline stage, or under interleaving a list of virtual ones."""

from __future__ import annotations


def chunks_of(model) -> list:
    """One stage, or a list of virtual ones, as a list."""
    return model if isinstance(model, list) else [model]
