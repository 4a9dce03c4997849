"""What a graph calls for one tensor, on NumPy vectors that share the memory of TensorFlow."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import tensorflow as tf
from horovod.tensorflow import mpi_ops as hvd_ops
from numpy.typing import NDArray
from tensorflow.python.ops import script_ops

from mpi_ops import codec, stages
from mpi_ops.kernels.host import Buffer, Tensors
from mpi_ops.layout import Layout, layout
from mpi_ops.stages import Stages, Steps

from .. import __version__
from ..path import agreement, pipeline, token
from ..path.config import Config, ConfigMismatchError, Plan

Array = NDArray[Any]

# What TensorFlow asks of memory that it takes over without a copy (EIGEN_MAX_ALIGN_BYTES).
_ALIGNMENT = 64

# What travels behind norms: so many numbers, as int32.
TAIL = 6


class MismatchError(ConfigMismatchError, ValueError):
    """One that TensorFlow does not make an UnknownError of.

    Horovod's elastic.run ends the training at one of those, as if it were done.
    """


def _aligned(size: int, dtype: Any) -> Array:
    """A new array that TensorFlow takes over without a copy."""
    dtype = np.dtype(dtype)
    memory = np.empty(size * dtype.itemsize + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size * dtype.itemsize].view(dtype)


@cache
def _plan(config: Config, world_size: int) -> Plan:
    return config.plan(world_size)


@dataclass(frozen=True)
class Kernels:
    """What is computed for one tensor, on NumPy vectors that share TensorFlow's memory.

    `shared` is the maximum over ranks of the norms and of what travels behind them (see `_tail`).
    A graph holds these fields as text, so that it can be saved and run in another process.
    """

    name: str
    dtype: str
    scaling: float  # of the result
    sums: bool  # whether the result is the sum over ranks, not the mean
    config: Config
    process_set_id: int
    chunk_count: int

    def encode(self, stage: str, *index: int) -> bytes:
        """A call of one of the methods below, for `run`."""
        fields = {**vars(self), "config": self.config.describe()}
        return json.dumps([stage, index, fields]).encode()

    @property
    def process_set(self) -> Any:
        return hvd_ops._temp_process_set_object(self.process_set_id)

    @property
    def plan(self) -> Plan:
        """For the ranks that there are now."""
        return _plan(self.config, self.process_set.size())

    def mark(self, x: Array, shape: Array) -> Array:
        """The token; it is what a reduction begins with. `shape` is that of the user's tensor."""
        return np.array(token.make(self.name, tuple(shape.tolist()), x.dtype.name))

    def measure(self, x: Array, shape: Array, step: Array) -> tuple[Array, Array]:
        """This rank's part of `shared`, and the token; `step` says that they belong to one run."""
        mark = self.mark(x, shape)
        norms = codec.norms(Buffer.of(x), self.plan)
        pipeline.warn_unless_finite(norms, self.name, int(step))
        return np.concatenate([norms, self._tail(shape, int(step))]), mark

    def quantize(self, chunk_index: int, x: Array, shape: Array, shared: Array) -> Array:
        """The payload of one chunk, in as many equal parts as there are ranks if it is codes.

        Raises ConfigMismatchError where a rank has other settings, or another tensor.
        """
        self._check(shared, shape, self.plan)
        own = self._stages(x.size)
        if not own.layout.parcels:
            return _aligned(0, codec.payload_dtype(own.plan))
        parcel = own.layout.parcels[chunk_index]
        out = _aligned(parcel.size, codec.payload_dtype(own.plan))
        return own.quantize(parcel, _tensors(x), _steps(shared), shared[:-TAIL], out)

    def reduce(self, chunk_index: int, pieces: Array, shared: Array, size: Array) -> Array:
        """The share of one chunk's mean that this rank rounds for all."""
        own = self._stages(int(size))
        if not own.layout.parcels:
            return _aligned(0, pieces.dtype)
        parcel = own.layout.parcels[chunk_index]
        out = _aligned(parcel.reduced_size, pieces.dtype)
        return own.reduce(parcel, pieces, _steps(shared), shared[:-TAIL], out)

    def check(self, reduced: Array, mark: Array) -> None:
        """Raise ConfigMismatchError where the ranks disagree about the tensor."""
        if self.scaling == 0:
            return  # nothing comes back of a token
        try:
            token.check(reduced.tolist(), mark.tolist(), self.name, self.process_set.size())
        except ConfigMismatchError as error:
            raise MismatchError(str(error)) from None

    def dequantize(
        self, reduced: Array, mark: Array, shared: Array, size: Array, *sums: Array
    ) -> Array:
        """The result; raises ConfigMismatchError where the ranks disagree about the tensor."""
        self.check(reduced, mark)
        own, plan = self._stages(int(size)), self.plan
        out = _aligned(int(size), tf.as_dtype(self.dtype).as_numpy_dtype)
        for parcel, payload in zip(own.layout.parcels, sums, strict=out.size > 0):
            own.dequantize(parcel, payload, shared[:-TAIL], _tensors(out))
        factor = self.scaling * (plan.world_size if self.sums else 1)
        if factor != 1:
            with np.errstate(over="ignore", invalid="ignore"):  # Inf, as Horovod's sums have it
                np.multiply(out, factor, out=out, casting="same_kind")
        return out

    def _tail(self, shape: Array, step: int) -> NDArray[np.int32]:
        """What travels behind the norms.

        The step; checksums of the settings and of the tensor, each with its complement, by which
        every rank sees that one has others; and `pipeline.PRESENT`, of which the maximum is 0 where
        a rank has called hvd.join(), since Horovod takes zeros for it.
        """
        tensor = agreement.checksum([self.name, shape.tolist(), self.dtype])
        sums = _settings(self.config), tensor
        pairs = [number for own in sums for number in (own, agreement.LARGEST - own)]
        return np.array([step & agreement.LARGEST, *pairs, pipeline.PRESENT], dtype=np.int32)

    def _check(self, shared: Array, shape: Array, plan: Plan) -> None:
        """Raise an error, on every rank alike, where their codes would not belong together."""
        expected = self._tail(shape, 0)
        if not np.array_equal(shared[-TAIL:][1:3], expected[1:3]):
            raise MismatchError(
                "GlobalQSGD: the ranks are configured differently, as they found with tensor "
                f"{self.name!r}; this one has {self.config.describe()}, gq-horovod {__version__}. "
                "Pass the same options on every rank."
            )
        if not np.array_equal(shared[-TAIL:][3:5], expected[3:5]):
            raise MismatchError(
                f"GlobalQSGD: the ranks disagree about tensor {self.name!r}: this one's has "
                f"shape {tuple(shape.tolist())} and dtype {self.dtype}. Every rank has to reduce a "
                "tensor of the same name, shape and dtype."
            )
        if shared[-1] == 0 and not plan.in_flight:
            raise ValueError(
                f"GlobalQSGD: levels must be 'standard' where ranks call hvd.join(), got "
                f"{self.config.levels!r}, and a rank had joined when tensor {self.name!r} was "
                "reduced: Horovod has no Alltoall for ranks that have joined. Pass "
                "levels='standard', or give every rank equally many batches."
            )

    def _stages(self, count: int) -> Stages:
        # Where the graph was built without knowing the size, there is one chunk.
        ranks = self.plan.world_size
        limit = max(count, 1) if self.chunk_count == 1 else pipeline.chunk_elements(ranks)
        name, rank = stages.tensor_name(self.name), self.process_set.rank()
        return _stages(layout((count,), self.plan, limit), name, self.config.seed, rank)


