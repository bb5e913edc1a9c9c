"""Adam for the CPU with the interface and the state of Apex's and Transformer Engine's ``FusedAdam``."""

from __future__ import annotations

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw


class CpuAdam(torch.optim.Optimizer):
    """Adam (``adam_w_mode=False``) or AdamW whose step count lives in the parameter group.

    State per parameter: ``exp_avg`` and ``exp_avg_sq`` in the parameter's dtype.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True, capturable=False
    ):
        """``capturable`` is of CUDA graphs, which a CPU has not."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict, params: list[torch.Tensor]) -> None:
        lr, eps, weight_decay = group["lr"], group["eps"], group["weight_decay"]
        beta1, beta2 = group["betas"]
        for p in params:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        # The fused kernel goes through memory once. It advances a step of each parameter: here copies, made anew.
        steps = [torch.tensor(float(group["step"] - 1)) for _ in params]
        (adamw if self.adam_w_mode else adam)(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )
