"""Kernels on the CPU: thin, checked wrappers around the shared library that setup.py builds.

Tensors enter as `Buffer`, a pointer with a dtype and an element count, so that frameworks hand
their memory over without a copy. Norms, payloads and codes are NumPy arrays. Every call releases
the interpreter lock while it runs, allocates its result unless `out` is given, and never modifies
its inputs. The formulas are in `elements.h`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import lanes

# The same list as DType in host.cpp.
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
ITEM_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}
INSTRUCTION_SETS = ("baseline", "x86_64_v3", "x86_64_v4")

_LIBRARY = Path(__file__).with_name("libgq_kernels.so")


class Buffer(NamedTuple):
    """A contiguous tensor in host memory."""

    pointer: int
    dtype: str  # a key of DTYPES
    size: int  # elements
    owner: object  # keeps the memory alive

    @classmethod
    def of(cls, array: NDArray[Any]) -> Buffer:
        """The memory of a C-contiguous NumPy array of float16, float32 or float64."""
        if array.dtype.name not in DTYPES:
            raise TypeError(
                f"Buffer.of: array must have one of the dtypes {', '.join(DTYPES)}, "
                f"got {array.dtype.name}; convert it with astype first."
            )
        if not array.flags.c_contiguous:
            raise ValueError(
                f"Buffer.of: array must be C-contiguous, got strides {array.strides} for shape "
                f"{array.shape}; copy it with numpy.ascontiguousarray first."
            )
        return cls(array.ctypes.data, array.dtype.name, array.size, array)


@cache
def _library() -> ctypes.CDLL:
    if not _LIBRARY.exists():
        raise ImportError(
            f"mpi_ops: the kernel library {_LIBRARY.name} is not beside {__file__}; "
            "install the package (`pip install .`) or build it in place (`make build`)."
        )
    library = ctypes.CDLL(str(_LIBRARY))
    library.gq_best_isa.restype = ctypes.c_char_p
    return library


@cache
def best_instruction_set() -> str:
    """Name of the newest instruction set that this CPU has, one of `INSTRUCTION_SETS`."""
    name: bytes = _library().gq_best_isa()
    return name.decode()


_POINTER = ctypes.c_void_p
_INT = ctypes.c_int
_LONG = ctypes.c_int64
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "absmax": (_INT, _POINTER, _LONG, _LONG, _POINTER),
    "l2norm": (_INT, _POINTER, _LONG, _LONG, _POINTER),
    "quantize_standard": (
        *(_INT, _POINTER, _LONG, _LONG, _POINTER),
        *(_INT, _INT, _POINTER, _POINTER),
    ),
    "dequantize_standard": (
        *(_INT, _POINTER, _LONG, _LONG, _POINTER),
        *(_INT, _LONG, _POINTER),
    ),
    "quantize_exponential": (
        *(_INT, _POINTER, _LONG, _LONG, _POINTER),
        *(_INT, _INT, _POINTER, _POINTER),
    ),
    "dequantize_exponential": (
        *(_INT, _POINTER, _LONG, _LONG, _POINTER),
        *(_INT, _INT, _POINTER),
    ),
    "reduce_exponential": (
        *(_POINTER, _INT, _LONG, _INT),
        *(ctypes.c_float, _POINTER, _POINTER),
    ),
    "add_exponential": (_POINTER, _POINTER, _LONG, _INT, _POINTER),
    "philox": (_POINTER, _POINTER, _INT, _POINTER),
}


@cache
def _kernel(name: str, instruction_set: str) -> Any:
    function = getattr(_library(), f"gq_{name}_{instruction_set}")
    function.argtypes = _SIGNATURES[name]
    function.restype = _INT
    return function


_instruction_set: str | None = None  # tests compare the instruction sets with each other


def _call(name: str, *arguments: Any) -> None:
    status = _kernel(name, _instruction_set or best_instruction_set())(*arguments)
    if status != 0:
        raise RuntimeError(f"mpi_ops.kernels.host: kernel {name} refused its arguments ({status}).")


# ------------------------------------------------------------------------------------------- checks


def _require(function: str, argument: str, fine: bool, expected: str, got: object) -> None:
    if not fine:
        raise ValueError(f"{function}: {argument} must be {expected}, got {got}.")


def _check_array(
    function: str, argument: str, array: NDArray[Any], dtype: DTypeLike, size: int
) -> None:
    fine = array.dtype == dtype and array.size == size and array.flags.c_contiguous
    got = f"{array.dtype} of shape {array.shape} and strides {array.strides}"
    expected = f"a contiguous {np.dtype(dtype)} array of {size} elements"
    _require(function, argument, bool(fine), expected, got)


def _check_tensor(function: str, argument: str, buffer: Buffer) -> None:
    known = f"a buffer of one of the dtypes {', '.join(DTYPES)}"
    _require(function, argument, buffer.dtype in DTYPES, known, buffer.dtype)


def _check_block(function: str, block_size: int) -> None:
    fine = block_size > 0 and block_size % lanes.ROW == 0
    _require(function, "block_size", fine, f"a positive multiple of {lanes.ROW}", block_size)


def _check_norms(function: str, norms: NDArray[np.int32], count: int, block_size: int) -> None:
    _check_block(function, block_size)
    _check_array(function, "norms", norms, np.int32, lanes.blocks(count, block_size))


def _output(function: str, out: NDArray[Any] | None, size: int, dtype: DTypeLike) -> NDArray[Any]:
    if out is None:
        return np.empty(size, dtype=dtype)
    _check_array(function, "out", out, dtype, size)
    return out


def _check_exponential(function: str, bits: int, headroom: int) -> None:
    _require(function, "bits", bits in lanes.EXPONENTIAL_BITS, "4 or 8", bits)
    _require(function, "headroom", 0 <= headroom <= 126, "between 0 and 126", headroom)


# ------------------------------------------------------------------------------------------ kernels


def absmax(x: Buffer, block_size: int, out: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
    """Largest |x| of each block, as the bit patterns of float32 (int32, one per block).

    Integer order of these patterns is float order with NaN above Inf above finite, so an integer
    Max-allreduce gives the global norm and carries NaN and Inf to every rank. float64 is rounded to
    float32 first, as quantization does; beyond its range it counts as Inf.
    """
    _check_tensor("absmax", "x", x)
    _check_block("absmax", block_size)
    norms = _output("absmax", out, lanes.blocks(x.size, block_size), np.int32)
    _call("absmax", DTYPES[x.dtype], x.pointer, x.size, block_size, norms.ctypes.data)
    return norms


def l2norm(x: Buffer, block_size: int, out: NDArray[np.int32] | None = None) -> NDArray[np.int32]:
    """L2 norm of each block, rounded up, as the bit patterns of float32 (int32, one per block).

    Summed in double, so squares do not overflow; a finite block never gives Inf.
    """
    _check_tensor("l2norm", "x", x)
    _check_block("l2norm", block_size)
    norms = _output("l2norm", out, lanes.blocks(x.size, block_size), np.int32)
    _call("l2norm", DTYPES[x.dtype], x.pointer, x.size, block_size, norms.ctypes.data)
    return norms


def quantize_standard(
    x: Buffer,
    norms: NDArray[np.int32],
    *,
    block_size: int,
    bits: int,
    levels: int,
    dither: NDArray[np.uint32],
    out: NDArray[np.int32] | None = None,
) -> NDArray[np.int32]:
    """Unbiased codes floor(levels * x / norm + u), packed as lanes of `bits` bits into int32 words.

    |code| <= `levels` for every input (a larger |x| than its norm saturates); blocks whose norm is
    zero or not finite give codes that decode to zeros or NaN. 1 <= `levels` <= 2**(bits-1) - 1.
    Adding the words of several ranks adds every lane as long as the sums stay within
    2**(bits-1) - 1 (`lanes.levels`). Returns `lanes.standard_words(x.size, bits)` words.
    """
    name = "quantize_standard"
    _check_tensor(name, "x", x)
    _check_norms(name, norms, x.size, block_size)
    _require(name, "bits", bits in lanes.STANDARD_BITS, "between 2 and 16", bits)
    top = 2 ** (bits - 1) - 1
    _require(name, "levels", 1 <= levels <= top, f"between 1 and {top} with {bits} bits", levels)
    _check_array(name, "dither", dither, np.uint32, 4)
    payload = _output(name, out, lanes.standard_words(x.size, bits), np.int32)
    _call(
        name,
        *(DTYPES[x.dtype], x.pointer, x.size, block_size, norms.ctypes.data),
        *(bits, levels, dither.ctypes.data, payload.ctypes.data),
    )
    return payload


def dequantize_standard(
    payload: NDArray[np.int32],
    norms: NDArray[np.int32],
    out: Buffer,
    *,
    block_size: int,
    bits: int,
    divisor: int,
) -> None:
    """Write norm * lane / divisor to `out`; with divisor = levels * ranks this is the mean.

    Elements of a block whose norm is not finite become NaN; no |result| exceeds its norm.
    """
    name = "dequantize_standard"
    _check_tensor(name, "out", out)
    _check_norms(name, norms, out.size, block_size)
    _require(name, "bits", bits in lanes.STANDARD_BITS, "between 2 and 16", bits)
    _check_array(name, "payload", payload, np.int32, lanes.standard_words(out.size, bits))
    _require(name, "divisor", 1 <= divisor < 2**31, "between 1 and 2**31 - 1", divisor)
    _call(
        name,
        *(DTYPES[out.dtype], payload.ctypes.data, out.size, block_size, norms.ctypes.data),
        *(bits, divisor, out.pointer),
    )


def quantize_exponential(
    x: Buffer,
    norms: NDArray[np.int32],
    *,
    block_size: int,
    bits: int,
    dither: NDArray[np.uint32],
    headroom: int = 0,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Unbiased codes of x / (norm * 2**headroom): a sign and the exponent of a power of two.

    8 bits: one code per byte, levels 0 and 2**-126 .. 1. 4 bits: two codes per byte, levels 0 and
    2**-6 .. 1. `headroom` leaves the sum room for that many doublings.
    Returns `lanes.exponential_bytes(x.size, bits)` bytes.
    """
    name = "quantize_exponential"
    _check_tensor(name, "x", x)
    _check_norms(name, norms, x.size, block_size)
    _check_exponential(name, bits, headroom)
    _check_array(name, "dither", dither, np.uint32, 4)
    codes = _output(name, out, lanes.exponential_bytes(x.size, bits), np.uint8)
    _call(
        name,
        *(DTYPES[x.dtype], x.pointer, x.size, block_size, norms.ctypes.data),
        *(bits, headroom, dither.ctypes.data, codes.ctypes.data),
    )
    return codes


