"""A compressed Allreduce for plain MPI programs.

    from mpi4py import MPI
    from mpi_ops import allreduce

    mean = allreduce(gradient, MPI.COMM_WORLD)

The codes travel as `mpi_ops.exchange` says. Importing this module imports mpi4py, which starts MPI
unless the program has set mpi4py.rc.initialize = False; MPI is called by the functions, not before.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from . import agreement, codec, lifetime, nodes
from .chunks import chunk_elements
from .exchange import TAGS, Exchange, Steps, allgather, alltoall, finish, in_window, largest
from .kernels import host
from .kernels.host import Buffer, Tensors
from .kernels.interface import dtype_name
from .layout import Parcel, layout
from .nodes import Round
from .scheme import ConfigMismatchError, Plan, Scheme
from .stages import Stages

Bytes = NDArray[np.uint8]
# Yields whenever there is nothing to do but wait; returns the error that every rank gets, if any.
Reduction = Generator[None, None, Exception | None]

# Exchanges in flight on one communicator have tags of their own. MPI guarantees tags to 32767. What
# finds no tags free waits for the oldest operation: this many may be in flight, and a third of that
# by nodes. On the other ranks the oldest may still go on: MPI delivers messages of one tag in the
# order in which they were sent.
_TAG_SETS = 32768 // TAGS

_DESCRIPTION_BYTES = 1024
_NAME = "mpi_ops.allreduce"  # of what is reduced, for its dither


@dataclass(eq=False)
class _Channel:
    """Private duplicates of a user's communicator, and the operations in flight on them.

    MPI matches collectives by the order in which they start. The openings start when the user
    calls, which is the same order on every rank; what follows starts when an opening is complete,
    which may be another order, so it has a communicator of its own and operations take turns.
    """

    opening: MPI.Intracomm
    comm: MPI.Intracomm
    operations: int = 0  # started so far, the same on every rank
    turn: int = 0  # the operation that may start its next collective
    in_flight: list[Request] = field(default_factory=list)  # in the order of their operations
    # Threads may wait for different requests. Reentrant, since a signal may come at any time.
    lock: threading.RLock = field(default_factory=threading.RLock)
    # What stopped an operation on this rank alone; its traceback keeps the buffers that MPI uses.
    broken: BaseException | None = None
    nodes: _Nodes | None = None  # once somebody reduces by nodes
    may_split: bool = True  # whether whoever advances operations here may wait for all ranks
    left: bool = False  # by the user, who has freed the communicator

    def next_operation(self) -> int:
        self.operations += 1
        return self.operations - 1

    def tags_of(self, operation: int, sets: int) -> Generator[None, None, int]:
        """The first of an operation's tags, in so many sets, once no other one here has them."""
        at_once = _TAG_SETS // sets
        while self.in_flight[0].operation <= operation - at_once:
            yield
        return operation % at_once * sets * TAGS

    def advance(self, may_split: bool) -> None:
        """Advance all operations, as far as they get without waiting; the lock is held."""
        self.may_split = may_split
        try:
            for request in list(self.in_flight):
                if self.broken is None:
                    request._advance()
        finally:
            self.may_split = True

    def require_whole(self) -> None:
        """Raise RuntimeError where an operation stopped halfway: no other would be complete."""
        if self.broken is not None:
            raise RuntimeError(
                "mpi_ops.allreduce: comm must be one on which every reduction was completed, but "
                f"one was stopped on this rank by {type(self.broken).__name__}: {self.broken}; "
                "other ranks wait for it, so end the job (comm.Abort(), or start programs with "
                "`python -m mpi4py`, which does it)."
            ) from self.broken

    def leave(self) -> None:
        """Free the duplicates, once nothing is in flight on them."""
        self.left = True
        if not self.in_flight:
            self.free()

    def remove(self, request: Request) -> None:
        self.in_flight.remove(request)
        if self.left and not self.in_flight:
            self.free()

    def free(self) -> None:
        _channels.remove(self)
        self.opening.Free()
        self.comm.Free()
        if self.nodes is not None:
            self.nodes.free()


_channels: list[_Channel] = []


