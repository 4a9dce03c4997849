"""One reduction, described once: what a rank computes, what its operations are called.

For each chunk of a tensor, after the ranks have taken the maximum of their norms (`norm`):

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

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import codec
from .chunks import Chunk
from .codec import Payload
from .dither import Dithers, Stage, dither
from .kernels.interface import Buffer
from .scheme import Plan

# ------------------------------------------------------------------------------------------- names


def tensor_name(name: str) -> str:
    """What operations and dithers of a tensor begin with; users' own names never do."""
    return f"gq.{name}"


def user_name(name: str) -> str:
    """The name that `tensor_name` was given."""
    return name.removeprefix("gq.")


NORM = "norm"


def codes(chunk: int) -> str:
    """The operation on the codes of a chunk."""
    return f"codes.{chunk}"


def mean(chunk: int) -> str:
    """The operation on the shares of a chunk's mean."""
    return f"mean.{chunk}"


def joined(chunk: int) -> str:
    """The operation on the codes of a chunk while a rank has called hvd.join()."""
    return f"joined.{chunk}"


# -------------------------------------------------------------------------------------- randomness


def dithers(seed: int, name: str, step: int, rank: int) -> Dithers:
    """The randomness of all chunks and stages of a tensor's reduction, on one rank.

    Arguments:
        seed: of the options.
        name: of the tensor (`tensor_name`), the same on every rank.
        step: how often it was reduced before.
        rank: among those that reduce it.
    """

    def of(chunk: int, stage: Stage, strata: int) -> NDArray[np.uint32]:
        return dither(seed, f"{name}.{chunk}", step, rank, stage, strata)

    return of


# -------------------------------------------------------------------------------------- arithmetic


class Stages(NamedTuple):
    """What one rank computes in the reduction of a tensor."""

    plan: Plan
    rank: int
    dither: Dithers

    def sent_size(self, count: int) -> int:
        """Elements of the payload of a chunk of `count` elements, for the operation `codes`."""
        if self.plan.in_flight:
            return codec.payload_size(count, self.plan)
        return codec.shard_size(count, self.plan) * self.plan.world_size

    def quantize(self, chunk: Chunk, x: Buffer, out: Payload | None = None) -> Payload:
        """This rank's codes of a chunk, whose elements are `x`.

        `out` may be longer than the codes, to be cut into equal parts: the rest becomes zeros.
        """
        random = self.dither(chunk.index, Stage.QUANTIZE, self.plan.strata)
        return codec.quantize(x, chunk.norms, self.plan, random, out)

    def reduce(
        self, chunk: Chunk, pieces: NDArray[np.generic], out: Payload | None = None
    ) -> Payload:
        """This rank's share of a chunk's mean, from all ranks' codes of the share, one a row."""
        random = self.dither(chunk.index, Stage.REDUCE, 0)
        count = chunk.stop - chunk.start
        norms = codec.norms_of_share(chunk.norms, count, self.rank, self.plan)
        rows = pieces.reshape(self.plan.world_size, -1)
        return codec.reduce(rows, self.plan, random, out, norms)

    def dequantize(self, chunk: Chunk, payload: Payload, out: Buffer) -> None:
        """Write the mean of a chunk to `out`, from the sum of codes or from all shares."""
        codec.dequantize(payload, chunk.norms, self.plan, out)
