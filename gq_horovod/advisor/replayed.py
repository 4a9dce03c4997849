"""A backward pass that only takes time: gradients that are there already, one after the other.

What reduces gradients has the host's cores for itself meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Layer(torch.autograd.Function):
    """Passes a scalar on; its backward takes time, then gives a parameter its gradient.

    apply(scalar, parameter, gradient, seconds, compute); the parameter and its gradient may be
    None, and compute(seconds) takes the time. What is applied last comes first in backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scalar: Any,
        parameter: Any,
        gradient: Any,
        seconds: float,
        compute: Callable[[float], None] = time.sleep,
    ) -> Any:
        ctx.gradient, ctx.seconds, ctx.compute = gradient, seconds, compute
        return scalar.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if ctx.seconds:
            ctx.compute(ctx.seconds)
        # An alias: autograd copies what somebody else holds as well, which no accelerator's host
        # does.
        gradient = None if ctx.gradient is None else ctx.gradient.detach()
        return gradients[0], gradient, None, None, None
