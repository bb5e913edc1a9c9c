"""The block-diffusion model: megatron-core's GPT with two changes that the packed layout asks for.

Rotary angles follow each token's position, because clean and noisy copies of a position share it; and the output layer
runs on the rows that a prediction is read from, never on the whole packed sequence.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_dtrpo.model.attention import PackedAttention
from megatron_dtrpo.model.limits import LOGIT_ROWS
from megatron_dtrpo.objectives.logprobs import vocab_parallel_log_probs


class BlockDiffusionModel(LanguageModule):
    """The two changes, for the classes of megatron-core that have an embedding, rotary angles, a decoder and an output
    layer: to be inherited before one of them."""

    writes_per_layer = 2
    """How often a layer writes to the residual stream."""

    @staticmethod
    def gpt_name(name: str) -> str:
        """The GPT model's name of a parameter that is called ``name`` in the whole model."""
        return name

    def __init__(self, *args, num_tokens: int, **kwargs):
        """``num_tokens``: of the ``vocab_size`` rows of megatron-core those that are tokens; the others pad them."""
        super().__init__(*args, **kwargs)
        shard = self.vocab_size // self.pg_collection.tp.size()
        self.tokens_here = min(max(num_tokens - shard * self.pg_collection.tp.rank(), 0), shard)
        """How many columns of this rank's logits are tokens; the others come last."""
        if self.post_process:
            # The head sees gathered rows: it is an ordinary column-parallel layer even under sequence parallelism.
            self.output_layer.sequence_parallel = False
            self.output_layer.allreduce_dgrad = self.pg_collection.tp.size() > 1

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        attention: PackedAttention,
        target_row: Tensor | None = None,
        target_token: Tensor | None = None,
    ) -> Tensor:
        """Runs this stage on one packed sequence.

        Args:
            tokens, position: int64 ``[S]``; under context parallelism this rank's part of the sequence.
            attention: the sequence's attention plan.
            target_row, target_token: int64 ``[N]``: packed row read (of ``tokens``) and token predicted; last stage
                only. N may be 0.

        Returns:
            On the last stage the log-probability of each target, fp32 ``[N]`` (hidden states ``[S, 1, h]`` if no
            targets are given); on the others hidden states ``[S, 1, h]``, ``[S / TP, 1, h]`` with sequence parallelism.
        """
        hidden = self.decoder(
            hidden_states=self._embedded(tokens, position) if self.pre_process else None,
            attention_mask=None,
            rotary_pos_emb=self._rotary_angles(position),
            packed_seq_params=attention,
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        if target_row is None:
            return hidden
        rows = hidden.squeeze(1)
        if target_row.numel() == 0:
            # Nothing to predict, on a context-parallel rank or in a micro-batch of padding: the head still takes part
            # in its collectives, and gets a gradient, of zeros.
            return self._log_probs(rows[:1], target_token.new_zeros(1))[:0]
        return self._target_log_probs(rows[target_row], target_token)

    def _embedded(self, tokens: Tensor, position: Tensor) -> Tensor:
        """``[S], [S] -> [S, 1, h]`` (``[S / TP, 1, h]`` with sequence parallelism).

        megatron-core's recomputation gives nothing a gradient unless one of its inputs requires one. The first layer's
        does not where the embedding is frozen, so it is made to; other stages' inputs always do.
        """
        embedded = self.embedding(input_ids=tokens[None], position_ids=position[None])
        recomputes = self.config.recompute_granularity is not None and torch.is_grad_enabled()
        if recomputes and not embedded.requires_grad:
            embedded.requires_grad_(any(p.requires_grad for p in self.decoder.layers.parameters()))
        return embedded

    def _rotary_angles(self, position: Tensor) -> Tensor:
        """Angles ``[S, 1, 1, d]`` of positions ``[S]``, in fp32."""
        self.rotary_pos_emb.inv_freq = self.rotary_pos_emb.inv_freq.to(position.device)
        angles = torch.outer(position.to(self.rotary_pos_emb.inv_freq.dtype), self.rotary_pos_emb.inv_freq)
        return torch.cat((angles, angles), dim=-1)[:, None, None, :]

    def _target_log_probs(self, rows: Tensor, target: Tensor) -> Tensor:
        if rows.shape[0] <= LOGIT_ROWS:
            return self._log_probs(rows, target)
        chunks = zip(rows.split(LOGIT_ROWS), target.split(LOGIT_ROWS), strict=True)
        return torch.cat([checkpoint(self._log_probs, r, t, use_reentrant=False) for r, t in chunks])

    def _log_probs(self, rows: Tensor, target: Tensor) -> Tensor:
        """``[N, h], [N] -> [N]``."""
        return vocab_parallel_log_probs(self.logits(rows), target, self.tokens_here, self.pg_collection.tp)

    def logits(self, rows: Tensor) -> Tensor:
        """Logits ``[N, V / TP]`` of gathered hidden rows ``[N, h]``; from ``tokens_here`` on they are padding's."""
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(rows, weight=weight)[0]


class BlockDiffusionGPTModel(BlockDiffusionModel, GPTModel):
    """One pipeline stage. Constructor as `GPTModel`; ``position_embedding_type`` must be ``"rope"``."""
