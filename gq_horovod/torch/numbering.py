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
that passes all calls on, and one method, to hear of process sets that are removed. `uninstall()`
puts the originals back.

The object also keeps Horovod's thread from waiting for Python; see `_held`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import horovod.torch as hvd
import torch
from horovod.common.basics import HorovodBasics
from horovod.torch import mpi_ops as hvd_ops

from ..log import Log
from ..path.buckets import REMEDY_CAPACITY
from ..path.pipeline import POLL_SECONDS, pipelines, poll_all
from .compiled import never_traced

__all__ = ["OURS", "Library", "install", "library", "session", "uninstall"]

_log = Log(__name__)

_PREFIX = "horovod_torch_"
# Functions that take a handle, or all of them. Every other one begins an operation and returns one.
_OF_HANDLES = ("poll", "wait_and_clear", "reset")

# Horovod's own remedy is for another case.
_JOINED = (
    "(A rank has called hvd.join(), and the compression in use needs an operation that Horovod "
    "cannot do then; use GlobalQSGD or no compression, or give every rank equally many batches.)"
)

# A rank that has joined takes part in operations of one device alone, and waits for ever in others.
_JOIN_REFUSED = (
    "hvd.join: the device must be that of all operations, because Horovod lets a rank that has "
    "joined take part in operations on its GPU or in host memory, never in both; got {asked}, and "
    "gradients are reduced {places}. Give every rank equally many batches; or set "
    "GQ_HOROVOD_GPU_CODES=0 and min_elements=0 on all ranks, and pass no device."
)
_PLACES = {False: "in host memory", True: "on GPUs"}
_JOINED_BEFORE = (
    "hvd.join: a rank has called it before the first gradient, and takes part in operations in "
    "host memory alone, while gradients are reduced on GPUs here, which would wait for it for "
    "ever. Give every rank equally many batches; or set GQ_HOROVOD_GPU_CODES=0 and min_elements=0 "
    "on all ranks."
)

_wanted = True

# Names that came once. What a program calls by ever new names is no part of a step.
_ONCE_AT_MOST = 100_000


class _Recurring:
    """Counts the names that come again, which Horovod's response cache should have room for."""

    def __init__(self) -> None:
        self.capacity = _capacity()
        self._once: set[str] = set()
        self._again: set[str] = set()

    def count(self, name: str) -> None:
        """Count an operation; say once that there are too many."""
        if self.capacity == 0 or name in self._again:
            return
        if name not in self._once:
            if len(self._once) == _ONCE_AT_MOST:
                self._once.clear()
            self._once.add(name)
            return
        self._once.remove(name)
        self._again.add(name)
        if len(self._again) > self.capacity:
            _log.say(
                logging.WARNING,
                "cache",
                f"more than {self.capacity} names of operations come again and again, which is all "
                "that Horovod's response cache holds: it negotiates operations anew in every step, "
                "and says that responses have been evicted; set HOROVOD_CACHE_CAPACITY="
                f"{REMEDY_CAPACITY} or more on all ranks",
                capacity=self.capacity,
            )
            self.capacity = 0


def _capacity() -> int:
    """Names that Horovod's response cache holds; 0: it is off, or nobody knows."""
    try:
        return int(os.environ.get("HOROVOD_CACHE_CAPACITY", "1024"))
    except ValueError:
        return 0


class _Ours(threading.local):
    """Whether this thread is starting an operation of ours: `with OURS: start it`."""

    on = False

    def __enter__(self) -> None:
        self.on = True

    def __exit__(self, *_: object) -> None:
        self.on = False


OURS = _Ours()


class Frontend(Protocol):
    """Who reduces tensors: knows more about one than Horovod does, and goes by process sets."""

    def explain(self, tensor: object) -> str | None:
        """What Horovod's error about an operation on `tensor` does not say; None: not ours."""

    def after_removal(self) -> None:
        """Horovod has removed a process set."""


