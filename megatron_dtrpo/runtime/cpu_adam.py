"""Adam for the CPU with the interface and the state of Apex's and Transformer Engine's ``FusedAdam``."""

from __future__ import annotations

import torch


class CpuAdam(torch.optim.Optimizer):
    """Adam (``adam_w_mode=False``) or AdamW whose step count lives in the parameter group.

    State per parameter: ``exp_avg`` and ``exp_avg_sq`` in the parameter's dtype. All parameters of a group are updated
    together, so a step costs a few passes over memory and not a Python loop of small kernels.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True):
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
        grads = [p.grad for p in params]
        first = [self.state[p]["exp_avg"] for p in params]
        second = [self.state[p]["exp_avg_sq"] for p in params]

        if weight_decay and self.adam_w_mode:
            torch._foreach_mul_(params, 1 - lr * weight_decay)
        elif weight_decay:
            grads = torch._foreach_add(grads, params, alpha=weight_decay)
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, (1 - beta2 ** group["step"]) ** 0.5)
        torch._foreach_add_(denominator, eps)
        torch._foreach_addcdiv_(params, first, denominator, -lr / (1 - beta1 ** group["step"]))
