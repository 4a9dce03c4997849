"""Where everything lies when tensors are reduced together, as a *bucket*.

Blocks, lanes and random numbers belong to a tensor and never cross into the next, so a bucket's
codes are those that each tensor would have by itself, one after the other. Tensors are cut into
chunks as each would be by itself, and chunks are put into *parcels*: what one operation carries.
Norms of all tensors travel together.

A layout says nothing of ranks' data: it is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import lanes, sizes
from .chunks import message_elements, spans
from .kernels.interface import ITEM_BYTES, SEGMENT, Tensors
from .scheme import Plan

Places = NDArray[np.int64]


class Piece(NamedTuple):
    """A chunk of one of a bucket's tensors."""

    tensor: int  # its place in the bucket
    chunk: int  # its number in the tensor
    start: int  # its first element
    stop: int
    skipped: int  # elements of the chunk before it; a whole number of lanes.GROUP
    norms: int  # place of its first norm among the bucket's
    norm_count: int
    payload: int  # place of its codes in the parcel
    units: int  # of its share of codes; only where they go by shares

    @property
    def elements(self) -> int:
        return self.stop - self.start


class _Part(NamedTuple):
    """What a piece and a share have in common."""

    piece: int  # its place in the parcel
    share: int
    skipped: int  # elements of the piece before
    inside: int  # elements of the share before
    elements: int  # in whole units


