"""What a graph calls for a group of tensors, on NumPy vectors that share TensorFlow's memory."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
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
from ..guards import replicas
from ..guards.stats import Sample
from ..path import agreement, pipeline, token
from ..path.auto import SharedTrials, Way, settings
from ..path.config import Config, ConfigMismatchError, Plan
from . import runtime

Array = NDArray[Any]

# What TensorFlow asks of memory that it takes over without a copy (EIGEN_MAX_ALIGN_BYTES).
_ALIGNMENT = 64

# What travels behind norms: so many numbers, as int32. The step is the first of them.
TAIL = 7
PREVIOUS = -2  # the place of the step in which this very reduction ran the last time, -1 for none


class MismatchError(ConfigMismatchError, ValueError):
    """One that TensorFlow does not make an UnknownError of.

    Horovod's elastic.run ends the training at one of those, as if it were done.
    """


class ReplicaError(replicas.ReplicaMismatchError, ValueError):
    """One that TensorFlow does not make an UnknownError of."""


def _aligned(size: int, dtype: Any) -> Array:
    """A new array that TensorFlow takes over without a copy."""
    dtype = np.dtype(dtype)
    memory = np.empty(size * dtype.itemsize + _ALIGNMENT, dtype=np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size * dtype.itemsize].view(dtype)


def _bytes(x: Array) -> NDArray[np.uint8]:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


@cache
def _plan(config: Config, world_size: int) -> Plan:
    return config.plan(world_size)


@dataclass(frozen=True)
class Kernels:
    """What is computed for tensors that are reduced together, a Horovod group or a single one.

    On NumPy vectors that share TensorFlow's memory. `shared` is the maximum over ranks of the norms
    and of what travels behind them (see `_tail`), `shapes` are those of the user's tensors (see
    `shapes_of`). A graph holds these fields as text, so that it can be saved and run in another
    process.
    """

    names: tuple[str, ...]
    dtype: str
    scaling: float  # of the results
    sums: bool  # whether results are the sum over ranks, not the mean
    config: Config
    process_set_id: int
    parcel_count: int
    step: int  # a checksum of all tensors of the step and their buckets
    others: int  # how many these are, without the first one
    owner: str  # whose they are; see runtime
    key: str  # of the reduction, in this process
    observed: bool  # whether statistics may be asked for

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

    @property
    def name(self) -> str:
        """Of the tensors' operations."""
        return self.names[0]

    def operation(self, part: str) -> str:
        """The name of an operation of Horovod's."""
        return f"{stages.tensor_name(hvd_ops._normalize_name(self.name))}.{part}"

    def waits(self, operation: str | None) -> None:
        """Tell the watchdog for which operation the reduction waits from now on; None: none."""
        timeout = self.config.timeout
        if timeout is None:
            return
        watched = runtime.under_way(timeout, self.config.FUNCTION)
        if operation is None:
            watched.end(self.key)
        else:
            watched.move(self.key, operation)

    def propose(self, shapes: Array, steps: Array) -> Array:
        """This rank's part of what `choose` chooses by: of levels="auto", and `_tail`."""
        step, previous = steps.tolist()
        self.waits(self.operation(stages.NORM))
        own = np.array(self._trials().propose(self.name), dtype=np.int32)
        return np.concatenate([own, self._tail(shapes, step, previous)])

    def choose(self, shapes: Array, shared: Array) -> Array:
        """The place among `settings` of how this step is reduced; 0 is no compression.

        Raises ConfigMismatchError where a rank has other settings, or other tensors.
        """
        self._check(shared, shapes)
        place = self._trials().choose(self.name, shared[:-TAIL].tolist())
        present = bool(shared[-1])  # all ranks; only an Allreduce is for those that have joined too
        return np.array(place if present else 0, dtype=np.int32)

    def depart(self, step: Array) -> Array:
        """Before Horovod reduces the tensors itself; the step."""
        self.waits(self.name)
        return step

    def arrive(self, step: Array) -> Array:
        """After that."""
        self.waits(None)
        return step

    def _trials(self) -> SharedTrials:
        """Those of this instance in its process set; the first reduction begins them."""
        process_set = self.process_set
        ranks = runtime.ranks_of(process_set)

        def begin() -> SharedTrials:
            return SharedTrials(tried(self.config, len(ranks)), speaks=process_set.rank() == 0)

        return runtime.trials(self.owner, self.process_set_id, ranks, begin)

    def marks(self, shapes: Array) -> Array:
        """The tokens, one after the other; they are what a reduction begins with."""
        own = zip(self.names, _shapes(shapes), strict=True)
        return np.concatenate([token.make(name, shape, self.dtype) for name, shape in own])

    def run(self, stage: str, index: Sequence[int], *inputs: Any) -> Any:
        """Call one of the methods below."""
        try:
            return getattr(self, stage)(*index, *inputs)
        except BaseException:
            self.waits(None)
            raise

    def measure(self, shapes: Array, steps: Array, *xs: Array) -> tuple[Array, Array]:
        """This rank's part of `shared`, and the tokens; `steps` are those of this run and before.

        See `_tail`.
        """
        own = self._stages(shapes)
        count = own.layout.norm_count
        out = np.empty(count + TAIL, dtype=np.int32)
        own.measure(_tensors(xs), out[:count])
        step, previous = steps.tolist()
        seen = np.full(len(self.names), step, dtype=np.uint32)
        pipeline.warn_unless_all_finite(out[:count], own, seen)
        out[count:] = self._tail(shapes, step, previous)
        self.waits(self.operation(stages.NORM))
        return out, self.marks(shapes)

    def quantize(self, index: int, shapes: Array, shared: Array, *xs: Array) -> Array:
        """The payload of one parcel, in as many equal parts as there are ranks if it is codes.

        Raises ConfigMismatchError where a rank has other settings, or other tensors.
        """
        self._check(shared, shapes)
        if shared[-1] == 0 and not self.plan.in_flight:
            raise ValueError(
                f"GlobalQSGD: levels must be 'standard' where ranks call hvd.join(), got "
                f"{self.config.levels!r}, and a rank had joined when tensor {self.name!r} was "
                "reduced: Horovod has no Alltoall for ranks that have joined. Pass "
                "levels='standard', or give every rank equally many batches."
            )
        own = self._stages(shapes)
        if not own.layout.parcels:
            return _aligned(0, codec.payload_dtype(own.plan))
        parcel = own.layout.parcels[index]
        out = _aligned(parcel.size, codec.payload_dtype(own.plan))
        self.waits(self.operation(stages.codes(index)))
        return own.quantize(parcel, _tensors(xs), self._steps(shared), shared[:-TAIL], out)

    def reduce(self, index: int, shapes: Array, shared: Array, pieces: Array) -> Array:
        """The share of one parcel's mean that this rank rounds for all."""
        own = self._stages(shapes)
        if not own.layout.parcels:
            return _aligned(0, pieces.dtype)
        parcel = own.layout.parcels[index]
        out = _aligned(parcel.reduced_size, pieces.dtype)
        self.waits(self.operation(stages.mean(index)))
        return own.reduce(parcel, pieces, self._steps(shared), shared[:-TAIL], out)

    def check(self, reduced: Array, place: int, mark: Array) -> None:
        """Raise ConfigMismatchError where the ranks disagree about a tensor."""
        if self.scaling == 0:
            return  # nothing comes back of a token
        expected = tuple(mark.tolist())
        try:
            token.check(reduced.tolist(), expected, self.names[place], self.process_set.size())
        except ConfigMismatchError as error:
            raise MismatchError(str(error)) from None

    def dequantize(self, shapes: Array, shared: Array, *inputs: Array) -> Any:
        """The results, from what has been summed; behind this rank's tensors, where `observed`."""
        self.waits(None)
        own, plan = self._stages(shapes), self.plan
        observed = len(self.names) if self.observed else 0
        xs, sums = inputs[:observed], inputs[observed:]
        dtype = tf.as_dtype(self.dtype).as_numpy_dtype
        outs = [_aligned(count, dtype) for count in own.layout.counts]
        for parcel, payload in zip(own.layout.parcels, sums, strict=any(own.layout.counts)):
            own.dequantize(parcel, payload, shared[:-TAIL], _tensors(outs))
        if xs:
            self._observe(own, shared, xs, outs)
        factor = self.scaling * (plan.world_size if self.sums else 1)
        if factor != 1:
            with np.errstate(over="ignore", invalid="ignore"):  # Inf, as Horovod's sums have it
                for out in outs:
                    np.multiply(out, factor, out=out, casting="same_kind")
        return outs if len(outs) > 1 else outs[0]

    def _observe(
        self, own: Stages, shared: Array, xs: Sequence[Array], outs: Sequence[Array]
    ) -> None:
        """Collect the statistics of a step, if it is one of those that are sampled."""
        owner = runtime.owner_of(self.owner)
        if owner is None:
            return
        step, previous, every = int(shared[-TAIL]), int(shared[PREVIOUS]), owner.stats_interval
        if previous >= 0 and step // every == previous // every:
            return
        samples = [Sample(x.astype(np.float32)) for x in xs]
        steps = self._steps(shared)
        for parcel in own.layout.parcels:
            dithers = own.dithers(parcel, steps)
            for place, piece in enumerate(parcel.pieces):
                result = outs[piece.tensor][piece.start : piece.stop].astype(np.float32)
                chunk = stages.chunk_of(parcel, place, shared[:-TAIL])
                samples[piece.tensor].add(own.plan, chunk, dithers[place], result)
        for name, sample in zip(self.names, samples, strict=True):
            owner.stats[name] = sample.stats(own.plan, step, self.config.transport)

    def digests(self, *variables: Array) -> Array:
        """This rank's rows of the table by which replicas are compared."""
        own = [replicas.digest(_bytes(variable)) for variable in variables]
        return replicas.table(own, self.process_set.rank(), self.process_set.size())

    def compare(self, names: bytes, step: Array, found: Array) -> Array:
        """Raise ReplicaMismatchError, on all ranks, where variables differ; `names` are JSON."""
        listed = json.loads(names)
        ranks = hvd_ops._basics._get_process_set_ids_and_ranks()[self.process_set_id]
        shape = len(ranks), len(listed), -1
        try:
            replicas.require_same(
                found.reshape(shape), listed, ranks, int(step), self.config.FUNCTION
            )
        except replicas.ReplicaMismatchError as error:
            raise ReplicaError(str(error)) from None
        return step

    def _tail(self, shapes: Array, step: int, previous: int) -> NDArray[np.int32]:
        """What travels behind the norms.

        The step; checksums of the settings and of the tensors, each with its complement, by which
        every rank sees that one has others; the step of the run before, which ranks that have just
        built their graph do not know; and `pipeline.PRESENT`, of which the maximum is 0 where
        a rank has called hvd.join(), since Horovod takes zeros for it.
        """
        tensors = agreement.checksum([self.names, shapes.tolist(), self.dtype, self.step])
        sums = _settings(self.config), tensors
        pairs = [number for own in sums for number in (own, agreement.LARGEST - own)]
        numbers = [step & agreement.LARGEST, *pairs, previous, pipeline.PRESENT]
        return np.array(numbers, dtype=np.int32)

    def _check(self, shared: Array, shapes: Array) -> None:
        """Raise an error, on every rank alike, where their codes would not belong together."""
        expected = self._tail(shapes, 0, 0)
        if not np.array_equal(shared[-TAIL:][1:3], expected[1:3]):
            raise MismatchError(
                "GlobalQSGD: the ranks are configured differently, as they found with tensor "
                f"{self.name!r}; this one has {self.config.describe()}, gq-horovod {__version__}. "
                "Pass the same options on every rank."
            )
        if not np.array_equal(shared[-TAIL:][3:5], expected[3:5]):
            first, *_ = _shapes(shapes)
            behind = f" or one of the {self.others} beside it" if self.others else ""
            raise MismatchError(
                f"GlobalQSGD: the ranks disagree about tensor {self.name!r}{behind}: this one's "
                f"has shape {first} and dtype {self.dtype}. Every rank has to reduce a tensor of "
                "the same name, shape and dtype."
            )

    def _stages(self, shapes: Array) -> Stages:
        counts = tuple(math.prod(shape) for shape in _shapes(shapes))
        # Where the graph was built without knowing the sizes, there is one parcel.
        limit = max(sum(counts), 1) if self.parcel_count == 1 else _limit()
        own = layout(counts, self.plan, limit)
        return _stages(own, self.names, self.config.seed, self.process_set.rank())

    def _steps(self, shared: Array) -> Steps:
        """How often the tensors were reduced before, on all ranks alike."""
        return np.full(len(self.names), shared[-TAIL], dtype=np.uint32)


