"""The packed layout in plain transformers: what megatron-core's share of our time is measured against.

One pair at a time under a dense mask made of the predicate, the head on target rows only. Everything that the layout
itself saves is saved here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2ForCausalLM

from megatron_dtrpo.diffusion.layout import PackedSequence, visible
from tools.benchmarks.peers.pairs import Pair
from tools.benchmarks.peers.weights import Learner


class PackedLayout:
    """One full preference step per call of `step`."""

    def __init__(self, learner: Learner, document: Callable[[Pair], PackedSequence], *, beta: float):
        self.learner, self.document, self.beta = learner, document, beta
        self.tokens = 0

    def step(self, pairs: Sequence[Pair]) -> float:
        """The mean loss of ``pairs``, and one update."""
        self.learner.optimizer.zero_grad()
        self.tokens, total = 0, 0.0
        for pair in pairs:
            sequence = self.document(pair)
            self.tokens += len(sequence)
            mask = torch.zeros(len(sequence), len(sequence)).masked_fill(~_sees(sequence), -torch.inf)[None, None]
            with torch.no_grad():
                reference = _log_likelihoods(self.learner.reference, sequence, mask)
            chosen, rejected = _log_likelihoods(self.learner.policy, sequence, mask) - reference
            loss = -F.logsigmoid(self.beta * (chosen - rejected)) / len(pairs)
            loss.backward()
            total += float(loss.detach())
        self.learner.update()
        return total


def _sees(sequence: PackedSequence) -> Tensor:
    coordinates = sequence.coordinates()
    return visible(coordinates.at((slice(None), None)), coordinates.at((None, slice(None))))


def _log_likelihoods(model: Qwen2ForCausalLM, sequence: PackedSequence, mask: Tensor) -> Tensor:
    hidden = model.model(
        input_ids=sequence.tokens[None], position_ids=sequence.position[None], attention_mask=mask, use_cache=False
    ).last_hidden_state[0]
    logits = model.lm_head(hidden[sequence.target_row])
    log_probs = -F.cross_entropy(logits, sequence.target_token, reduction="none")
    weighted = log_probs * sequence.target_weight
    return weighted.new_zeros(sequence.responses).index_add(0, sequence.target_response, weighted)
