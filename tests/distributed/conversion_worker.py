"""One tensor-parallel rank that loads a checkpoint as training does: ``conversion_worker.py INPUT OUTPUT``.

Writes the logits of clean tokens under the block-causal mask and, where asked, tokens continued greedily (block size 1
is the causal mask).
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from megatron_dtrpo.config.settings import ParallelSettings
from megatron_dtrpo.diffusion.layout import Coordinates
from megatron_dtrpo.runtime import initialize


@torch.no_grad()
def logits(model, tokens: torch.Tensor, block_size: int) -> torch.Tensor:
    """``[S, V]``; S is a multiple of the block size."""
    from megatron_dtrpo.model.attention import attention_width, plan_attention

    position = torch.arange(len(tokens))
    same = torch.zeros(len(tokens), dtype=torch.long)
    coordinates = Coordinates(document=same, branch=same, view=same, block=position // block_size)
    attention = plan_attention(coordinates, block_size, "sdpa", width=attention_width(model.config))
    mine = model.logits(model(tokens, position, attention).squeeze(1))
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine.contiguous())
    return torch.cat(parts, -1)


def main(source: str, target: str) -> None:
    case = torch.load(source)
    parallel = ParallelSettings(tensor_model_parallel_size=int(os.environ.get("WORLD_SIZE", 1)))
    initialize.start(parallel, seed=1)
    from megatron_dtrpo.checkpoint import distributed as checkpoint
    from megatron_dtrpo.checkpoint import folder as checkpoint_folder
    from megatron_dtrpo.checkpoint import iterations
    from megatron_dtrpo.model.provider import build_model

    folder = case["folder"]
    settings = checkpoint_folder.load_model_config(folder)
    model = build_model(settings, parallel)
    checkpoint.load(folder, iterations.require_latest(folder), model)
    model.eval()
    tokens = case["tokens"]
    out = {"logits": logits(model, tokens, case["block_size"])[:, : settings.vocab_size]}
    for _ in range(case["greedy"]):
        best = logits(model, tokens, 1)[-1, : settings.vocab_size].argmax()
        tokens = torch.cat([tokens, best[None]])
    out["tokens"] = tokens
    if dist.get_rank() == 0:
        torch.save(out, target)
    initialize.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
