"""Reduce a bucket's codes among the ranks of a communicator by messages between pairs of ranks.

Each rank sends every other rank its share of the codes, reduces its own share from all ranks' codes
(standard: an integer sum; exponential and two-hop: decoded, averaged, rounded once), and sends the
result to every other rank. A rank sends 2(n-1)/n times the compressed size, the least that an
Allreduce can do, and one rank decides each share, so all ranks get the same bytes.

Short pieces among many ranks go through a rank between (`chunks.forwarded`). Ranks stand in rows
and columns. A rank sends what is for a column to the rank there in its own row, which sends it
along the column. Shares go back along the column, and all of its shares along the rows. Nothing is
rounded between, so the results are the same bytes.

Parcels are chunks of this transport's own size, and several are in flight: while some travel,
others are quantized, reduced or decoded. Importing this module imports mpi4py, and calls nothing of
MPI.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from . import codec
from .chunks import CHUNKS_IN_FLIGHT, columns, forwarded
from .kernels.host import Tensors
from .layout import Parcel
from .stages import Stages
from .stages import Steps as Numbers

Steps = Generator[None, None, None]  # yields whenever there is nothing to do but wait

# What one exchange uses: one for each of the two messages of every parcel in flight. MPI delivers
# messages of one tag in the order in which they were sent, so later parcels use them again.
# The two messages by rows and by columns have one tag: they are between other ranks.
TAGS = 2 * CHUNKS_IN_FLIGHT


@dataclass(frozen=True)
class Exchange:
    """One bucket to reduce. Exchanges in flight on one communicator must not share tags."""

    comm: MPI.Intracomm
    first_tag: int  # the same on every rank; uses TAGS tags from here
    x: Tensors  # must not change until the exchange is complete
    steps: Numbers
    norms: NDArray[np.int32]  # of all ranks
    stages: Stages  # of this rank of `comm`, with a layout for messages
    deliver: Callable[[Parcel, codec.Payload], None]  # takes the reduced payload of a parcel

    def run(self) -> Steps:
        """Do it; every parcel is delivered at the end. One is delivered after its x was read."""
        near = codec.near(self.norms, self.x)
        parcels = self.stages.layout.parcels
        yield from in_window((self._reduce(own, near) for own in parcels), CHUNKS_IN_FLIGHT)

    def _reduce(self, parcel: Parcel, near: codec.Norms) -> Steps:
        """Quantize a parcel, reduce this rank's share of it, gather all shares.

        `near` are the norms where x lies.
        """
        comm, stages = self.comm, self.stages
        tag = self.first_tag + 2 * (parcel.index % CHUNKS_IN_FLIGHT)

        # Reduced shares come where the codes have been. They may be longer.
        dtype = codec.payload_dtype(stages.plan)
        reduced = np.empty((comm.size, parcel.reduced_size), dtype)
        payload = reduced.reshape(-1)[: parcel.size].reshape(comm.size, parcel.share_size)
        pieces = np.empty_like(payload)

        def quantize() -> None:
            stages.quantize(parcel, self.x, self.steps, near, payload.reshape(-1))

        yield from alltoall(comm, tag, payload, pieces, before=quantize)

        def reduce() -> None:
            nonlocal pieces
            stages.reduce(parcel, pieces, self.steps, self.norms, reduced[comm.rank])
            del pieces

        yield from allgather(comm, tag + 1, reduced[comm.rank], reduced, before=reduce)
        self.deliver(parcel, reduced.reshape(-1))


def alltoall(
    comm: MPI.Intracomm,
    tag: int,
    array: NDArray[Any],
    out: NDArray[Any],
    sizes: Sequence[int] | None = None,
    before: Callable[[], None] | None = None,
) -> Steps:
    """Piece i of rank j becomes piece j of rank i, in `out`.

    Pieces of `array` have so many elements, or are equal parts; the same on every rank. `before`
    fills it, when receives are there.
    """
    pieces = out.reshape(comm.size, -1)
    if sizes is not None or not forwarded(comm.size, pieces[0].nbytes):
        own = _pieces(array, comm.size, sizes)
        yield from _swap(comm, tag, range(comm.size), own, pieces, before)
        return
    row, column = _row(comm), _column(comm)
    # By column, and there by row; pieces for a column are copied as they are sent.
    wanted = array.reshape(len(column), len(row), -1).swapaxes(0, 1)
    held = np.empty(wanted.shape, array.dtype)
    yield from _swap(comm, tag, row, wanted, held, before)
    found = out.reshape(len(column), len(row), -1)
    yield from _swap(comm, tag, column, held.swapaxes(0, 1), found)


def allgather(
    comm: MPI.Intracomm,
    tag: int,
    array: NDArray[Any],
    out: NDArray[Any],
    sizes: Sequence[int] | None = None,
    before: Callable[[], None] | None = None,
) -> Steps:
    """The arrays of all ranks, in `out`; they have so many elements each, or are equally large.

    `before` fills `array`, when receives are there.
    """
    if sizes is not None or not forwarded(comm.size, array.nbytes):
        rows = _pieces(out, comm.size, sizes)
        yield from _swap(comm, tag, range(comm.size), [array] * comm.size, rows, before)
        return
    row, column = _row(comm), _column(comm)
    held = np.empty((len(column), array.size), array.dtype)
    yield from _swap(comm, tag, column, [array] * len(column), held, before)
    found = np.empty((len(row), *held.shape), array.dtype)
    yield from _swap(comm, tag, row, [held] * len(row), found)
    out.reshape(len(column), len(row), -1)[:] = found.swapaxes(0, 1)


def _row(comm: MPI.Intracomm) -> range:
    """The ranks of this rank's row."""
    size = columns(comm.size)
    begin = comm.rank // size * size
    return range(begin, begin + size)


