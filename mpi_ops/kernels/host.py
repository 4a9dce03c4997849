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

from .. import lanes

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
_SIGNATURES = {
    **SIGNATURES,
    **TABLE_SIGNATURES,
    "encode_elias": "plipp",
    "decode_elias": "pllip",
    "philox": "ppip",
}
_BAD_STREAM = 3  # what decode_elias returns; as in host.cpp


@cache
def _kernel(name: str, instruction_set: str) -> Any:
    function = getattr(_library(), f"gq_{name}_{instruction_set}")
    function.argtypes = [_TYPES[letter] for letter in _SIGNATURES[name]]
    function.restype = ctypes.c_int
    return function


_instruction_set: str | None = None  # tests compare the instruction sets with each other


def _call(name: str, *arguments: Any) -> int:
    status: int = _kernel(name, _instruction_set or best_instruction_set())(*arguments)
    return status


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

    def copy(self, source: NDArray[Any], target: NDArray[Any]) -> None:
        target[:] = source

    def wait(self) -> None:
        pass

    def measure(
        self,
        name: str,
        x: Buffer,
        block_size: int,
        norms: NDArray[np.int32],
        bounds: NDArray[np.int32] | None,
    ) -> None:
        self.launch(name, x.dtype, x.size, x.pointer, x.size, block_size, self.address(norms))
        if bounds is not None:
            np.minimum(norms, bounds, out=norms, where=bounds < INFINITY)

    def launch(self, name: str, dtype: str | None, elements: int, *arguments: Any) -> None:
        if dtype is not None:
            arguments = (DTYPES[dtype], *arguments)
        status = _call(name, *arguments)
        if status != 0:
            raise RuntimeError(
                f"mpi_ops.kernels.host: kernel {name} refused its arguments ({status})."
            )

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

    def pack_table(
        self, dtype: str, segments: NDArray[Any], factor: float, flat: NDArray[np.float32]
    ) -> None:
        self._over("pack_table", dtype, segments, factor, self.address(flat))

    def unpack_table(self, dtype: str, segments: NDArray[Any], flat: NDArray[np.float32]) -> None:
        self._over("unpack_table", dtype, segments, self.address(flat))

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


def elias_words(count: int, bits: int) -> int:
    """Words of 64 bits that the Elias gamma codes of `count` standard codes may take at most."""
    return -(-count * 2 * bits // 64)


def encode_elias(
    payload: NDArray[np.int32], count: int, *, bits: int, out: NDArray[np.int64]
) -> int:
    """Write the Elias gamma codes of a payload's standard codes to `out`; how many words they take.

    Arguments:
        payload: `lanes.standard_words(count, bits)` words, or more.
        count: codes.
        bits: of a lane, 2 to 16.
        out: at least `elias_words(count, bits)` words. What lies behind the stream is undefined.

    Raises ValueError for other sizes. `elias.h` has the format.
    """
    name = "encode_elias"
    _check_elias(name, payload, count, bits)
    room = elias_words(count, bits)
    require(name, "out", out.dtype == np.int64, "of int64", out.dtype)
    require(name, "out", out.flags.c_contiguous, "C-contiguous", f"strides {out.strides}")
    require(name, "out", out.size >= room, f"{room} words or more", out.size)
    size = ctypes.c_int64()
    addresses = KERNELS.address(payload), KERNELS.address(out)
    KERNELS.launch(name, None, count, addresses[0], count, bits, addresses[1], ctypes.byref(size))
    return size.value // 8


def decode_elias(
    stream: NDArray[np.int64], count: int, *, bits: int, out: NDArray[np.int32]
) -> bool:
    """Write the payload that `encode_elias` was given to `out`; False where it has made no such.

    Arguments:
        stream: the words, and no others. Whatever they are, nothing beyond them is read.
        count, bits: as they were given to `encode_elias`.
        out: `lanes.standard_words(count, bits)` words, or more. Undefined where this is False.

    Raises ValueError for other sizes.
    """
    name = "decode_elias"
    _check_elias(name, out, count, bits)
    require(name, "stream", stream.dtype == np.int64, "of int64", stream.dtype)
    require(name, "stream", stream.flags.c_contiguous, "C-contiguous", f"strides {stream.strides}")
    addresses = KERNELS.address(stream), KERNELS.address(out)
    return _call(name, addresses[0], stream.nbytes, count, bits, addresses[1]) != _BAD_STREAM


def _check_elias(name: str, payload: NDArray[np.int32], count: int, bits: int) -> None:
    require(name, "bits", bits in lanes.STANDARD_BITS, "between 2 and 16", bits)
    require(name, "count", count >= 0, "0 or more", count)
    words = lanes.standard_words(count, bits)
    require(name, "payload", payload.dtype == np.int32, "of int32", payload.dtype)
    require(name, "payload", payload.flags.c_contiguous, "C-contiguous", payload.strides)
    require(name, "payload", payload.size >= words, f"{words} words or more", payload.size)


def philox(counter: Sequence[int], key: Sequence[int], rounds: int) -> NDArray[np.uint32]:
    """One block of Philox4x32 with 7 or 10 rounds, for tests against published values."""
    words = np.array(counter, dtype=np.uint32)
    keys = np.array(key, dtype=np.uint32)
    require("philox", "rounds", rounds in (7, 10), "7 or 10", rounds)
    result = np.empty(4, dtype=np.uint32)
    addresses = [array.ctypes.data for array in (words, keys, result)]
    KERNELS.launch("philox", None, 4, *addresses[:2], rounds, addresses[2])
    return result
