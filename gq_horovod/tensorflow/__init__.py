"""Global-QSGD for Horovod's TensorFlow API.

    import horovod.tensorflow as hvd
    from gq_horovod.tensorflow import GlobalQSGD

    tape = hvd.DistributedGradientTape(tape, compression=GlobalQSGD)

Horovod calls `compress` and `decompress` while the graph is built. What they insert into it, for
one gradient:

1. The norms of its blocks, reduced by a Max-allreduce; and a token, which Horovod reduces in place
   of the gradient (see `token`).
   The step travels with the norms: it is what the dither depends on, and a worker that joins an
   elastic job learns it from the others. So do checksums of the settings and of the tensor, and
   whether a rank has called hvd.join().
2. The codes, reduced by a Sum-allreduce (standard levels), or by an alltoall, one rounding and an
   allgather (exponential and two-hop levels).
3. The mean, or what else the user's `op` and scaling make of it, decoded after the token has been
   checked.

TensorFlow runs these as their inputs arrive, so many gradients are in flight at once. The kernels
are ordinary functions of their inputs, the step among them, and are declared so: TensorFlow would
run stateful operations one after the other. What depends on the ranks (their number, this rank, the
levels) they look up when they run: in an elastic job a graph outlives them. Nothing in a graph
belongs to the process that has built it, so that it can be saved, and loaded by another one.

Eagerly each operation waits for all ranks, and the token goes first.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

try:
    import tensorflow as tf
except ImportError as error:
    raise ImportError(
        "gq_horovod.tensorflow: TensorFlow is not installed; `pip install gq-horovod[tensorflow]`, "
        "or import GlobalQSGD from the module of the framework that you use."
    ) from error

try:
    import horovod.tensorflow as hvd
    from horovod.tensorflow import mpi_ops as hvd_ops
except ImportError as error:
    raise ImportError(
        "gq_horovod.tensorflow: Horovod with TensorFlow support is not installed; build it with "
        "HOROVOD_WITH_TENSORFLOW=1 (its `horovodrun --check-build` shows what it has)."
    ) from error

from tensorflow.python.ops import script_ops
from tensorflow.python.ops.control_flow_v2_func_graphs import CondBranchFuncGraph

from mpi_ops import codec, lanes, stages
from mpi_ops.chunks import Chunk, chunks
from mpi_ops.kernels.host import Buffer
from mpi_ops.stages import Stages

from .. import __version__, log
from ..frontend import ClassOrInstance, Compression, require_linear, require_name
from ..path import agreement, pipeline, token
from ..path.config import Config, ConfigMismatchError, Plan

__all__ = ["GlobalQSGD", "allreduce"]

Array = NDArray[Any]

_DTYPES = (tf.float32, tf.float64, tf.float16, tf.bfloat16)

# What TensorFlow asks of memory that it takes over without a copy (EIGEN_MAX_ALIGN_BYTES).
_ALIGNMENT = 64

# What travels behind norms: so many numbers, as int32.
_TAIL = 6

# Where this is in the text of an error of TensorFlow, Horovod's elastic.run takes it for a lost
# worker, and restores the state. It is in those of Horovod's operations that have no name yet.
_LOSS = "HorovodAllreduce"


def _elastic() -> bool:
    """Whether workers may come and go. Horovod builds graphs for that where this is set."""
    return os.environ.get("HOROVOD_ELASTIC", "0") not in ("", "0")


class _ConfigMismatchError(ConfigMismatchError, ValueError):
    """One that TensorFlow does not make an UnknownError of.

    Horovod's elastic.run ends the training at one of those, as if it were done.
    """


# ------------------------------------------------------------------------------------------- caller


class _Caller(NamedTuple):
    """Who called compress(), as far as it matters: it is called with the gradient alone."""

    name: str  # of the tensor, the same on every rank
    op: int
    process_set: Any
    ignore_name_scope: bool  # of the names of Horovod's operations
    scaling: float  # of the result, beside what op does
    siblings: tuple[Any, ...]  # the tensors of its group, itself among them
    expected: int | None  # gradients of the step, if that is known


def _callers(frame: FrameType | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and variables of the functions of horovod.tensorflow on the stack, innermost first.

    AutoGraph, which tf.function applies to all that it traces, runs a rewritten copy of a function.
    The copy has the variables and the module of the original, and a prefix to its name.
    """
    while frame is not None:
        if frame.f_globals is vars(hvd):
            yield frame.f_code.co_name.removeprefix("tf__"), frame.f_locals
        frame = frame.f_back


