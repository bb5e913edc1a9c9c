"""Which token a prediction proposes, and how sure it is: pure functions on logits.

Some tokens are forbidden, the mask and those that the tokenizer does not know: they are never proposed. They count in
the normaliser of every confidence, sampled or greedy, as they do in training: at temperature 1 and top_p 1 a confidence
is the probability that training knows. Rows that pad the vocabulary are no tokens: their logits are minus infinity.

Legend: N predictions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def propose(
    logits: Tensor, forbidden: Tensor, uniform: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Draws one token for each prediction (Fast-dLLM v2, ``sample_with_top_p``).

    The distribution is ``softmax(logits / temperature)`` over the allowed tokens, cut to its nucleus: the most probable
    ones up to and including the one with which their sum exceeds ``top_p``, renormalised.

    Args:
        logits: ``[N, V]``.
        forbidden: bool ``[V]``, tokens that must not be written.
        uniform: ``[N]`` in [0, 1): the randomness, from outside, so that it can be a function of the prompt.
        temperature: above 0; greedy proposals are `most_probable`'s.

    Returns:
        Tokens int64 ``[N]`` and the confidence ``[N]`` in each: its probability in the cut distribution times the share
        of the allowed tokens in ``softmax(logits / temperature)``.
    """
    tempered = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    allowed = tempered.masked_fill(forbidden, -torch.inf)
    share = (allowed.logsumexp(-1) - tempered.logsumexp(-1)).exp()
    probability, token = torch.softmax(allowed, -1).sort(dim=-1, descending=True, stable=True)
    before = probability.cumsum(-1) - probability
    kept = probability.masked_fill(before > top_p, 0.0)
    kept[:, 0] = probability[:, 0]
    cumulative = kept.cumsum(-1)
    total = cumulative[:, -1:]
    choice = (cumulative <= uniform.to(total.dtype).unsqueeze(1) * total).sum(-1, keepdim=True)
    # Rounding may carry the draw past the last token that was kept.
    choice = torch.minimum(choice, (kept > 0).sum(-1, keepdim=True) - 1)
    return token.gather(1, choice).squeeze(1), (kept.gather(1, choice) / total).squeeze(1) * share


def most_probable(logits: Tensor, forbidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The greedy proposal, as parts that combine over shards of the vocabulary.

    Args:
        logits: ``[N, V]``; forbidden: bool ``[V]``, tokens that must not be written.

    Returns:
        Token int64 ``[N]``, its logit ``[N]`` and ``logsumexp(logits)`` ``[N]``.
    """
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    best, token = wide.masked_fill(forbidden, -torch.inf).max(-1)
    return token, best, wide.logsumexp(-1)


def surest(confidence: Tensor, count: int) -> Tensor:
    """Which of one sequence's proposals are the ``count`` surest, the first ones among equals. ``[n] -> bool [n]``."""
    accepted = torch.zeros_like(confidence, dtype=torch.bool)
    accepted[confidence.argsort(descending=True, stable=True)[:count]] = True
    return accepted


def even_shares(count: int, steps: int) -> list[int]:
    """How many of ``count`` tokens each of ``steps`` steps writes: as many in each, and one more in the first ones
    (SDAR, LLaDA)."""
    base, more = divmod(count, steps)
    return [base + (step < more) for step in range(steps)]


def shares_of_time(count: int, steps: int) -> list[int]:
    """As `even_shares`, of Dream: time runs from 1 to 0.001 in even steps, and a step from t to s writes a share of
    1 - s / t of what is masked, rounded down; the last one writes the rest."""
    time = torch.linspace(1, 1e-3, steps + 1)
    shares: list[int] = []
    for step in range(steps - 1):
        shares.append(int((count - sum(shares)) * (1 - time[step + 1] / time[step])))
    return [*shares, count - sum(shares)]


def accept(confidence: Tensor, threshold: float) -> Tensor:
    """Which of one sequence's proposals are written: those surer than ``threshold``, and always the surest.
    ``[n] -> bool [n]``, n >= 1."""
    accepted = confidence > threshold
    accepted[confidence.argmax()] = True
    return accepted
