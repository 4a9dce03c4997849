"""One reduction, described once: what a rank computes, what its operations are called.

For each parcel of a bucket, after the ranks have taken the maximum of their norms (`norm`):

1. `quantize`: this rank's codes, by the norms of all ranks.
2. Codes of standard levels are summed by Allreduce (`codes`). Others go by an Alltoall: each rank
   gets all ranks' codes of its share.
3. `reduce`: the share's mean, rounded once, which an Allgather (`mean`) brings to all ranks.
4. `dequantize`: the mean.

Who starts these operations, and when, is not said here: the pipeline of PyTorch does it as they
complete (`gq_horovod.path.pipeline`), the graph of TensorFlow holds them as its nodes, and messages
between ranks replace them (`exchange`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from . import codec, lanes
from .chunks import Chunk
from .codec import Payload
from .dither import Stage, dither
from .kernels.interface import Tensors
from .layout import Layout, Parcel
from .scheme import Plan

# ------------------------------------------------------------------------------------------- names


def tensor_name(name: str) -> str:
    """What operations and dithers of a tensor begin with; users' own names never do."""
    return f"gq.{name}"


def user_name(name: str) -> str:
    """The name that `tensor_name` was given."""
    return name.removeprefix("gq.")


NORM = "norm"


def codes(parcel: int) -> str:
    """The operation on the codes of a parcel."""
    return f"codes.{parcel}"


def mean(parcel: int) -> str:
    """The operation on the shares of a parcel's mean."""
    return f"mean.{parcel}"


def joined(parcel: int) -> str:
    """The operation on the codes of a parcel while a rank has called hvd.join()."""
    return f"joined.{parcel}"


# Where ranks of a node add before codes are made (`nodes`).
THERE = "there"  # who has the tensors, and whether all ranks are there


def inside(index: int) -> str:
    """The operation that brings the elements of a round to the ranks of the node that add them."""
    return f"node.{index}"


def whole(index: int) -> str:
    """The operation that brings the means of a round to all ranks of the node."""
    return f"whole.{index}"


# -------------------------------------------------------------------------------------- arithmetic

Steps = NDArray[np.uint32]  # for each tensor of a bucket, how often it was reduced before


@dataclass(frozen=True)
class Stages:
    """What one rank computes in the reduction of a bucket."""

    layout: Layout
    names: tuple[str, ...]  # of the tensors (`tensor_name`), the same on every rank
    seed: int  # of the options
    rank: int  # among those that reduce
    # Called with each parcel as soon as it is quantized, the norms of all ranks, and its codes.
    coded: Callable[[Parcel, NDArray[np.int32], Payload], None] | None = None

    @property
    def plan(self) -> Plan:
        """The settings of all tensors."""
        return self.layout.plan

    def measure(
        self, x: Tensors, out: NDArray[np.int32], spare: NDArray[np.int32] | None = None
    ) -> None:
        """Write this rank's norms to `out`, as many as the layout has; `spare`: as in `codec`."""
        codec.measure(x, self.layout.measured(x), self.plan, out, self._gaps, spare)

    def quantize(
        self, parcel: Parcel, x: Tensors, steps: Steps, norms: NDArray[np.int32], out: Payload
    ) -> Payload:
        """This rank's codes of a parcel, by the norms of all ranks, in `out`; which it returns."""
        random = self.dithers(parcel, steps)
        codec.quantize_parcel(x, parcel.table(x, random), norms, self.plan, out)
        if self.coded is not None:
            self.coded(parcel, norms, out)
        return out

    def decode_own(
        self, parcel: Parcel, codes: Payload, norms: NDArray[np.int32], out: Tensors
    ) -> None:
        """Write what this rank's codes of a parcel stand for to `out`; not exponential ones."""
        segments = parcel.table(out, np.zeros(4, np.uint32))
        codec.dequantize_parcel(codes, segments, norms, self.plan.alone, out)

    def reduce(
        self,
        parcel: Parcel,
        pieces: NDArray[np.generic],
        steps: Steps,
        norms: NDArray[np.int32],
        out: Payload,
    ) -> Payload:
        """This rank's share of a parcel's mean, from all ranks' codes of the share, one a row."""
        piece, segments = parcel.share(self.rank)
        segments = segments.copy()
        if not self.plan.in_flight:
            segments["random"] = self._random(parcel, Stage.REDUCE, steps)[piece]
        own = None
        if self.plan.levels == "two-hop":
            begin, end = parcel.norm_span
            own = codec.norms_of_share(norms[begin:end], parcel.padded, self.rank, self.plan)
        rows = pieces.reshape(self.plan.world_size, -1)
        return codec.reduce_share(rows, segments, self.plan, out, own)

    def dequantize(
        self, parcel: Parcel, payload: Payload, norms: NDArray[np.int32], out: Tensors
    ) -> None:
        """Write the mean of a parcel to `out`, from the sum of codes or from all shares."""
        codec.dequantize_parcel(payload, parcel.results(out), norms, self.plan, out)

    def dithers(self, parcel: Parcel, steps: Steps) -> NDArray[np.uint32]:
        """The dithers with which this rank quantizes a parcel's pieces, one a row."""
        return self._random(parcel, Stage.QUANTIZE, steps)

    def _random(self, parcel: Parcel, stage: Stage, steps: Steps) -> NDArray[np.uint32]:
        tensor, words = self._words(parcel.index, stage)
        words = words.copy()
        words[:, 2] = steps[tensor]
        return words

    @cached_property
    def _gaps(self) -> bool:
        """Whether there is room between the norms of one tensor and the next."""
        measured = (lanes.blocks(own, self.plan.block_for(own)) for own in self.layout.counts)
        return self.layout.norm_count > sum(measured)

    @cached_property
    def _known(self) -> dict[tuple[int, Stage], tuple[NDArray[np.int64], NDArray[np.uint32]]]:
        return {}

    def _words(self, index: int, stage: Stage) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
        """The tensor of each piece of a parcel, and its dither at step 0."""
        known = self._known.get((index, stage))
        if known is None:
            pieces = self.layout.parcels[index].pieces
            # Whoever reduces an element rounds it in the same way.
            rank, strata = (self.rank, self.plan.strata) if stage is Stage.QUANTIZE else (0, 0)
            words = [
                dither(self.seed, f"{self.names[own.tensor]}.{own.chunk}", 0, rank, stage, strata)
                for own in pieces
            ]
            tensors = np.array([own.tensor for own in pieces], dtype=np.int64)
            known = self._known[index, stage] = tensors, np.stack(words)
        return known


def chunk_of(parcel: Parcel, place: int, norms: NDArray[np.int32]) -> Chunk:
    """A piece of a parcel as a chunk of its tensor; `norms` are all those of the bucket."""
    own = parcel.pieces[place]
    return Chunk(own.chunk, own.start, own.stop, norms[own.norms :][: own.norm_count])
