"""Log-probabilities of a micro-batch's targets, and which response each belongs to: what an objective looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Legend: N targets that this process predicts, R responses of the micro-batch.

    ``log_prob`` fp32 ``[N]``, with gradient in training; ``weight`` fp64 ``[N]``; ``response``, ``block`` and ``step``
    int64 ``[N]``: the response (numbered through the micro-batch), the block and the decoding step (see
    `diffusion.layout.PackedSequence`); ``view``, the view that it is read from. ``length`` int64 ``[R]``: tokens that
    the assistant writes. ``steps``, ``views``: one more than the largest of the whole micro-batch.

    Under context parallelism the targets of a response are on several processes. ``add_up`` sums a tensor over them,
    with gradient; without context parallelism it is the identity.
    """

    log_prob: Tensor
    weight: Tensor
    response: Tensor
    block: Tensor
    step: Tensor
    length: Tensor
    view: Tensor | None = None
    steps: int = 0
    views: int = 0
    add_up: Callable[[Tensor], Tensor] = lambda total: total

    def likelihoods(self) -> Tensor:
        """``L(y) = sum of weight * log p`` per response, fp64 ``[R]``, the same on every context-parallel rank.

        In fp64, because margins are small differences of these large sums.
        """
        return self.sum_by_response(self.log_prob.to(self.weight.dtype) * self.weight)

    def sum_by_response(self, values: Tensor) -> Tensor:
        """Sums one value per target, fp64 ``[N]``, over each response: ``[R]``."""
        total = values.new_zeros(self.length.numel()).index_add(0, self.response, values)
        return self.add_up(total) if self.length.numel() else total

    def sum_by_step(self, values: Tensor) -> Tensor:
        """Sums one value per target, fp64 ``[N]``, over what each decoding step wrote, in each view that shows it:
        ``[R, views, steps]``, the same on every context-parallel rank."""
        shape = (self.length.numel(), self.views, self.steps)
        place = (self.response * self.views + self.view) * self.steps + self.step
        total = values.new_zeros(shape[0] * shape[1] * shape[2]).index_add(0, place, values)
        return (self.add_up(total) if total.numel() else total).view(shape)
