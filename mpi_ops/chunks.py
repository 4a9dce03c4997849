"""Cut a tensor into chunks that travel by themselves: while some do, others are computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from . import lanes, sizes
from .kernels.host import ITEM_BYTES, Buffer
from .scheme import Plan

# Elements of a chunk that one operation of Horovod carries. It still fills the network. Operations
# wait for as many messages, one after the other, as there are ranks: so chunks grow with them.
# Beyond MANY_RANKS they grow as the root, because fewer chunks overlap less (docs/advisor.md).
CHUNK_ELEMENTS = 1 << 21
CHUNK_ELEMENTS_PER_RANK = 1 << 18
MANY_RANKS = 256

# Chunks that travel as messages between ranks (`mpi_ops.exchange`). A chunk's buffers hold twice
# its compressed size. Four of at least eight chunks in flight keep that below the compressed size
# of the tensor; large chunks make messages that fill the network, and what a message costs by
# itself is too much for chunks smaller than MINIMUM_CHUNK. Both are those of MESSAGE_RANKS ranks.
# With more, the largest chunks grow as the ranks do, so that messages stay as large. The smallest
# ones grow as their square up to that: a chunk costs as many messages as there are ranks. Then a
# tensor may have fewer than eight, and its buffers up to twice its compressed size.
CHUNKS_IN_FLIGHT = 4
MINIMUM_CHUNKS = 8
MAXIMUM_CHUNK = 1 << 20  # elements
MINIMUM_CHUNK = 1 << 17  # elements
MESSAGE_RANKS = 64

# Pieces that one rank has for another, of at most so many bytes, go through a rank between where
# there are so many ranks. In rows and columns of them a rank sends some 2√n messages in place of
# n-1, and codes twice. With fewer ranks the latency of another round would cost more than the
# messages do, and with larger pieces the bytes would on links of 2.5 Gbit/s (docs/advisor.md).
FORWARDED_BYTES = 1024
FORWARDING_RANKS = 32

# Chunks begin at whole blocks and at whole words of lanes of any width, so they share neither norms
# nor words.
_UNIT = lanes.ROW * lanes.WORD_BITS


@dataclass(frozen=True)
class Chunk:
    """Elements `start` to `stop` of a tensor."""

    index: int
    start: int
    stop: int
    norms: NDArray[np.int32]  # of its blocks

    def of(self, tensor: Buffer) -> Buffer:
        """The memory of the chunk."""
        pointer = tensor.pointer + self.start * ITEM_BYTES[tensor.dtype]
        return tensor._replace(pointer=pointer, size=self.stop - self.start)


def chunk_elements(ranks: int) -> int:
    """Elements of a chunk that one operation of Horovod carries, among so many ranks."""
    growth = min(ranks, math.isqrt(MANY_RANKS * ranks))
    return max(CHUNK_ELEMENTS, CHUNK_ELEMENTS_PER_RANK * growth)


def message_elements(count: int, ranks: int) -> int:
    """Elements of a chunk that travels as messages among so many ranks, of `count` elements."""
    ranks = max(ranks, MESSAGE_RANKS)
    most = MAXIMUM_CHUNK * ranks // MESSAGE_RANKS
    least = min(MINIMUM_CHUNK * ranks**2 // MESSAGE_RANKS**2, most)
    return min(max(count // MINIMUM_CHUNKS, least), most)


@cache
def columns(ranks: int) -> int:
    """Ranks in a row, where so many ranks make as many rows: the divisor that is next to the root.

    At least as many as there are rows. All of them, where the number is prime.
    """
    rows = next(own for own in range(math.isqrt(ranks), 0, -1) if ranks % own == 0)
    return ranks // rows


def forwarded(ranks: int, size: int) -> bool:
    """Whether pieces of `size` bytes, of each rank for each, go through ranks between."""
    several = ranks >= FORWARDING_RANKS and columns(ranks) < ranks
    return several and size <= FORWARDED_BYTES


def spans(count: int, plan: Plan, wanted: int) -> Iterator[tuple[int, int]]:
    """Where the chunks, of about `wanted` elements each, of `count` elements begin and end."""
    unit = math.lcm(plan.block_size or _UNIT, _UNIT)
    if not plan.in_flight:
        unit = math.lcm(unit, sizes.share_unit(plan))
    size = -(-wanted // unit) * unit
    for start in range(0, count, size):
        yield start, min(start + size, count)


def chunks(count: int, norms: NDArray[np.int32], plan: Plan, wanted: int) -> Iterator[Chunk]:
    """The chunks, of about `wanted` elements each, of a tensor of `count` elements.

    Where the plan has one norm for the tensor, all chunks have it.
    """
    for index, (start, stop) in enumerate(spans(count, plan, wanted)):
        if plan.block_size is None:
            own = norms
        else:
            own = norms[start // plan.block_size : lanes.blocks(stop, plan.block_size)]
        yield Chunk(index, start, stop, own)
