"""What the tests of mpi_ops share that need NumPy and an MPI library, and nothing else."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from mpi4py import MPI

COMM = MPI.COMM_WORLD

# A sound operation fails one comparison with probability at most 2 exp(-Z**2 / 2) = 3e-8. Inputs
# and dither are fixed by seeds, so what passes once passes always.
Z = 6.0


@cache
def rank_inputs(count: int, tag: int = 0) -> list[np.ndarray]:
    """Every rank's float32 input: normal, of a scale that changes every 96 elements, some zeros."""
    inputs = []
    for rank in range(COMM.size):
        x = np.random.default_rng([tag, rank]).standard_normal(count, dtype=np.float32)
        x *= np.float32(2.0) ** -(np.arange(count) // 96 % 6)
        x[5::11] = 0
        inputs.append(x)
    return inputs


def check_same_bytes(array: np.ndarray) -> None:
    """Assert that every rank holds the same bytes."""
    checksums = COMM.allgather(zlib.crc32(array.tobytes()))
    assert len(set(checksums)) == 1, f"checksums by rank: {checksums}"


def check_unbiased(result: np.ndarray, expected: np.ndarray) -> None:
    """Assert that `result` is random around `expected`, upwards and away from zero.

    The elements' errors are independent, so if their means are zero their sum is within Z times the
    root of the sum of their squares.
    """
    error = result.astype(np.float64) - expected
    allowed = Z * np.sqrt((error**2).sum())
    assert allowed > 0, "every element is exact"
    for name, direction in (("up", 1.0), ("away from zero", np.sign(expected))):
        off = (error * direction).sum()
        assert abs(off) <= allowed, f"biased {name} by {off}, allowed {allowed}"


# --------------------------------------------------------------------------- the library's settings


class _Tools:
    """MPI's tool interface, which mpi4py does not wrap."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(MPI.__file__)  # finds the symbols of the library it links
        self._call("init_thread", MPI.THREAD_SINGLE, ctypes.byref(ctypes.c_int()))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, f"MPI_T_{name}")(*arguments)
        assert status == MPI.SUCCESS, f"MPI_T_{name}{arguments} gave {status}"

    def write(self, variable: str, value: int) -> None:
        index, count, handle = ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        self._call("cvar_get_index", variable.encode(), ctypes.byref(index))
        self._call("cvar_handle_alloc", index, None, ctypes.byref(handle), ctypes.byref(count))
        self._call("cvar_write", handle, ctypes.byref(ctypes.c_int(value)))
        self._call("cvar_handle_free", ctypes.byref(handle))


_tools: list[_Tools] = []


@contextmanager
def settings(**variables: int) -> Iterator[MPI.Intracomm]:
    """A communicator made under other values of the library's control variables, 0 afterwards.

    Open MPI reads them when a communicator is made, MPICH at every call.
    """
    if not _tools:
        _tools.append(_Tools())
    for variable, value in variables.items():
        _tools[0].write(variable, value)
    comm = COMM.Dup()
    yield comm
    comm.Free()
    for variable in variables:
        _tools[0].write(variable, 0)
