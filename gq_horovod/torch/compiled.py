"""What torch.compile must not trace."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch._C._dynamo.eval_frame import get_eval_frame_callback


def never_traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which torch.compile runs as it is: what it does is no part of a graph.

    torch._dynamo takes a second to import, which whoever compiles has done by now.
    """
    untraced: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*arguments: Any) -> Any:
        if get_eval_frame_callback() is None:  # outside of compiled regions
            return function(*arguments)
        if not untraced:
            untraced.append(torch.compiler.disable(function))
        return untraced[0](*arguments)

    return call


# It stands between compress() and its caller.
CALL_CODE = never_traced(lambda: None).__code__
