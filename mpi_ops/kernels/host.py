"""Kernels on the CPU: the shared library that setup.py builds, behind the checks of `interface`.

The functions are those of `interface.Kernels`, for NumPy arrays and for buffers in host memory.
Every call releases the interpreter lock while it runs. Several threads share a large one (see
`mpi_ops.set_threads`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Callers find Buffer, DTYPES and ITEM_BYTES here.
from .interface import DTYPES as DTYPES
from .interface import (
    INFINITY,
    SIGNATURES,
    TABLE_SIGNATURES,
    Kernels,
    host_address,
    require,
)
from .interface import ITEM_BYTES as ITEM_BYTES
from .interface import Buffer as Buffer
from .interface import Tensors as Tensors
from .threads import chosen_threads

INSTRUCTION_SETS = ("baseline", "x86_64_v3", "x86_64_v4")

_LIBRARY = Path(__file__).with_name("libgq_kernels.so")


@cache
def _library() -> ctypes.CDLL:
    if not _LIBRARY.exists():
        raise ImportError(
            f"mpi_ops: the kernel library {_LIBRARY.name} is not beside {__file__}; "
            "install the package (`pip install .`) or build it in place (`make build`)."
        )
    count = chosen_threads()  # before the library, whose number is 1 until it is told another
    library = ctypes.CDLL(str(_LIBRARY))
    library.gq_best_isa.restype = ctypes.c_char_p
    library.gq_set_threads(count)
    return library


@cache
def fingerprint() -> str:
    """Digest of the sources and flags that the library was built from: equal on all ranks."""
    library = _library()
    if not hasattr(library, "gq_fingerprint"):
        return "unknown"  # a library of an older version
    library.gq_fingerprint.restype = ctypes.c_char_p
    digest: bytes = library.gq_fingerprint()
    return digest.decode()


@cache
def best_instruction_set() -> str:
    """Name of the newest instruction set that this CPU has, one of `INSTRUCTION_SETS`."""
    name: bytes = _library().gq_best_isa()
    return name.decode()


def threads() -> int:
    """How many threads share a call at most."""
    count: int = _library().gq_threads()
    return count


def set_threads(count: int) -> None:
    """Let `count` threads, at least 1, share each call; `mpi_ops.set_threads` checks it."""
    _library().gq_set_threads(count)


# The dither is a pointer to its four words here.
_TYPES = {
    "d": ctypes.c_int,
    "p": ctypes.c_void_p,
    "l": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "r": ctypes.c_void_p,
}
_SIGNATURES = {**SIGNATURES, **TABLE_SIGNATURES, "philox": "ppip"}


@cache
def _kernel(name: str, instruction_set: str) -> Any:
    function = getattr(_library(), f"gq_{name}_{instruction_set}")
    function.argtypes = [_TYPES[letter] for letter in _SIGNATURES[name]]
    function.restype = ctypes.c_int
    return function


_instruction_set: str | None = None  # tests compare the instruction sets with each other


_NO_DEVICE = nullcontext()


class Host(Kernels):
    """The kernels for host memory."""

    memory = "host"
    array_type = np.ndarray
    xp = np

    def address(self, array: NDArray[Any]) -> int:
        return host_address(array)

    def random(self, dither: NDArray[np.uint32]) -> tuple[Any, ...]:
        return (dither.tobytes(),)  # passed as a pointer; much quicker than .ctypes.data

    def table(self, arrays: Sequence[NDArray[Any]]) -> Any:
        return (ctypes.c_void_p * len(arrays))(*map(self.address, arrays))

    def on_device_of(self, buffer: Buffer | Tensors) -> AbstractContextManager[object]:
        return _NO_DEVICE

    def upload(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def staging(self, array: NDArray[Any]) -> NDArray[Any]:
        return array

    def download(self, staged: NDArray[Any], array: NDArray[Any]) -> None:
        assert staged is array

    def wait(self) -> None:
        pass

    def measure(self, name: str, x: Buffer, block_size: int, norms: NDArray[np.int32]) -> None:
        self.launch(name, x.dtype, x.size, x.pointer, x.size, block_size, self.address(norms))

    def launch(self, name: str, dtype: str | None, elements: int, *arguments: Any) -> None:
        if dtype is not None:
            arguments = (DTYPES[dtype], *arguments)
        status = _kernel(name, _instruction_set or best_instruction_set())(*arguments)
        if status != 0:
            raise RuntimeError(
                f"mpi_ops.kernels.host: kernel {name} refused its arguments ({status})."
            )

    def bound_norms(self, own: NDArray[np.int32], norms: NDArray[np.int32]) -> None:
        np.minimum(own, norms, out=own, where=norms < INFINITY)

    # ------------------------------------------------------------------------------------- tables

    def measure_table(
        self,
        norm: str,
        dtype: str,
        segments: NDArray[Any],
        block_size: int,
        norms: NDArray[np.int32],
    ) -> None:
        self._over(f"{norm}_table", dtype, segments, block_size, self.address(norms))

    def quantize_table(
        self,
        dtype: str,
        segments: NDArray[Any],
        norms: NDArray[np.int32],
        payload: NDArray[Any],
        *,
        block_size: int,
        bits: int,
        levels: int,
        square: bool,
    ) -> None:
        places = self.address(norms), self.address(payload)
        if levels:
            self._over(
                *("quantize_standard_table", dtype, segments, block_size),
                *(places[0], bits, levels, square, places[1]),
            )
        else:
            self._over(
                *("quantize_exponential_table", dtype, segments, block_size),
                *(places[0], bits, places[1]),
            )

    def dequantize_table(
        self,
        dtype: str,
        segments: NDArray[Any],
        norms: NDArray[np.int32],
        payload: NDArray[Any],
        *,
        block_size: int,
        bits: int,
        divisor: int,
        square: bool,
    ) -> None:
        places = self.address(norms), self.address(payload)
        if divisor:
            self._over(
                *("dequantize_standard_table", dtype, segments, block_size),
                *(places[0], bits, square, divisor, places[1]),
            )
        else:
            self._over(
                *("dequantize_exponential_table", dtype, segments, block_size),
                *(places[0], bits, places[1]),
            )

    def reduce_table(
        self,
        inputs: Sequence[NDArray[np.uint8]],
        segments: NDArray[Any],
        *,
        bits: int,
        factor: float,
        out: NDArray[np.uint8],
    ) -> None:
        own = self.address(segments), len(segments)
        arguments = self.table(inputs), len(inputs), *own, bits, factor, self.address(out)
        self.launch("reduce_exponential_table", None, 0, *arguments)

    def _over(self, name: str, dtype: str, segments: NDArray[Any], *arguments: Any) -> None:
        if len(segments):
            self.launch(name, dtype, 0, self.address(segments), len(segments), *arguments)


KERNELS = Host()
absmax = KERNELS.absmax
l2norm = KERNELS.l2norm
quantize_standard = KERNELS.quantize_standard
dequantize_standard = KERNELS.dequantize_standard
mean_standard = KERNELS.mean_standard
quantize_exponential = KERNELS.quantize_exponential
dequantize_exponential = KERNELS.dequantize_exponential
reduce_exponential = KERNELS.reduce_exponential
add_exponential = KERNELS.add_exponential


def philox(counter: Sequence[int], key: Sequence[int], rounds: int) -> NDArray[np.uint32]:
    """One block of Philox4x32 with 7 or 10 rounds, for tests against published values."""
    words = np.array(counter, dtype=np.uint32)
    keys = np.array(key, dtype=np.uint32)
    require("philox", "rounds", rounds in (7, 10), "7 or 10", rounds)
    result = np.empty(4, dtype=np.uint32)
    addresses = [array.ctypes.data for array in (words, keys, result)]
    KERNELS.launch("philox", None, 4, *addresses[:2], rounds, addresses[2])
    return result
