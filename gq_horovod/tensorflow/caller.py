"""Who called compress(), and for which tensor, as the stack tells."""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple

import horovod.tensorflow as hvd
import tensorflow as tf

from ..frontend import require_linear, require_name
from .ranks import LOSS


class Caller(NamedTuple):
    """Who called compress(), as far as it matters: it is called with the gradient alone."""

    name: str  # of the tensor, the same on every rank
    op: int
    process_set: Any
    ignore_name_scope: bool  # of the names of Horovod's operations
    scaling: float  # of the result, beside what op does
    siblings: tuple[Any, ...]  # the tensors of its group, itself among them
    expected: int | None  # gradients of the step, if that is known


def _callers(frame: FrameType | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and variables of the functions of horovod.tensorflow on the stack, innermost first.

    AutoGraph, which tf.function applies to all that it traces, runs a rewritten copy of a function.
    The copy has the variables and the module of the original, and a prefix to its name.
    """
    while frame is not None:
        if frame.f_globals is vars(hvd):
            yield frame.f_code.co_name.removeprefix("tf__"), frame.f_locals
        frame = frame.f_back


def find_caller(tensor: Any, frame: FrameType | None) -> Caller:
    """Identify the Horovod function that called compress(tensor)."""
    callers = _callers(frame)
    for function, found in callers:
        if function in ("reducescatter", "grouped_reducescatter"):
            raise ValueError(
                f"GlobalQSGD: the caller must be an allreduce, got hvd.{function}; use Horovod's "
                "own compression for it."
            )
        if function in ("allreduce", "grouped_allreduce"):
            variables = found
            break
    else:
        raise RuntimeError(
            "GlobalQSGD: compress() must be called by Horovod's DistributedOptimizer, "
            "DistributedGradientTape or allreduce, which tell it the name of the tensor; to reduce "
            "a tensor yourself use gq_horovod.tensorflow.allreduce."
        )
    name, siblings = variables["name"], (tensor,)
    if function == "grouped_allreduce":
        siblings = tuple(variables["tensors"])
        name = None if name is None else f"{name}.{_position(tensor, siblings)}"
    op = variables["op"]  # Horovod has put there what `average` says
    scaling = variables["prescale_factor"] * variables["postscale_factor"]
    expected = None
    for function, outer in callers:
        if function == "allreduce_grads":
            # gradient_predivide_factor only divides before the sum what it multiplies after it.
            scaling = 1.0
            # Like Horovod's own names, which come from the graph, this one has no counter in it.
            name = name or f"{outer['name']}.{_position(tensor, outer['grads'])}"
            expected = sum(_is_dense(gradient) for gradient in outer["grads"])
            break
    require_linear(hvd, op, name)
    return Caller(
        name=require_name(name).removeprefix(f"{LOSS}."),
        op=op,
        process_set=variables["process_set"],
        ignore_name_scope=variables["ignore_name_scope"],
        scaling=scaling,
        siblings=siblings,
        expected=expected,
    )


def _is_dense(gradient: Any) -> bool:
    """Whether Horovod asks compress() about a gradient."""
    return gradient is not None and not isinstance(gradient, tf.IndexedSlices)


def _position(tensor: Any, tensors: Any) -> int:
    """Where a tensor is in a list.

    A tensor that is in it twice has the first place twice. Its reductions differ in their steps,
    and in the name scopes of their operations.
    """
    return next(index for index, member in enumerate(tensors) if member is tensor)
