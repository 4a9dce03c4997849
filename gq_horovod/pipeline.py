"""A gradient's path: norm, quantize, reduce, dequantize, with many tensors in flight at once.

Each method is a generator that reads from top to bottom and yields wherever it waits for the
network. `Pipeline` advances the generators of all tensors whenever it gets the chance, so that no
backward hook ever waits for a round trip.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpi_ops import codec
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels.host import Buffer

from .config import Plan

Array = NDArray[Any]

# While nothing is ready: long enough to leave the core to other ranks, short against a round trip.
_POLL_SECONDS = 50e-6


class Handle(Protocol):
    """A collective operation in flight."""

    def ready(self) -> bool:
        """Whether wait() would return at once."""

    def wait(self) -> Array:
        """The result, after blocking until it is there. Raises if the operation failed."""


class Collectives(Protocol):
    """Asynchronous collectives on NumPy arrays, matched between ranks by name."""

    def allreduce_max(self, array: NDArray[np.int32], name: str) -> Handle:
        """Element-wise maximum over ranks; may overwrite `array`."""

    def allreduce_sum(self, array: NDArray[np.int32], name: str) -> Handle:
        """Element-wise sum over ranks; may overwrite `array`."""

    def alltoall(self, array: NDArray[np.uint8], name: str) -> Handle:
        """Piece i of rank j becomes piece j of rank i; pieces are equal parts of `array`."""

    def allgather(self, array: NDArray[np.uint8], name: str) -> Handle:
        """The arrays of all ranks, one after the other."""


@dataclass(frozen=True)
class Task:
    """One tensor to average over ranks."""

    name: str  # the same on every rank, and different for tensors in flight together
    x: Buffer  # must not change until the reduction is done
    new_output: Callable[[], Buffer]  # memory for the mean, with as many elements as x
    plan: Plan
    collectives: Collectives
    rank: int  # in the group that reduces
    seed: int
    step: int  # how many times this tensor was reduced before

    def dither(self, stage: Stage) -> NDArray[np.uint32]:
        """Randomness of one stage on this rank."""
        return dither(self.seed, self.name, self.step, self.rank, stage)


Reduction = Generator[Handle, Array, Buffer]


def global_norms(task: Task) -> Generator[Handle, Array, Array]:
    """Norm of each block over all ranks, as bit patterns; NaN and Inf of one rank reach all."""
    return (
        yield task.collectives.allreduce_max(codec.norms(task.x, task.plan), f"{task.name}.norm")
    )


def standard(task: Task) -> Reduction:
    """Codes of evenly spaced levels, summed in lanes of int32 words by Allreduce itself."""
    norms = yield from global_norms(task)
    payload = codec.quantize(task.x, norms, task.plan, task.dither(Stage.QUANTIZE))
    payload = yield task.collectives.allreduce_sum(payload, f"{task.name}.codes")
    mean = task.new_output()
    codec.dequantize(payload, norms, task.plan, mean)
    return mean


def exponential(task: Task) -> Reduction:
    """Codes of powers of two: each rank reduces one shard of all ranks' codes with one rounding."""
    plan = task.plan
    norms = yield from global_norms(task)
    codes = np.empty(codec.shard_size(task.x.size, plan) * plan.world_size, dtype=np.uint8)
    codec.quantize(task.x, norms, plan, task.dither(Stage.QUANTIZE), out=codes)
    pieces = yield task.collectives.alltoall(codes, f"{task.name}.codes")
    shard = codec.reduce(np.split(pieces, plan.world_size), plan, task.dither(Stage.REDUCE))
    codes = yield task.collectives.allgather(shard, f"{task.name}.mean")
    mean = task.new_output()
    codec.dequantize(codes, norms, plan, mean)
    return mean


METHODS: dict[str, Callable[[Task], Reduction]] = {
    "standard": standard,
    "exponential": exponential,
}


class InFlight:
    """A reduction and the operation that it waits for."""

    def __init__(self, task: Task) -> None:
        self.name = task.name
        self.result: Buffer | None = None
        self._reduction = METHODS[task.plan.levels](task)
        self._handle: Handle | None = next(self._reduction)

    def advance(self) -> bool:
        """Go on to the next operation if this one is complete. Whether there was progress."""
        if self._handle is None or not self._handle.ready():
            return False
        try:
            self._handle = self._reduction.send(self._handle.wait())
        except StopIteration as done:
            self._handle = None
            self.result = done.value
        return True


class Pipeline:
    """The reductions in flight. Not thread-safe; one for each group of ranks that reduces."""

    def __init__(self) -> None:
        self._in_flight: dict[str, InFlight] = {}

    def submit(self, task: Task) -> InFlight:
        """Start reducing a tensor and advance the others. Waits for nothing.

        (But for one case: a reduction of the same name that was started and never asked for,
        because the step failed in between. It is finished first, as it is on every other rank.)
        """
        abandoned = self._in_flight.get(task.name)
        if abandoned is not None:
            self.finish(abandoned)
        self.poll()
        started = InFlight(task)
        self._in_flight[task.name] = started
        return started

    def poll(self) -> bool:
        """Advance every reduction whose operation is complete. Whether any was."""
        try:
            advanced = [reduction.advance() for reduction in self._in_flight.values()]
        except BaseException:
            self.give_up()
            raise
        return any(advanced)

    def give_up(self) -> None:
        """Forget what is in flight: after a failed operation none of it can be trusted."""
        self._in_flight.clear()

    def finish(self, reduction: InFlight) -> Buffer:
        """The mean of a tensor. Blocks, and advances the others meanwhile."""
        while reduction.result is None:
            if self._in_flight.get(reduction.name) is not reduction:
                raise RuntimeError(
                    f"GlobalQSGD: the reduction of {reduction.name!r} was given up, because an "
                    "operation that was in flight with it failed; see the first error."
                )
            if not self.poll():
                time.sleep(_POLL_SECONDS)
        if self._in_flight.get(reduction.name) is reduction:
            del self._in_flight[reduction.name]
        return reduction.result
