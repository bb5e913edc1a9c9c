"""Which token a prediction proposes, how sure it is, and which proposals a step writes: pure functions.

Some tokens are forbidden, the mask and those that the tokenizer does not know: they are never proposed. They count in
the normaliser of every confidence, sampled or greedy, as they do in training: at temperature 1 and top_p 1 a confidence
is the probability that training knows. What sorts proposals may be another number: Dream's measures are of the whole
distribution. Rows that pad the vocabulary are no tokens: their logits are minus infinity.

Legend: N predictions, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

SORTED = (32, 1024, 16384)  # so many of a prediction's most probable tokens may be its nucleus: tried before all


class Measure(NamedTuple):
    """How sure a prediction is by its whole distribution, the larger the surer, from shards of the vocabulary.

    ``parts``: probabilities ``[N, v]`` of a shard's allowed tokens, among its own -> ``[k, N]``.
    ``joined``: the parts of n shards ``[n, k, N]`` and the probability ``[n, N]`` of each shard -> ``[N]``.
    """

    parts: Callable[[Tensor], Tensor]
    joined: Callable[[Tensor, Tensor], Tensor]

    def whole(self, probability: Tensor) -> Tensor:
        """Of the probabilities ``[N, V]`` of all allowed tokens: ``[N]``."""
        return self.joined(self.parts(probability)[None], probability.new_ones(1, len(probability)))


def _entropy_parts(probability: Tensor) -> Tensor:
    return torch.stack([-torch.special.entr(probability).sum(-1), probability.sum(-1)])


def _negative_entropy(parts: Tensor, share: Tensor) -> Tensor:
    """``sum p log p``, where a token of probability q in its shard has p = share x q."""
    return (share * parts[:, 0] + parts[:, 1] * torch.xlogy(share, share)).sum(0)


def _two_largest(probability: Tensor) -> Tensor:
    return probability.topk(2, -1).values.T


def _margin(parts: Tensor, share: Tensor) -> Tensor:
    first, second = (parts * share.unsqueeze(1)).flatten(0, 1).topk(2, 0).values
    return first - second


MEASURES = {"entropy": Measure(_entropy_parts, _negative_entropy), "margin": Measure(_two_largest, _margin)}


def propose(
    logits: Tensor,
    forbidden: Tensor,
    uniform: Tensor,
    temperature: float,
    top_p: float,
    measure: Measure | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token for each prediction (Fast-dLLM v2, ``sample_with_top_p``).

    The distribution is ``softmax(logits / temperature)`` over the allowed tokens, cut to its nucleus: the most probable
    ones up to and including the one with which their sum exceeds ``top_p``, renormalised.

    Args:
        logits: ``[N, V]``.
        forbidden: bool ``[V]``, tokens that must not be written.
        uniform: ``[N]`` in [0, 1): the randomness, from outside, so that it can be a function of the prompt.
        temperature: above 0; greedy proposals are `most_probable`'s.
        measure: what sorts the proposals; None: their confidence.

    Returns:
        Tokens int64 ``[N]``, the confidence ``[N]`` in each, which is its probability in the cut distribution times the
        share of the allowed tokens in ``softmax(logits / temperature)``, and what sorts them ``[N]``.
    """
    tempered = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    allowed = tempered.masked_fill(forbidden, -torch.inf)
    share = (allowed.logsumexp(-1) - tempered.logsumexp(-1)).exp()
    probability = _nucleus(torch.softmax(allowed, -1), top_p)
    token = _drawn_token(probability, uniform)
    confidence = probability.gather(1, token).squeeze(1) * share
    rank = measure.whole(probability * share.unsqueeze(1)) if measure else confidence
    return token.squeeze(1), confidence, rank


def _nucleus(probability: Tensor, top_p: float) -> Tensor:
    """``[N, V]``, cut and renormalised. Among equals at the cut the first ones stay."""
    if top_p >= 1:
        return probability
    least, count = _cut(probability, top_p)
    stays = probability >= least
    tied = (stays.sum(-1, keepdim=True) > count).squeeze(1).nonzero().squeeze(1)
    if len(tied):
        some, bound = probability[tied], least[tied]
        left = count[tied] - (some > bound).sum(-1, keepdim=True)
        stays[tied] &= (some > bound) | ((some == bound).cumsum(-1) <= left)
    kept = probability.masked_fill(~stays, 0.0)
    return kept / kept.sum(-1, keepdim=True)


