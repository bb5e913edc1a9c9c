"""VRPO of a model with full attention in plain transformers: every view of every response a row, padded on the right.

A fair peer: all rows of a micro-batch are one batch under SDPA with a mask of its padding alone, and the head runs on
the rows that are read, where LLaDA's published code runs it on all.
Legend: r rows of a micro-batch (views of chosen, views of rejected, and so on), L tokens of the longest, K views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from megatron_dtrpo.diffusion.estimators import Noise
from tools.benchmarks.peers.pairs import Pair
from tools.benchmarks.peers.weights import Learner


class Batch(NamedTuple):
    """``noisy, clean``: int64 ``[r, L]``; ``weight``: float64 ``[r, L]``, 0 where nothing is read; ``mask``: additive
    ``[r, 1, 1, L]``."""

    noisy: Tensor
    clean: Tensor
    weight: Tensor
    mask: Tensor


class PaddedViews:
    """One full preference step per call of `step`: reference and policy on the same noise, gradient, clipping, Adam."""

    def __init__(
        self,
        learner: Learner,
        noise: Callable[[Pair], Sequence[Noise]],
        *,
        mask_id: int,
        beta: float,
        micro_batch_size: int,
    ):
        """``noise``: that of a pair's two responses, ``[K, 1, P + R]`` each."""
        self.learner, self.noise, self.mask_id, self.beta = learner, noise, mask_id, beta
        self.micro_batch_size = micro_batch_size
        self.tokens = 0  # through the policy in the last step

    def step(self, pairs: Sequence[Pair]) -> float:
        """The mean loss of ``pairs``, and one update."""
        self.learner.optimizer.zero_grad()
        self.tokens, total = 0, 0.0
        for first in range(0, len(pairs), self.micro_batch_size):
            some = pairs[first : first + self.micro_batch_size]
            batch = self._batch(some)
            self.tokens += batch.noisy.numel()
            with torch.no_grad():
                reference = _log_likelihoods(self.learner.reference, batch)
            gains = _log_likelihoods(self.learner.policy, batch) - reference
            chosen, rejected = gains.view(len(some), 2, -1).sum(2).unbind(1)  # over a response's views
            loss = -F.logsigmoid(self.beta * (chosen - rejected)).sum() / len(pairs)
            loss.backward()
            total += float(loss.detach())
        self.learner.update()
        return total

    def _batch(self, pairs: Sequence[Pair]) -> Batch:
        noisy, clean, weight = [], [], []
        for pair in pairs:
            for response, noise in zip(pair.responses, self.noise(pair), strict=True):
                whole = torch.cat([pair.prompt, response])
                noisy += [whole.masked_fill(masked, self.mask_id) for masked in noise.masked.flatten(1)]
                clean += [whole] * len(noise.masked)
                weight += [*noise.weight.flatten(1)]
        longest = max(map(len, clean))
        hidden = torch.stack([torch.arange(longest) >= len(row) for row in clean])
        mask = torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)[:, None, None]
        return Batch(*(pad_sequence(rows, batch_first=True) for rows in (noisy, clean, weight)), mask)


def _log_likelihoods(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """The weighted log-probabilities of every row, fp64 ``[r]``; a token is predicted by its own row."""
    hidden = model.model(input_ids=batch.noisy, attention_mask=batch.mask, use_cache=False).last_hidden_state
    row, place = batch.weight.nonzero(as_tuple=True)
    logits = model.lm_head(hidden[row, place])
    log_probs = -F.cross_entropy(logits, batch.clean[row, place], reduction="none")
    weighted = log_probs * batch.weight[row, place]
    return weighted.new_zeros(len(batch.noisy)).index_add(0, row, weighted)
