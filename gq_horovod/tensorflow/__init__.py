"""Global-QSGD for Horovod's TensorFlow API.

    import horovod.tensorflow as hvd
    from gq_horovod.tensorflow import GlobalQSGD

    tape = hvd.DistributedGradientTape(tape, compression=GlobalQSGD)

Horovod calls `compress` and `decompress` while the graph is built. What they insert into it, for
one gradient:

1. The norms of its blocks, reduced by a Max-allreduce; and a token, which Horovod reduces in place
   of the gradient (see `token`).
   The step travels with the norms: it is what the dither depends on, and a worker that joins an
   elastic job learns it from the others.
2. The codes, reduced by a Sum-allreduce (standard levels), or by an alltoall, one rounding and an
   allgather (exponential and two-hop levels).
3. The mean, or what else the user's `op` and scaling make of it, decoded after the token has been
   checked.

TensorFlow runs these as their inputs arrive, so many gradients are in flight at once. The kernels
are ordinary functions of their inputs, the step among them, and are declared so: TensorFlow would
run stateful operations one after the other. What depends on the ranks (their number, this rank, the
levels) they look up when they run: in an elastic job a graph outlives them.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import uuid
import zlib
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

from mpi_ops import codec, lanes
from mpi_ops.chunks import Chunk, chunks
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels.host import Buffer

from .. import __version__, agreement, log, pipeline, token
from ..config import Config, ConfigMismatchError, Plan
from ..frontend import ClassOrInstance, Compression, require_linear, require_name

__all__ = ["GlobalQSGD", "allreduce"]

Array = NDArray[Any]

_DTYPES = (tf.float32, tf.float64, tf.float16, tf.bfloat16)

# What TensorFlow asks of memory that it takes over without a copy (EIGEN_MAX_ALIGN_BYTES).
_ALIGNMENT = 64

# What travels behind norms: so many numbers, as int32.
_TAIL = 3
_LARGEST = 2**31 - 1

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
    op = hvd_ops.handle_average_backwards_compatibility(variables["op"], variables["average"])
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
    """What is computed for one tensor, on NumPy arrays that share TensorFlow's memory.

    `shared` is the maximum over ranks of the norms and of what travels behind them: the step, a
    checksum of the settings, and its complement, by which every rank sees that one has others.
    """

    name: str
    dtype: Any
    scaling: float  # of the result
    sums: bool  # whether the result is the sum over ranks, not the mean
    config: Config
    process_set: Any
    settings: int  # a checksum, of 31 bits
    chunk_count: int

    @property
    def plan(self) -> Plan:
        """For the ranks that there are now."""
        return _plan(self.config, self.process_set.size())

    def measure(self, x: Array, step: Array) -> tuple[Array, Array]:
        """This rank's part of `shared`, and the token; `step` says that they belong to one run."""
        mark = token.make(self.name, x.shape, x.dtype.name)
        norms = codec.norms(Buffer.of(x), self.plan)
        pipeline.warn_unless_finite(norms, self.name, int(step))
        tail = [int(step) & _LARGEST, self.settings, _LARGEST - self.settings]
        return np.concatenate([norms, np.array(tail, dtype=np.int32)]), np.array(mark)

    def quantize(self, chunk_index: int, x: Array, shared: Array) -> Array:
        """The payload of one chunk, in as many equal parts as there are ranks if it is codes.

        Raises ConfigMismatchError where a rank has other settings.
        """
        if shared[-2] != self.settings or shared[-1] != _LARGEST - self.settings:
            raise _ConfigMismatchError(
                "GlobalQSGD: the ranks are configured differently, as they found with tensor "
                f"{self.name!r}; this one has {self.config.describe()}, gq-horovod {__version__}. "
                "Pass the same options on every rank."
            )
        plan = self.plan
        chunk = self._chunks(x.size, shared)[chunk_index]
        part = chunk.of(Buffer.of(x))
        size = codec.payload_size(part.size, plan)
        if not plan.in_flight:
            size = codec.shard_size(part.size, plan) * plan.world_size
        out = _aligned(size, codec.payload_dtype(plan))
        random = self._dither(chunk_index, shared, Stage.QUANTIZE, plan.strata)
        codec.quantize(part, chunk.norms, plan, random, out=out)
        return out

    def reduce(self, chunk_index: int, pieces: Array, shared: Array, shape: Array) -> Array:
        """The share of one chunk's mean that this rank rounds for all."""
        plan = self.plan
        chunk = self._chunks(int(shape.prod()), shared)[chunk_index]
        count = chunk.stop - chunk.start
        own = codec.norms_of_share(chunk.norms, count, self.process_set.rank(), plan)
        out = _aligned(codec.reduced_size(count, plan), pieces.dtype)
        random = self._dither(chunk_index, shared, Stage.REDUCE)
        codec.reduce(np.split(pieces, plan.world_size), plan, random, out, own)
        return out

    def dequantize(
        self, reduced: Array, mark: Array, shared: Array, shape: Array, *sums: Array
    ) -> Array:
        """The result; raises ConfigMismatchError where the ranks disagree about the tensor."""
        plan = self.plan
        try:
            token.check(reduced.tolist(), mark.tolist(), self.name, plan.world_size)
        except ConfigMismatchError as error:
            raise _ConfigMismatchError(str(error)) from None
        out = _aligned(int(shape.prod()), self.dtype)
        for chunk, payload in zip(self._chunks(out.size, shared), sums, strict=True):
            codec.dequantize(payload, chunk.norms, plan, chunk.of(Buffer.of(out)))
        factor = self.scaling * (plan.world_size if self.sums else 1)
        if factor != 1:
            np.multiply(out, factor, out=out, casting="same_kind")
        return out.reshape(shape)

    def _chunks(self, count: int, shared: Array) -> list[Chunk]:
        norms = shared[:-_TAIL]
        # Where the graph was built without knowing the size, there is one chunk.
        wanted = max(count, 1) if self.chunk_count == 1 else pipeline.CHUNK_ELEMENTS
        return list(chunks(count, norms, self.plan, wanted)) or [Chunk(0, 0, 0, norms)]

    def _dither(
        self, chunk_index: int, shared: Array, stage: Stage, strata: int = 0
    ) -> NDArray[np.uint32]:
        # The names are those of the pipeline, so that all frameworks round alike.
        name, rank = f"gq.{self.name}.{chunk_index}", self.process_set.rank()
        return dither(self.config.seed, name, int(shared[-_TAIL]), rank, stage, strata)


