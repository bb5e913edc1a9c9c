"""A policy-gradient step in TraceRL's layout, in plain transformers.

A decoding is replayed in rounds. In round k every block of the answer stands as its k-th step saw it, and what that
step wrote is predicted: ``[prompt | answer, clean | answer, noisy]``, a row for each answer and round, as many rounds
as its slowest block had steps. A fair peer: rows are batched with rows of their length, the head runs on targets only,
and the first update after a rollout needs no other pass. TraceRL's own code pads all rows to the longest of the run,
runs its head on all of them, and makes the rollout policy's log-probabilities in a pass of its own.

Legend: P prompt tokens, B block size, n blocks of the answer, K rounds, r rows of a micro-batch, L padded tokens of the
clean half, N targets of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from megatron_dtrpo.online.rollouts import Group
from tools.benchmarks.peers.answers import Kind

NEVER = torch.iinfo(torch.long).max  # the step that wrote what is behind the end token


class Row(NamedTuple):
    """One answer in one round: the tokens ``[l]`` of the clean half and ``[n B]`` of the noisy one, and of what is read
    the position, in which half, and its token, int64 (bool) ``[N]`` each."""

    answer: int
    clean: Tensor
    noisy: Tensor
    position: Tensor
    from_clean: Tensor
    token: Tensor


class Batch(NamedTuple):
    """Tokens and positions ``[r, S]``, the additive mask ``[S, S]``, and of the targets ``[N]`` their row, place in it,
    token, answer, and number in the answer."""

    tokens: Tensor
    position: Tensor
    mask: Tensor
    row: Tensor
    place: Tensor
    token: Tensor
    answer: Tensor
    number: Tensor


class TraceRlLayout:
    """The gradient of one group per call of `step`, added to what the policy has."""

    def __init__(self, policy: PreTrainedModel, kind: Kind, *, mask_id: int, clip: float, micro_batch_size: int):
        """``micro_batch_size``: rows at once."""
        self.policy, self.kind, self.mask_id, self.clip = policy, kind, mask_id, clip
        self.micro_batch_size = micro_batch_size
        self.tokens = 0  # through the policy in the last step

    def step(
        self, group: Group, rollout_policy: PreTrainedModel | None = None, weights: Sequence[Tensor] | None = None
    ) -> float:
        """The loss of a group, a mean over its tokens. ``rollout_policy``: default: the policy. ``weights``: of each
        answer's tokens; default: 1 each."""
        count = sum(len(one.tokens) for one in group.completions)
        advantages = torch.from_numpy(group.advantages)
        self.tokens, total = 0, 0.0
        for batch in self._batches(group):
            self.tokens += batch.tokens.numel()
            log_probs = self._log_probs(self.policy, batch)
            old = log_probs.detach()
            if rollout_policy is not None:
                with torch.no_grad():
                    old = self._log_probs(rollout_policy, batch)
            ratio, advantage = (log_probs.double() - old.double()).exp(), advantages[batch.answer]
            gain = torch.minimum(ratio * advantage, ratio.clamp(1 - self.clip, 1 + self.clip) * advantage)
            if weights is not None:
                gain = gain * torch.stack([weights[a][n] for a, n in zip(batch.answer, batch.number, strict=True)])
            loss = -gain.sum() / count
            loss.backward()
            total += float(loss.detach())
        return total

    def tokens_of(self, group: Group) -> int:
        """How many would go through the policy."""
        return sum(batch.tokens.numel() for batch in self._batches(group))

    def _rows(self, answer: int, group: Group) -> Iterator[Row]:
        """The rounds of one answer."""
        prompt, one, B = group.prompt.ids, group.completions[answer], self.kind.block_size
        P, stop = len(prompt), len(prompt) + len(one.tokens)
        start, length = P // B * B, -(-stop // B) * B
        clean = torch.full((length,), self.mask_id)
        clean[:stop] = torch.tensor(prompt + one.tokens)
        written = torch.full((length,), NEVER)
        written[:P], written[P:stop] = -1, torch.tensor(one.steps)
        position = torch.arange(length)
        # With prediction shift 1 a block's first token is predicted by the clean half, and is no round of its own.
        ahead = (position >= P) & (position < stop) & (position % B == 0) & bool(self.kind.shift)
        steps = written[start:].masked_fill(ahead[start:], -1).view(-1, B)
        rounds = [sorted(set(block.tolist()) - {-1, NEVER}) for block in steps]
        for k in range(max(1, *map(len, rounds))):
            now = torch.tensor([block[k] if k < len(block) else NEVER - 1 for block in rounds]).unsqueeze(1)
            noisy = clean[start:].masked_fill((steps >= now).flatten(), self.mask_id)
            read = torch.zeros(length, dtype=torch.bool)
            read[start:] = (steps == now).flatten()
            if k == 0:
                read |= ahead
            where = read.nonzero().squeeze(1)
            yield Row(answer, clean, noisy, where, ahead[where], clean[where])

    def _batches(self, group: Group) -> Iterator[Batch]:
        rows = [row for answer in range(len(group.completions)) for row in self._rows(answer, group)]
        rows.sort(key=lambda row: len(row.clean))
        for first in range(0, len(rows), self.micro_batch_size):
            yield self._batch(rows[first : first + self.micro_batch_size], len(group.prompt.ids))

    def _batch(self, rows: Sequence[Row], P: int) -> Batch:
        start, length = P // self.kind.block_size * self.kind.block_size, len(rows[-1].clean)
        tokens = torch.full((len(rows), 2 * length - start), self.mask_id)
        for line, row in zip(tokens, rows, strict=True):
            line[: len(row.clean)] = row.clean
            line[length : length + len(row.noisy)] = row.noisy
        each = torch.arange(length)
        position = torch.cat([each, each[start:]])
        block, is_noisy = position // self.kind.block_size, torch.arange(len(position)) >= length
        where = torch.cat([row.position for row in rows])
        from_clean = torch.cat([row.from_clean for row in rows])
        counts = torch.tensor([len(row.position) for row in rows])
        return Batch(
            tokens,
            position.expand(len(rows), -1),
            _mask(block, is_noisy),
            torch.arange(len(rows)).repeat_interleave(counts),
            where - self.kind.shift + torch.where(from_clean, 0, length - start),
            torch.cat([row.token for row in rows]),
            torch.tensor([row.answer for row in rows]).repeat_interleave(counts),
            where - P,
        )

    @staticmethod
    def _log_probs(model: PreTrainedModel, batch: Batch) -> Tensor:
        hidden = model.model(
            input_ids=batch.tokens,
            position_ids=batch.position,
            attention_mask=batch.mask[None, None],
            use_cache=False,
        ).last_hidden_state
        return -F.cross_entropy(model.lm_head(hidden[batch.row, batch.place]), batch.token, reduction="none")


def _mask(block: Tensor, is_noisy: Tensor) -> Tensor:
    """A clean token sees the clean blocks up to its own, a noisy one the clean blocks before its own and its own noisy
    block: additive ``[S, S]``."""
    query, key = block.unsqueeze(1), block.unsqueeze(0)
    noisy_query, noisy_key = is_noisy.unsqueeze(1), is_noisy.unsqueeze(0)
    clean = ~noisy_key & torch.where(noisy_query, key < query, key <= query)
    seen = clean | (noisy_query & noisy_key & (key == query))
    return torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
