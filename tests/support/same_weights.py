"""Our model with the weights of a model of transformers', to be compared with it."""

from __future__ import annotations

import torch

from megatron_dtrpo.config.settings import ModelSettings, ParallelSettings
from tools.benchmarks.peers.qwen2_weights import megatron_from_qwen2


def with_weights_of(peer, settings: ModelSettings, **parallel):
    """In float64, in one process. The conversion is not ours."""
    from megatron_dtrpo.model.initialization import global_parameter_names
    from megatron_dtrpo.model.provider import build_model

    model = build_model(settings, ParallelSettings(**parallel)).double()
    model.config.params_dtype = torch.float64
    config = peer.config
    heads, groups, tied = config.num_attention_heads, config.num_key_value_heads, config.tie_word_embeddings
    theirs, ours = megatron_from_qwen2(peer.state_dict(), heads, groups, tied), global_parameter_names(model)
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(theirs[name])
    return model
