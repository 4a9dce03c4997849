"""Who called compress(): Horovod passes the gradient alone, so its name is found on the stack."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import horovod.torch as hvd
import torch
from horovod.torch import mpi_ops as hvd_ops
from horovod.torch import optimizer as hvd_optimizer

from ..frontend import require_linear, require_name


class Caller(NamedTuple):
    """The function of Horovod that called compress(), as far as it matters."""

    name: str  # of the operation, the same on every rank
    op: int
    process_set: Any
    scaling: float = 1.0  # of the result, beside what op does
    in_place: bool = False  # whether the result replaces the tensor
    optimizer: Any = None
    parameter: Any = None  # of the optimizer
    # The tensors of the same call, where there are several, and the place of this one.
    together: Any = None
    place: int = 0


_Place = tuple[str, str, int]


def _place_of(code: CodeType) -> _Place:
    """Where a function stands. torch.compile runs rewritten copies, which stand there too."""
    return code.co_filename, code.co_name, code.co_firstlineno


_HOOK_CODE = hvd_optimizer._DistributedOptimizer._allreduce_grad_async.__code__
_GROUPED_HOOK_CODE = hvd_optimizer._DistributedOptimizer._grouped_allreduce_grad_async.__code__
_HOOK, _GROUPED_HOOK = _place_of(_HOOK_CODE), _place_of(_GROUPED_HOOK_CODE)
_ADASUM_HOOK = _place_of(hvd_optimizer._DistributedAdasumOptimizer._allreduce_grad_async.__code__)
_ALLREDUCE = _place_of(hvd_ops.allreduce.__code__)
_GROUPED_ALLREDUCE = _place_of(hvd_ops.grouped_allreduce.__code__)
_KNOWN = {_HOOK, _GROUPED_HOOK, _ADASUM_HOOK, _ALLREDUCE, _GROUPED_ALLREDUCE}


def find_hook(tensor: torch.Tensor, frame: FrameType) -> tuple[Any, Any] | None:
    """The optimizer whose gradient `tensor` is, and the parameter, where that is plain to see.

    Quickly: this is asked for every gradient of every step. `frame` is that of the caller of
    compress(). None where only `find_caller` knows.
    """
    if frame.f_code is _HOOK_CODE:
        variables = frame.f_locals
        return variables["self"], variables["p"]
    outer = frame.f_back if frame.f_code.co_name == "<listcomp>" else frame
    if outer is not None and outer.f_code is _GROUPED_HOOK_CODE:
        parameter = frame.f_locals.get("p")
        if parameter is not None and parameter.grad is tensor:
            return outer.f_locals["self"], parameter
    return None


def find_caller(tensor: torch.Tensor, frame: FrameType | None, function: str) -> Caller:
    """Identify the Horovod function that called compress(tensor), by where it stands.

    It may have done so through a class of the user that passes some tensors on. Names have to come
    from the parameter, never from a counter: ranks may run their hooks in different orders. `frame`
    is that of the caller of compress(), `function` what errors name.
    """
    between: list[FrameType] = []
    while frame is not None:
        place = _place_of(frame.f_code)
        if place in _KNOWN:
            return _identify(place, frame, tensor, between, function)
        between.append(frame)
        frame = frame.f_back
    raise RuntimeError(
        f"{function}: compress() must be called by Horovod's DistributedOptimizer or allreduce, "
        "which tell it the name of the tensor; to reduce a tensor yourself use "
        "gq_horovod.torch.allreduce."
    )


def _identify(
    place: _Place,
    frame: FrameType,
    tensor: torch.Tensor,
    between: list[FrameType],
    function: str,
) -> Caller:
    variables = frame.f_locals
    if place == _HOOK:
        return _optimizer_caller(variables["self"], variables["p"], function)
    if place == _ADASUM_HOOK:
        raise ValueError(
            f"{function}: op must be hvd.Average or hvd.Sum, got hvd.Adasum, which combines "
            "gradients in a way that quantized sums cannot express; choose another op."
        )
    if place == _ALLREDUCE:
        return _function_caller(variables, variables["name"], function)
    inner = _loop_variables(frame, between)
    if place == _GROUPED_HOOK:
        index = _index(tensor, [parameter.grad for parameter in variables["ps"]], inner)
        return _optimizer_caller(variables["self"], variables["ps"][index], function)
    name, together = variables["name"], variables["tensors"]
    index = _index(tensor, together, inner)
    caller = _function_caller(variables, None if name is None else f"{name}.{index}", function)
    return caller._replace(together=together, place=index)


def _loop_variables(frame: FrameType, between: list[FrameType]) -> list[Any]:
    """The variables of the comprehension in which Horovod calls compress() for each of a list.

    Up to Python 3.11 it has a frame of its own, from 3.12 on it shares that of the function.
    """
    inner = between[-1:] if between and between[-1].f_code.co_name == "<listcomp>" else [frame]
    return [value for own in inner for value in own.f_locals.values()]


def _index(tensor: torch.Tensor, members: Any, variables: list[Any]) -> int:
    """Which of `members` Horovod has got to.

    It is `tensor` itself, unless a class of the user has passed on something made of it. (A tensor
    that is in the list twice has the first place twice.)
    """
    for wanted in (tensor, *_tensors(variables)):
        for index, member in enumerate(members):
            if member is wanted:
                return index
    raise RuntimeError("no tensor of the group is the one that compress() was called for")


def _tensors(variables: list[Any]) -> Iterator[torch.Tensor]:
    """The tensors among variables, and the gradients of the parameters among them."""
    for value in variables:
        if isinstance(value, torch.Tensor):
            yield value
            if value.is_leaf and value.grad is not None:
                yield value.grad


def _optimizer_caller(optimizer: Any, parameter: torch.Tensor, function: str) -> Caller:
    # gradient_predivide_factor only divides before the sum what it multiplies after it.
    name = optimizer._parameter_names[parameter]
    require_linear(hvd, optimizer.op, name, function)
    return Caller(
        *(name, optimizer.op, optimizer.process_set),
        in_place=True,
        optimizer=optimizer,
        parameter=parameter,
    )


def _function_caller(variables: dict[str, Any], name: str | None, function: str) -> Caller:
    op = hvd_ops.handle_average_backwards_compatibility(variables["op"], variables["average"])
    scaling = variables["prescale_factor"] * variables["postscale_factor"]
    name = require_name(name, function)
    require_linear(hvd, op, name, function)
    return Caller(name, op, variables["process_set"], scaling)
