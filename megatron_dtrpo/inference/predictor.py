"""One forward pass of the model and the tokens it proposes, under tensor and pipeline parallelism.

Every process of a model-parallel group runs the same decoding and makes the same calls; each gets the same proposals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from megatron_dtrpo.diffusion.sampling import MEASURES, most_probable, propose
from megatron_dtrpo.model.attention import PackedAttention
from megatron_dtrpo.model.chunks import chunks_of
from megatron_dtrpo.model.gpt import BlockDiffusionModel

ROWS = 1024  # predictions whose logits are there at once: under full attention a batch asks for many thousands

# So many predictions, and the temperature and top_p of them.
Sampling = tuple[int, tuple[float, float]]


class Predictor:
    """Proposes tokens; collective over the model-parallel processes."""

    def __init__(
        self,
        model: BlockDiffusionModel | list[BlockDiffusionModel],
        *,
        vocab_size: int,
        mask_id: int | None,
        order: str = "confidence",
    ):
        """``model``: this process's stage, or its virtual ones. ``vocab_size``: without padding; padding and the mask
        token are never proposed. ``order``: of `config.decoding.Rule`."""
        self.chunks = chunks_of(model)
        self.model = self.chunks[-1]  # on the last stage it has the head
        self.measure = MEASURES.get(order)
        self.device = next(self.model.parameters()).device
        self.group = parallel_state.get_tensor_model_parallel_group()
        allowed = torch.arange(self.model.vocab_size) < vocab_size
        if mask_id is not None:
            allowed[mask_id] = False
        shard = self.model.vocab_size // self.group.size()
        self.first = self.group.rank() * shard
        self.forbidden = ~allowed.to(self.device)
        self.forbidden_here = self.forbidden[self.first : self.first + shard]

    @torch.no_grad()
    def __call__(
        self,
        tokens: Tensor,
        position: Tensor,
        attention: PackedAttention,
        rows: Tensor,
        uniform: Tensor,
        sampling: Sequence[Sampling],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs ``tokens, position`` int64 ``[s]`` and reads the predictions of ``rows`` int64 ``[N]``; ``uniform``
        float64 ``[N]`` is the randomness of each, used above temperature 0. All on the model's device. ``sampling``:
        of how many rows in turn, N together, which temperature and top_p.

        Returns:
            Proposed tokens int64 ``[N]``, their confidence ``[N]`` and what sorts them ``[N]``, the larger the surer,
            on the CPU.
        """
        # Under sequence parallelism the processes have as many rows each; the attention leaves the padding out.
        ranks = self.group.size() if self.model.config.sequence_parallel else 1
        tokens, position = (F.pad(t, (0, -len(t) % ranks)) for t in (tokens, position))
        hidden = self._through_stages(tokens, position, attention)
        if not len(rows):
            return torch.empty(0, dtype=torch.long), torch.empty(0), torch.empty(0)
        proposals = torch.empty(3, len(rows), dtype=torch.float64, device=self.device)
        if parallel_state.is_pipeline_last_stage():
            hidden = hidden.squeeze(1)[rows]
            for how, places in _alike(sampling, self.device).items():
                some = zip(hidden[places].split(ROWS), uniform[places].split(ROWS), strict=True)
                proposals[:, places] = torch.cat([self._propose(*each, *how) for each in some], 1)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            dist.broadcast(proposals, src=last, group=parallel_state.get_pipeline_model_parallel_group())
        token, confidence, rank = proposals.cpu()
        return token.long(), confidence, rank

    def _through_stages(self, tokens: Tensor, position: Tensor, attention: PackedAttention) -> Tensor:
        """Hidden states ``[s, 1, h]`` of the last stage; on the others what they sent on. A virtual stage sends what it
        has to the next process, the last process's to the first."""
        config = self.model.config
        rows = len(tokens) // (self.group.size() if config.sequence_parallel else 1)
        for number, chunk in enumerate(self.chunks):
            if number > 0 or not parallel_state.is_pipeline_first_stage():
                received = torch.empty(rows, 1, config.hidden_size, dtype=config.params_dtype, device=self.device)
                dist.recv(received, src=parallel_state.get_pipeline_model_parallel_prev_rank())
                chunk.set_input_tensor(received)
            hidden = chunk(tokens, position, attention)
            if number + 1 < len(self.chunks) or not parallel_state.is_pipeline_last_stage():
                dist.send(hidden.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
        return hidden

    def _propose(self, hidden: Tensor, uniform: Tensor, temperature: float, top_p: float) -> Tensor:
        """Of the rows ``[n, h]`` that are read: tokens, confidences and what sorts them, ``[3, n]``."""
        logits = self.model.logits(hidden)
        logits[:, self.model.tokens_here :] = -torch.inf
        found = self._greedy(logits) if temperature == 0 else self._sample(logits, uniform, temperature, top_p)
        return torch.stack([each.double() for each in found])  # token ids are exact in fp64

    def _greedy(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[N, V / TP]`` -> tokens, probabilities and what sorts them, ``[N]``: at most five numbers a row travel, not
        the vocabulary."""
        token, best, normaliser = most_probable(logits, self.forbidden_here)
        parts = [token + self.first, best, normaliser]
        if self.measure:
            probability = (logits - normaliser.unsqueeze(1)).masked_fill(self.forbidden_here, -torch.inf).exp()
            parts += self.measure.parts(probability)
        mine = torch.stack([part.double() for part in parts])
        if self.group.size() == 1:
            everyone = mine[None]
        else:
            parts = [torch.empty_like(mine) for _ in range(self.group.size())]
            dist.all_gather(parts, mine, group=self.group)
            everyone = torch.stack(parts)
        winner = everyone[:, 1].argmax(0, keepdim=True)
        token, best = everyone[:, 0].gather(0, winner)[0], everyone[:, 1].gather(0, winner)[0]
        normaliser = everyone[:, 2].logsumexp(0)
        confidence = (best - normaliser).exp()
        share = (everyone[:, 2] - normaliser).exp()
        return token, confidence, self.measure.joined(everyone[:, 3:], share) if self.measure else confidence

    def _sample(
        self, logits: Tensor, uniform: Tensor, temperature: float, top_p: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.group.size() > 1:
            parts = [torch.empty_like(logits) for _ in range(self.group.size())]
            dist.all_gather(parts, logits.contiguous(), group=self.group)
            logits = torch.cat(parts, -1)
        return propose(logits, self.forbidden, uniform, temperature, top_p, self.measure)


def _alike(sampling: Sequence[Sampling], device: torch.device) -> dict[tuple[float, float], Tensor | slice]:
    """Which predictions are drawn alike: all, where no two differ."""
    if len({how for _, how in sampling}) == 1:
        return {sampling[0][1]: slice(None)}
    places: dict[tuple[float, float], list[int]] = {}
    first = 0
    for count, how in sampling:
        places.setdefault(how, []).extend(range(first, first + count))
        first += count
    return {how: torch.tensor(found, device=device) for how, found in places.items() if found}