def dequantize_exponential(
    codes: NDArray[np.uint8],
    norms: NDArray[np.int32],
    out: Buffer,
    *,
    block_size: int,
    bits: int,
    headroom: int = 0,
) -> None:
    """Write level * 2**headroom * norm to `out`; NaN where the norm is not finite."""
    name = "dequantize_exponential"
    _check_tensor(name, "out", out)
    _check_norms(name, norms, out.size, block_size)
    _check_exponential(name, bits, headroom)
    _check_array(name, "codes", codes, np.uint8, lanes.exponential_bytes(out.size, bits))
    _call(
        name,
        *(DTYPES[out.dtype], codes.ctypes.data, out.size, block_size, norms.ctypes.data),
        *(bits, headroom, out.pointer),
    )


def reduce_exponential(
    inputs: Sequence[NDArray[np.uint8]],
    *,
    bits: int,
    dither: NDArray[np.uint32],
    factor: float = 1.0,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Codes of factor * (sum of all inputs): decoded, added in float32, rounded once, unbiased.

    `factor` = 1 is the operation of a sum (saturating at level 1), 1 / len(inputs) gives the mean,
    which needs no headroom. One rounding multiplies the variance by at most 9/8, whatever the
    number of inputs.
    """
    name = "reduce_exponential"
    _require(name, "inputs", len(inputs) >= 1, "at least one array", len(inputs))
    _check_exponential(name, bits, 0)
    _check_array(name, "dither", dither, np.uint32, 4)
    size = inputs[0].size
    for index, codes in enumerate(inputs):
        _check_array(name, f"inputs[{index}]", codes, np.uint8, size)
    result = _output(name, out, size, np.uint8)
    pointers = (ctypes.c_void_p * len(inputs))(*(codes.ctypes.data for codes in inputs))
    _call(
        name,
        *(pointers, len(inputs), size, bits),
        *(factor, dither.ctypes.data, result.ctypes.data),
    )
    return result


def add_exponential(
    source: int, target: int, size: int, *, bits: int, dither: NDArray[np.uint32]
) -> None:
    """The operation of an MPI reduction: target = round(source + target), in place.

    `source` and `target` are addresses of `size` bytes of codes, as MPI hands them to an operation.
    The result is a pure function of `dither` and of the two blocks, symmetric in the blocks: ranks
    that compute the same pair get the same bytes, and different hops of a reduction round
    independently. Saturates at level 1. Raises ValueError for `bits` other than 4 and 8.
    """
    _call("add_exponential", source, target, size, bits, dither.ctypes.data)


def philox(counter: Sequence[int], key: Sequence[int], rounds: int) -> NDArray[np.uint32]:
    """One block of Philox4x32 with 7 or 10 rounds, for tests against published values."""
    words = np.array(counter, dtype=np.uint32)
    keys = np.array(key, dtype=np.uint32)
    _require("philox", "rounds", rounds in (7, 10), "7 or 10", rounds)
    result = np.empty(4, dtype=np.uint32)
    _call("philox", words.ctypes.data, keys.ctypes.data, rounds, result.ctypes.data)
    return result