def _cut(probability: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Of each nucleus the least probability and how many tokens it has, ``[N, 1]`` each.

    Mostly these are few: the most probable ones are sorted first, and more of them where they do not suffice. To sort a
    vocabulary of 150,000 takes a hundred times as long."""
    size = probability.shape[-1]
    least, count = probability[:, :1].clone(), torch.empty_like(probability[:, :1], dtype=torch.long)
    rows, some = torch.arange(len(probability), device=probability.device), probability
    for width in (*(width for width in SORTED if width < size), size):
        ordered = some.topk(width).values
        cumulative = ordered.cumsum(-1)
        inside = (cumulative - ordered <= top_p).sum(-1, keepdim=True).clamp(min=1)
        least[rows], count[rows] = ordered.gather(1, inside - 1), inside
        more = cumulative[:, -1] <= top_p
        rows, some = rows[more], some[more]
        if not len(rows):
            break
    return least, count


def _drawn_token(probability: Tensor, uniform: Tensor) -> Tensor:
    """The first token ``[N, 1]`` up to which the probabilities ``[N, V]`` sum to more than ``uniform [N]`` of all."""
    cumulative = probability.cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    choice = torch.searchsorted(cumulative, uniform.to(total.dtype).unsqueeze(1) * total, right=True)
    # Rounding may carry the draw past the last token of any probability.
    return torch.minimum(choice, torch.searchsorted(cumulative, total))


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


def surest(rank: Tensor, count: int) -> Tensor:
    """Which of one sequence's proposals are the ``count`` that rank highest, the first ones among equals.
    ``[n] -> bool [n]``."""
    chosen = torch.zeros_like(rank, dtype=torch.bool)
    chosen[rank.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def choose(rank: Tensor, confidence: Tensor, count: int, threshold: float | None) -> Tensor:
    """Which of one sequence's proposals a step writes: those surer than ``threshold`` if there are as many as
    ``count``, else the ``count`` that rank highest. ``[n], [n] -> bool [n]``."""
    if threshold is not None:
        sure = confidence > threshold
        if sure.sum() >= count:
            return sure
    return surest(rank, count)


@functools.cache
def _times(steps: int) -> Tensor:
    """Dream's: from 1 to 0.001 in even steps, ``[steps + 1]``."""
    return torch.linspace(1, 1e-3, steps + 1)


# How a sub-block's places are sorted without the model: (places, steps, generator) -> [places], the larger the earlier.


def _from_the_left(places: int, steps: int, generator: torch.Generator) -> Tensor:
    return -torch.arange(places)


def _drawn(places: int, steps: int, generator: torch.Generator) -> Tensor:
    """Dream's ``origin``: a step from time t to s writes each masked token with probability 1 - s / t, the last step
    all. That is: a token is written in the step in which time falls below a number that is drawn for it once."""
    moment = torch.rand(places, generator=generator, dtype=torch.float64)
    later = (_times(steps).double() > moment.unsqueeze(1)).sum(1) - 1
    return -later.clamp(max=steps - 1)


PLACES = {"position": _from_the_left, "time": _drawn}


# How many tokens a step writes at least: (ranks [n] of what is masked, places of the sub-block, number of the step from
# 0, steps) -> count. Where it is 0 the step is nothing, and needs no pass.


def _one(rank: Tensor, places: int, step: int, steps: int) -> int:
    return 1


def _even(rank: Tensor, places: int, step: int, steps: int) -> int:
    """As many in each step, and one more in the first ones (SDAR, LLaDA)."""
    base, more = divmod(places, steps)
    return max(1, base + (step < more))


def _time(rank: Tensor, places: int, step: int, steps: int) -> int:
    """Dream's: a step from time t to s writes a share of 1 - s / t of what is masked, rounded down; the last step the
    rest."""
    if step >= steps - 1:
        return len(rank)
    return int(len(rank) * (1 - _times(steps)[step + 1] / _times(steps)[step]))


def _as_drawn(rank: Tensor, places: int, step: int, steps: int) -> int:
    """All that were drawn for the same step."""
    return int((rank == rank.max()).sum())


SHARES = {"one": _one, "even": _even, "time": _time, "drawn": _as_drawn}
