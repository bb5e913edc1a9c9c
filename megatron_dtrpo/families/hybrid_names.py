"""Names of parameters of megatron-core's HybridModel, as its GPTModel names them.

In a HybridModel every transformer layer is two layers, attention and then MLP, so that its layers 2n and 2n + 1 are
layer n of a GPTModel. Inside a layer all names are the same, and no name is in both halves. The final norm has another
name.
"""

from __future__ import annotations

import re

HALVES = 2
"""Layers of a HybridModel in one transformer layer."""

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def gpt_name(name: str) -> str:
    """``decoder.layers.5.mlp.linear_fc1.weight`` to ``decoder.layers.2.mlp.linear_fc1.weight``. ``name`` is one in the
    whole model: layers are numbered through all pipeline stages."""
    name = _LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) // HALVES}.", name)
    return re.sub(r"^decoder\.final_norm\.", "decoder.final_layernorm.", name)
