"""Who called compress(), and for which tensor, as the stack tells."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NamedTuple

import horovod.tensorflow as hvd
import tensorflow as tf

from ..frontend import require_linear, require_name
from .ranks import LOSS


class Step(NamedTuple):
    """What a tape or an optimizer reduces at a time."""

    gradients: tuple[Any, ...]  # those about which Horovod asks compress()
    labels: tuple[str, ...]  # of their variables; "" where there is none
    variables: tuple[Any, ...]  # what was differentiated to, but for plain tensors


class Caller(NamedTuple):
    """Who called compress(), as far as it matters: it is called with the gradient alone."""

    names: tuple[str, ...]  # of it and its siblings, the same on every rank
    labels: tuple[str, ...]  # by which users know them: names of variables, or else those
    place: int  # of the tensor among them
    op: int
    process_set: Any
    ignore_name_scope: bool  # of the names of Horovod's operations
    scaling: float  # of the result, beside what op does
    prescale: float  # what Horovod multiplies by before it sums, and after it
    postscale: float
    device: str  # where Horovod reduces; "": where TensorFlow wants
    siblings: tuple[Any, ...]  # what Horovod has beside it in a list, itself among them
    listed: Any  # that list; None of a single tensor
    fused: bool  # whether the list is a group, which Horovod reduces as one
    step: Step | None  # None: there is no tape or optimizer

    @property
    def name(self) -> str:
        """Of the tensor."""
        return self.names[self.place]


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
    name, listed = variables["name"], None
    if name is None:
        name = _name_in_keras(frame)
    fused = function == "grouped_allreduce"
    if fused:
        listed = variables["tensors"]
    op = variables["op"]  # Horovod has put there what `average` says
    prescale, postscale = variables["prescale_factor"], variables["postscale_factor"]
    scaling = prescale * postscale
    siblings: tuple[Any, ...] = (tensor,) if listed is None else tuple(listed)
    names = [name]
    if fused:
        names = [None if name is None else f"{name}.{place}" for place in range(len(siblings))]
    step, label_of = None, dict[int, str]()
    for function, outer in callers:
        if function == "allreduce_grads":
            # gradient_predivide_factor only divides before the sum what it multiplies after it.
            scaling = 1.0
            gradients = outer["grads"]
            dense = [(i, own) for i, own in enumerate(gradients) if _is_dense(own)]
            trained = [own for own in outer["vars"] or () if isinstance(own, tf.Variable)]
            labels = _labels_of(outer["vars"] or (), len(gradients))
            step = Step(
                tuple(own for _, own in dense), tuple(labels[i] for i, _ in dense), tuple(trained)
            )
            if fused:
                place_of: dict[int, int] = {}
                for i, own in enumerate(gradients):
                    place_of.setdefault(id(own), i)
                positions = [place_of[id(member)] for member in siblings]
            else:
                listed, siblings = gradients, step.gradients
                positions = [i for i, _ in dense]
            label_of = dict(enumerate(labels[own] for own in positions))
            if name is None:  # like Horovod's own names, which come from the graph: no counter
                names = [f"{outer['name']}.{position}" for position in positions]
            elif not fused:
                names = [f"grad_{position}" for position in positions]  # as Horovod has it
            break
    place = _position(tensor, siblings)
    require_linear(hvd, op, names[place])
    plain = tuple(require_name(own).removeprefix(f"{LOSS}.") for own in names)
    return Caller(
        names=plain,
        labels=tuple(label_of.get(at) or own for at, own in enumerate(plain)),
        place=place,
        op=op,
        process_set=variables["process_set"],
        ignore_name_scope=variables["ignore_name_scope"],
        scaling=scaling,
        prescale=prescale,
        postscale=postscale,
        device=variables["device_dense"],
        siblings=siblings,
        listed=listed,
        fused=fused,
        step=step,
    )


def _name_in_keras(frame: FrameType | None) -> str | None:
    """The name that a value was given in Horovod's Keras API, which does not pass it on."""
    while frame is not None:
        if frame.f_globals.get("__name__") == "horovod._keras":
            name: str | None = frame.f_locals.get("name")
            return name if frame.f_code.co_name.removeprefix("tf__") == "allreduce" else None
        frame = frame.f_back
    return None


_given = threading.local()  # labels of variables, by those who know better ones than their names


@contextlib.contextmanager
def labelled(labels: Sequence[str]) -> Iterator[None]:
    """Inside, Horovod reduces the gradients of variables that users know by these names."""
    _given.labels = labels
    try:
        yield
    finally:
        _given.labels = None


def _labels_of(variables: Sequence[Any], count: int) -> Sequence[str]:
    """What users call the variables of so many gradients; "" where that is not known."""
    given: Sequence[str] | None = getattr(_given, "labels", None)
    if given is None:
        names = [getattr(own, "name", None) for own in variables]
        given = [own.removesuffix(":0") if isinstance(own, str) else "" for own in names]
    return given if len(given) == count else [""] * count


def _is_dense(gradient: Any) -> bool:
    """Whether Horovod asks compress() about a gradient."""
    return gradient is not None and not isinstance(gradient, tf.IndexedSlices)


def _position(tensor: Any, tensors: Any) -> int:
    """Where a tensor is in a list.

    A tensor that is in it twice has the first place twice.
    """
    return next(index for index, member in enumerate(tensors) if member is tensor)
