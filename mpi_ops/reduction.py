"""A compressed Allreduce for plain MPI programs.

    from mpi4py import MPI
    from mpi_ops import allreduce

    mean = allreduce(gradient, MPI.COMM_WORLD)

The codes travel as `mpi_ops.exchange` says. Importing this module imports mpi4py, which starts MPI.
"""

from __future__ import annotations

import atexit
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

from . import agreement, codec
from .chunks import Chunk
from .dither import Stage, dither
from .exchange import TAGS, Exchange, Steps, finish
from .kernels import host
from .kernels.host import Buffer
from .kernels.interface import dtype_name
from .scheme import Plan, Scheme

Bytes = NDArray[np.uint8]

# Exchanges in flight on one communicator have tags of their own. MPI guarantees tags to 32767.
_TAG_SETS = 32768 // TAGS

_DESCRIPTION_BYTES = 1024


@dataclass
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
    in_flight: list[Request] = field(default_factory=list)

    def next_operation(self) -> int:
        self.operations += 1
        return self.operations - 1

    def free(self) -> None:
        self.opening.Free()
        self.comm.Free()


_channels: list[_Channel] = []


def _release(comm: MPI.Comm, keyval: int, channel: _Channel) -> None:
    if channel in _channels:
        _channels.remove(channel)
        channel.free()


def _release_all() -> None:
    if not MPI.Is_finalized():
        for channel in list(_channels):
            _channels.remove(channel)
            channel.free()


_keyval = MPI.Comm.Create_keyval(delete_fn=_release)
atexit.register(_release_all)


def _channel(comm: Any) -> _Channel:
    """The duplicate that belongs to `comm`; made at the first use, freed with `comm` or at exit."""
    if not isinstance(comm, MPI.Comm) or comm == MPI.COMM_NULL:
        raise ValueError(
            f"mpi_ops.allreduce: comm must be a communicator that is not freed, got {comm!r}; "
            "pass MPI.COMM_WORLD or a part of it."
        )
    if comm.Is_inter():
        raise ValueError(
            "mpi_ops.allreduce: comm must be an intracommunicator, got an intercommunicator; "
            "merge it first (comm.Merge())."
        )
    channel = comm.Get_attr(_keyval)
    if channel is None:
        assert isinstance(comm, MPI.Intracomm)
        channel = _Channel(comm.Dup(), comm.Dup())
        _channels.append(channel)
        comm.Set_attr(_keyval, channel)
    assert isinstance(channel, _Channel)
    return channel


class Request:
    """A reduction in flight. Communication advances inside test() and wait() only."""

    def __init__(self, channel: _Channel, steps: Steps, out: NDArray[Any]) -> None:
        self._channel = channel
        self._steps = steps
        self._out = out
        self._error: BaseException | None = None
        channel.in_flight.append(self)

    def test(self) -> bool:
        """Advance; whether the result is complete. Raises what the reduction raises."""
        # The others too: another rank may be waiting for a message of theirs.
        for request in list(self._channel.in_flight):
            request._advance()
        if self._error is not None:
            raise self._error
        return self not in self._channel.in_flight

    def wait(self) -> NDArray[Any]:
        """The result, after blocking until it is complete."""
        while not self.test():
            os.sched_yield()
        return self._out

    def _advance(self) -> None:
        try:
            next(self._steps)
        except StopIteration:
            self._channel.in_flight.remove(self)
        except Exception as error:
            self._error = error
            self._channel.in_flight.remove(self)


