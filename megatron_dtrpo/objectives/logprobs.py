"""Log-probabilities of target tokens from logits that are sharded over the vocabulary."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, tokens: int | None, group) -> Tensor:
        sharded = group is not None and group.size() > 1
        shard = logits.shape[-1]
        tokens = shard if tokens is None else tokens
        local = target - (group.rank() * shard if sharded else 0)
        owned = (local >= 0) & (local < tokens)
        local = local.masked_fill(~owned, 0)

        wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        peak = wide[:, :tokens].amax(-1) if tokens else wide.new_full(wide.shape[:1], -torch.inf)
        if sharded:
            dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
        probabilities = (wide - peak.unsqueeze(-1)).exp_()
        probabilities[:, tokens:].zero_()
        # Normaliser and target logit travel in one message.
        parts = torch.stack(
            [probabilities.sum(-1), (wide.gather(-1, local.unsqueeze(-1)).squeeze(-1) - peak).masked_fill(~owned, 0)]
        )
        if sharded:
            dist.all_reduce(parts, group=group)
        normaliser, target_logit = parts
        probabilities.div_(normaliser.unsqueeze(-1))
        log_probs = target_logit - normaliser.log()
        ctx.save_for_backward(probabilities.to(logits.dtype), log_probs, local, owned)
        return log_probs

    @staticmethod
    def backward(ctx, grad: Tensor):
        probabilities, log_probs, local, owned = ctx.saved_tensors
        # d log p(target) / d logit = 1[target] - softmax
        grad_logits = probabilities * -grad.to(probabilities.dtype).unsqueeze(-1)
        # The target's entry comes from its log-probability: bf16 rounds a p above 0.998 to 1, and 1 - p would be lost.
        place = local.unsqueeze(-1)
        hit = (grad * -torch.expm1(log_probs)).to(grad_logits.dtype).unsqueeze(-1)
        grad_logits.scatter_(-1, place, torch.where(owned.unsqueeze(-1), hit, grad_logits.gather(-1, place)))
        return grad_logits, None, None, None


def vocab_parallel_log_probs(logits: Tensor, target: Tensor, tokens: int | None = None, group=None) -> Tensor:
    """``log softmax(logits)[target]`` in fp32 (fp64 for fp64 logits).

    Args:
        logits: ``[N, V / ranks]``, this rank's contiguous part of the vocabulary.
        target: int64 ``[N]``, global token ids.
        tokens: how many of this rank's columns are tokens, maybe none. The others, which pad the vocabulary at its end,
            have no probability and no gradient. ``None``: all of them are.
        group: tensor-parallel process group; ``None`` for unsharded logits.

    Returns:
        ``[N]``, the same on every rank. Each rank's gradient reaches its own logits.
    """
    return _VocabParallelLogProbs.apply(logits, target, tokens, group)
