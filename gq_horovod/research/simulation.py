"""Many ranks in one process: the mean that a job of any size would get, without a network.

    ranks = SimulatedRanks(Config(levels="two-hop"), world_size=64)
    mean = ranks.average("layer1.weight", gradients)     # a list of 64 arrays

Each rank is a reduction of the pipeline of its own, with its own dither, and the codes of all are
exchanged in memory. So kernels, lanes, shares and random numbers are those of a real job, and the
mean is the one that every rank of it would get, bit for bit (of methods whose Allreduce adds
integers, or adds nothing: PowerSGD's float32 sums depend on Horovod's order).

It knows no framework.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ops import codec
from mpi_ops.kernels.host import Buffer, Tensors
from mpi_ops.stages import tensor_name

from ..path.config import Config
from ..path.pipeline import Array, InFlight, Method, Task
from .baselines import elements_of

__all__ = ["SimulatedRanks", "combine"]


def combine(kind: str, arrays: Sequence[Array]) -> list[Array]:
    """What a collective operation gives to each rank; `arrays` are what they put in, in order.

    Arguments:
        kind: "max" and "sum" (each rank gets memory of its own), "alltoall" or "allgather".
    """
    if kind in ("max", "sum"):
        operation = np.maximum if kind == "max" else np.add
        total = arrays[0].copy()
        for array in arrays[1:]:
            operation(total, array, out=total)
        return [total.copy() for _ in arrays]
    if kind == "alltoall":
        pieces = np.stack(arrays).reshape(len(arrays), len(arrays), -1)
        return [pieces[:, rank].reshape(-1) for rank in range(len(arrays))]
    assert kind == "allgather", kind
    return [np.concatenate([array.reshape(-1) for array in arrays])] * len(arrays)


class _Operation:
    """One rank's part in an operation; `Handle` of the pipeline."""

    def __init__(self) -> None:
        self.result: Array | None = None

    def ready(self) -> bool:
        return self.result is not None

    def wait(self) -> Array:
        assert self.result is not None
        result, self.result = self.result, None
        return result


