"""A preference step in Fast-dLLM v2's own training layout, in plain transformers, as its users write it.

``[noisy | clean]`` over prompt and response for each response, padded to the longest of a micro-batch; the head runs on
the whole noisy half. A fair peer: SDPA under one mask for all rows, log-probabilities by cross-entropy.
Legend: r responses of a micro-batch (chosen, rejected, chosen, ...), L padded tokens of one half, K noisy views.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2ForCausalLM

from megatron_dtrpo.diffusion.estimators import Noise
from megatron_dtrpo.diffusion.layout import Blocks
from tools.benchmarks.peers.pairs import Pair
from tools.benchmarks.peers.weights import Learner

IGNORED = -100


class FastDllmLayout:
    """One full preference step per call of `step`: reference and policy on the same noise, gradient, clipping, Adam."""

    def __init__(
        self,
        learner: Learner,
        noise: Callable[[Pair], Sequence[Noise]],
        *,
        block_size: int,
        mask_id: int,
        beta: float,
        micro_batch_size: int,
    ):
        """``noise``: that of a pair's two responses, K views each. With ``K > 1`` views are run one after the other
        and pairs one at a time: together they would not fit."""
        self.learner, self.policy, self.reference = learner, learner.policy, learner.reference
        self.noise, self.block_size, self.mask_id, self.beta = noise, block_size, mask_id, beta
        self.micro_batch_size = micro_batch_size
        self.tokens = 0  # through the policy in the last step

    def step(self, pairs: Sequence[Pair]) -> float:
        """The mean loss of ``pairs``, and one update."""
        self.learner.optimizer.zero_grad()
        self.tokens, loss = 0, 0.0
        drawn = [self.noise(pair) for pair in pairs]
        if len(drawn[0][0].masked) > 1:
            loss = self._view_by_view(pairs, drawn)
        else:
            for first in range(0, len(pairs), self.micro_batch_size):
                some = slice(first, first + self.micro_batch_size)
                batch = self._batch(pairs[some], [n for noise in drawn[some] for n in noise], view=0)
                with torch.no_grad():
                    reference = self._log_likelihoods(self.reference, *batch)
                losses = self._loss(self._log_likelihoods(self.policy, *batch) - reference)
                (losses.sum() / len(pairs)).backward()
                loss += float(losses.detach().sum()) / len(pairs)
        self.learner.update()
        return loss

    def _view_by_view(self, pairs: Sequence[Pair], drawn: Sequence[Sequence[Noise]]) -> float:
        """The loss is a function of each pair's sum over views: a view's gradient of the margin is taken at once, and
        the loss's derivative multiplies their sum, so that one view's activations are alive at a time."""
        parameters, total, loss = list(self.policy.parameters()), None, 0.0
        for pair, noise in zip(pairs, drawn, strict=True):
            margin = torch.zeros((), dtype=torch.float64)
            for view in range(len(noise[0].masked)):
                if not any(n.weight[view].any() for n in noise):
                    continue  # a trajectory that has ended: nothing is predicted
                batch = self._batch([pair], noise, view)
                with torch.no_grad():
                    reference = self._log_likelihoods(self.reference, *batch)
                chosen, rejected = self._log_likelihoods(self.policy, *batch) - reference
                (chosen - rejected).backward()
                margin += (chosen - rejected).detach()
            slope = -self.beta * torch.sigmoid(-self.beta * margin) / len(pairs)
            loss += float(-F.logsigmoid(self.beta * margin)) / len(pairs)
            for p in parameters:
                p.grad.mul_(slope)
            if len(pairs) > 1:
                grads = [p.grad for p in parameters]
                total = grads if total is None else torch._foreach_add(total, grads)
                self.learner.optimizer.zero_grad()
        if total is not None:
            for p, grad in zip(parameters, total, strict=True):
                p.grad = grad
        return loss

    def _loss(self, gains: Tensor) -> Tensor:
        chosen, rejected = gains.view(-1, 2).unbind(1)
        return -F.logsigmoid(self.beta * (chosen - rejected))

    def _batch(self, pairs: Sequence[Pair], noise: Sequence[Noise], view: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[r, 2 L]``, and labels and weights of the noisy half's predictions, ``[r, L - 1]`` each."""
        B = self.block_size
        rows = [(pair.prompt, response) for pair in pairs for response in pair.responses]
        length = max(-(-(len(p) + len(r)) // B) * B for p, r in rows)
        clean = torch.full((len(rows), length), self.mask_id)
        labels = torch.full((len(rows), length), IGNORED)
        weight = torch.zeros(len(rows), length, dtype=torch.float64)
        noisy = clean.clone()
        for row, ((prompt, response), n) in enumerate(zip(rows, noise, strict=True)):
            blocks = Blocks(len(prompt), len(response), B)
            here = slice(blocks.start, blocks.start + blocks.count * B)
            clean[row, : len(prompt) + len(response)] = torch.cat([prompt, response])
            noisy[row] = clean[row]
            noisy[row, here] = clean[row, here].masked_fill(n.masked[view].flatten(), self.mask_id)
            weight[row, here] = n.weight[view].flatten()
            labels[row, here] = clean[row, here].masked_fill(weight[row, here] == 0, IGNORED)
        self.tokens += 2 * clean.numel()
        return torch.cat([noisy, clean], dim=1), labels[:, 1:], weight[:, 1:]

    def _log_likelihoods(self, model: Qwen2ForCausalLM, tokens: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
        """``L`` of every row, fp64 ``[r]``: the prediction of a token is read from the noisy row before it."""
        half = tokens.shape[1] // 2
        hidden = model.model(
            input_ids=tokens,
            position_ids=torch.arange(half).repeat(2)[None],
            attention_mask=_mask(half, self.block_size)[None, None],
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden[:, : half - 1])
        log_probs = -F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
        return (log_probs.view(labels.shape) * weight).sum(1)


def _mask(length: int, block_size: int) -> Tensor:
    """Fast-dLLM v2's rule for ``[noisy | clean]``, additive ``[2 L, 2 L]``: a noisy query sees its own noisy block and
    the clean blocks before it, a clean one the clean blocks up to its own."""
    block = torch.arange(length) // block_size
    same, before = block[:, None] == block[None, :], block[:, None] > block[None, :]
    nothing = torch.zeros_like(same)
    seen = torch.cat([torch.cat([same, before], 1), torch.cat([nothing, before | same], 1)])
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)


def every_step(maskable: Tensor, generator: torch.Generator, steps_per_block: int) -> Noise:
    """A whole random trajectory and not a sample of it: view t is the state before decoding step t of every block, and
    what that step unmasks has weight 1. ``maskable``: bool ``[n, B]``."""
    T = steps_per_block
    masked = torch.zeros(T, *maskable.shape, dtype=torch.bool)
    weight = torch.zeros(T, *maskable.shape, dtype=torch.float64)
    for block, can in enumerate(maskable):
        places = can.nonzero().squeeze(1)
        order = places[torch.randperm(len(places), generator=generator)]
        for t, group in enumerate(torch.tensor_split(order, min(T, len(order)) or 1)):
            masked[: t + 1, block, group] = True
            weight[t, block, group] = 1
    return Noise(masked, weight)