def _advance_beside(own: _Channel | None) -> None:
    """Advance what is in flight on other communicators; their owners are told of errors."""
    for other in list(_channels):
        if other is own or not other.in_flight:
            continue
        if other.lock.acquire(blocking=False):  # else another thread advances it
            try:
                other.advance(may_split=False)
            finally:
                other.lock.release()


def _release(comm: MPI.Comm, keyval: int, channel: _Channel) -> None:
    with channel.lock:
        if channel in _channels:
            channel.leave()


@atexit.register
def _leave() -> None:
    """At the end of this process: complete what others wait for, or end the job with an error.

    They would wait for ever, or MPI would end while it writes to memory that is gone. (The program
    may have finalized MPI before.)
    """
    if lifetime.problem() is not None:
        return
    end = time.monotonic() + lifetime.LEAVE_SECONDS
    while any(own.in_flight and own.broken is None for own in _channels):
        _advance_beside(None)
        if time.monotonic() > end:
            break
        os.sched_yield()
    if any(own.in_flight for own in _channels):
        lifetime.end_job("mpi_ops.allreduce")
    for channel in list(_channels):
        channel.free()


@cache
def _keyval() -> int:
    return MPI.Comm.Create_keyval(delete_fn=_release)


def _channel(comm: Any) -> _Channel:
    """The duplicate that belongs to `comm`; made at the first use, freed with `comm` or at exit."""
    if not isinstance(comm, MPI.Comm) or comm == MPI.COMM_NULL:
        raise ValueError(
            f"mpi_ops.allreduce: comm must be a communicator that is not freed, got {comm!r}; "
            "pass MPI.COMM_WORLD or a part of it."
        )
    # Those of a session of MPI 4 work without MPI_Init.
    if MPI.Is_finalized() or comm in (MPI.COMM_WORLD, MPI.COMM_SELF):
        lifetime.require("mpi_ops.allreduce")
    if comm.Is_inter():
        raise ValueError(
            "mpi_ops.allreduce: comm must be an intracommunicator, got an intercommunicator; "
            "merge it first (comm.Merge())."
        )
    channel = comm.Get_attr(_keyval())
    if channel is None:
        assert isinstance(comm, MPI.Intracomm)
        channel = _Channel(comm.Dup(), comm.Dup())
        _channels.append(channel)
        comm.Set_attr(_keyval(), channel)
    assert isinstance(channel, _Channel)
    return channel


class Request:
    """A reduction in flight.

    Communication advances inside test() and wait() only: that of all requests of this process.
    """

    def __init__(
        self, channel: _Channel, operation: int, steps: Reduction, out: NDArray[Any]
    ) -> None:
        self.operation = operation
        self._channel = channel
        self._steps = steps
        self._out = out
        self._error: Exception | None = None
        channel.in_flight.append(self)

    def test(self) -> bool:
        """Advance; whether the result is complete. Raises what the reduction raises."""
        channel = self._channel
        with channel.lock:
            if self in channel.in_flight:
                if MPI.Is_finalized():
                    lifetime.require("mpi_ops.iallreduce")
                # The others too: another rank may be waiting for a message of theirs.
                channel.advance(may_split=True)
            if self._error is not None:
                raise self._error
            if self not in channel.in_flight:
                return True
            channel.require_whole()
        _advance_beside(channel)
        return False

    def wait(self) -> NDArray[Any]:
        """The result, after blocking until it is complete."""
        while not self.test():
            os.sched_yield()
        return self._out

    def _advance(self) -> None:
        try:
            next(self._steps)
        except StopIteration as end:
            self._error = end.value
            self._channel.remove(self)
        except Exception as error:
            self._error = self._channel.broken = error
        except BaseException as error:  # an interrupt, after which the generator has ended too
            self._channel.broken = error
            raise