def _chunk_count(count: int | None, plan: Plan) -> int:
    if count is None:
        return 1
    norms = np.empty(lanes.blocks(count, plan.block_for(count)), dtype=np.int32)
    return len(list(chunks(count, norms, plan, pipeline.CHUNK_ELEMENTS)))


# ------------------------------------------------------------------------------------------- graph


@dataclass(frozen=True)
class _Reduction:
    """One tensor's way through the graph."""

    kernels: _Kernels
    ignore_name_scope: bool
    x: Any
    counter: _Counter

    def measure(self) -> tuple[Any, Any]:
        """What the ranks share before they quantize; and the token.

        They take the largest step of any rank, and go on from there: where one has joined or been
        lost, no dither of a step that was is used again.
        """
        inputs = [self.x, self.counter.next()]
        own, mark = self._call(self.kernels.measure, inputs, "measure", tf.int32, tf.float64)
        mark.set_shape([4])
        shared = self._allreduce(own, "norm", hvd.Max)
        with tf.control_dependencies([self.counter.set(shared[-_TAIL])]):
            return tf.identity(shared), mark

    def standard(self, shared: Any) -> list[Any]:
        """Codes of evenly spaced levels, summed in lanes of int32 words by Allreduce itself."""
        payloads = [self._quantize(index, shared) for index in range(self.kernels.chunk_count)]
        return [
            self._allreduce(payload, f"codes.{index}", hvd.Sum)
            for index, payload in enumerate(payloads)
        ]

    def by_shares(self, shared: Any) -> list[Any]:
        """Codes that Allreduce cannot add: each rank reduces one share of all ranks' codes."""
        means = []
        for index in range(self.kernels.chunk_count):
            codes = self._quantize(index, shared)
            pieces = hvd.alltoall(codes, **self._named(f"codes.{index}"))
            (share,) = self._call(
                lambda *inputs, index=index: self.kernels.reduce(index, *inputs),
                [pieces, shared, tf.shape(self.x)],
                f"reduce.{index}",
                tf.as_dtype(codec.payload_dtype(self.kernels.plan)),
            )
            means.append(hvd.allgather(share, **self._named(f"mean.{index}")))
        return means

    def dequantize(self, reduced: Any, mark: Any, shared: Any, payloads: list[Any]) -> Any:
        """The result, of the shape and dtype of x."""
        inputs = [reduced, mark, shared, tf.shape(self.x), *payloads]
        (result,) = self._call(self.kernels.dequantize, inputs, "dequantize", self.x.dtype)
        result.set_shape(self.x.shape)
        return result

    def _quantize(self, index: int, shared: Any) -> Any:
        dtype = tf.as_dtype(codec.payload_dtype(self.kernels.plan))
        (payload,) = self._call(
            lambda *inputs: self.kernels.quantize(index, *inputs),
            [self.x, shared],
            f"quantize.{index}",
            dtype,
        )
        return payload

    def _allreduce(self, array: Any, part: str, op: int) -> Any:
        return hvd_ops._allreduce(array, op=op, **self._named(part))

    def _named(self, part: str) -> dict[str, Any]:
        return {
            "name": f"{_LOSS}.{self._name(part)}" if _elastic() else self._name(part),
            "ignore_name_scope": self.ignore_name_scope,
            "process_set": self.kernels.process_set,
        }

    def _name(self, part: str) -> str:
        return f"gq.{hvd_ops._normalize_name(self.kernels.name)}.{part}"

    def _call(
        self, function: Callable[..., Any], inputs: list[Any], part: str, *dtypes: Any
    ) -> list[Any]:
        """Insert a call of a kernel; all results but the last stage's are vectors."""
        results = tf.numpy_function(
            function,
            inputs,
            dtypes[0] if len(dtypes) == 1 else list(dtypes),
            stateful=False,
            name=self._name(part),
        )
        listed = [results] if len(dtypes) == 1 else list(results)
        if part != "dequantize":
            for result in listed:
                result.set_shape([None])
        return listed


