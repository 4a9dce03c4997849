"""transport="mpi": codes travel as messages between ranks, beside Horovod's own operations.

Horovod still exchanges the norms, which also settles what MPI needs to know: ranks may start their
tensors in different orders, so every rank proposes a number for a tensor with its norms, and all
take that of the group's first rank to tell the messages apart.

Importing this module imports mpi4py, which starts MPI where Horovod has not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from mpi_ops.chunks import Chunk
from mpi_ops.codec import Payload
from mpi_ops.dither import Stage
from mpi_ops.exchange import TAGS, Exchange
from mpi_ops.kernels.host import Buffer

from .config import Plan

# Exchanges under way. They own the memory that MPI reads and writes, so they have to outlive a
# pipeline that is given up.
_running: set[Running] = set()


class Running:
    """An exchange under way; `Handle` of the pipeline. It advances when it is asked."""

    def __init__(self, exchange: Exchange) -> None:
        self._steps = exchange.steps()
        _running.add(self)
        self.ready()  # the first messages go out now

    def ready(self) -> bool:
        """Advance; whether the result is complete."""
        if next(self._steps, self) is self:
            _running.discard(self)
            return True
        return False

    def wait(self) -> None:
        """Block until the result is complete."""
        while not self.ready():
            pass


class Messages:
    """Exchanges among the ranks of one group; `Exchanges` of the pipeline."""

    def __init__(self, ranks: list[int]) -> None:
        """Collective over `ranks` of the world, which are given in the same order on each."""
        self._comm = _communicator(tuple(ranks))
        limit = MPI.COMM_WORLD.Get_attr(MPI.TAG_UB) or 32767  # what the standard guarantees
        self._numbers = (min(limit, 2**30) + 1) // TAGS
        self._next = 0

    def propose(self) -> int:
        """A number that this rank uses for no other exchange in flight."""
        self._next = (self._next + 1) % self._numbers
        return self._next

    def start(
        self,
        number: int,
        x: Buffer,
        norms: NDArray[np.int32],
        plan: Plan,
        dither: Callable[[int, Stage], NDArray[np.uint32]],
        deliver: Callable[[Chunk, Payload], None],
    ) -> Running:
        """Reduce the codes of `x` over ranks."""
        return Running(Exchange(self._comm, number * TAGS, x, norms, plan, dither, deliver))


@cache
def _communicator(ranks: tuple[int, ...]) -> MPI.Intracomm:
    """A communicator of our own; it lives as long as MPI, since hvd.init() may ask again."""
    world = MPI.COMM_WORLD
    return world.Create_group(world.Get_group().Incl(ranks))


def problem(rank: int, size: int) -> str | None:
    """Why MPI cannot be used beside a Horovod job in which this is `rank` of `size`, or None."""
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