def _column(comm: MPI.Intracomm) -> range:
    """The ranks of this rank's column."""
    size = columns(comm.size)
    return range(comm.rank % size, comm.size, size)


def _swap(
    comm: MPI.Intracomm,
    tag: int,
    ranks: Sequence[int],
    own: Sequence[NDArray[Any]] | NDArray[Any],
    pieces: Sequence[NDArray[Any]] | NDArray[Any],
    before: Callable[[], None] | None = None,
) -> Steps:
    """Among some ranks, this one too: own[i] goes to ranks[i], and pieces[i] comes from there.

    The first step sends: whoever waits for another exchange need not ask for this one.
    """
    here = ranks.index(comm.rank)
    # The neighbour first: so not all of them send to the same one at first.
    others = [(here + step) % len(ranks) for step in range(1, len(ranks))]
    requests = [comm.Irecv(pieces[place], ranks[place], tag) for place in reversed(others)]
    if before is not None:
        before()
    requests += [
        comm.Isend(np.ascontiguousarray(own[place]), ranks[place], tag) for place in others
    ]
    pieces[here][...] = own[here]
    yield from finish(requests)


def largest(
    comm: MPI.Intracomm, tag: int, array: NDArray[np.int32]
) -> Generator[None, None, NDArray[np.int32]]:
    """The element-wise maximum over ranks; of numbers that are not negative."""
    share = -(-array.size // comm.size)
    padded = np.zeros((comm.size, share), array.dtype)
    padded.reshape(-1)[: array.size] = array
    pieces, found = np.empty_like(padded), np.empty_like(padded)
    yield from alltoall(comm, tag, padded, pieces)
    yield from allgather(comm, tag + 1, pieces.max(axis=0), found)
    return found.reshape(-1)[: array.size]


def _pieces(array: NDArray[Any], ranks: int, sizes: Sequence[int] | None) -> Sequence[NDArray[Any]]:
    """One for each rank, of so many elements, or equal parts."""
    if sizes is None:
        return list(array.reshape(ranks, -1))
    return np.split(array.reshape(-1), np.cumsum(sizes)[:-1])


def finish(requests: list[MPI.Request]) -> Steps:
    """Wait for messages."""
    while not MPI.Request.Testall(requests):
        yield


def in_window(every: Iterable[Steps], size: int) -> Steps:
    """Do all of them, `size` at a time; each next one begins when the oldest is complete."""
    window: deque[Steps] = deque()
    for own in every:
        if len(window) == size:
            yield from _oldest(window)
        window.append(own)
    while window:
        yield from _oldest(window)


def _oldest(window: deque[Steps]) -> Steps:
    """Advance the chunks of a window until its oldest is complete, and drop that one."""
    while True:
        for chunk in list(window):
            if next(chunk, chunk) is chunk and chunk is window[0]:
                window.popleft()
                return
        yield