def _find_caller(tensor: Any, frame: FrameType | None) -> _Caller:
    """Identify the Horovod function that called compress(tensor)."""
    callers = _callers(frame)
    for function, found in callers:
        if function in ("reducescatter", "grouped_reducescatter"):
            raise ValueError(
                f"GlobalQSGD: the caller must be an allreduce, got hvd.{function}; use Horovod's "
                "own compression for it."
            )
        if function in ("allreduce", "grouped_allreduce"):
            variables = found
            break
    else:
        raise RuntimeError(
            "GlobalQSGD: compress() must be called by Horovod's DistributedOptimizer, "
            "DistributedGradientTape or allreduce, which tell it the name of the tensor; to reduce "
            "a tensor yourself use gq_horovod.tensorflow.allreduce."
        )
    name, siblings = variables["name"], (tensor,)
    if function == "grouped_allreduce":
        siblings = tuple(variables["tensors"])
        name = None if name is None else f"{name}.{_position(tensor, siblings)}"
    op = variables["op"]  # Horovod has put there what `average` says
    scaling = variables["prescale_factor"] * variables["postscale_factor"]
    expected = None
    for function, outer in callers:
        if function == "allreduce_grads":
            # gradient_predivide_factor only divides before the sum what it multiplies after it.
            scaling = 1.0
            # Like Horovod's own names, which come from the graph, this one has no counter in it.
            name = name or f"{outer['name']}.{_position(tensor, outer['grads'])}"
            expected = sum(_is_dense(gradient) for gradient in outer["grads"])
            break
    require_linear(hvd, op, name)
    return _Caller(
        name=require_name(name).removeprefix(f"{_LOSS}."),
        op=op,
        process_set=variables["process_set"],
        ignore_name_scope=variables["ignore_name_scope"],
        scaling=scaling,
        siblings=siblings,
        expected=expected,
    )


def _is_dense(gradient: Any) -> bool:
    """Whether Horovod asks compress() about a gradient."""
    return gradient is not None and not isinstance(gradient, tf.IndexedSlices)


def _position(tensor: Any, tensors: Any) -> int:
    """Where a tensor is in a list.

    A tensor that is in it twice has the first place twice. Its reductions differ in their steps,
    and in the name scopes of their operations.
    """
    return next(index for index, member in enumerate(tensors) if member is tensor)


