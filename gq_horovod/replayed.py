"""A backward pass that only takes time: gradients that are there already, one after the other.

What reduces gradients sees what it sees of an accelerator, whose computation takes none of the
host's cores.
"""

from __future__ import annotations

import time
from typing import Any

import torch


class Layer(torch.autograd.Function):
    """Passes a scalar on; its backward sleeps, then gives a parameter its gradient.

    apply(scalar, parameter, gradient, seconds); the parameter and its gradient may be None. What is
    applied last comes first in backward.
    """

    @staticmethod
    def forward(ctx: Any, scalar: Any, parameter: Any, gradient: Any, seconds: float) -> Any:
        ctx.gradient, ctx.seconds = gradient, seconds
        return scalar.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        if ctx.seconds:
            time.sleep(ctx.seconds)
        # An alias: autograd copies what somebody else holds as well, which no accelerator's host
        # does.
        gradient = None if ctx.gradient is None else ctx.gradient.detach()
        return gradients[0], gradient, None, None
