"""Two levels of reduction: exact sums inside a node, codes between nodes.

For each *round* of a bucket, among nodes of as many ranks each:

1. The elements are packed as float32, and each rank gets all of its node's for one *share*. It adds
   them: the share's mean over the node (`Round.packed`).
2. Ranks of the same place in their nodes reduce their share with codes, like a bucket of its own,
   with levels, norms and dithers for as many parties as there are nodes (`Round.parts`).
3. The node's ranks gather the shares, and unpack them.

A share has whole blocks and whole groups of random numbers of each tensor. So, where a block has a
size, the codes are those of a flat reduction of the nodes' means. Shares differ in size by up to
two of these, and nothing is packed between them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import lanes, sizes
from .kernels.interface import ITEM_BYTES, SEGMENT, Tensors
from .layout import addresses, layout, places_of_norms
from .scheme import Plan
from .stages import Stages

# Rounds of a bucket that are under way at one time: while some travel, others are computed.
ROUNDS_IN_FLIGHT = 3


class Placement(NamedTuple):
    """Where the ranks of a group are: nodes with as many of them each."""

    nodes: tuple[tuple[int, ...], ...]  # the ranks of each

    @property
    def ranks_per_node(self) -> int:
        return len(self.nodes[0])

    @property
    def has_levels(self) -> bool:
        """Whether there are several nodes, with several ranks each."""
        return len(self.nodes) > 1 and self.ranks_per_node > 1

    def place(self, rank: int) -> int:
        """The place of a rank in its node."""
        return next(ranks.index(rank) for ranks in self.nodes if rank in ranks)

    def inside(self, rank: int) -> tuple[int, ...]:
        """The ranks of its node."""
        return next(ranks for ranks in self.nodes if rank in ranks)

    def across(self, place: int) -> tuple[int, ...]:
        """The ranks with a place in their nodes."""
        return tuple(sorted(ranks[place] for ranks in self.nodes))


def placement(nodes: Sequence[int]) -> Placement | str:
    """Where ranks are, by the number of each one's node; or why there are no two levels."""
    ranks: dict[int, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks.setdefault(node, []).append(rank)
    counts = [len(own) for own in ranks.values()]
    if len(set(counts)) > 1:
        return f"nodes have {', '.join(map(str, counts))} ranks, and not as many each"
    return Placement(tuple(map(tuple, ranks.values())))


class Part(NamedTuple):
    """Elements of one of a bucket's tensors."""

    tensor: int  # its place in the bucket
    start: int
    stop: int
    flat: int  # place of the first one among the packed ones of the round


@dataclass(frozen=True, eq=False)  # `rounds` makes it once, and what caches it hashes no parts
class Round:
    """What of a bucket is reduced at one time."""

    index: int
    sizes: tuple[int, ...]  # elements of each share; a share without parts has one
    shares: tuple[tuple[Part, ...], ...]  # by the place of the rank that reduces them

    @property
    def size(self) -> int:
        """Packed elements."""
        return sum(self.sizes)

    @cached_property
    def _all(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[Any]]:
        parts = [part for own in self.shares for part in own]
        segments = np.zeros(len(parts), dtype=SEGMENT)
        segments["elements"] = [part.stop - part.start for part in parts]
        segments["payload"] = [part.flat for part in parts]
        segments["stop"] = [*segments["payload"][1:], self.size]
        tensors = np.array([part.tensor for part in parts], dtype=np.int64)
        return tensors, np.array([part.start for part in parts], dtype=np.int64), segments

    def packed(self, x: Tensors) -> NDArray[Any]:
        """A segment for each part of `x`, with its place among the packed elements."""
        tensor, starts, template = self._all
        own = template.copy()
        own["x"] = addresses(x, tensor, starts)
        return own

    def parts(self, place: int, share: int) -> NDArray[np.uint64]:
        """The addresses of the parts of a share, where that begins with the address `share`."""
        begin = sum(self.sizes[:place])
        offsets = [ITEM_BYTES["float32"] * (part.flat - begin) for part in self.shares[place]]
        return np.array(offsets, dtype=np.uint64) + np.uint64(share)

    def norms(self, place: int, plan: Plan) -> tuple[int, int, int]:
        """Where the norms of a share are among those of the round.

        The place of the first one, their number, and that of all. Where a tensor has one norm, it
        is that of all of its parts in the round.
        """
        if plan.block_size is None:
            tensors = list(dict.fromkeys(part.tensor for own in self.shares for part in own))
            parts = self.shares[place]
            begin = tensors.index(parts[0].tensor) if parts else 0
            return begin, len(parts), len(tensors)
        counts = [
            sum(places_of_norms(part.stop - part.start, plan) for part in own)
            for own in self.shares
        ]
        return sum(counts[:place]), counts[place], sum(counts)


def unit(plan: Plan) -> int:
    """Elements that shares are made of: whole blocks, and whole groups of random numbers.

    Where ranks reduce shares of their codes, these are whole as well: a share may have the end of a
    chunk, and the chunk behind it begins with another one.
    """
    own = math.lcm(plan.block_size or lanes.GROUP, lanes.GROUP)
    return own if plan.in_flight else math.lcm(own, sizes.share_unit(plan))


@lru_cache(maxsize=1024)
def rounds(
    counts: tuple[int, ...], plan: Plan, ranks_per_node: int, limit: int
) -> tuple[Round, ...]:
    """How a bucket of tensors of so many elements is cut into rounds, and those into shares.

    Arguments:
        counts: of elements, one for each tensor.
        plan: of what is reduced between nodes.
        ranks_per_node: as many shares each round has.
        limit: elements of a share, at least one `unit`; it may have one more.
    """
    own, total = unit(plan), sum(counts)
    if total == 0:
        return ()
    number = -(-total // (max(limit, own) * ranks_per_node))
    ends = list(accumulate(counts))

    def edge(wanted: int) -> int:
        """The place next to one among all elements where a share may begin."""
        tensor = bisect_right(ends, wanted)
        if tensor == len(counts):
            return total
        begin = ends[tensor] - counts[tensor]
        return min(begin + (wanted - begin + own // 2) // own * own, ends[tensor])

    shares = number * ranks_per_node
    edges = [edge(share * total // shares) for share in range(shares + 1)]
    each = [edges[begin:][: ranks_per_node + 1] for begin in range(0, shares, ranks_per_node)]
    # Where units are large, one may be empty.
    each = [places for places in each if places[0] < places[-1]]
    return tuple(_round(index, places, counts, ends) for index, places in enumerate(each))


def _round(index: int, edges: list[int], counts: tuple[int, ...], ends: list[int]) -> Round:
    """One whose shares begin and end at places among the elements of all tensors."""
    shares: list[tuple[Part, ...]] = []
    elements: list[int] = []
    for begin, end in pairwise(edges):
        parts, at = [], sum(elements)
        for tensor in range(bisect_right(ends, begin), len(counts)):
            first = ends[tensor] - counts[tensor]
            if first >= end:
                break
            start, stop = max(begin, first), min(end, ends[tensor])
            if start < stop:
                parts.append(Part(tensor, start - first, stop - first, at + start - begin))
        shares.append(tuple(parts))
        elements.append(max(end - begin, 1))
    return Round(index, tuple(elements), tuple(shares))


@lru_cache(maxsize=4096)  # what is worked out for a bucket serves all of its steps
def stages_of(
    own: Round,
    place: int,
    names: tuple[str, ...],
    counts: tuple[int, ...],
    plan: Plan,
    limit: int | None,
    seed: int,
    node: int,
) -> Stages:
    """What the rank at a place of a node computes of its share of a round.

    Arguments:
        own, place: the share.
        names, counts: of the bucket's tensors; the same on every rank.
        plan: of what is reduced between nodes.
        limit: as of `layout`.
        seed: of the options.
        node: this rank among those of its place.
    """
    parts = own.shares[place]
    described = layout(
        tuple(part.stop - part.start for part in parts),
        plan,
        limit,
        parts_of=tuple((part.start, counts[part.tensor]) for part in parts),
    )
    return Stages(described, tuple(names[part.tensor] for part in parts), seed, node)