@dataclass(frozen=True)
class Parcel:
    """What one operation carries."""

    index: int
    pieces: tuple[Piece, ...]
    plan: Plan
    shares: bool  # whether each rank reduces a share

    @cached_property
    def padded(self) -> int:
        """Elements that the pieces stand for, in whole units; only where they go by shares."""
        return sum(piece.units for piece in self.pieces) * sizes.share_unit(self.plan)

    @cached_property
    def share_size(self) -> int:
        """Payload elements of a share of one rank's codes."""
        return sizes.shard_size(self.padded, self.plan)

    @cached_property
    def reduced_size(self) -> int:
        """Payload elements of a reduced share."""
        return sizes.reduced_size(self.padded, self.plan)

    @cached_property
    def size(self) -> int:
        """Payload elements that one rank sends, in as many equal parts as there are ranks."""
        if self.shares:
            return self.share_size * self.plan.world_size
        last = self.pieces[-1]
        return last.payload + sizes.payload_size(last.elements, self.plan)

    @cached_property
    def norm_span(self) -> tuple[int, int]:
        """Places of the parcel's first norm, and after its last one."""
        first, last = self.pieces[0], self.pieces[-1]
        return first.norms, last.norms + last.norm_count

    def _parts(self) -> Iterator[_Part]:
        unit, share = sizes.share_unit(self.plan), sizes.share_elements(self.padded, self.plan)
        begin = 0
        for place, piece in enumerate(self.pieces):
            end = begin + piece.units * unit
            at = begin
            while at < end:
                number = at // share
                stop = min(end, (number + 1) * share)
                yield _Part(place, number, at - begin, at - number * share, stop - at)
                at = stop
            begin = end

    # ------------------------------------------------------------------------------------- tables

    @cached_property
    def _of_tensor(self) -> Places:
        return np.array([piece.tensor for piece in self.pieces], dtype=np.int64)

    @cached_property
    def _starts(self) -> Places:
        return np.array([piece.start for piece in self.pieces], dtype=np.int64)

    @cached_property
    def _pieces(self) -> NDArray[Any]:
        """A segment for each piece."""
        own = np.zeros(len(self.pieces), dtype=SEGMENT)
        own["elements"] = [piece.elements for piece in self.pieces]
        own["norms"] = [piece.norms for piece in self.pieces]
        own["payload"] = [piece.payload for piece in self.pieces]
        own["group"] = [piece.skipped // lanes.GROUP for piece in self.pieces]
        own["stop"] = [*own["payload"][1:], self.size] if self.pieces else []
        return own

    @cached_property
    def _reduced(self) -> tuple[Places, Places, NDArray[Any]]:
        """A segment for each part of all reduced shares, with norms of its own; its piece too."""
        parts, plan = list(self._parts()), self.plan
        own = np.zeros(len(parts), dtype=SEGMENT)
        norm_count = sizes.share_norms(self.padded, plan)
        for segment, part in zip(own, parts, strict=True):
            left = self.pieces[part.piece].elements - part.skipped
            segment["elements"] = min(part.elements, left)
            begin = part.share * self.reduced_size
            segment["norms"] = begin + part.inside // (plan.block_size or max(self.padded, 1))
            rows = part.inside // sizes.row_elements(plan)
            segment["payload"] = begin + norm_count + rows * lanes.ROW
        piece = np.array([part.piece for part in parts], dtype=np.int64)
        skipped = np.array([part.skipped for part in parts], dtype=np.int64)
        return piece, skipped, own

    @cached_property
    def _known_shares(self) -> dict[int, tuple[Places, NDArray[Any]]]:
        return {}

    def share(self, rank: int) -> tuple[Places, NDArray[Any]]:
        """A segment for each part of a rank's share, as it is rounded; and the pieces they are of.

        Places are those in the share, of norms and of codes; `x` that of elements.
        """
        known = self._known_shares.get(rank)
        if known is None:
            known = self._known_shares[rank] = self._share(rank)
        return known

    def _share(self, rank: int) -> tuple[Places, NDArray[Any]]:
        parts, plan = [part for part in self._parts() if part.share == rank], self.plan
        own = np.zeros(len(parts), dtype=SEGMENT)
        for segment, part in zip(own, parts, strict=True):
            segment["x"] = part.inside
            segment["elements"] = part.elements
            segment["norms"] = part.inside // (plan.block_size or max(self.padded, 1))
            segment["payload"] = part.inside // sizes.row_elements(plan) * lanes.ROW
            skipped = self.pieces[part.piece].skipped + part.skipped
            segment["group"] = skipped // lanes.GROUP
        own["stop"] = [*own["payload"][1:], self.share_size] if parts else []
        return np.array([part.piece for part in parts], dtype=np.int64), own

    def table(self, x: Tensors, random: NDArray[np.uint32]) -> NDArray[Any]:
        """The pieces of `x`, to be quantized with a row of `random` each."""
        own = self._pieces.copy()
        own["x"] = addresses(x, self._of_tensor, self._starts)
        own["random"] = random
        return own

    def results(self, out: Tensors) -> NDArray[Any]:
        """The pieces of `out`, to be decoded from the sum of all ranks' codes or of shares."""
        if self.shares and self.plan.levels == "two-hop":
            piece, skipped, template = self._reduced
            tensor, starts = self._of_tensor[piece], self._starts[piece] + skipped
        else:
            tensor, starts, template = self._of_tensor, self._starts, self._pieces
        own = template.copy()
        own["x"] = addresses(out, tensor, starts)
        return own


def addresses(tensors: Tensors, tensor: Places, starts: Places) -> NDArray[np.uint64]:
    """Where parts of tensors begin, by the place of each one's tensor and its first element.

    0 for a part of a tensor that is not there.
    """
    base = tensors.pointers[tensor]
    offsets = (starts * ITEM_BYTES[tensors.dtype]).astype(np.uint64)
    return np.where(base != 0, base + offsets, base)


@dataclass(frozen=True)
class Layout:
    """Where the norms and the codes of a bucket's tensors lie."""

    counts: tuple[int, ...]  # elements of each tensor
    plan: Plan
    parcels: tuple[Parcel, ...]
    norm_places: tuple[int, ...]  # of each tensor's first norm
    norm_count: int

    @cached_property
    def _norms(self) -> NDArray[Any]:
        own = np.zeros(len(self.counts), dtype=SEGMENT)
        own["elements"], own["norms"] = self.counts, self.norm_places
        return own

    def measured(self, x: Tensors) -> NDArray[Any]:
        """A segment for each tensor, to be measured."""
        own = self._norms.copy()
        own["x"] = x.pointers
        return own


def places_of_norms(count: int, plan: Plan) -> int:
    """Places of norms that a tensor, or a part of one, of `count` elements takes.

    With two-hop levels they are those of whole units of shares, of which the last may be gaps.
    """
    if plan.levels == "two-hop" and plan.block_size:
        unit = sizes.share_unit(plan)
        count = -(-count // unit) * unit
    return lanes.blocks(count, plan.block_for(count))


@lru_cache(maxsize=1024)
def layout(
    counts: tuple[int, ...],
    plan: Plan,
    limit: int | None,
    norms_for: Plan | None = None,
    parts_of: tuple[tuple[int, int], ...] | None = None,
) -> Layout:
    """How tensors of so many elements are reduced together.

    Arguments:
        counts: of elements, one for each tensor.
        plan: of all of them.
        limit: elements of a chunk, and of a parcel. None: codes travel as messages between ranks,
            in chunks of their own size.
        norms_for: the plan of the layout by which norms are there already, if that is another.
        parts_of: where these are parts of tensors, the first element of each, and the elements of
            its whole tensor. Parts begin with whole units of shares (`nodes.unit`), and have the
            chunks and the dithers of the whole: their codes are those that it would have there.
    """
    messages = limit is None
    shares = messages or not plan.in_flight
    placed = norms_for or plan
    share_unit, row = sizes.share_unit(plan), sizes.row_elements(plan)
    most = message_elements(sum(counts), plan.world_size) if limit is None else limit
    places, at = [], 0
    parcels: list[Parcel] = []
    pieces: list[Piece] = []
    payload = elements = 0
    for tensor, count in enumerate(counts):
        places.append(at)
        first, whole = (0, count) if parts_of is None else parts_of[tensor]
        wanted = message_elements(whole, plan.world_size) if limit is None else limit
        for chunk, (begin, end) in enumerate(spans(whole, plan, wanted)):
            start, stop = max(begin - first, 0), min(end - first, count)
            own, skipped = stop - start, first + start - begin
            if own <= 0:
                continue
            if pieces and (elements + own > most or not plan.mixes_tensors):
                parcels.append(Parcel(len(parcels), tuple(pieces), plan, shares))
                pieces, payload, elements = [], 0, 0
            norms = at + (start // plan.block_size if plan.block_size else 0)
            norm_count = lanes.blocks(own, plan.block_for(own))
            units = -(-own // share_unit) if shares else 0
            pieces.append(
                Piece(tensor, chunk, start, stop, skipped, norms, norm_count, payload, units)
            )
            elements += own
            if shares:
                payload += units * share_unit // row * lanes.ROW
            else:
                payload += sizes.payload_size(own, plan)
        at += places_of_norms(count, placed)
    if pieces:
        parcels.append(Parcel(len(parcels), tuple(pieces), plan, shares))
    return Layout(counts, plan, tuple(parcels), tuple(places), at)
