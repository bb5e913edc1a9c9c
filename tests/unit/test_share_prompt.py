"""Responses laid out one by one and joined are the responses laid out together."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from megatron_dtrpo.diffusion.estimators import NoiseRequest, dtrpo, noise_generator
from megatron_dtrpo.diffusion.layout import Blocks, lay_out, share_prompt

BLOCK, MASK = 4, 99


@pytest.mark.parametrize("block_start", ["clean", "noisy"])
@pytest.mark.parametrize("prompt_length", [1, 4, 7, 8])
def test_joined_is_laid_out_together(prompt_length, block_start):
    prompt = torch.arange(prompt_length)
    responses = [torch.arange(50, 50 + length) for length in (3, 9, 1)]
    noise = []
    for branch, response in enumerate(responses):
        maskable = Blocks(prompt_length, len(response), BLOCK).maskable(block_start)
        noise.append(dtrpo(NoiseRequest(maskable, [noise_generator(0, 0, 0, branch, view) for view in (1, 2)])))
    known = {"block_size": BLOCK, "mask_id": MASK, "block_start": block_start}
    together = lay_out(prompt, responses, [n.masked for n in noise], [n.weight for n in noise], **known)
    alone = [lay_out(prompt, [r], [n.masked], [n.weight], **known) for r, n in zip(responses, noise, strict=True)]
    joined = share_prompt(alone)
    for field in fields(together):
        one, other = getattr(joined, field.name), getattr(together, field.name)
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name