@lru_cache(maxsize=4096)  # one for each tensor of a model
def _stages(own: Layout, names: tuple[str, ...], seed: int, rank: int) -> Stages:
    return Stages(own, tuple(map(stages.tensor_name, names)), seed, rank)


def _tensors(xs: Sequence[Array]) -> Tensors:
    if len(xs) == 1:
        return Tensors.of(Buffer.of(xs[0]))
    buffers = [Buffer.of(x) for x in xs]
    pointers = np.array([own.pointer for own in buffers], dtype=np.uint64)
    return Tensors(pointers, buffers[0].dtype, xs)


def shapes_of(xs: Sequence[Any]) -> Any:
    """The shapes of tensors as one vector: of each, the dimensions behind their number.

    A constant where they are known.
    """
    if all(x.shape.is_fully_defined() for x in xs):
        known = [number for x in xs for number in (x.shape.rank, *x.shape.as_list())]
        return tf.constant(known, tf.int32)
    return tf.concat([part for x in xs for part in ([tf.rank(x)], tf.shape(x))], 0)


def _shapes(shapes: Array) -> list[tuple[int, ...]]:
    """What shapes_of() has put together."""
    numbers, found = iter(shapes.tolist()), []
    for rank in numbers:
        found.append(tuple(next(numbers) for _ in range(rank)))
    return found


