"""The MPI operation that adds exponential codes.

    from mpi_ops import exponential_sum

    comm.Allreduce(codes, total, op=exponential_sum(bits=8))

Each element of the two buffers is a byte of codes: one 8-bit code, or two 4-bit codes. A sum is
rounded to a level without bias, and saturates at level 1: quantize with enough `headroom` (n - 1 is
enough for n ranks in any order of additions, see `chain_headroom`).

The result of one application is a pure function of the two blocks, symmetric in them, so every rank
gets the same bytes under every algorithm of the MPI library, even where several ranks compute the
same pair. Buffers may lie on a GPU if the MPI library passes such pointers to operations, and if
CuPy is installed. Importing this module imports mpi4py, which starts MPI unless the program has set
mpi4py.rc.initialize = False; MPI is called when an operation is made, and not before.
"""

from __future__ import annotations

import atexit
import ctypes
import operator
import warnings
from collections.abc import Callable
from typing import Any

from mpi4py import MPI

from . import lanes, lifetime
from .dither import Stage, dither
from .kernels import host

# Level 1 has to lie 2**headroom above the largest |x|; 127 levels leave room for that to about 100
# ranks. Beyond, doubling at more than 90 of the additions has a probability below 2**-4000, and
# saturates instead of wrapping.
MAXIMUM_HEADROOM = {8: 90, 4: 5}


def chain_headroom(world_size: int, bits: int = 8) -> int:
    """Headroom that a sum over `world_size` ranks needs in any topology.

    Each stochastic addition can at most double the larger of its inputs, and a chain has
    world_size - 1 of them.
    """
    return min(world_size - 1, MAXIMUM_HEADROOM[bits])


def exponential_sum(bits: int = 8, seed: int = 0) -> MPI.Op:
    """The operation, commutative, for buffers of codes of `bits` bits (8, or 4 packed).

    Works with Reduce, Allreduce, Reduce_scatter, Scan, their nonblocking forms and one-byte
    datatypes. `seed`, an integer, must be the same on every rank. MPI has few slots for operations:
    this one is made once for each (bits, seed) and freed at exit; do not free it.

    Raises ValueError or TypeError for values that cannot work, and RuntimeError before MPI is
    initialized and after it was finalized.
    """
    if bits not in lanes.EXPONENTIAL_BITS:
        raise ValueError(f"exponential_sum: bits must be 4 or 8, got {bits!r}; leave it out for 8.")
    lifetime.require("exponential_sum")
    key = (_integer("bits", bits), _integer("seed", seed))
    operation = _operations.get(key)
    if operation is None or operation == MPI.OP_NULL:  # the user has freed it after all
        operation = _operations[key] = _operation(*key)
    return operation


def _integer(argument: str, value: Any) -> int:
    """The value as an int, NumPy's included: 1.0 would share a key with 1, but not its dither."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"exponential_sum: {argument} must be an integer, got {value!r} of type "
            f"{type(value).__name__}; pass an int."
        ) from None


_operations: dict[tuple[int, int], MPI.Op] = {}


def _operation(bits: int, seed: int) -> MPI.Op:
    random = dither(seed, "mpi_ops.exponential_sum", 0, 0, Stage.REDUCE)
    # Made before the operation is: the callback must not fail, an exception there aborts the job.
    add_exponential = _addition()
    add_exponential(0, 0, 0, bits=bits, dither=random)

    def add(source: Any, target: Any, datatype: MPI.Datatype) -> None:  # MPI.buffer
        add_exponential(source.address, target.address, source.nbytes, bits=bits, dither=random)

    return MPI.Op.Create(add, commute=True)


def _driver_is_there() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _addition() -> Callable[..., None]:
    """The kernel for host memory; for memory of any kind if this process has a GPU and CuPy."""
    if not _driver_is_there():  # nor would anything be gained by importing CuPy
        return host.add_exponential
    try:
        from .kernels import device

        if device.prepare_addition():
            return device.add_anywhere
    except (ImportError, RuntimeError) as error:
        warnings.warn(
            f"exponential_sum: buffers on a GPU cannot be reduced, only those of the host: {error}",
            stacklevel=2,
        )
    return host.add_exponential


@atexit.register
def _free_all() -> None:
    """The program may have finalized MPI, or freed operations, before it ends."""
    if lifetime.problem() is None:
        for operation in _operations.values():
            if operation != MPI.OP_NULL:
                operation.Free()
    _operations.clear()
