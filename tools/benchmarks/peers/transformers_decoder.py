"""The same block decoder in plain transformers, as its users write it: one prompt at a time, a key/value cache.

A fair peer: the head runs on the rows that are read only, the cache is cropped and never copied, and a block's first
token is read from the clean pass that fills the cache. In a model of prediction shift 0 that pass predicts nothing, and
runs no head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prompt: Sequence[int],
    *,
    block_size: int,
    small_block_size: int,
    threshold: float,
    max_new_tokens: int,
    mask_id: int,
    end_id: int,
    shift: int = 1,
    temperature: float = 0.0,
) -> list[int]:
    """The response to one prompt, its end token included if it has one. ``shift``: the prediction of position p is read
    from the row of p - shift. ``temperature`` 0 is greedy; above it tokens are drawn from torch's global state."""
    cache, limit = DynamicCache(), len(prompt) + max_new_tokens
    tokens = torch.tensor(list(prompt))
    clean = len(prompt) // block_size * block_size
    if clean:  # block-causal prefill
        block = torch.arange(clean) // block_size
        mask = torch.zeros(clean, clean).masked_fill(block[:, None] < block[None, :], -torch.inf)
        hidden = _hidden(model, tokens[:clean], 0, cache, mask)
        if shift and clean == len(prompt):
            tokens = torch.cat([tokens, _proposed(model, hidden[-1:], mask_id, temperature)[0]])
    while True:
        start = cache.get_seq_length()
        stop = min(start + block_size, limit)
        known = len(tokens) - start
        block = torch.full((block_size,), mask_id)
        block[:known] = tokens[start:]
        masked = torch.zeros(block_size, dtype=torch.bool)
        masked[known : stop - start] = True
        mask = torch.zeros(block_size, start + block_size)
        for first in range(0, block_size, small_block_size):
            while True:
                asked = first + masked[first : first + small_block_size].nonzero().squeeze(1)
                if not len(asked):
                    break
                hidden = _hidden(model, block, start, cache, mask)
                cache.crop(-block_size)
                token, confidence = _proposed(model, hidden[asked - shift], mask_id, temperature)
                accepted = confidence > threshold
                accepted[confidence.argmax()] = True
                block[asked[accepted]] = token[accepted]
                masked[asked[accepted]] = False
                ends = (~masked & (block == end_id)).nonzero()
                if len(ends):
                    end = max(int(ends[0]), known)
                    masked[end + 1 :] = False
                    block[end + 1 :] = mask_id
        tokens = torch.cat([tokens[:start], block])
        written = tokens[len(prompt) : stop].tolist()
        if end_id in written:
            return written[: written.index(end_id) + 1]
        if stop == limit:
            return written
        hidden = _hidden(model, block, start, cache, mask)
        if shift:
            tokens = torch.cat([tokens, _proposed(model, hidden[-1:], mask_id, temperature)[0]])
        if tokens[-1] == end_id:
            return tokens[len(prompt) :].tolist()


def _hidden(model: PreTrainedModel, tokens: Tensor, start: int, cache: DynamicCache, mask: Tensor) -> Tensor:
    position = torch.arange(start, start + len(tokens))
    output = model.model(
        input_ids=tokens[None], position_ids=position[None], attention_mask=mask[None, None], past_key_values=cache
    )
    return output.last_hidden_state[0]


def _proposed(model: PreTrainedModel, hidden: Tensor, mask_id: int, temperature: float) -> tuple[Tensor, Tensor]:
    """Tokens and their confidence of the rows ``[n, h]``: ``[n]`` each."""
    logits = model.lm_head(hidden).float()
    allowed = torch.softmax(logits / temperature if temperature else logits, -1)
    allowed[:, mask_id] = 0
    if not temperature:
        confidence, token = allowed.max(-1)
        return token, confidence
    token = torch.multinomial(allowed, 1)
    return token.squeeze(1), allowed.gather(1, token).squeeze(1)
