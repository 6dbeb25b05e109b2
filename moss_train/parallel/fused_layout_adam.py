"""Adam with the state layout of the fused GPU optimizers, for machines without Transformer Engine and Apex."""

import torch


class FusedLayoutAdam(torch.optim.Optimizer):
    """Adam/AdamW (Kingma & Ba 2015; Loshchilov & Hutter 2019) whose step count lives in the parameter group.

    Megatron-core 0.16.1's distributed optimizer restores the layout of Transformer Engine's and Apex's FusedAdam,
    where `step` belongs to the group; `torch.optim.AdamW` keeps it per parameter and cannot be restored by it.
    Numerically equal to `torch.optim.AdamW` up to rounding.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **unused_fused_options,
    ):
        defaults = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            raise ValueError("FusedLayoutAdam takes no closure, as the fused optimizers it stands for")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            if not params:
                continue
            step, (beta1, beta2), lr = group["step"], group["betas"], group["lr"]
            for p in params:
                if "exp_avg" not in self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            first = [self.state[p]["exp_avg"] for p in params]
            second = [self.state[p]["exp_avg_sq"] for p in params]
            if group["weight_decay"]:
                if self.adam_w_mode:
                    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
                else:
                    grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, value=1 - beta2)
            correction1 = 1 - beta1**step if group["bias_correction"] else 1.0
            correction2 = 1 - beta2**step if group["bias_correction"] else 1.0
            denominators = torch._foreach_sqrt(second)
            torch._foreach_div_(denominators, correction2**0.5)
            torch._foreach_add_(denominators, group["eps"])
            torch._foreach_addcdiv_(params, first, denominators, value=-lr / correction1)