# ------------------------------------------------------------------------------------------ kernels


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
class _Kernels:
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
        """A call of one of the methods below, for `_run`."""
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
        plan = self.plan
        self._check(shared, shape, plan)
        chunk = self._chunks(x.size, shared)[chunk_index]
        part = chunk.of(Buffer.of(x))
        own = self._stages(shared)
        out = _aligned(own.sent_size(part.size), codec.payload_dtype(plan))
        return own.quantize(chunk, part, out)

    def reduce(self, chunk_index: int, pieces: Array, shared: Array, size: Array) -> Array:
        """The share of one chunk's mean that this rank rounds for all."""
        chunk = self._chunks(int(size), shared)[chunk_index]
        out = _aligned(codec.reduced_size(chunk.stop - chunk.start, self.plan), pieces.dtype)
        return self._stages(shared).reduce(chunk, pieces, out)

    def check(self, reduced: Array, mark: Array) -> None:
        """Raise ConfigMismatchError where the ranks disagree about the tensor."""
        if self.scaling == 0:
            return  # nothing comes back of a token
        try:
            token.check(reduced.tolist(), mark.tolist(), self.name, self.process_set.size())
        except ConfigMismatchError as error:
            raise _ConfigMismatchError(str(error)) from None

    def dequantize(
        self, reduced: Array, mark: Array, shared: Array, size: Array, *sums: Array
    ) -> Array:
        """The result; raises ConfigMismatchError where the ranks disagree about the tensor."""
        self.check(reduced, mark)
        own, plan = self._stages(shared), self.plan
        out = _aligned(int(size), tf.as_dtype(self.dtype).as_numpy_dtype)
        for chunk, payload in zip(self._chunks(out.size, shared), sums, strict=True):
            own.dequantize(chunk, payload, chunk.of(Buffer.of(out)))
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
        if not np.array_equal(shared[-_TAIL:][1:3], expected[1:3]):
            raise _ConfigMismatchError(
                "GlobalQSGD: the ranks are configured differently, as they found with tensor "
                f"{self.name!r}; this one has {self.config.describe()}, gq-horovod {__version__}. "
                "Pass the same options on every rank."
            )
        if not np.array_equal(shared[-_TAIL:][3:5], expected[3:5]):
            raise _ConfigMismatchError(
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

    def _chunks(self, count: int, shared: Array) -> list[Chunk]:
        norms = shared[:-_TAIL]
        # Where the graph was built without knowing the size, there is one chunk.
        wanted = max(count, 1) if self.chunk_count == 1 else pipeline.CHUNK_ELEMENTS
        return list(chunks(count, norms, self.plan, wanted)) or [Chunk(0, 0, 0, norms)]

    def _stages(self, shared: Array) -> Stages:
        name, rank, step = stages.tensor_name(self.name), self.process_set.rank(), shared[-_TAIL]
        return Stages(self.plan, rank, stages.dithers(self.config.seed, name, int(step), rank))


@cache
def _settings(config: Config) -> int:
    """A checksum of what all ranks have to share."""
    return agreement.checksum(agreement.describe(config))


@cache
def _decode(call: bytes) -> tuple[str, list[int], _Kernels]:
    stage, index, fields = json.loads(call)
    return stage, index, _Kernels(**{**fields, "config": Config(**fields["config"])})


def _run(call: bytes, *inputs: Any) -> Any:
    """What the graph calls: a method of `_Kernels`, written down by its `encode`."""
    stage, index, kernels = _decode(call)
    return getattr(kernels, stage)(*index, *inputs)


# tf.numpy_function would number the functions as this process makes them. A graph that is saved
# keeps the number, and what another process has under it may be any function. The key is what the
# error shows where it is unknown.
_KEY = "gq_horovod.tensorflow (to be imported before a compressed training step is loaded and run)"
script_ops._py_funcs._funcs[_KEY] = _run


def _chunk_count(count: int | None, plan: Plan) -> int:
    if not count:  # unknown, or an empty tensor in a group with a large one
        return 1
    norms = np.empty(lanes.blocks(count, plan.block_for(count)), dtype=np.int32)
    return len(list(chunks(count, norms, plan, pipeline.CHUNK_ELEMENTS)))


# ------------------------------------------------------------------------------------------- graph


def _aside() -> Any:
    """A name scope for operations that have no name of their own.

    Horovod names operations that the user gave no name after their inputs. Those keep the names
    that TensorFlow gives them without compression.
    """
    return tf.name_scope("gq")


@dataclass(frozen=True)
class _Reduction:
    """One tensor's way through the graph, as a vector."""

    kernels: _Kernels
    ignore_name_scope: bool
    x: Any
    shape: Any  # of the user's tensor
    counter: _Counter

    def begin(self) -> tuple[Any, tuple[Any, list[Any]] | None]:
        """The token; and, in a graph, what `finish` needs.

        Eagerly every operation waits for all ranks, so that Horovod can reduce the token first and
        nothing else is sent where they disagree. In a graph that would be a round trip for nothing.
        """
        if tf.executing_eagerly():
            mark = self.kernels.mark(np.array(self.x), np.array(self.shape))
            return tf.constant(mark), None
        shared, mark = self._measure()
        return mark, (shared, self._payloads(shared))

    def finish(self, reduced: Any, mark: Any, begun: tuple[Any, list[Any]] | None) -> Any:
        """The result, as a vector, for the reduced token."""
        if begun is None:
            self.kernels.check(reduced.numpy(), mark.numpy())
            shared, _ = self._measure()
            begun = shared, self._payloads(shared)
        shared, payloads = begun
        inputs = [reduced, mark, shared, self._size(), *payloads]
        return self._call("dequantize", (), inputs, self.x.dtype)[0]

    def _measure(self) -> tuple[Any, Any]:
        """What the ranks share before they quantize; and the token.

        They take the largest step of any rank, and go on from there: where one has joined or been
        lost, no dither of a step that was is used again.
        """
        with _aside():
            inputs = [self.x, self.shape, self.counter.next()]
        own, mark = self._call("measure", (), inputs, tf.int32, tf.float64)
        mark.set_shape([4])
        shared = self._allreduce(own, stages.NORM, hvd.Max)
        with _aside(), tf.control_dependencies(self.counter.set(shared[-_TAIL])):
            return tf.identity(shared), mark

    def _payloads(self, shared: Any) -> list[Any]:
        standard = self.kernels.plan.in_flight
        return self._standard(shared) if standard else self._by_shares(shared)

    def _standard(self, shared: Any) -> list[Any]:
        """Codes of evenly spaced levels, summed in lanes of int32 words by Allreduce itself."""
        payloads = [self._quantize(index, shared) for index in range(self.kernels.chunk_count)]
        return [
            self._allreduce(payload, stages.codes(index), hvd.Sum)
            for index, payload in enumerate(payloads)
        ]

    def _by_shares(self, shared: Any) -> list[Any]:
        """Codes that Allreduce cannot add: each rank reduces one share of all ranks' codes."""
        means = []
        for index in range(self.kernels.chunk_count):
            codes = self._quantize(index, shared)
            pieces = hvd.alltoall(codes, **self._named(stages.codes(index)))
            inputs = [pieces, shared, self._size()]
            (share,) = self._call("reduce", (index,), inputs, codes.dtype)
            means.append(hvd.allgather(share, **self._named(stages.mean(index))))
        return means

    def _quantize(self, index: int, shared: Any) -> Any:
        dtype = tf.as_dtype(codec.payload_dtype(self.kernels.plan))
        return self._call("quantize", (index,), [self.x, self.shape, shared], dtype)[0]

    def _size(self) -> Any:
        with _aside():
            return tf.size(self.x)

    def _allreduce(self, array: Any, part: str, op: int) -> Any:
        return hvd_ops._allreduce(array, op=op, **self._named(part))

    def _named(self, part: str) -> dict[str, Any]:
        return {
            "name": f"{_LOSS}.{self._name(part)}" if _elastic() else self._name(part),
            "ignore_name_scope": self.ignore_name_scope,
            "process_set": self.kernels.process_set,
        }

    def _name(self, part: str) -> str:
        return f"{stages.tensor_name(hvd_ops._normalize_name(self.kernels.name))}.{part}"

    def _call(self, stage: str, index: tuple[int, ...], inputs: list[Any], *dtypes: Any) -> Any:
        """Insert a call of a kernel; all of its results are vectors."""
        call = self.kernels.encode(stage, *index)
        if tf.executing_eagerly():
            results = _run(call, *(np.array(x) for x in inputs))
            return [tf.convert_to_tensor(x) for x in (results if len(dtypes) > 1 else [results])]
        with _aside():
            inputs = [tf.constant(call), *inputs]
        part = ".".join([stage, *map(str, index)])
        results = tf.raw_ops.PyFuncStateless(
            input=inputs, token=_KEY, Tout=dtypes, name=self._name(part)
        )
        for result in results:
            result.set_shape([None])
        return results


class _Counter:
    """How many times a tensor of one name was reduced.

    A table of one number in TensorFlow's memory. TensorFlow orders the uses of one resource, and of
    nothing else. Graphs make the table themselves where there is none of its name, which a variable
    does not: they can be saved, and run in another process or in a session.
    """

    def __init__(self) -> None:
        self._shared_name = f"gq.step.{uuid.uuid4()}"

    def next(self) -> Any:
        """The number of the reduction that begins here, as a tensor; the first is 0."""
        number = self.last() + 1
        with tf.control_dependencies(self.set(number)):
            return tf.identity(number)

    def set(self, number: Any) -> list[Any]:
        """Make this the number of the last reduction; what does it, in a graph."""
        with tf.device("/CPU:0"):
            done = tf.raw_ops.LookupTableInsertV2(
                table_handle=self._table(),
                keys=tf.constant(0, tf.int64),
                values=tf.cast(number, tf.int64),
            )
        return [] if done is None else [done]

    def last(self) -> Any:
        """The number of the last reduction, as a tensor; -1 where there was none."""
        with tf.device("/CPU:0"):
            return tf.raw_ops.LookupTableFindV2(
                table_handle=self._table(),
                keys=tf.constant(0, tf.int64),
                default_value=tf.constant(-1, tf.int64),
            )

    def _table(self) -> Any:
        if tf.executing_eagerly():
            return self._make()
        # In the function around the branch of a tf.cond that Horovod puts a gradient into: branches
        # without a resource among their inputs would run one after the other.
        graph = tf.compat.v1.get_default_graph()
        while isinstance(graph, CondBranchFuncGraph):
            graph = graph.outer_graph
        made = graph.get_collection_ref(self)  # one for a graph, or TensorFlow would see several
        if not made:
            with graph.as_default(), tf.control_dependencies(None):
                made.append(self._make())
        return made[0]

    def _make(self) -> Any:
        with tf.device("/CPU:0"):
            return tf.raw_ops.MutableHashTableV2(
                key_dtype=tf.int64,
                value_dtype=tf.int64,
                shared_name=self._shared_name,
                name="gq.step",
            )


class _Group(NamedTuple):
    """What belongs to one process set."""

    plan: Plan  # for the number of ranks when it was made
    census: log.Census | None  # of its tensors, on the rank that logs them


class _Context(NamedTuple):
    """What decompress() has to know about a tensor."""

    reduction: _Reduction
    tensor: Any
    mark: Any
    begun: tuple[Any, list[Any]] | None


def _not_differentiable(x: Any, result: Any) -> Any:
    """The result; an error if somebody differentiates it to `x`, not a gradient of None."""
    _, result = tf.raw_ops.IdentityN(input=[x, result])
    return tf.raw_ops.PreventGradient(
        input=result,
        message="GlobalQSGD: a compressed result must not be differentiated, because the quantized "
        "mean is not differentiable; pass tf.stop_gradient(tensor), or no compression.",
    )


# --------------------------------------------------------------------------------------- agreement


def _largest(own: NDArray[np.int32], name: str, process_set: Any) -> NDArray[np.int32]:
    """The maximum over ranks, to which those that have called hvd.join() contribute zeros.

    In a graph of its own, because Horovod names operations after the nodes of graphs, and whether
    or not TensorFlow executes eagerly.
    """
    options = {"name": name, "ignore_name_scope": True, "process_set": process_set}
    settings = tf.compat.v1.ConfigProto(device_count={"GPU": 0})
    with tf.Graph().as_default(), tf.compat.v1.Session(config=settings) as session:
        shared: NDArray[np.int32] = session.run(
            hvd_ops._allreduce(tf.constant(own), op=hvd.Max, **options)
        )
    return shared


class _Library:
    """Stands in for Horovod's library, to see hvd.join(), however a program has imported it."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.joined = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def horovod_join(self, *arguments: Any, **options: Any) -> Any:
        self.joined = True
        return self._library.horovod_join(*arguments, **options)


if not isinstance(hvd_ops.MPI_LIB, _Library):
    hvd_ops.MPI_LIB = _Library(hvd_ops.MPI_LIB)


def _ranks_compare() -> bool:
    """Whether ranks that build their first graph compare their settings.

    Not where one of them may do so while others have built theirs: they would take no part. That is
    in an elastic job, and after hvd.join(). There what travels behind the norms has to tell.
    """
    return not (_elastic() or hvd_ops.MPI_LIB.joined)


class _InFlight:
    """A function that waits for other ranks, in a thread; `Handle` of the pipeline."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._result: Any = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(function, arguments), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            self._result = function(*arguments)
        except Exception as error:  # wait() raises it
            self._error = error

    def ready(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result


# One for each process set: threads of one process must not begin two comparisons at a time.
_locks: dict[Any, threading.Lock] = {}


class GlobalQSGD(Compression):
    """Horovod compression by Global-QSGD: unbiased, and the same result on every rank bit for bit.

    Pass the class itself for the defaults, or an instance. Works with hvd.allreduce,
    grouped_allreduce, DistributedGradientTape and DistributedOptimizer, eagerly and in a
    tf.function, with op Average and Sum, `gradient_predivide_factor`, `backward_passes_per_step`,
    `groups`, `sparse_as_dense` and process sets.

    A NaN or Inf on any rank makes its block NaN on every rank; a block of zeros stays zeros.
    float16, bfloat16, float32 and float64 are compressed (float64 at the range of float32),
    anything else is left to Horovod, tf.IndexedSlices too. Tensors on a GPU are staged through host
    memory. transport must be "horovod".

    Raises ConfigMismatchError at the first use, on every rank, if the ranks are configured
    differently; in an elastic job at the first gradient (where block sizes or min_elements differ,
    Horovod raises its own error about operations that do not match). There graphs outlive the ranks
    that they were built for. Raises ValueError with exponential and two-hop levels where a rank has
    called hvd.join(). What is raised while a graph runs, is a tf.errors.InvalidArgumentError with
    the same text.
    """

    HVD = hvd

    @cached_property
    def _groups(self) -> dict[Any, _Group]:
        """What belongs to the process sets that have agreed on their settings."""
        return {}

    @cached_property
    def _counters(self) -> dict[str, _Counter]:
        """How many times each tensor was reduced, by its name."""
        return {}

    # -------------------------------------------------------------------------- Horovod's interface

    @tf.autograph.experimental.do_not_convert
    def _compress(self, tensor: Any) -> tuple[Any, Any]:
        """Start reducing `tensor` and return a token for Horovod to reduce in place of it."""
        caller = _find_caller(tensor, sys._getframe(1))
        eligible = any(self._eligible(member) for member in caller.siblings)
        if not caller.process_set.included():
            # Horovod builds the graph on all ranks, and runs it on those of the process set.
            return tensor, None
        plan, census = self._group(caller.process_set)
        if census is not None and census.wanted:
            self._see(census, tensor, caller, eligible, plan)
        if not eligible or tensor.dtype not in _DTYPES:
            return _left_to_horovod(tensor)
        with _aside():
            x = tf.convert_to_tensor(tensor)
            vector, shape = tf.reshape(x, [-1]), tf.shape(x)
        kernels = _Kernels(
            name=caller.name,
            dtype=x.dtype.name,
            scaling=caller.scaling,
            sums=caller.op == hvd.Sum,
            config=self.config,
            process_set_id=caller.process_set.process_set_id,
            chunk_count=_chunk_count(x.shape.num_elements(), plan),
        )
        counter = self._counter(caller.name)
        reduction = _Reduction(kernels, caller.ignore_name_scope, vector, shape, counter)
        mark, begun = reduction.begin()
        return mark, _Context(reduction, x, mark, begun)

    @tf.autograph.experimental.do_not_convert
    def _decompress(self, tensor: Any, ctx: Any) -> Any:
        """The reduced gradient for the token that Horovod reduced."""
        if ctx is None:
            return tensor
        if not isinstance(ctx, _Context):
            return tf.cast(tensor, ctx)
        vector = ctx.reduction.finish(tensor, ctx.mark, ctx.begun)
        with _aside():
            result = tf.reshape(vector, ctx.reduction.shape)
            result.set_shape(ctx.tensor.shape)
            return _not_differentiable(ctx.tensor, result)

    compress = ClassOrInstance(_compress)
    decompress = ClassOrInstance(_decompress)

    def _eligible(self, tensor: Any) -> bool:
        """Whether to compress; a tensor whose size the graph does not know yet is compressed."""
        if isinstance(tensor, tf.IndexedSlices):
            return False
        count = tensor.shape.num_elements()
        large = count is None or count >= max(self.config.min_elements, 1)
        return large and tensor.dtype in _DTYPES

    # --------------------------------------------------------------------------------------- state

    def _counter(self, name: str) -> _Counter:
        return self._counters.setdefault(name, _Counter())

    def _see(
        self, census: log.Census, tensor: Any, caller: _Caller, eligible: bool, plan: Plan
    ) -> None:
        """Log a tensor that comes by for the first time."""
        count, dtype = tensor.shape.num_elements(), tensor.dtype.name
        supported = tensor.dtype in _DTYPES
        known = eligible and count is not None
        census.see(
            caller.name,
            count,
            dtype,
            reason=None if eligible else self.reason(count or 0, dtype, supported),
            wire_bytes=self.wire_bytes(count, plan) if known else None,
            expected=caller.expected,
        )

    def _group(self, process_set: Any) -> _Group:
        """The settings for a process set; on first use, checks that its ranks have the same.

        See `_ranks_compare` for where they cannot.
        """
        self.require_process_set(process_set)
        key = (process_set.process_set_id, process_set.size(), tuple(process_set.ranks or ()))
        with _locks.setdefault(key, threading.Lock()):
            if key not in self._groups:
                log.identify(hvd.rank(), hvd.size())
                plan = self.config.plan(process_set.size())
                if _ranks_compare():
                    self._agree(process_set)
                self._groups[key] = _Group(plan, self.begin_log(process_set, plan))
        return self._groups[key]

    def _agree(self, process_set: Any) -> None:
        """Raise ConfigMismatchError, on all ranks that take part, where settings differ."""

        def largest(own: NDArray[np.int32], name: str) -> NDArray[np.int32]:
            return agreement.wait(_InFlight(_largest, own, name, process_set))

        description = agreement.describe(self.config)
        agreement.agree(largest, description, (), process_set.rank(), process_set.size())


def _left_to_horovod(tensor: Any) -> tuple[Any, Any]:
    """What Horovod reduces by itself: in TensorFlow it knows float16 but not bfloat16."""
    if tensor.dtype == tf.bfloat16:
        return tf.cast(tensor, tf.float32), tensor.dtype
    return tensor, None


def allreduce(
    tensor: Any,
    name: str,
    *,
    op: int = hvd.Average,
    compression: type[GlobalQSGD] | GlobalQSGD = GlobalQSGD,
    process_set: Any = hvd.global_process_set,
) -> Any:
    """Average or sum a tensor over ranks with Global-QSGD, without an optimizer.

    Arguments:
        tensor: tf.Tensor or tf.Variable of any shape and dtype.
        name: identifies the operation, the same on every rank. Repeated calls may reuse it.
        op: hvd.Average or hvd.Sum.
        compression: GlobalQSGD or an instance of it.
        process_set: the ranks that take part.

    Returns a new tensor of the same shape and dtype, equal on every rank bit for bit. Eagerly, it
    blocks until it is there. Raises ValueError for a missing name or another op.
    """
    if _elastic() and name is not None:
        name = f"{_LOSS}.{name}"
    return hvd.allreduce(tensor, name=name, op=op, compression=compression, process_set=process_set)
