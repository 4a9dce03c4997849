"""transport="mpi": codes travel as messages between ranks, beside Horovod's own operations.

Horovod still exchanges the norms, which also settles what MPI needs to know: ranks may start their
tensors in different orders, so every rank proposes a number for a tensor with its norms, and all
take that of the group's first rank to tell the messages apart.

Importing this module imports mpi4py, which starts MPI where Horovod has not, unless the program
has set mpi4py.rc.initialize = False.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpi_ops import exchange as messages
from mpi_ops import lifetime
from mpi_ops.codec import Payload
from mpi_ops.exchange import TAGS, Exchange
from mpi_ops.kernels.host import Tensors
from mpi_ops.layout import Parcel
from mpi_ops.nodes import ROUNDS_IN_FLIGHT
from mpi_ops.stages import Stages, Steps

from .pipeline import Array, Pipeline

# Exchanges under way. They own the memory that MPI reads and writes, so they have to outlive a
# pipeline that is given up.
_running: set[Running] = set()

# How long a rank goes on with its own exchanges when another one has ended.
_LAST_SECONDS = 1.0
# How long the norms of a tensor may take from one rank to another.
_START_SECONDS = 0.2
_POLL_SECONDS = 1e-3

_pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()


class Running:
    """An exchange under way; `Handle` of the pipeline. It advances when it is asked."""

    def __init__(self, steps: messages.Steps, result: Any = None) -> None:
        """Begin it; `result` is what wait() returns."""
        self._steps, self._result = steps, result
        self.failed = self._complete = False
        _running.add(self)
        self.ready()  # the first messages go out now

    def ready(self) -> bool:
        """Advance; whether the result is complete."""
        with _mpi.lock:
            if _mpi.ended and not self._complete:
                raise RuntimeError(
                    "GlobalQSGD: MPI was shut down while codes were on their way, because another "
                    "rank has ended; see the first error of the ranks that stopped."
                )
            return self.advance()

    def advance(self) -> bool:
        """The same for whoever holds the lock, while MPI may be called."""
        if not self._complete:
            try:
                self._complete = next(self._steps, self) is self
            except Exception:
                self.failed = True  # what it has begun cannot be completed any more
                raise
        if self._complete and not self.failed:
            _running.discard(self)
        return self._complete

    def wait(self) -> Any:
        """The result, after blocking until it is complete."""
        while not self.ready():
            pass
        return self._result


class _Library:
    """When the MPI library may be called.

    Horovod's own thread ends MPI where it has started it, as soon as any rank shuts Horovod down.
    Polling messages at that time is a crash. But MPI_Finalize first deletes the attributes of
    MPI_COMM_SELF, so the one that is set here can wait until nobody polls, and close the door.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()  # held by whoever polls
        self.ended = False
        self._watched = False

    def watch(self) -> None:
        """Notice when MPI ends. MPI must have been started, which an import does not ensure."""
        with self.lock:
            if not self._watched:
                MPI.COMM_SELF.Set_attr(MPI.Comm.Create_keyval(delete_fn=self._end), None)
                self._watched = True

    def _end(self, *arguments: object) -> None:
        """MPI is about to end: receive what others had sent before they ended, and close the door.

        A rank that is done with its last step may end while this one still has messages of it to
        read.
        """
        begin = time.monotonic()
        while True:
            with self.lock:
                for exchange in list(_running):
                    with contextlib.suppress(Exception):  # its owner is told when it asks
                        exchange.advance()
                late = time.monotonic() > begin + _LAST_SECONDS
                if late or not _running or any(exchange.failed for exchange in _running):
                    self.ended = True
                    return
            time.sleep(_POLL_SECONDS)


def leave() -> None:
    """At the end of this process: complete what others wait for, or end the job with an error.

    They would wait for ever: a rank that has ended answers no messages, and where Horovod has not
    started MPI itself its shutdown does not reach those who poll.
    """
    begin = time.monotonic()
    waiting = [pipeline for pipeline in _pipelines if pipeline.busy]
    while waiting and time.monotonic() < begin + _START_SECONDS:
        for pipeline in waiting:
            pipeline.poll()  # may start exchanges, which others have started too
        time.sleep(_POLL_SECONDS)
    while _running and not _mpi.ended and not any(exchange.failed for exchange in _running):
        for exchange in list(_running):
            with contextlib.suppress(Exception):  # known by now: this is the end
                exchange.ready()
        if time.monotonic() > begin + lifetime.LEAVE_SECONDS:
            break
        time.sleep(_POLL_SECONDS)
    if _running and not _mpi.ended:
        lifetime.end_job("GlobalQSGD")