class _Network:
    """Matches the ranks' operations by name, and completes each when the last rank joins."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self.sent = 0.0  # bytes that a rank has sent, in the mean of all ranks
        self._waiting: dict[str, list[tuple[_Operation, Array]]] = {}

    def submit(self, kind: str, array: Array, name: str) -> _Operation:
        """Ranks submit in their order, as `SimulatedRanks` advances them."""
        operation = _Operation()
        self.sent += _hops(kind, self._world_size) * array.nbytes / self._world_size
        waiting = self._waiting.setdefault(name, [])
        waiting.append((operation, array))
        if len(waiting) == self._world_size:
            del self._waiting[name]
            results = combine(kind, [array for _, array in waiting])
            for (own, _), result in zip(waiting, results, strict=True):
                own.result = result
        return operation

    # What the pipeline knows of a network: `Collectives`.

    def allreduce_max(self, array: NDArray[np.int32], name: str) -> _Operation:
        return self.submit("max", array, name)

    def allreduce_sum(self, array: Array, name: str) -> _Operation:
        return self.submit("sum", array, name)

    def alltoall(self, array: Array, name: str) -> _Operation:
        return self.submit("alltoall", array, name)

    def allgather(self, array: Array, name: str) -> _Operation:
        return self.submit("allgather", array, name)


def _hops(kind: str, ranks: int) -> float:
    """How many times a rank sends what it puts into an operation, if the ranks form a ring."""
    if kind == "allgather":
        return ranks - 1
    return (1 if kind == "alltoall" else 2) * (ranks - 1) / ranks


class _Residual:
    """What codes of one rank leave out of a tensor; `Feedback` of `path.feedback`."""

    def __init__(self, values: Array, left: Array) -> None:
        self._values, self._left = values, left
        self.x, self.residuals = Tensors.of(Buffer.of(values)), Tensors.of(Buffer.of(left))

    def subtract(self, tensor: int, start: int, stop: int, norms: NDArray[np.int32]) -> None:
        part = self._left[start:stop]
        if norms.max() < codec.INFINITY:
            np.subtract(self._values[start:stop], part, out=part)
        else:
            part.fill(0)


class SimulatedRanks:
    """A job of `world_size` ranks that all live in this process, for one configuration."""

    def __init__(self, config: Config, world_size: int, method: Method | None = None) -> None:
        """Make them.

        Arguments:
            config: options, as of GlobalQSGD; its transport and min_elements do not matter here.
            world_size: ranks, 1 or more.
            method: another way than Global-QSGD's, such as one of `baselines`.

        Raises ValueError for fewer ranks, or a width that cannot hold the sum of so many.
        """
        if world_size < 1:
            raise ValueError(
                f"SimulatedRanks: world_size must be 1 or more, got {world_size}; pass the number "
                "of ranks to simulate."
            )
        self._config, self._method = config, method
        self._plan = config.plan(world_size)
        self._steps: dict[str, int] = {}
        self._states: dict[str, list[dict[str, Any]]] = {}
        self._left: dict[str, list[Array]] = {}  # residuals of ranks, where error_feedback=True

    def reduce(self, name: str, gradients: Sequence[Buffer], out: Buffer) -> float:
        """Write the mean over ranks to `out`.

        Arguments:
            name: of the tensor in a job, as Horovod's optimizer has it. Its calls are counted, and
                each takes other random numbers.
            gradients: one for each rank, in their order, of one size; they are not modified.
            out: as many elements; may not overlap the gradients.

        Returns the bytes that a rank sends for it, if the ranks form a ring: the mean over ranks,
        without the token that Horovod reduces.

        Raises ValueError if the numbers do not fit.
        """
        world_size = self._plan.world_size
        if len(gradients) != world_size or {own.size for own in gradients} != {out.size}:
            raise ValueError(
                f"SimulatedRanks: gradients must be {world_size} buffers of {out.size} elements, "
                f"got {len(gradients)} of {sorted({own.size for own in gradients})}; pass one for "
                "each rank."
            )
        step = self._steps.get(name, 0)
        self._steps[name] = step + 1
        states = self._states.setdefault(name, [{} for _ in range(world_size)])
        network = _Network(world_size)
        feedback = self._residuals(name, gradients) if self._plan.nearest else [None] * world_size
        ranks = [
            InFlight(
                Task(
                    name=tensor_name(name),
                    keys=(tensor_name(name),),
                    counts=(own.size,),
                    x=Tensors.of(own) if left is None else left.x,
                    new_output=lambda: Tensors.of(out),
                    plan=self._plan,
                    collectives=network,
                    rank=rank,
                    seed=self._config.seed,
                    steps=np.array([step & 0xFFFFFFFF], dtype=np.uint32),
                    method=self._method,
                    state=states[rank],
                    feedback=left,
                )
            )
            for rank, (own, left) in enumerate(zip(gradients, feedback, strict=True))
        ]
        while not all(own.done for own in ranks):
            progress = [own.advance() for own in ranks]
            assert any(progress), "the ranks wait for each other"
        for own in ranks:
            if own.error is not None:
                raise own.error
        # All get the same, so one is enough, unless they remember something of it.
        for own in ranks if any(states) else ranks[:1]:
            own.decode()
        return network.sent

    def _residuals(self, name: str, gradients: Sequence[Buffer]) -> list[_Residual]:
        """Of each rank, with its gradient and what was left out before."""
        own = [elements_of(gradient) for gradient in gradients]
        kept = self._left.get(name)
        if kept is None:
            kept = self._left[name] = [np.zeros_like(array) for array in own]
        return [_Residual(array + left, left) for array, left in zip(own, kept, strict=True)]

    def average(self, name: str, gradients: Sequence[Array]) -> Array:
        """The mean over ranks of arrays: float16, float32 or float64, of one shape and dtype.

        See `reduce`; returns a new array.
        """
        own = [np.ascontiguousarray(gradient) for gradient in gradients]
        mean = np.empty_like(own[0])
        self.reduce(name, [Buffer.of(array.reshape(-1)) for array in own], Buffer.of(mean.ravel()))
        return mean