class _Counter:
    """How many times a tensor of one name was reduced.

    A variable of its own: TensorFlow orders the uses of one variable, and of nothing else. It is
    not a tf.Variable, because a tf.function may create those only when it is traced first.
    """

    def __init__(self) -> None:
        with tf.init_scope(), tf.device("/CPU:0"):
            self._handle = tf.raw_ops.VarHandleOp(
                dtype=tf.int64, shape=[], shared_name=f"gq.step.{uuid.uuid4()}"
            )
            tf.raw_ops.AssignVariableOp(resource=self._handle, value=tf.constant(-1, tf.int64))

    def next(self) -> Any:
        """The number of the reduction that begins here, as a tensor; the first is 0."""
        with tf.device("/CPU:0"):
            one = tf.constant(1, tf.int64)
            added = tf.raw_ops.AssignAddVariableOp(resource=self._handle, value=one)
            with tf.control_dependencies([] if tf.executing_eagerly() else [added]):
                return self.last()

    def set(self, number: Any) -> Any:
        """Make this the number of the last reduction; what does it, in a graph."""
        with tf.device("/CPU:0"):
            value = tf.cast(number, tf.int64)
            return tf.raw_ops.AssignVariableOp(resource=self._handle, value=value)

    def last(self) -> Any:
        """The number of the last reduction, as a tensor."""
        return tf.raw_ops.ReadVariableOp(resource=self._handle, dtype=tf.int64)


class _Group(NamedTuple):
    """What belongs to one process set."""

    plan: Plan  # for the number of ranks when it was made
    settings: int  # a checksum of what all ranks have to share
    census: log.Census | None  # of its tensors, on the rank that logs them