@lru_cache(maxsize=4096)  # one for each tensor of a model
def _stages(own: Layout, name: str, seed: int, rank: int) -> Stages:
    return Stages(own, (name,), seed, rank)


def _tensors(x: Array) -> Tensors:
    return Tensors.of(Buffer.of(x))


def _steps(shared: Array) -> Steps:
    """How often the tensor was reduced before, on all ranks alike."""
    return shared[-TAIL : 1 - TAIL].astype(np.uint32)


@cache
def _settings(config: Config) -> int:
    """A checksum of what all ranks have to share."""
    return agreement.checksum(agreement.describe(config))


@cache
def _decode(call: bytes) -> tuple[str, list[int], Kernels]:
    stage, index, fields = json.loads(call)
    return stage, index, Kernels(**{**fields, "config": Config(**fields["config"])})


def run(call: bytes, *inputs: Any) -> Any:
    """What the graph calls: a method of `Kernels`, written down by its `encode`."""
    stage, index, kernels = _decode(call)
    return getattr(kernels, stage)(*index, *inputs)


# tf.numpy_function would number the functions as this process makes them. A graph that is saved
# keeps the number, and what another process has under it may be any function. The key is what the
# error shows where it is unknown.
KEY = "gq_horovod.tensorflow (to be imported before a compressed training step is loaded and run)"
script_ops._py_funcs._funcs[KEY] = run


def chunk_count(count: int | None, plan: Plan) -> int:
    if not count:  # unknown, or an empty tensor in a group with a large one
        return 1
    return len(layout((count,), plan, pipeline.chunk_elements(plan.world_size)).parcels)