class Messages:
    """Exchanges among the ranks of one group; `Exchanges` of the pipeline."""

    def __init__(
        self, members: list[int], across: list[int] | None = None, node: list[int] | None = None
    ) -> None:
        """Collective over `members` of the world, which are given in the same order on each.

        By nodes, all messages are among those of one place, `across`, or those of this `node`.
        """
        _mpi.watch()
        everyone = tuple(members)
        self._comm = _communicator(everyone, tuple(across or members))
        self._node = None if node is None else _communicator(everyone, tuple(node), "node")
        limit = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32767  # what the standard guarantees
        # Of a reduction by nodes several rounds are in flight.
        self._numbers = (min(limit, 2**30) + 1) // TAGS // (ROUNDS_IN_FLIGHT if node else 1)
        self._counter = _counter(everyone)

    def proposals(self, rank: int, ranks: int) -> list[int]:
        """A number for the next exchange, at the place of this rank among zeros for the others."""
        proposals = [0] * ranks
        proposals[rank] = next(self._counter) % self._numbers + 1
        return proposals

    def inside(self, number: int) -> Inside:
        """Collectives among the ranks of this node."""
        assert self._node is not None
        return Inside(self._node, number * TAGS)

    def start(
        self,
        number: int,
        x: Tensors,
        steps: Steps,
        norms: NDArray[np.int32],
        stages: Stages,
        deliver: Callable[[Parcel, Payload], None],
    ) -> Running:
        """Reduce the codes of `x` over ranks."""
        return Running(Exchange(self._comm, number * TAGS, x, steps, norms, stages, deliver).run())


class Inside(NamedTuple):
    """Collectives of float32 arrays by messages; those of one number in the same order on each."""

    comm: MPI.Intracomm
    first_tag: int

    def alltoall(self, array: Array, name: str, sizes: Sequence[int]) -> Running:
        """Piece i of rank j becomes piece j of rank i; pieces of `array` have these sizes."""
        out = np.empty(sizes[self.comm.rank] * self.comm.size, array.dtype)
        return Running(messages.alltoall(self.comm, self.first_tag, array, out, sizes), out)

    def allgather(self, array: Array, name: str, sizes: Sequence[int]) -> Running:
        """The arrays of all ranks, which have these sizes, one after the other."""
        out = np.empty(sum(sizes), array.dtype)
        return Running(messages.allgather(self.comm, self.first_tag + 1, array, out, sizes), out)


@cache
def _leave_at_exit() -> None:
    atexit.register(leave)  # after Horovod's own, and so before it


def serve(pipeline: Pipeline) -> None:
    """Complete its exchanges at the end of this process as well."""
    _pipelines.add(pipeline)
    _leave_at_exit()


@cache
def _communicator(
    members: tuple[int, ...], ranks: tuple[int, ...], purpose: str = ""
) -> MPI.Intracomm:
    """A communicator of our own; it lives as long as MPI, since hvd.init() may ask again.

    It has `ranks`, for what `members` reduce: numbers of exchanges are told apart among them alone.
    Ranks of a place or of a node may be a process set as well, which has its own numbers.
    """
    world = MPI.COMM_WORLD
    return world.Create_group(world.Get_group().Incl(ranks))


@cache
def _counter(members: tuple[int, ...]) -> itertools.count[int]:
    """Numbers for the exchanges of a group of ranks, which several optimizers may share."""
    return itertools.count(1)


_mpi = _Library()


def problem(rank: int, size: int) -> str | None:
    """Why MPI cannot be used beside a Horovod job in which this is `rank` of `size`, or None."""
    outside = lifetime.problem()
    if outside is not None:
        return outside
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (rank, size):
        return (
            f"mpi4py sees rank {world.rank} of {world.size} where Horovod sees rank {rank} of "
            f"{size}: build mpi4py for the MPI that Horovod uses, and start with mpirun"
        )
    if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
        return (
            "MPI was started without MPI_THREAD_MULTIPLE: call hvd.init() before anything that "
            "starts MPI, or use an MPI library that supports it"
        )
    return None