@cache
def tried(config: Config, world_size: int) -> list[Way]:
    """The ways of levels="auto": a graph has all of them. Buckets are not split by size."""
    return settings(config, world_size, factors=(1,))


@cache
def _settings(config: Config) -> int:
    """A checksum of what all ranks have to share."""
    return agreement.checksum(agreement.describe(config))


@lru_cache(maxsize=16384)  # of a large model's stages; graphs that are traced again have others
def _decode(call: bytes) -> tuple[str, list[int], Kernels]:
    stage, index, fields = json.loads(call)
    fields = {**fields, "names": tuple(fields["names"]), "config": Config(**fields["config"])}
    try:
        return stage, index, Kernels(**fields)
    except TypeError as error:
        raise ValueError(
            "gq_horovod.tensorflow: a graph must be run by the version that has built it, got one "
            f"that gq-horovod {__version__} does not know ({error}); save it again."
        ) from error


def run(call: bytes, *inputs: Any) -> Any:
    """What the graph calls: a method of `Kernels`, written down by its `encode`."""
    stage, index, kernels = _decode(call)
    return kernels.run(stage, index, *inputs)


# tf.numpy_function would number the functions as this process makes them. A graph that is saved
# keeps the number, and what another process has under it may be any function. The key is what the
# error shows where it is unknown.
KEY = "gq_horovod.tensorflow (to be imported before a compressed training step is loaded and run)"
script_ops._py_funcs._funcs[KEY] = run


def parcel_count(counts: Sequence[int | None], plan: Plan) -> int:
    """Parcels of tensors of so many elements; 1 where one is not known."""
    if None in counts or not any(counts):  # none of empty tensors, in a group with one that counts
        return 1
    known = tuple(count or 0 for count in counts)
    return len(layout(known, plan, _limit()).parcels)


def _limit() -> int:
    """Elements of a parcel, for any number of ranks: a graph may outlive those that there are."""
    return pipeline.chunk_elements(1)
