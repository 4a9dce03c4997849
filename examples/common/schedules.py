"""Learning rates over a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def warm_cosine(optimizer: Any, warm_up: int, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Rise linearly from 1/warm_up of the learning rate, then fall along half a cosine to 0.

    Args:
        warm_up: steps of the rise; 0 for none. At most half of `steps` are taken.
        steps: of the whole run.
    """
    return _warm(optimizer, warm_up, steps, lambda share: 0.5 * (1 + math.cos(math.pi * share)))


def warm_linear(optimizer: Any, warm_up: int, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """The same with a straight line down to 0."""
    return _warm(optimizer, warm_up, steps, lambda share: 1 - share)


def _warm(
    optimizer: Any, warm_up: int, steps: int, fall: Callable[[float], float]
) -> torch.optim.lr_scheduler.LambdaLR:
    """Rise, then fall as `fall` does with the share of the steps after the rise."""
    warm_up = min(warm_up, steps // 2)

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        return fall(min(1.0, (step - warm_up) / max(1, steps - warm_up)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
