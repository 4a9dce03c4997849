"""Other compressors on the path of Global-QSGD, to compare it with: options and reductions.

They use the same kernels, the same chunks and the same pipeline, so that a comparison shows the
methods and not how well each was written. What each is, and how it differs from its paper, is in
docs/baselines.md; the classes that Horovod takes are in `torch_baselines`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mpi_ops import codec, lanes, stages
from mpi_ops.chunks import Chunk
from mpi_ops.codec import Norms, Payload
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels.host import Buffer, Tensors
from mpi_ops.layout import Parcel
from mpi_ops.stages import Stages

from ..path import pipeline
from ..path.config import Config, Plan
from ..path.pipeline import Deliver, Method, Reduction, Task
from . import elias

# ------------------------------------------------------------------------------------------ options


@dataclass(frozen=True)
class BaselineConfig(Config):
    """Options of a baseline: some of Global-QSGD's, with the others as the method has them."""

    OPTIONS: ClassVar[tuple[str, ...]]  # those that users choose

    levels: str = "standard"  # evenly spaced, as most of them are described

    def describe(self) -> dict[str, Any]:
        """The options that users choose, as plain data."""
        return {key: value for key, value in asdict(self).items() if key in self.OPTIONS}


@dataclass(frozen=True)
class QSGDConfig(BaselineConfig):
    """Options of QSGD."""

    FUNCTION: ClassVar[str] = "QSGD"
    OPTIONS: ClassVar[tuple[str, ...]] = (
        "bits",
        "block_size",
        "norm",
        "coding",
        "min_elements",
        "seed",
    )

    bits: int | None = 8
    block_size: int | Any | None = 512  # the paper's buckets for 4 and 8 bits
    coding: Literal["fixed", "elias"] = "fixed"  # how codes are written; see `elias`

    def plan(self, world_size: int) -> Plan:
        """The settings: all levels that fit the lanes, because no codes are added."""
        assert self.bits is not None
        top = lanes.levels(self.bits, 1)
        return Plan("standard", self.bits, top, self._block_size(self.bits), self.norm, world_size)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("bits", self.bits)
        if self.coding not in ("fixed", "elias"):
            self._fail("coding", "'fixed' or 'elias'", self.coding, "choose one of them")


@dataclass(frozen=True)
class TernGradConfig(QSGDConfig):
    """Options of TernGrad: QSGD with the levels -1, 0 and 1 of the largest element of a tensor."""

    FUNCTION: ClassVar[str] = "TernGrad"
    OPTIONS: ClassVar[tuple[str, ...]] = ("block_size", "min_elements", "seed")

    bits: int | None = 2
    block_size: int | Any | None = None


@dataclass(frozen=True)
class NaturalConfig(BaselineConfig):
    """Options of natural compression."""

    FUNCTION: ClassVar[str] = "NaturalCompression"
    OPTIONS: ClassVar[tuple[str, ...]] = ("min_elements", "seed")

    levels: Any = "exponential"
    bits: int | None = 8
    block_size: int | Any | None = None


@dataclass(frozen=True)
class NearestConfig(BaselineConfig):
    """Options of rounding to nearest: those of Global-QSGD's standard levels, without a seed."""

    FUNCTION: ClassVar[str] = "NearestRounding"
    OPTIONS: ClassVar[tuple[str, ...]] = ("bits", "block_size", "norm", "min_elements")

    bits: int | None = 8


