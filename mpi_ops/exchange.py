"""Reduce a tensor's codes among the ranks of a communicator by messages between pairs of ranks.

Each rank sends every other rank its share of the codes, reduces its own share from all ranks' codes
(standard: an integer sum; exponential and two-hop: decoded, averaged, rounded once), and sends the
result to every other rank. A rank sends 2(n-1)/n times the compressed size, the least that an
Allreduce can do, and one rank decides each share, so all ranks get the same bytes.

Tensors are cut into chunks, several of which are in flight: while some travel, others are
quantized, reduced or decoded. Importing this module imports mpi4py, and calls nothing of MPI.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from . import codec
from .chunks import CHUNKS_IN_FLIGHT, Chunk, chunks, message_elements
from .kernels.host import Buffer
from .stages import Stages

Steps = Generator[None, None, None]  # yields whenever there is nothing to do but wait

# What one exchange uses: one for each of the two messages of every chunk in flight. MPI delivers
# messages of one tag in the order in which they were sent, so later chunks use them again.
TAGS = 2 * CHUNKS_IN_FLIGHT


@dataclass(frozen=True)
class Exchange:
    """One tensor to reduce. Exchanges in flight on one communicator must not share tags."""

    comm: MPI.Intracomm
    first_tag: int  # the same on every rank; uses TAGS tags from here
    x: Buffer  # must not change until the exchange is complete
    norms: NDArray[np.int32]  # of all ranks
    stages: Stages  # of this rank of `comm`
    deliver: Callable[[Chunk, codec.Payload], None]  # takes the reduced payload of a chunk

    def steps(self) -> Steps:
        """Do it; every chunk is delivered at the end. A chunk is delivered after its x was read."""
        count = self.x.size
        window: deque[Steps] = deque()
        for chunk in chunks(count, self.norms, self.stages.plan, message_elements(count)):
            if len(window) == CHUNKS_IN_FLIGHT:
                yield from _oldest(window)
            window.append(self._reduce(chunk))
        while window:
            yield from _oldest(window)

    def _reduce(self, chunk: Chunk) -> Steps:
        """Quantize a chunk, reduce this rank's share of it, gather all shares."""
        comm, stages, plan = self.comm, self.stages, self.stages.plan
        x = chunk.of(self.x)
        tag = self.first_tag + 2 * (chunk.index % CHUNKS_IN_FLIGHT)
        # Each rank begins with its neighbour, so that not all of them send to the same one first.
        others = [(comm.rank + step) % comm.size for step in range(1, comm.size)]

        # Reduced shares come where the codes have been. They may be longer.
        reduced = np.empty((comm.size, codec.reduced_size(x.size, plan)), codec.payload_dtype(plan))
        size = codec.shard_size(x.size, plan)
        payload = reduced.reshape(-1)[: comm.size * size].reshape(comm.size, size)
        pieces = np.empty_like(payload)
        requests = [comm.Irecv(pieces[rank], rank, tag) for rank in reversed(others)]
        stages.quantize(chunk, x, out=payload.reshape(-1))
        requests += [comm.Isend(payload[rank], rank, tag) for rank in others]
        pieces[comm.rank] = payload[comm.rank]
        yield from finish(requests)

        requests = [comm.Irecv(reduced[rank], rank, tag + 1) for rank in reversed(others)]
        stages.reduce(chunk, pieces, out=reduced[comm.rank])
        del pieces
        requests += [comm.Isend(reduced[comm.rank], rank, tag + 1) for rank in others]
        yield from finish(requests)
        self.deliver(chunk, reduced.reshape(-1))


def finish(requests: list[MPI.Request]) -> Steps:
    """Wait for messages."""
    while not MPI.Request.Testall(requests):
        yield


def _oldest(window: deque[Steps]) -> Steps:
    """Advance the chunks of a window until its oldest is complete, and drop that one."""
    while True:
        for chunk in list(window):
            if next(chunk, chunk) is chunk and chunk is window[0]:
                window.popleft()
                return
        yield