class Library:
    """Stands in the place of Horovod's `mpi_lib`: the same functions, counted."""

    def __init__(self, original: Any) -> None:
        self.original = original
        self.session = object()  # between one hvd.shutdown() and the next
        self.joins = 0  # calls of hvd.join()
        self.frontends: weakref.WeakSet[Frontend] = weakref.WeakSet()
        self.before_shutdown: Callable[[], None] | None = None  # called by hvd.shutdown()
        self.places: set[bool] = set()  # whether operations of a step are on a GPU; see join
        self.joined = False  # whether a rank had called hvd.join() when ranks last agreed
        self._lock = threading.RLock()
        # Handles that were given out to others; None before our first operation, when Horovod's own
        # numbers are right.
        self._others: int | None = None
        self._names: dict[int, str] = {}  # of operations in flight, by their handles
        self._held: dict[int, list[torch.Tensor]] = {}  # see the function of that name
        self.recurring: _Recurring | None = None  # on the rank that logs
        for name, function in vars(original).items():
            if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) not in _OF_HANDLES:
                setattr(self, name, self._starting(name.removeprefix(_PREFIX), function))
            elif not name.startswith("__"):
                setattr(self, name, function)
        self.horovod_torch_wait_and_clear = never_traced(self._wait_and_clear)
        self.horovod_torch_reset = self._reset
        self.remove_process_set = HorovodBasics._remove_process_set_impl

    def name(self, handle: int) -> str:
        """What an operation in flight is called in messages."""
        return self._names.get(handle, f"operation {handle}")

    def _starting(self, kind: str, function: Callable[..., int]) -> Callable[..., int]:
        """A function that begins an operation."""
        word = kind.split("_async_")[0]

        def start(*arguments: Any) -> int:
            if kind == "join":
                asked = arguments[1] >= 0 and bool(hvd.nccl_built())
                if self.places - {asked}:
                    # No RuntimeError, which Horovod takes for a failed operation.
                    places = " and ".join(_PLACES[own] for own in sorted(self.places))
                    raise ValueError(_JOIN_REFUSED.format(asked=_PLACES[asked], places=places))
                # What this rank has begun must be over before it joins: others may still start an
                # operation for it that Horovod cannot do without this rank.
                for pipeline in pipelines():
                    pipeline.drain()
            with self._lock:
                self.joins += kind == "join"
                number = None
                if self._others is not None and not OURS.on:
                    # Also where Horovod refuses it, which uses up a handle.
                    number = self._others = self._others + 1
                arguments, name = _named(arguments, number)
                held = _held(arguments)
                handle = function(*arguments)
                self._held[handle] = held
                if self._others is None and OURS.on:
                    self._others = handle - 1
                if name is None:
                    name = f"noname.{handle}"
                full = self._names[handle] = f"{word}.{name}" if name else word
                if self.recurring is not None:
                    self.recurring.count(full)
                return handle

        return start

    def _wait_and_clear(self, handle: int) -> Any:
        """Wait for an operation while something of ours is in flight.

        Horovod would take a whole core for as long as it waits, from ranks that share it. What is
        in flight advances meanwhile, since other ranks may begin this operation behind it. Not
        where this is a token or a gradient: where one tells that ranks disagree, others would start
        what some never do.
        """
        try:
            advances = None
            while not self.original.horovod_torch_poll(handle) and pipelines():
                if advances is None:
                    advances = not self._described(handle)
                if not (advances and poll_all()):
                    time.sleep(POLL_SECONDS)
            result = self.original.horovod_torch_wait_and_clear(handle)
            # After an error Horovod may be about to drop tensors while it keeps others waiting.
            self._held.pop(handle, None)
            return result
        except RuntimeError as error:
            if known := self._explanation(handle, str(error)):
                raise RuntimeError(f"{error} {known}") from error
            raise
        finally:
            self._names.pop(handle, None)

    def _explanation(self, handle: int, error: str) -> str:
        """What our classes know about an operation that has failed."""
        if "with Join" in error and ".gq." in self.name(handle):
            return _JOINED
        return self._described(handle)

    def _described(self, handle: int) -> str:
        """What our classes say of an operation's tensors; "" where these are none of theirs."""
        of, *_ = hvd_ops._handle_map.get(handle, (None,))
        members = of if isinstance(of, (tuple, list)) else (of,)
        explained = (own.explain(member) for own in self.frontends for member in members)
        return " ".join(dict.fromkeys(text for text in explained if text))

    def _reset(self) -> Any:
        """Of hvd.shutdown(): Horovod begins to count again."""
        if self.before_shutdown is not None:
            self.before_shutdown()
        with self._lock:
            self.session = object()
            self._others = None
            self._names.clear()
            self._held.clear()
            self.places.clear()
            self.joined = False
            return self.original.horovod_torch_reset()


