"""Keeps our operations out of the numbers that Horovod gives to operations without a name.

Horovod calls an operation that has no name after the number of its handle, and has one counter of
handles for all operations of a process. What we start between two points of the user's program,
when its inputs happen to be there, would move that counter by another number on every rank: an
unnamed `hvd.allreduce(loss)` between backward() and step() would wait for ever, and so would
Horovod's own unnamed operations in a backward pass.

So from our first operation on, an operation without a name gets the name that plain Horovod would
give it: `noname.<handles of others so far>`. Ranks that do not use this package, or not yet, agree
with those that do.

This replaces one attribute of Horovod at run time, `horovod.torch.mpi_ops.mpi_lib`, by an object
that passes all calls on. `uninstall()` puts the original back.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from horovod.torch import mpi_ops as hvd_ops

from ..log import Log
from ..pipeline import pipelines

__all__ = ["Library", "install", "library", "ours", "uninstall"]

_log = Log(__name__)

_PREFIX = "horovod_torch_"
# Functions that take a handle, or all of them. Every other one begins an operation and returns one.
_OF_HANDLES = ("poll", "wait_and_clear", "reset")

_thread = threading.local()  # .ours: whether this thread is starting an operation of ours
_wanted = True


class Library:
    """Stands in the place of Horovod's `mpi_lib`: the same functions, counted."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.joins = 0  # calls of hvd.join()
        self._lock = threading.RLock()
        # Handles that were given out to others; None before our first operation, when Horovod's own
        # numbers are right.
        self._others: int | None = None
        self._names: dict[
            int, str
        ] = {}  # of operations by their handles, until they are waited for
        # What to add to Horovod's error about an operation on a tensor, by the tensor's id.
        self._notes: dict[int, tuple[weakref.ref[torch.Tensor], Callable[[], str]]] = {}
        self._noted: dict[int, Callable[[], str]] = {}  # the same by handle
        for name, function in vars(original).items():
            if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) not in _OF_HANDLES:
                setattr(self, name, self._starting(name.removeprefix(_PREFIX), function))
            elif not name.startswith("__"):
                setattr(self, name, function)
        self.horovod_torch_wait_and_clear = self._wait_and_clear
        self.horovod_torch_reset = self._reset

    def note(self, tensor: torch.Tensor, text: Callable[[], str]) -> None:
        """Let Horovod's error about the operation that `tensor` is handed to end with a text."""
        key = id(tensor)
        with self._lock:
            own = weakref.ref(tensor, lambda _: self._notes.pop(key, None))
            self._notes[key] = (own, text)

    def name(self, handle: int) -> str:
        """What an operation in flight is called in messages."""
        return self._names.get(handle, f"operation {handle}")

    def _starting(self, kind: str, function: Callable[..., int]) -> Callable[..., int]:
        """A function that begins an operation."""
        word = kind.split("_async_")[0]

        def start(*arguments: Any) -> int:
            if kind == "join":
                # What this rank has begun must be over before it joins: others may still start an
                # operation for it that Horovod cannot do without this rank.
                for pipeline in pipelines():
                    pipeline.drain()
            with self._lock:
                own = getattr(_thread, "ours", False)
                number = None if own or self._others is None else self._others + 1
                arguments, name = _named(arguments, number)
                try:
                    handle = function(*arguments)
                except RuntimeError:  # refused by Horovod, which has used up a handle
                    if number is not None:
                        self._others = number
                    raise
                if own and self._others is None:
                    self._others = handle - 1
                elif number is not None:
                    self._others = number
                if name is None:
                    name = f"noname.{handle}"
                self._names[handle] = f"{word}.{name}" if name else word
                self._keep_note(handle, arguments)
                self.joins += kind == "join"
                return handle

        return start

    def _keep_note(self, handle: int, arguments: tuple[Any, ...]) -> None:
        if not arguments or not self._notes:
            return
        tensors = arguments[0] if isinstance(arguments[0], (list, tuple)) else arguments[:1]
        for tensor in tensors:
            noted = self._notes.get(id(tensor))
            if noted is not None and noted[0]() is tensor:
                self._noted[handle] = noted[1]
                return

    def _wait_and_clear(self, handle: int) -> Any:
        try:
            return self.original.horovod_torch_wait_and_clear(handle)
        except RuntimeError as error:
            if handle in self._noted:
                raise RuntimeError(f"{error} {self._noted[handle]()}") from error
            raise
        finally:
            self._names.pop(handle, None)
            self._noted.pop(handle, None)

    def _reset(self) -> Any:
        """Of hvd.shutdown(): Horovod begins to count again."""
        with self._lock:
            self._others = None
            self._names.clear()
            self._noted.clear()
            return self.original.horovod_torch_reset()


def _named(arguments: tuple[Any, ...], number: int | None) -> tuple[tuple[Any, ...], str | None]:
    """The arguments, with a name where there is none and `number` is given; and the name."""
    for place, argument in enumerate(arguments):
        if isinstance(argument, (str, bytes)):
            if argument:
                return arguments, argument.decode() if isinstance(argument, bytes) else argument
            if number is None:
                return arguments, None
            name = f"noname.{number}"
            return (*arguments[:place], name.encode(), *arguments[place + 1 :]), name
    return arguments, ""  # join and barrier have names of their own


def library() -> Library | None:
    """What stands in the place of Horovod's library; None where nothing does."""
    found = hvd_ops.mpi_lib
    return found if isinstance(found, Library) else None


def install() -> None:
    """Put a Library in the place of Horovod's, once; not after uninstall()."""
    if library() is None and _wanted:
        hvd_ops.mpi_lib = Library(hvd_ops.mpi_lib)
        _log.say(
            logging.DEBUG,
            "numbering",
            "operations of Horovod without a name are numbered as if there were no compression "
            "(gq_horovod.torch.numbering stands in for horovod.torch.mpi_ops.mpi_lib)",
        )


def uninstall() -> None:
    """Put Horovod's library back, for good.

    From then on an operation without a name may hang between backward() and step(), and what
    follows an hvd.join() that ranks called at different steps is not agreed on again.
    """
    global _wanted
    _wanted = False
    if (own := library()) is not None:
        hvd_ops.mpi_lib = own.original


@contextlib.contextmanager
def ours() -> Iterator[None]:
    """Inside, what this thread starts is not counted."""
    _thread.ours = True
    try:
        yield
    finally:
        _thread.ours = False
