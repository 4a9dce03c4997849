"""LAMB: Adam's step, as long as the parameters that it changes.

You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020,
algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

MOST = 10.0  # norm of parameters from which on a step grows no longer


class Lamb(torch.optim.Optimizer):
    """A step of each tensor is lr · min(|w|, MOST) / |r| · r, with r Adam's step and decay · w.

    The ratio is 1 where either norm is 0.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        """As of torch.optim.Adam."""
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), gradient = self.state[parameter], group["betas"], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        update = mean / (1 - beta1 ** state["step"]) / root
        update.add_(parameter, alpha=group["weight_decay"])
        length, own = parameter.norm().clamp(max=MOST), update.norm()
        ratio = torch.where((length > 0) & (own > 0), length / own, torch.ones_like(own))
        parameter.sub_(group["lr"] * ratio * update)