def _removing(own: Library) -> Callable[..., int | None]:
    """What stands in the place of the method that removes a process set, of every framework."""

    def remove(basics: Any, number: int) -> int | None:
        removed: int | None = own.remove_process_set(basics, number)
        for frontend in list(own.frontends):
            frontend.after_removal()
        return removed

    return remove


def _held(arguments: tuple[Any, ...]) -> list[torch.Tensor]:
    """Views that keep the tensors of an operation alive without Python's part in them.

    Whoever drops the last reference to a tensor besides its Python object's needs Python's lock
    (PyTorch 2.13). At shutdown Horovod's thread drops the tensors in flight while it holds the lock
    of its table of process sets. An operation that begins waits for that one, and holds Python's:
    the rank stands still for ever, also without this package. A view has a reference of its own to
    the tensor that it is of, so Horovod's is never the last.
    """
    held: list[torch.Tensor] = []
    last = None
    for own in arguments:
        if isinstance(own, torch.Tensor):
            if own is not last:  # the result may take the place of the input
                held.append(own.view_as(own))
                last = own
        elif isinstance(own, list | tuple):
            held += [each.view_as(each) for each in own]
        elif isinstance(own, bytes | str):
            break  # the name stands behind all tensors
    return held


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


def note_operation(on_gpu: bool) -> None:
    """Remember that gradients are reduced on a GPU, or in host memory, in this session.

    Raises ValueError where a rank that has joined would keep them waiting.
    """
    if (own := library()) is not None:
        if on_gpu and own.joined:
            raise ValueError(_JOINED_BEFORE)
        own.places.add(on_gpu)


def session() -> object:
    """What stays the same from one hvd.init() to hvd.shutdown(), and no longer.

    (Without a Library, any hvd.init() counts, also of a rank that has not shut Horovod down.)
    """
    own = library()
    return hvd_ops._handle_map if own is None else own.session


def install(speaks: bool = False) -> None:
    """Put a Library in the place of Horovod's, once; not after uninstall(). `speaks`: log it."""
    if library() is not None or not _wanted:
        return
    own = hvd_ops.mpi_lib = Library(hvd_ops.mpi_lib)
    HorovodBasics._remove_process_set_impl = _removing(own)
    if speaks:
        own.recurring = _Recurring()
        _log.say(
            logging.DEBUG,
            "numbering",
            "operations of Horovod without a name are numbered as if there were no compression "
            "(gq_horovod.torch.numbering stands in for horovod.torch.mpi_ops.mpi_lib)",
        )


def uninstall() -> None:
    """Put Horovod's library back, for good.

    From then on an operation without a name may hang between backward() and step(), and what
    follows an hvd.join() that ranks called at different steps is not agreed on again. A process set
    by which gradients go inside or between nodes must not be removed any more.
    """
    global _wanted
    _wanted = False
    if (own := library()) is not None:
        hvd_ops.mpi_lib = own.original
        HorovodBasics._remove_process_set_impl = own.remove_process_set
