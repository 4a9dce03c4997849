"""What quantization does to each tensor, sampled while training: GlobalQSGD(stats=True).

Of a sampled step a copy of the rank's gradient is kept. When the mean has arrived, and with it the
norms that all ranks shared, the copy is quantized and decoded again: random numbers are a function
of tensor, step and rank, so these are the codes that were sent, whatever transport carried them.
Nothing is communicated, and a rank may collect statistics while others do not.

It knows no framework.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpi_ops import codec, rounding, wire
from mpi_ops.chunks import Chunk
from mpi_ops.kernels.host import Buffer

from ..path.config import Plan

__all__ = ["TensorStats", "check", "write"]

DEFAULT_INTERVAL = 100  # steps


@dataclass(frozen=True)
class TensorStats:
    """One reduction of one tensor, as this rank saw it."""

    step: int  # reductions of the tensor before this one
    elements: int
    bits: float  # of codes and norms, for each element on the wire
    # ‖Q(x) - x‖² / ‖x‖² of this rank's codes Q(x) of its gradient x; NaN where x is not finite.
    relative_error: float
    # Expected ‖result - mean‖² / ‖result‖², if the other ranks' codes are as far off as these, and
    # where an element lies between two levels has nothing to do with where it lies on other ranks.
    mean_error: float
    saturated: int  # elements at the outermost level
    to_zero: int  # elements that are not zero, and whose code is

    def scalars(self) -> dict[str, float]:
        """The figures for a plot, by name."""
        own = asdict(self)
        return {name: float(own[name]) for name in own if name not in ("step", "elements")}


class Writer(Protocol):
    """What `write` needs of torch.utils.tensorboard's SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Add a point to a curve."""


def write(writer: Writer, stats: Mapping[str, TensorStats], step: int) -> None:
    """Write the newest figures of all tensors to TensorBoard.

    Arguments:
        writer: a torch.utils.tensorboard.SummaryWriter, or another with `add_scalar`.
        stats: those of a compression, `compression.stats`.
        step: of training, the place on the horizontal axis.
    """
    for tag, value in points(stats):
        writer.add_scalar(tag, value, step)


def points(stats: Mapping[str, TensorStats]) -> Iterator[tuple[str, float]]:
    """The newest figures of all tensors, each with the name of its curve."""
    for name, own in stats.items():
        for quantity, value in own.scalars().items():
            yield f"gq/{quantity}/{name}", value


def check(function: str, stats: object) -> int:
    """The steps from one sample to the next, 0 for none; raises TypeError or ValueError."""
    if isinstance(stats, bool):
        return DEFAULT_INTERVAL if stats else 0
    if not isinstance(stats, int):
        raise TypeError(
            f"{function}: stats must be True, False or a number of steps, got {stats!r} of type "
            f"{type(stats).__name__}; True samples every {DEFAULT_INTERVAL} steps."
        )
    if stats < 1:
        raise ValueError(
            f"{function}: stats must be a number of steps, 1 or more, got {stats}; pass False for "
            "none."
        )
    return stats


class Sample:
    """Collects the figures of one reduction, chunk by chunk."""

    def __init__(self, x: NDArray[np.floating[Any]]) -> None:
        """Of a rank's gradient, one dimension, in host memory, which must not change any more."""
        self._x = x
        self._signal = self._noise = 0.0  # ‖x‖² and ‖Q(x) - x‖²
        self._result = self._second = 0.0  # ‖result‖², and what its own rounding adds to the error
        # Of square levels: Σ width², and as much as widths of different ranks have in common.
        self._widths = self._common = 0.0
        self._saturated = self._to_zero = 0

    def add(
        self,
        plan: Plan,
        chunk: Chunk,
        random: NDArray[np.uint32],
        result: NDArray[np.floating[Any]],
    ) -> None:
        """Count a chunk, which was quantized with the dither `random`.

        `result` is its part of the mean.
        """
        x = chunk.of(Buffer.of(self._x))
        own = self._x[chunk.start : chunk.stop]
        payload = codec.quantize(x, chunk.norms, plan, random)
        # The codes of this rank alone: what the mean over one rank would be decoded from.
        alone = replace(plan, world_size=1) if plan.levels == "exponential" else plan.alone
        decoded = np.empty(own.size, dtype=np.float32)
        codec.dequantize(payload, chunk.norms, alone, Buffer.of(decoded))
        norm = np.repeat(chunk.norms.view(np.float32), plan.block_for(own.size))[: own.size]
        self._saturated += int(np.count_nonzero((np.abs(decoded) >= norm) & (norm > 0)))
        self._to_zero += int(np.count_nonzero((decoded == 0) & (own != 0)))
        self._signal += _square(own)
        self._noise += _square(decoded - own.astype(np.float64))
        self._result += _square(result)
        self._second += _second_rounding(plan, result)
        if plan.square:
            y = np.divide(own, norm, out=np.zeros(own.size), where=norm > 0)
            width = norm * rounding.square_width(rounding.square_position(y, plan.level_count))
            starts = np.arange(0, own.size, plan.block_for(own.size))
            self._widths += _square(width)
            counts = np.diff(np.append(starts, own.size))
            self._common += float((np.add.reduceat(width, starts) ** 2 / counts).sum())

    def stats(self, plan: Plan, step: int, transport: str) -> TensorStats:
        """The figures, after all chunks; `step` counts the reductions before."""
        count = self._x.size
        gain = 1.0
        if plan.strata and not plan.nearest:
            gain = rounding.repelled_factor(plan.world_size)
        if self._widths > 0:  # ranks whose levels differ in width repel each other less
            gain = 1 - (1 - gain) * self._common / self._widths
        error = gain * self._noise / plan.world_size + self._second
        return TensorStats(
            step=step,
            elements=count,
            bits=wire.wire(count, plan, transport).bits_per_element(count),
            relative_error=_ratio(self._noise, self._signal),
            mean_error=_ratio(error, self._result),
            saturated=self._saturated,
            to_zero=self._to_zero,
        )


def _second_rounding(plan: Plan, mean: NDArray[np.floating[Any]]) -> float:
    """What rounding the mean once more is expected to add to ‖result - mean‖²."""
    if plan.world_size == 1 or plan.in_flight:
        return 0.0  # with one rank, what is rounded again lies on the levels
    if plan.levels == "exponential":
        return rounding.EXPONENTIAL_TYPICAL * _square(mean)
    # Fractions of a level are uniform, of variance 1/6, in blocks of the mean's own norms.
    values = np.ascontiguousarray(mean, dtype=np.float32)
    norms = codec.norms(Buffer.of(values), plan).view(np.float32).astype(np.float64)
    size = plan.block_for(values.size)
    if plan.square:  # levels around y are 2√y/s apart; with the max norm, the largest is on one
        starts = np.arange(0, values.size, size)
        magnitudes = np.add.reduceat(np.abs(values), starts, dtype=np.float64)
        exact = _square(norms) if plan.norm == "max" else 0.0
        return 4 * (float(np.dot(norms, magnitudes)) - exact) / (6 * plan.level_count**2)
    return _square(norms) * min(size, values.size) / (6 * plan.level_count**2)


def _square(values: NDArray[np.floating[Any]]) -> float:
    wide = values.astype(np.float64, copy=False)
    return float(np.dot(wide, wide))


def _ratio(noise: float, signal: float) -> float:
    if noise == 0:
        return 0.0
    return noise / signal if signal != 0 else math.inf