def allreduce(
    array: Any,
    comm: MPI.Comm = MPI.COMM_WORLD,
    *,
    levels: Literal["standard", "exponential", "two-hop"] = "two-hop",
    bits: int | None = None,
    block_size: int | Literal["auto"] | None = "auto",
    norm: Literal["max", "l2"] = "max",
    average: bool = True,
    hierarchical: bool = False,
    seed: int = 0,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """Average (or sum) an array over the ranks of `comm` with Global-QSGD codes on the wire.

    Arguments:
        array: float16, float32, float64 (or ml_dtypes.bfloat16) of any shape. A NumPy array or
            anything that NumPy reads through the buffer or the DLPack protocol; or a CuPy array or
            anything with `__cuda_array_interface__`, which is quantized and decoded on its GPU, so
            that only codes and norms pass through host memory. It is not modified. An array that is
            not C-contiguous is copied.
        comm: an intracommunicator; the call is collective and works on a private duplicate.
        levels, bits, block_size, norm, seed: as in `mpi_ops.scheme.Scheme`.
        average: False gives the sum.
        hierarchical: True adds arrays exactly, as float32, among the ranks of each node, and
            quantizes what goes between nodes, with levels for as many ranks as there are nodes.
            Nodes need as many ranks each. The first such call on a communicator splits it, and
            waits for all ranks. Arrays on a GPU then pass through host memory as float32.
        out: C-contiguous NumPy (or CuPy) array of the same shape and dtype for the result; may be
            `array` itself.

    Returns `out` or a new array, NumPy's or CuPy's: unbiased, equal on every rank bit for bit; NaN
    in blocks where any rank has a NaN or Inf. A sum beyond the range of the dtype is Inf, without a
    warning of NumPy's. Memory beyond that: the norms, and at most the compressed size.
    Deterministic in `seed`, the data and the number of earlier calls on `comm`.

    Raises ConfigMismatchError on every rank if size, dtype or options differ between ranks, and
    ValueError or TypeError for options that cannot work; the other ranks then get
    ConfigMismatchError. RuntimeError before MPI is initialized and after it was finalized, and on a
    communicator on which an error or an interrupt has stopped an earlier call halfway. Blocks.

    Threads that share a communicator need MPI_THREAD_MULTIPLE, and must make their calls in the
    same order on every rank, as with MPI's own collectives: give each thread a communicator.
    """
    return iallreduce(
        array,
        comm,
        levels=levels,
        bits=bits,
        block_size=block_size,
        norm=norm,
        average=average,
        hierarchical=hierarchical,
        seed=seed,
        out=out,
    ).wait()


def iallreduce(
    array: Any,
    comm: MPI.Comm = MPI.COMM_WORLD,
    *,
    levels: Literal["standard", "exponential", "two-hop"] = "two-hop",
    bits: int | None = None,
    block_size: int | Literal["auto"] | None = "auto",
    norm: Literal["max", "l2"] = "max",
    average: bool = True,
    hierarchical: bool = False,
    seed: int = 0,
    out: NDArray[Any] | None = None,
) -> Request:
    """Start an `allreduce`; the result is that of the request's wait().

    `array` and `out` must be left alone until then. Several may be in flight on one communicator,
    if every rank starts them in the same order. Of more than 4,096 (by nodes 1,365) the later ones
    exchange nothing before the oldest are complete. Errors are raised by test() and wait(), which
    any thread may call. `comm` may be freed before.

    Ranks may wait in any order, also for requests on different communicators.

    Making communicators blocks until all ranks do the same. The first call on `comm` duplicates it.
    The first hierarchical one splits the duplicate when all that was started before is complete on
    this rank: in the call, or in the test() or wait() of any request of `comm`, which other ranks
    then have to call as well.
    """
    channel = _channel(comm)
    problem: Exception | None = None
    prepared: _Prepared | None = None
    local: codec.Norms | None = None
    try:
        scheme = Scheme(levels=levels, bits=bits, block_size=block_size, norm=norm, seed=seed)
        prepared = _prepare(array, out, scheme, channel.comm.size, average, hierarchical)
        description = prepared.describe()
        if not prepared.hierarchical:
            local = codec.norms(prepared.x, prepared.plan)
    except Exception as error:  # whatever it is: the other ranks wait for this one
        problem = error  # raised once they have been told
        description = {"error": f"{type(error).__name__}: {error}"}
    except BaseException as error:  # an interrupt: the next call is not the one that others make
        channel.broken = channel.broken or error
        raise
    with channel.lock:
        channel.require_whole()
        operation = channel.next_operation()  # counted on every rank, also where it is refused
        steps = _reduction(channel, operation, description, prepared, local, problem)
        request = Request(
            channel, operation, steps, prepared.out if prepared is not None else np.empty(0)
        )
        request._advance()  # the opening goes out now
    return request


@dataclass
class _Prepared:
    """A checked call."""

    x: Buffer
    out: NDArray[Any]
    target: Buffer  # the memory of out
    scheme: Scheme
    plan: Plan  # of a reduction among all ranks
    average: bool
    hierarchical: bool

    def describe(self) -> dict[str, Any]:
        return {
            **asdict(self.scheme),
            "elements": self.x.size,
            "dtype": self.x.dtype,
            "average": self.average,
            "hierarchical": self.hierarchical,
        }


def _prepare(
    array: Any,
    out: NDArray[Any] | None,
    scheme: Scheme,
    world_size: int,
    average: bool,
    hierarchical: bool,
) -> _Prepared:
    for argument, given, remedy in (
        ("average", average, "pass False for the sum"),
        ("hierarchical", hierarchical, "pass True to add exactly inside nodes"),
    ):
        if not isinstance(given, bool | np.bool_):
            raise TypeError(
                f"mpi_ops.allreduce: {argument} must be True or False, got {given!r} of type "
                f"{type(given).__name__}; {remedy}."
            )
    xp, values = _as_array(array)
    for argument, masked in (("array", values), ("out", out)):
        if isinstance(masked, np.ma.MaskedArray):
            raise TypeError(
                f"mpi_ops.allreduce: {argument} must be an array without a mask, which MPI does "
                "not carry, got a numpy.ma.MaskedArray; pass its .filled(0) or its .data."
            )
    if dtype_name(values.dtype) not in host.DTYPES:
        raise TypeError(
            "mpi_ops.allreduce: array must have one of the dtypes "
            f"{', '.join(host.DTYPES)} in native byte order, got {values.dtype}; convert it first, "
            "or use comm.Allreduce."
        )
    # By nodes, codes of fewer parties are added; one is the least, and says what is no plan at all.
    plan = scheme.plan(1 if hierarchical else world_size)
    x = Buffer.of(_readable(xp, values))
    if out is None:
        out = xp.empty(values.shape, dtype=values.dtype)
    elif not isinstance(out, xp.ndarray):
        raise TypeError(
            f"mpi_ops.allreduce: out must be a {xp.__name__}.ndarray, got a "
            f"{type(out).__module__}.{type(out).__name__}; "
            "leave it out to get a new array."
        )
    # CuPy's arrays always have both flags, and do not say so.
    names = {"writeable": "read-only", "aligned": "not aligned"}
    lacks = "".join(f", {name}" for flag, name in names.items() if not getattr(out.flags, flag, 1))
    same = out.shape == values.shape and out.dtype == values.dtype
    if not (same and out.flags.c_contiguous) or lacks:
        raise ValueError(
            f"mpi_ops.allreduce: out must be a C-contiguous, aligned, writeable array of shape "
            f"{values.shape} and dtype {values.dtype}, got shape {out.shape}, dtype {out.dtype}, "
            f"strides {out.strides}{lacks}; leave it out to get a new array."
        )
    target = Buffer.of(out)
    # The same memory is fine: a chunk is written after it has been read.
    if 0 < abs(target.pointer - x.pointer) < values.nbytes:
        raise ValueError(
            "mpi_ops.allreduce: out must be array itself or share no memory with it, got "
            "overlapping arrays; pass one of them, or leave out out."
        )
    return _Prepared(x, out, target, scheme, plan, bool(average), bool(hierarchical))


def _as_array(array: Any) -> tuple[Any, Any]:
    """The module of array functions for the memory in which `array` lies, and an array of it."""
    if isinstance(array, np.ndarray):
        return np, array
    if hasattr(array, "__cuda_array_interface__"):
        try:
            import cupy
        except ImportError as error:
            raise TypeError(
                f"mpi_ops.allreduce: array must be in host memory where CuPy is missing, got "
                f"{type(array).__name__} on a GPU; `pip install 'gq-horovod[cuda13]'` (or "
                "cuda12, for an older driver), or copy it to the host first."
            ) from error
        return cupy, cupy.asarray(array)
    if not hasattr(array, "__dlpack__"):
        return np, np.asarray(array)
    try:
        return np, np.from_dlpack(array)
    except (BufferError, RuntimeError) as error:
        raise TypeError(
            "mpi_ops.allreduce: array must be one that NumPy can read by DLPack, got a "
            f"{type(array).__name__} that it cannot ({error}); pass a NumPy array of its memory, "
            "of bfloat16 in torch x.view(torch.int16).numpy().view(ml_dtypes.bfloat16)."
        ) from error


def _readable(xp: Any, values: Any) -> Any:
    """The array where kernels can read it, or a copy."""
    if xp is np:
        return np.require(values, requirements=("C_CONTIGUOUS", "ALIGNED"))
    return xp.ascontiguousarray(values)


def _scale(out: Any, factor: int) -> None:
    """Multiply an array in place. An overflow is Inf, of which nobody needs to be warned."""
    if not isinstance(out, np.ndarray):
        out *= factor
        return
    # float16 and bfloat16 would round the factor: 257 ranks would be 256.
    dtype = np.float32 if out.itemsize < 4 else out.dtype
    with np.errstate(all="ignore"):
        np.multiply(out, factor, out=out, dtype=dtype, casting="unsafe")


# ---------------------------------------------------------------------------------------- the steps


def _reduction(
    channel: _Channel,
    operation: int,
    description: dict[str, Any],
    prepared: _Prepared | None,
    local: codec.Norms | None,
    problem: Exception | None,
) -> Reduction:
    """Agree, exchange norms, then the codes. Whatever it raises is an error of this rank alone."""
    encoded = agreement.encode(description, _DESCRIPTION_BYTES)
    fingerprint = int.from_bytes(encoded.tobytes(), "little") % (2**61 - 1)
    extremes = np.array([fingerprint, -fingerprint])
    largest = np.empty_like(extremes)
    opening = channel.opening.Iallreduce(extremes, largest, op=MPI.MAX)
    yield from finish([opening])
    while channel.turn != operation:
        yield
    # Every rank sees the same two extremes, so all take the same branch.
    if problem is not None or largest[0] != -largest[1]:
        request, gathered = _gather(channel.comm, encoded)
        channel.turn += 1
        yield from finish([request])
        if problem is not None:
            return problem
        try:
            descriptions = agreement.decode(gathered, _DESCRIPTION_BYTES)
            agreement.require_same(descriptions, "mpi_ops.allreduce")
        except ConfigMismatchError as error:
            return error
    assert prepared is not None
    if prepared.hierarchical:
        if channel.nodes is None:
            # To split waits for all ranks. They may wait for what has begun before, so that first.
            while not channel.may_split or any(
                other.operation < operation for other in channel.in_flight
            ):
                yield
            channel.nodes = _Nodes.of(channel.comm)
        channel.turn += 1
        first_tag = yield from channel.tags_of(operation, nodes.ROUNDS_IN_FLIGHT)
        return (yield from _by_nodes(channel.nodes, operation, first_tag, prepared))
    assert local is not None
    norms = np.empty_like(local)
    exchange = channel.comm.Iallreduce(local, norms, op=MPI.MAX)
    channel.turn += 1
    yield from finish([exchange])
    del local
    own = layout((prepared.x.size,), prepared.plan, None)
    stages = Stages(own, (_NAME,), prepared.scheme.seed, channel.comm.rank)
    first_tag = yield from channel.tags_of(operation, 1)
    numbers = np.array([operation & 0xFFFFFFFF], dtype=np.uint32)
    x, target = Tensors.of(prepared.x), Tensors.of(prepared.target)

    near = codec.near(norms, target)

    def decode(parcel: Parcel, payload: codec.Payload) -> None:
        stages.dequantize(parcel, payload, near, target)

    yield from Exchange(channel.comm, first_tag, x, numbers, norms, stages, decode).run()
    if not prepared.average:
        _scale(prepared.out, channel.comm.size)
    return None


@dataclass(frozen=True)
class _Nodes:
    """The ranks of this node, and those of the same place in theirs; or why there are none."""

    inside: MPI.Intracomm
    across: MPI.Intracomm
    problem: str | None

    @classmethod
    def of(cls, comm: MPI.Intracomm) -> _Nodes:
        """Collective over `comm`."""
        inside = _node(comm)
        # A node is known by its first rank.
        found = nodes.placement(comm.allgather(inside.bcast(comm.rank)))
        across = comm.Split(inside.rank, comm.rank)
        assert isinstance(across, MPI.Intracomm)
        return cls(inside, across, found if isinstance(found, str) else None)

    def free(self) -> None:
        """As the communicator that they are of."""
        self.inside.Free()
        self.across.Free()


def _node(comm: MPI.Intracomm) -> MPI.Intracomm:
    """The ranks of this rank's node: those with which it shares memory."""
    own = comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)
    assert isinstance(own, MPI.Intracomm)
    return own