class _Context(NamedTuple):
    """What decompress() has to know about a tensor."""

    reduction: _Reduction
    mark: Any
    shared: Any
    payloads: list[Any]


@tf.custom_gradient
def _not_differentiable(x: Any, result: Any) -> Any:
    """The result; an error if somebody differentiates it to `x`, not a gradient of None."""

    def refuse(_: Any) -> Any:
        raise ValueError(
            "GlobalQSGD: a compressed result must not be differentiated, because the quantized "
            "mean is not differentiable; pass tf.stop_gradient(tensor), or no compression."
        )

    return tf.identity(result), refuse


# --------------------------------------------------------------------------------------- agreement


@cache
def _gathering(process_set: Any) -> Any:
    """A graph that gathers bytes: Horovod names operations after the nodes of graphs."""

    @tf.function(autograph=False, input_signature=[tf.TensorSpec([None], tf.uint8)])
    def gather(data: Any) -> Any:
        return hvd.allgather(
            data, name="gq.configuration", ignore_name_scope=True, process_set=process_set
        )

    return gather


class _Gathering:
    """An allgather in flight; `Handle` of the pipeline. TensorFlow itself only waits."""

    def __init__(self, own: NDArray[np.uint8], process_set: Any) -> None:
        self._result: Any = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(own, process_set), daemon=True)
        self._thread.start()

    def _run(self, own: NDArray[np.uint8], process_set: Any) -> None:
        try:
            self._result = _gathering(process_set)(tf.constant(own)).numpy()
        except Exception as error:  # wait() raises it
            self._error = error

    def ready(self) -> bool:
        return not self._thread.is_alive()

    def wait(self) -> Any:
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result


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
    that they were built for.
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
        plan, settings, census = self._group(caller.process_set)
        if census is not None and census.wanted:
            self._see(census, tensor, caller, eligible, plan)
        if not eligible:
            return _left_to_horovod(tensor)
        x = tf.convert_to_tensor(tensor)
        kernels = _Kernels(
            name=caller.name,
            dtype=x.dtype.as_numpy_dtype,
            scaling=caller.scaling,
            sums=caller.op == hvd.Sum,
            config=self.config,
            process_set=caller.process_set,
            settings=settings,
            chunk_count=_chunk_count(x.shape.num_elements(), plan),
        )
        counter = self._counter(caller.name)
        reduction = _Reduction(kernels, caller.ignore_name_scope, x, counter)
        shared, mark = reduction.measure()
        method = reduction.standard if plan.in_flight else reduction.by_shares
        return mark, _Context(reduction, mark, shared, method(shared))

    @tf.autograph.experimental.do_not_convert
    def _decompress(self, tensor: Any, ctx: Any) -> Any:
        """The reduced gradient for the token that Horovod reduced."""
        if ctx is None:
            return tensor
        if not isinstance(ctx, _Context):
            return tf.cast(tensor, ctx)
        result = ctx.reduction.dequantize(tensor, ctx.mark, ctx.shared, ctx.payloads)
        return _not_differentiable(ctx.reduction.x, result)

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
        if name not in self._counters:
            self._counters[name] = _Counter()
        return self._counters[name]

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

        Not in an elastic job: there a worker that joins uses it first while others do not, and what
        travels behind the norms of every tensor has to tell.
        """
        self.require_process_set(process_set)
        key = (process_set.process_set_id, process_set.size(), tuple(process_set.ranks or ()))
        if key not in self._groups:
            log.identify(hvd.rank(), hvd.size())
            plan = self.config.plan(process_set.size())
            description = agreement.describe(self.config)
            settings = zlib.crc32(json.dumps(description, sort_keys=True).encode()) & _LARGEST
            if not _elastic():
                with tf.init_scope():
                    handle = _Gathering(agreement.encode(description), process_set)
                    agreement.require_same(agreement.decode(agreement.wait(handle)))
            self._groups[key] = _Group(plan, settings, self.begin_log(process_set, plan))
        return self._groups[key]


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
