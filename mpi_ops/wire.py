"""What a tensor is on the wire: the sizes that `chunks` and `codec` really make, in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from . import lanes
from .chunks import MINIMUM_CHUNKS, chunk_elements, message_elements, spans
from .layout import layout
from .scheme import Plan
from .sizes import payload_dtype

NORM_BYTES = 4


@dataclass(frozen=True)
class Wire:
    """What one tensor is on the wire."""

    payload: int  # bytes of codes of one rank, padding included
    norms: int  # bytes of one rank's norms
    sent: float  # bytes that a rank sends: 2(n-1)/n times both

    def bits_per_element(self, count: int) -> float:
        """Bits of codes and norms for each of `count` elements."""
        return 8 * (self.payload + self.norms) / count


def wire(count: int, plan: Plan, transport: str = "horovod") -> Wire:
    """Bytes of a tensor of `count` elements.

    Without its token (`gq_horovod.path.token.BYTES`); `gq_horovod.advisor.model.cost` has whole
    steps.
    """
    payload = sum(parcel_bytes((count,), plan, transport))
    norms = NORM_BYTES * norm_count(count, plan)
    return Wire(payload, norms, sent_bytes(payload + norms, plan.world_size))


@lru_cache(maxsize=4096)  # the advisor asks for every parcel, at every bandwidth that it tries
def parcel_bytes(counts: tuple[int, ...], plan: Plan, transport: str) -> tuple[int, ...]:
    """Bytes of each parcel's payload of tensors that are reduced together, padding included."""
    item = payload_dtype(plan).itemsize
    limit = None if transport == "mpi" else chunk_elements(plan.world_size)
    skipped = 0
    if len(counts) == 1:
        # Of a model that is one tensor, as the advisor may be asked about: all but its last chunks
        # are alike.
        wanted = message_elements(counts[0], plan.world_size) if limit is None else limit
        whole = next((stop for _, stop in spans(counts[0], plan, wanted)), 1)
        # As many as remain have chunks of the same size.
        skipped = max(counts[0] // whole - 2 * MINIMUM_CHUNKS, 0)
        counts = (counts[0] - skipped * whole,)
    found = []
    for parcel in layout(counts, plan, limit).parcels:
        if not parcel.shares:
            found.append(parcel.size * item)
        else:  # as many whole units for every rank; two hops, the second with norms of its own
            hops = parcel.share_size + parcel.reduced_size
            found.append(hops * plan.world_size * item // 2)
    return tuple(found[:1] * skipped + found)


def norm_count(count: int, plan: Plan) -> int:
    """Norms of a tensor of `count` elements."""
    return lanes.blocks(count, plan.block_for(count))


def sent_bytes(size: float, ranks: int) -> float:
    """Bytes that a rank sends when `size` bytes are reduced: 2(n-1)/n times as many."""
    return 2 * (ranks - 1) / ranks * size