def _by_nodes(own: _Nodes, operation: int, first_tag: int, prepared: _Prepared) -> Reduction:
    """Exact sums inside nodes, codes between them (`mpi_ops.nodes`)."""
    if own.problem is not None:
        return ValueError(
            f"mpi_ops.allreduce: hierarchical=True needs nodes with as many ranks each, but "
            f"{own.problem}; leave hierarchical out, or pass a communicator of such nodes."
        )
    try:
        plan = prepared.scheme.plan(own.across.size)
    except ValueError as error:  # the same on every rank
        return error
    limit = chunk_elements(plan.world_size)
    rounds = nodes.rounds((prepared.x.size,), plan, own.inside.size, limit)
    slots = nodes.ROUNDS_IN_FLIGHT

    def reduce(one: Round) -> Steps:
        tag = first_tag + one.index % slots * TAGS
        return _round(own, one, tag, operation, prepared, plan)

    yield from in_window(map(reduce, rounds), slots)
    if not prepared.average:
        _scale(prepared.out, own.across.size * own.inside.size)
    return None


def _round(
    own: _Nodes, one: Round, tag: int, operation: int, prepared: _Prepared, plan: Plan
) -> Steps:
    """One round of it. Messages of all of its parts have the same tags, one after the other."""
    x, target = Tensors.of(prepared.x), Tensors.of(prepared.target)
    place, ranks = own.inside.rank, own.inside.size
    flat = np.empty(one.size, np.float32)
    codec.pack(x, one.packed(x), 1 / ranks, flat)
    pieces = np.empty((ranks, one.sizes[place]), np.float32)
    yield from alltoall(own.inside, tag, flat, pieces, one.sizes)
    share = np.empty(one.sizes[place], np.float32)
    codec.add(pieces, share)
    del pieces
    names, counts, seed = (_NAME,), (prepared.x.size,), prepared.scheme.seed
    stages = nodes.stages_of(one, place, names, counts, plan, None, seed, own.across.rank)
    parts = Tensors(one.parts(place, share.ctypes.data), "float32", share)
    norms: codec.Norms = np.zeros(stages.layout.norm_count, np.int32)
    if norms.size:
        stages.measure(parts, norms)
        norms = yield from largest(own.across, tag, norms)
    if plan.block_size is None:  # one norm, of the parts at all places
        whole = yield from largest(own.inside, tag, norms if norms.size else np.zeros(1, np.int32))
        norms = whole[: norms.size]

    def decode(parcel: Parcel, payload: codec.Payload) -> None:
        stages.dequantize(parcel, payload, norms, parts)

    if norms.size:
        numbers = np.array([operation & 0xFFFFFFFF], dtype=np.uint32)
        yield from Exchange(own.across, tag, parts, numbers, norms, stages, decode).run()
    yield from allgather(own.inside, tag, share, flat, one.sizes)
    codec.unpack(flat, one.packed(target), target)


def _gather(comm: MPI.Intracomm, encoded: Bytes) -> tuple[MPI.Request, Bytes]:
    """Start gathering every rank's description, a row each."""
    padded = np.zeros(_DESCRIPTION_BYTES, dtype=np.uint8)
    padded[: encoded.size] = encoded
    gathered = np.empty((comm.size, _DESCRIPTION_BYTES), dtype=np.uint8)
    return comm.Iallgather(padded, gathered), gathered