@dataclass(frozen=True)
class PowerSGDConfig(BaselineConfig):
    """Options of PowerSGD."""

    FUNCTION: ClassVar[str] = "PowerSGD"
    OPTIONS: ClassVar[tuple[str, ...]] = (
        "rank",
        "warm_start",
        "error_feedback",
        "min_elements",
        "seed",
    )

    rank: int = 4  # columns of the two factors
    warm_start: bool = True  # whether a step begins with the factor of the step before
    error_feedback: bool = True  # whether what a step leaves out is added to the next

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_integer("rank", self.rank)
        if self.rank < 1:
            self._fail("rank", "1 or more", self.rank, "the paper uses 1 to 4")
        self._require_bool("warm_start", self.warm_start)

    def plan(self, world_size: int) -> Plan:
        """Nothing is quantized: the number of ranks is all that matters."""
        return Plan("low rank", 32, 0, None, self.norm, world_size)

    def shape(self, tensor_shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns of the matrix that a tensor is, or None if factors save nothing.

        As in the paper: the first dimension (outputs) by all others.
        """
        if len(tensor_shape) < 2 or 0 in tensor_shape:
            return None
        rows, columns = tensor_shape[0], math.prod(tensor_shape[1:])
        return (rows, columns) if self.rank * (rows + columns) < rows * columns else None


# --------------------------------------------------------------------------- gathered, then decoded

# Elements that are decoded at a time: 256 KB of float32, so that a sum stays in a core's cache.
_PIECE_ELEMENTS = 1 << 16


def local_norms(task: Task) -> Norms:
    """Norm of each block on this rank, as bit patterns."""
    return codec.norms(task.tensor, task.plan)


def powers_of_two(task: Task) -> Norms:
    """This rank's norms, rounded up to powers of two, so that the levels are powers of two."""
    norms = local_norms(task)
    mantissa, largest = 0x7FFFFF, 0x7F000000
    # Above 2**127 there is no further power of two; norms that are not finite are there too.
    return np.where(norms > largest, norms, (norms + mantissa) & ~mantissa).astype(np.int32)


class Coding(Protocol):
    """How the norms and codes of a chunk are written in the message that a rank gathers."""

    def pack(self, task: Task, chunk: Chunk, x: Buffer, random: NDArray[np.uint32]) -> NDArray[Any]:
        """The message of this rank."""

    def unpack(self, task: Task, chunk: Chunk, gathered: NDArray[Any]) -> list[Part]:
        """What is in the messages of all ranks, in their order."""


class Part(NamedTuple):
    """What one rank sent of a chunk."""

    norms: Norms
    codes_of: Callable[[int], Payload]  # of one of its `_pieces`, and maybe those that follow


class Fixed:
    """Codes of a fixed width: the payload as it is, behind the norms."""

    def pack(self, task: Task, chunk: Chunk, x: Buffer, random: NDArray[np.uint32]) -> NDArray[Any]:
        items = codec.payload_size(x.size, task.plan)
        size = chunk.norms.nbytes + items * codec.payload_dtype(task.plan).itemsize
        message = np.empty(size, dtype=np.uint8)
        norms, codes = self._split(message, task, chunk)
        norms[:] = chunk.norms
        codec.quantize(x, chunk.norms, task.plan, random, out=codes)
        return message

    def unpack(self, task: Task, chunk: Chunk, gathered: NDArray[Any]) -> list[Part]:
        plan = task.plan
        pieces = _pieces(chunk.stop - chunk.start, plan)
        begins = [codec.payload_size(start, plan) for start, _ in pieces]

        def codes_of(piece: int, codes: Payload) -> Payload:
            return codes[begins[piece] :]

        parts = (self._split(own, task, chunk) for own in np.split(gathered, plan.world_size))
        return [Part(norms, partial(codes_of, codes=codes)) for norms, codes in parts]

    def _split(self, message: NDArray[np.uint8], task: Task, chunk: Chunk) -> tuple[Norms, Payload]:
        norms, codes = np.split(message, [chunk.norms.nbytes])
        return norms.view(np.int32), codes.view(codec.payload_dtype(task.plan))


class Elias:
    """Elias gamma codes, a stream for each of the pieces that are decoded at a time."""

    def pack(self, task: Task, chunk: Chunk, x: Buffer, random: NDArray[np.uint32]) -> NDArray[Any]:
        payload = codec.quantize(x, chunk.norms, task.plan, random)
        pieces = [
            (payload[codec.payload_size(start, task.plan) :], stop - start)
            for start, stop in _pieces(x.size, task.plan)
        ]
        return elias.pack(chunk.norms, pieces, task.plan.bits)

    def unpack(self, task: Task, chunk: Chunk, gathered: NDArray[Any]) -> list[Part]:
        plan = task.plan
        counts = [stop - start for start, stop in _pieces(chunk.stop - chunk.start, plan)]
        messages = elias.split(gathered, plan.world_size, chunk.norms.size, len(counts), task.key)
        scratch = np.empty(codec.payload_size(max(counts, default=0), plan), np.int32)

        def codes_of(piece: int, message: elias.Message) -> Payload:
            message.decode(piece, counts[piece], plan.bits, scratch)
            return scratch

        return [Part(own.norms, partial(codes_of, message=own)) for own in messages]


FIXED: Coding = Fixed()


def gather(
    task: Task,
    deliver: Deliver,
    norms_of: Callable[[Task], Norms] = local_norms,
    coding: Coding = FIXED,
) -> Reduction:
    """Each rank quantizes by its own norms; norms and codes of all go to all by Allgather."""
    gathered = []
    for chunk in task.chunks(norms_of(task)):
        name = f"{task.key}.{chunk.index}"
        random = dither(task.seed, name, task.step, task.rank, Stage.QUANTIZE)
        message = coding.pack(task, chunk, chunk.of(task.tensor), random)
        name = task.operation(stages.codes(chunk.index))
        gathered.append((chunk, task.collectives.allgather(message, name)))
    for chunk, handle in gathered:
        deliver(chunk, (yield handle))


def add_up(
    task: Task, chunk: Chunk, gathered: NDArray[Any], means: Tensors, coding: Coding = FIXED
) -> None:
    """Decode all ranks' messages and add them up in `means`, float32, in the ranks' order.

    The order is the same on every rank, and so is the result, bit for bit. What is decoded is each
    rank's share of the mean, so a sum exceeds the largest norm by no more than rounding does.
    """
    plan, out = task.plan, chunk.of(task.buffer(means))
    parts = coding.unpack(task, chunk, gathered)
    if plan.levels == "exponential":  # codec.dequantize takes such codes for those of a mean
        parts = [part._replace(norms=_divided(part.norms, plan.world_size)) for part in parts]
    scratch = np.empty(0, dtype=np.float32)
    for piece, (start, stop) in enumerate(_pieces(out.size, plan)):
        target = Chunk(0, start, stop, chunk.norms).of(out)
        total = array_of(target)
        if scratch.size == 0:  # the first piece is the largest
            scratch = np.empty_like(total)
        share = scratch[: total.size]
        block = plan.block_size
        for rank, (norms, codes_of) in enumerate(parts):
            own = norms if block is None else norms[start // block : lanes.blocks(stop, block)]
            into = target if rank == 0 else Buffer.of(share)
            codec.dequantize(codes_of(piece), own, plan, into)
            if rank > 0:
                np.add(total, share, out=total)


def _divided(norms: Norms, number: int) -> Norms:
    """Norms divided by a number, as bit patterns again."""
    return (norms.view(np.float32) / np.float32(number)).view(np.int32)


def _pieces(count: int, plan: Plan) -> Iterator[tuple[int, int]]:
    """Parts of `count` elements that begin at whole blocks and at whole rows of the payload."""
    row = lanes.ROW * (8 * codec.payload_dtype(plan).itemsize // plan.bits)
    unit = math.lcm(plan.block_size or row, row)
    size = max(_PIECE_ELEMENTS // unit, 1) * unit
    for start in range(0, count, size):
        yield start, min(start + size, count)


def array_of(buffer: Buffer) -> NDArray[np.float32]:
    """The elements of a float32 buffer in host memory, as an array that shares it."""
    assert buffer.dtype == "float32", buffer
    return elements_of(buffer)


def elements_of(buffer: Buffer) -> NDArray[Any]:
    """The same of any dtype that NumPy has."""
    assert buffer.memory == "host", buffer
    dtype = np.dtype(buffer.dtype)
    size = buffer.size * dtype.itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(buffer.pointer)).view(dtype)


# ------------------------------------------------------------------------------- rounded to nearest


def nearest(
    task: Task, own: Stages, parcel: Parcel, all_norms: NDArray[np.int32], part: str
) -> Payload:
    """This rank's codes of a chunk of float32, each rounded to the nearest level.

    The kernel packs them: it gets integers, in units in which no fraction is left to round.
    """
    plan, chunk = own.plan, stages.chunk_of(parcel, 0, all_norms)
    block = plan.block_for(chunk.stop - chunk.start)
    x = array_of(chunk.of(task.tensor))
    norms = chunk.norms.view(np.float32).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(norms > 0, plan.level_count / norms, 0.0)
        codes = np.rint(x * np.repeat(scale, block)[: x.size]).astype(np.float32)
    codes.clip(-plan.level_count, plan.level_count, out=codes)
    unit = np.full(norms.shape, plan.level_count, dtype=np.float32).view(np.int32)
    no_dither = np.zeros(4, dtype=np.uint32)
    return codec.quantize(Buffer.of(codes), unit, plan, no_dither)


GATHER = Method(gather, add_up)
GATHER_ELIAS = Method(partial(gather, coding=Elias()), partial(add_up, coding=Elias()))
GATHER_POWERS_OF_TWO = Method(partial(gather, norms_of=powers_of_two), add_up)
NEAREST = Method(partial(pipeline.standard, quantize=nearest))