def allreduce(
    array: Any,
    comm: MPI.Comm = MPI.COMM_WORLD,
    *,
    levels: Literal["standard", "exponential", "two-hop"] = "exponential",
    bits: int | None = None,
    block_size: int | Literal["auto"] | None = "auto",
    norm: Literal["max", "l2"] = "max",
    average: bool = True,
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
        out: C-contiguous NumPy (or CuPy) array of the same shape and dtype for the result; may be
            `array` itself.

    Returns `out` or a new array, NumPy's or CuPy's: unbiased, equal on every rank bit for bit; NaN
    in blocks where any rank has a NaN or Inf. Memory beyond that: the norms, and at most the
    compressed size. Deterministic in `seed`, the data and the number of earlier calls on `comm`.

    Raises ConfigMismatchError on every rank if size, dtype or options differ between ranks, and
    ValueError or TypeError for options that cannot work; the other ranks then get
    ConfigMismatchError. Blocks.
    """
    return iallreduce(
        array,
        comm,
        levels=levels,
        bits=bits,
        block_size=block_size,
        norm=norm,
        average=average,
        seed=seed,
        out=out,
    ).wait()


def iallreduce(
    array: Any,
    comm: MPI.Comm = MPI.COMM_WORLD,
    *,
    levels: Literal["standard", "exponential", "two-hop"] = "exponential",
    bits: int | None = None,
    block_size: int | Literal["auto"] | None = "auto",
    norm: Literal["max", "l2"] = "max",
    average: bool = True,
    seed: int = 0,
    out: NDArray[Any] | None = None,
) -> Request:
    """Start an `allreduce`; the result is that of the request's wait().

    `array` and `out` must be left alone until then. Several may be in flight on one communicator,
    if every rank starts them in the same order. Errors are raised by test() and wait().
    """
    channel = _channel(comm)
    operation = channel.next_operation()  # counted on every rank, whatever happens next
    problem: Exception | None = None
    prepared: _Prepared | None = None
    try:
        scheme = Scheme(levels=levels, bits=bits, block_size=block_size, norm=norm, seed=seed)
        prepared = _prepare(array, out, scheme, channel.comm.size, average)
        description = prepared.describe()
    except Exception as error:  # whatever it is: the other ranks wait for this one
        problem = error  # raised once they have been told
        description = {"error": f"{type(error).__name__}: {error}"}
    steps = _reduction(channel, operation, description, prepared, problem)
    request = Request(channel, steps, prepared.out if prepared is not None else np.empty(0))
    request._advance()  # the opening goes out now
    return request


@dataclass
class _Prepared:
    """A checked call."""

    x: Buffer
    out: NDArray[Any]
    target: Buffer  # the memory of out
    scheme: Scheme
    plan: Plan
    average: bool

    def describe(self) -> dict[str, Any]:
        return {
            **asdict(self.scheme),
            "elements": self.x.size,
            "dtype": self.x.dtype,
            "average": self.average,
        }


def _prepare(
    array: Any,
    out: NDArray[Any] | None,
    scheme: Scheme,
    world_size: int,
    average: bool,
) -> _Prepared:
    if not isinstance(average, bool | np.bool_):
        raise TypeError(
            f"mpi_ops.allreduce: average must be True or False, got {average!r} of type "
            f"{type(average).__name__}; pass False for the sum."
        )
    xp, values = _as_array(array)
    if dtype_name(values.dtype) not in host.DTYPES:
        raise TypeError(
            "mpi_ops.allreduce: array must have one of the dtypes "
            f"{', '.join(host.DTYPES)} in native byte order, got {values.dtype}; convert it first, "
            "or use comm.Allreduce."
        )
    plan = scheme.plan(world_size)
    x = Buffer.of(xp.ascontiguousarray(values))
    if out is None:
        out = xp.empty(values.shape, dtype=values.dtype)
    elif not isinstance(out, xp.ndarray):
        raise TypeError(
            f"mpi_ops.allreduce: out must be a {xp.__name__}.ndarray, got a "
            f"{type(out).__module__}.{type(out).__name__}; "
            "leave it out to get a new array."
        )
    writeable = getattr(out.flags, "writeable", True)  # CuPy's always are
    same = out.shape == values.shape and out.dtype == values.dtype
    if not (same and out.flags.c_contiguous and writeable):
        raise ValueError(
            f"mpi_ops.allreduce: out must be a C-contiguous, writeable array of shape "
            f"{values.shape} and dtype {values.dtype}, got shape {out.shape}, dtype {out.dtype}, "
            f"strides {out.strides}{'' if writeable else ', read-only'}; leave it out to get a new "
            "array."
        )
    target = Buffer.of(out)
    # The same memory is fine: a chunk is written after it has been read.
    if 0 < abs(target.pointer - x.pointer) < values.nbytes:
        raise ValueError(
            "mpi_ops.allreduce: out must be array itself or share no memory with it, got "
            "overlapping arrays; pass one of them, or leave out out."
        )
    return _Prepared(x, out, target, scheme, plan, bool(average))


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
                f"{type(array).__name__} on a GPU; `pip install gq-horovod[cuda12]`, or copy it to "
                "the host first."
            ) from error
        return cupy, cupy.asarray(array)
    return np, np.from_dlpack(array) if hasattr(array, "__dlpack__") else np.asarray(array)


# ---------------------------------------------------------------------------------------- the steps


def _reduction(
    channel: _Channel,
    operation: int,
    description: dict[str, Any],
    prepared: _Prepared | None,
    problem: Exception | None,
) -> Steps:
    """Agree, exchange norms, then the codes."""
    encoded = agreement.encode(description, _DESCRIPTION_BYTES)
    fingerprint = int.from_bytes(encoded.tobytes(), "little") % (2**61 - 1)
    extremes = np.array([fingerprint, -fingerprint])
    largest = np.empty_like(extremes)
    opening = channel.opening.Iallreduce(extremes, largest, op=MPI.MAX)
    local = None if prepared is None else codec.norms(prepared.x, prepared.plan)
    yield from finish([opening])
    while channel.turn != operation:
        yield
    # Every rank sees the same two extremes, so all take the same branch.
    if prepared is None or largest[0] != -largest[1]:
        request, gathered = _gather(channel.comm, encoded)
        channel.turn += 1
        yield from finish([request])
        if problem is not None:
            raise problem
        descriptions = agreement.decode(gathered, _DESCRIPTION_BYTES)
        agreement.require_same(descriptions, "mpi_ops.allreduce")
    assert prepared is not None
    assert local is not None
    norms = np.empty_like(local)
    exchange = channel.comm.Iallreduce(local, norms, op=MPI.MAX)
    channel.turn += 1
    yield from finish([exchange])
    del local
    seed = prepared.scheme.seed

    def random(chunk: int, stage: Stage, strata: int) -> NDArray[np.uint32]:
        name = f"mpi_ops.allreduce.{chunk}"
        return dither(seed, name, operation, channel.comm.rank, stage, strata)

    first_tag = operation % _TAG_SETS * TAGS
    x, out, plan = prepared.x, prepared.target, prepared.plan

    def decode(chunk: Chunk, payload: codec.Payload) -> None:
        codec.dequantize(payload, chunk.norms, plan, chunk.of(out))

    yield from Exchange(channel.comm, first_tag, x, norms, plan, random, decode).steps()
    if not prepared.average:
        prepared.out *= prepared.plan.world_size


def _gather(comm: MPI.Intracomm, encoded: Bytes) -> tuple[MPI.Request, Bytes]:
    """Start gathering every rank's description, a row each."""
    padded = np.zeros(_DESCRIPTION_BYTES, dtype=np.uint8)
    padded[: encoded.size] = encoded
    gathered = np.empty((comm.size, _DESCRIPTION_BYTES), dtype=np.uint8)
    return comm.Iallgather(padded, gathered), gathered
