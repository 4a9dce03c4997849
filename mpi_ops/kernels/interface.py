"""What the kernels of all kinds of memory share: buffers, checks, outputs and signatures.

Tensors enter as `Buffer`, a pointer with a dtype and an element count, so that frameworks hand
their memory over without a copy. Norms, payloads and codes are arrays of one kind of memory: NumPy
arrays for `host`, CuPy arrays for `device`. The dither is a NumPy array for both. Every function
allocates its result unless `out` is given, and never modifies its inputs. The formulas are in
`elements.h`.
"""

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .. import lanes

# The same list as DType in host.cpp.
DTYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 3}
ITEM_BYTES = {"float32": 4, "float64": 8, "float16": 2, "bfloat16": 2}

# Parameters of the kernels: d a dtype, p a pointer, l an int64, i an int, f a float, r the dither.
SIGNATURES = {
    "absmax": "dpllp",
    "l2norm": "dpllp",
    "quantize_standard": "dpllpiiirp",
    "dequantize_standard": "dpllpiilp",
    "quantize_exponential": "dpllpiirp",
    "dequantize_exponential": "dpllpiip",
    "reduce_exponential": "pilifrp",
    "add_exponential": "pplir",
    "mean_standard": "pillpiilp",
    "add": "pilp",
}

# Of one call for the tensors of a bucket: the segments and their number in place of a pointer and a
# size; a block size of 0 makes a block of each segment.
TABLE_SIGNATURES = {
    "absmax_table": "dpllp",
    "l2norm_table": "dpllp",
    "quantize_standard_table": "dpllpiiip",
    "dequantize_standard_table": "dpllpiilp",
    "quantize_exponential_table": "dpllpip",
    "dequantize_exponential_table": "dpllpip",
    "reduce_exponential_table": "piplifp",
    "pack_table": "dplfp",
    "unpack_table": "dplp",
}

# A tensor, or a part of one, in a table; the same fields as Segment in host.cpp. Norms and payload
# are those of all segments, and places count their elements.
SEGMENT = np.dtype(
    [
        ("x", np.uint64),  # address of its elements; 0: zeros, and no results
        ("elements", np.int64),
        ("norms", np.int64),  # place of its first norm
        ("payload", np.int64),  # place of its codes
        ("stop", np.int64),  # place where what follows the codes ends, which becomes zeros
        ("random", np.uint32, 4),  # its dither
        ("group", np.int64),  # the lanes.GROUP elements, in its dither, that it begins with
    ]
)

INFINITY = 0x7F800000  # bit pattern of the smallest norm that is not finite

Array = Any  # numpy.ndarray in host memory, cupy.ndarray on a device

# Kernels of small tensors take less than NumPy does to make a dtype of a type, or an address.
INT32, UINT8, UINT32 = (np.dtype(kind) for kind in (np.int32, np.uint8, np.uint32))
_first_byte = ctypes.c_byte.from_buffer


def host_address(array: NDArray[Any]) -> int:
    """Where the elements of a NumPy array begin."""
    try:
        return ctypes.addressof(_first_byte(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # read-only, empty, or of a dtype that has no buffer
        return array.ctypes.data


@cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """The key of DTYPES for an array's dtype; for any other dtype, what to call it in an error."""
    return dtype.name if dtype.isnative else dtype.str  # cached: NumPy makes the name anew


class Buffer(NamedTuple):
    """A contiguous tensor."""

    pointer: int
    dtype: str  # a key of DTYPES
    size: int  # elements
    owner: object  # keeps the memory alive
    memory: str = "host"  # or "device"
    # A stream of CuPy's on which a device's kernels are called for it; None: the current one.
    stream: Any = None

    @classmethod
    def of(cls, array: Any) -> Buffer:
        """The memory of a C-contiguous array of float16, float32 or float64.

        A NumPy array, or an object with `__cuda_array_interface__` (CuPy, PyTorch, Numba), whose
        buffer lies on the device. Nothing is ordered: what writes such an array must be done, or
        lie on the stream that is CuPy's current one when a kernel is called.
        """
        if not isinstance(array, np.ndarray) and hasattr(array, "__cuda_array_interface__"):
            described, memory = array.__cuda_array_interface__, "device"
            pointer, dtype = described["data"][0], np.dtype(described["typestr"])
            shape, strides = described["shape"], described.get("strides")
            contiguous, size = strides is None, math.prod(shape)
            if strides is not None:  # a NumPy array knows; its elements are never looked at
                layout = np.lib.stride_tricks.as_strided(np.empty(1, dtype), shape, strides)
                contiguous = layout.flags.c_contiguous
        else:
            pointer, memory = host_address(array), "host"
            dtype, shape, strides = array.dtype, array.shape, array.strides
            contiguous, size = array.flags.c_contiguous, array.size
        name = dtype_name(dtype)
        if name not in DTYPES:
            raise TypeError(
                f"Buffer.of: array must have one of the dtypes {', '.join(DTYPES)}, "
                f"got {name}; convert it with astype first."
            )
        if not contiguous:
            raise ValueError(
                f"Buffer.of: array must be C-contiguous, got strides {strides} for shape {shape}; "
                "copy it with ascontiguousarray first."
            )
        return cls(pointer, name, size, array, memory)


class Tensors(NamedTuple):
    """Contiguous tensors of one dtype, in one kind of memory."""

    pointers: NDArray[np.uint64]  # 0: a tensor of zeros, which takes no results
    dtype: str  # a key of DTYPES
    owner: object  # keeps the memory alive
    memory: str = "host"
    stream: Any = None  # as a Buffer's

    @classmethod
    def of(cls, buffer: Buffer) -> Tensors:
        """A single one."""
        pointers = np.array([buffer.pointer], dtype=np.uint64)
        return cls(pointers, buffer.dtype, buffer.owner, buffer.memory, buffer.stream)


# ------------------------------------------------------------------------------------------- checks


def require(function: str, argument: str, fine: bool, expected: str, got: object) -> None:
    """Raise ValueError with the names of the function and of the argument unless `fine`."""
    if not fine:
        raise ValueError(f"{function}: {argument} must be {expected}, got {got}.")


def _check_array(function: str, argument: str, array: Array, dtype: DTypeLike, size: int) -> None:
    if array.dtype == dtype and array.size == size and array.flags.c_contiguous:
        return  # writing the texts takes longer than a kernel of a small tensor
    got = f"{array.dtype} of shape {array.shape} and strides {array.strides}"
    expected = f"a contiguous {np.dtype(dtype)} array of {size} elements"
    require(function, argument, False, expected, got)


def _check_block(function: str, block_size: int) -> None:
    fine = block_size > 0 and block_size % lanes.ROW == 0
    require(function, "block_size", fine, f"a positive multiple of {lanes.ROW}", block_size)


def _check_exponential(function: str, bits: int, headroom: int) -> None:
    require(function, "bits", bits in lanes.EXPONENTIAL_BITS, "4 or 8", bits)
    require(function, "headroom", 0 <= headroom <= 126, "between 0 and 126", headroom)


def check_square(function: str, square: bool, bits: int) -> None:
    """Raise ValueError where codes of `bits` bits have no square levels."""
    fine = not square or bits <= lanes.SQUARE_BITS
    require(function, "bits", fine, f"at most {lanes.SQUARE_BITS} with square levels", bits)


def _check_dither(function: str, dither: NDArray[np.uint32]) -> None:
    _check_array(function, "dither", dither, UINT32, 4)


# ------------------------------------------------------------------------------------------ kernels


class Kernels(ABC):
    """The kernels of one kind of memory. A subclass says how to allocate and how to launch."""

    memory: str  # what a Buffer says that it lies in
    array_type: type  # of norms, payloads and codes
    xp: Any  # the module of such arrays

    @abstractmethod
    def address(self, array: Array) -> int:
        """Where the elements of an array begin."""

    @abstractmethod
    def random(self, dither: NDArray[np.uint32]) -> tuple[Any, ...]:
        """The dither as arguments of a kernel."""

    @abstractmethod
    def table(self, arrays: Sequence[Array]) -> Any:
        """The addresses of several arrays, as an argument of a kernel."""

    @abstractmethod
    def on_device_of(self, buffer: Buffer | Tensors) -> AbstractContextManager[object]:
        """What to call kernels in, so that they run on the device of a buffer."""

    @abstractmethod
    def upload(self, array: Array) -> Array:
        """The values of an array, where kernels can read them: the array itself if they can."""

    @abstractmethod
    def staging(self, array: Array) -> Array:
        """Where kernels can write what `download` is to bring into an array, or the array."""

    @abstractmethod
    def download(self, staged: Array, array: Array) -> None:
        """Wait for the kernels that write `staged`, and have its values in `array`.

        Nothing is waited for where both are the same.
        """

    @abstractmethod
    def copy(self, source: Array, target: Array) -> None:
        """Copy between arrays of one size and dtype, where kernels are called."""

    @abstractmethod
    def wait(self) -> None:
        """Wait for the kernels that were called."""

    @abstractmethod
    def measure(
        self, name: str, x: Buffer, block_size: int, norms: Array, bounds: Array | None
    ) -> None:
        """Run `absmax` or `l2norm` over the blocks of x."""

    @abstractmethod
    def launch(self, name: str, dtype: str | None, elements: int, *arguments: Any) -> None:
        """Run a kernel over so many elements, of a dtype if it has one, with its SIGNATURES."""

    def empty(self, size: int, dtype: DTypeLike) -> Array:
        """A new array of one dimension."""
        return self.xp.empty(size, dtype=dtype)

    def _check_array(
        self, function: str, argument: str, array: Array, dtype: DTypeLike, size: int
    ) -> None:
        if not isinstance(array, self.array_type):
            expected = f"an array in {self.memory} memory"
            require(function, argument, False, expected, f"a {type(array).__module__} array")
        _check_array(function, argument, array, dtype, size)

    def _check_tensor(self, function: str, argument: str, buffer: Buffer) -> None:
        if buffer.dtype in DTYPES and buffer.memory == self.memory:
            return
        known = f"a buffer of one of the dtypes {', '.join(DTYPES)}"
        require(function, argument, buffer.dtype in DTYPES, known, buffer.dtype)
        expected = f"a buffer in {self.memory} memory"
        require(function, argument, False, expected, f"one in {buffer.memory} memory")

    def _check_norms(self, function: str, norms: Array, count: int, block_size: int) -> None:
        _check_block(function, block_size)
        self._check_array(function, "norms", norms, INT32, lanes.blocks(count, block_size))

    def _output(self, function: str, out: Array | None, size: int, dtype: DTypeLike) -> Array:
        if out is None:
            return self.empty(size, dtype)
        self._check_array(function, "out", out, dtype, size)
        return out

    def _norms(
        self, name: str, x: Buffer, block_size: int, out: Array | None, bounds: Array | None
    ) -> Array:
        self._check_tensor(name, "x", x)
        _check_block(name, block_size)
        count = lanes.blocks(x.size, block_size)
        if bounds is not None:
            self._check_array(name, "bounds", bounds, INT32, count)
        norms = self._output(name, out, count, INT32)
        self.measure(name, x, block_size, norms, bounds)
        return norms

    def absmax(
        self, x: Buffer, block_size: int, out: Array | None = None, bounds: Array | None = None
    ) -> Array:
        """Largest |x| of each block, as the bit patterns of float32 (int32, one per block).

        Integer order of these patterns is float order with NaN above Inf above finite, so an
        integer Max-allreduce gives the global norm and carries NaN and Inf to every rank. float64
        is rounded to float32 first, as quantization does; beyond its range it counts as Inf.
        `bounds` are norms that those of the result are lowered to, where they are finite.
        """
        return self._norms("absmax", x, block_size, out, bounds)

    def l2norm(
        self, x: Buffer, block_size: int, out: Array | None = None, bounds: Array | None = None
    ) -> Array:
        """L2 norm of each block, rounded up, as the bit patterns of float32 (int32, one per block).

        Summed in double, so squares do not overflow. At most the largest finite number of x's
        dtype, which still bounds every |x|, so a finite block neither gives Inf nor decodes to it.
        The one kernel whose result may differ between host and device: a device sums blocks of more
        than 2048 elements in another order (always the same one), which can move the last place.
        """
        return self._norms("l2norm", x, block_size, out, bounds)

    def quantize_standard(
        self,
        x: Buffer,
        norms: Array,
        *,
        block_size: int,
        bits: int,
        levels: int,
        dither: NDArray[np.uint32],
        square: bool = False,
        out: Array | None = None,
    ) -> Array:
        """Unbiased codes floor(levels * x / norm + u), as lanes of `bits` bits in int32 words.

        With `square`, which takes 8 bits at most, a code k stands for sign(k) * (k / levels)**2 in
        place of k / levels. |code| <= `levels` for every input (a larger |x| than its norm
        saturates); blocks whose norm is zero or not finite give codes that decode to zeros or NaN.
        1 <= `levels` <= 2**(bits-1) - 1, or `lanes.two_hop_levels` with `square`. Adding the words
        of several ranks adds every lane as long as the sums stay within 2**(bits-1) - 1
        (`lanes.levels`) and lanes are not dense (`lanes.dense`). Returns
        `lanes.standard_words(x.size, bits)` words.
        """
        name = "quantize_standard"
        self._check_tensor(name, "x", x)
        self._check_norms(name, norms, x.size, block_size)
        require(name, "bits", bits in lanes.STANDARD_BITS, "between 2 and 16", bits)
        top = lanes.two_hop_levels(bits) if square else lanes.levels(bits, 1)
        require(name, "levels", 1 <= levels <= top, f"between 1 and {top} with {bits} bits", levels)
        check_square(name, square, bits)
        _check_dither(name, dither)
        payload = self._output(name, out, lanes.standard_words(x.size, bits), INT32)
        self.launch(
            *(name, x.dtype, x.size),
            *(x.pointer, x.size, block_size, self.address(norms)),
            *(bits, levels, square, *self.random(dither), self.address(payload)),
        )
        return payload

    def dequantize_standard(
        self,
        payload: Array,
        norms: Array,
        out: Buffer,
        *,
        block_size: int,
        bits: int,
        divisor: int,
        square: bool = False,
    ) -> None:
        """Write norm * lane / divisor to `out`; with divisor = levels * ranks this is the mean.

        With `square` it is norm * lane * |lane| / divisor, of codes that have not been added.
        Elements of a block whose norm is not finite become NaN; no |result| exceeds its norm.
        """
        name = "dequantize_standard"
        self._check_tensor(name, "out", out)
        self._check_norms(name, norms, out.size, block_size)
        require(name, "bits", bits in lanes.STANDARD_BITS, "between 2 and 16", bits)
        words = lanes.standard_words(out.size, bits)
        self._check_array(name, "payload", payload, INT32, words)
        require(name, "divisor", 1 <= divisor < 2**31, "between 1 and 2**31 - 1", divisor)
        check_square(name, square, bits)
        self.launch(
            *(name, out.dtype, out.size),
            *(self.address(payload), out.size, block_size, self.address(norms)),
            *(bits, square, divisor, out.pointer),
        )

    def quantize_exponential(
        self,
        x: Buffer,
        norms: Array,
        *,
        block_size: int,
        bits: int,
        dither: NDArray[np.uint32],
        headroom: int = 0,
        out: Array | None = None,
    ) -> Array:
        """Unbiased codes of x / (norm * 2**headroom): a sign and the exponent of a power of two.

        8 bits: one code per byte, levels 0 and 2**-126 .. 1. 4 bits: two codes per byte, levels 0
        and 2**-6 .. 1. `headroom` leaves the sum room for that many doublings.
        Returns `lanes.exponential_bytes(x.size, bits)` bytes.
        """
        name = "quantize_exponential"
        self._check_tensor(name, "x", x)
        self._check_norms(name, norms, x.size, block_size)
        _check_exponential(name, bits, headroom)
        _check_dither(name, dither)
        codes = self._output(name, out, lanes.exponential_bytes(x.size, bits), UINT8)
        self.launch(
            *(name, x.dtype, x.size),
            *(x.pointer, x.size, block_size, self.address(norms)),
            *(bits, headroom, *self.random(dither), self.address(codes)),
        )
        return codes

    def dequantize_exponential(
        self,
        codes: Array,
        norms: Array,
        out: Buffer,
        *,
        block_size: int,
        bits: int,
        headroom: int = 0,
    ) -> None:
        """Write level * 2**headroom * norm to `out`; NaN where the norm is not finite."""
        name = "dequantize_exponential"
        self._check_tensor(name, "out", out)
        self._check_norms(name, norms, out.size, block_size)
        _check_exponential(name, bits, headroom)
        size = lanes.exponential_bytes(out.size, bits)
        self._check_array(name, "codes", codes, UINT8, size)
        self.launch(
            *(name, out.dtype, out.size),
            *(self.address(codes), out.size, block_size, self.address(norms)),
            *(bits, headroom, out.pointer),
        )

    def reduce_exponential(
        self,
        inputs: Sequence[Array],
        *,
        bits: int,
        dither: NDArray[np.uint32],
        factor: float = 1.0,
        out: Array | None = None,
    ) -> Array:
        """Codes of factor * (sum of all inputs): decoded, added in float32, rounded once, unbiased.

        `factor` = 1 is the operation of a sum (saturating at level 1), 1 / len(inputs) gives the
        mean, which needs no headroom. One rounding multiplies the variance by at most 9/8, whatever
        the number of inputs.
        """
        name = "reduce_exponential"
        require(name, "inputs", len(inputs) >= 1, "at least one array", len(inputs))
        _check_exponential(name, bits, 0)
        _check_dither(name, dither)
        size = inputs[0].size
        for index, codes in enumerate(inputs):
            self._check_array(name, f"inputs[{index}]", codes, UINT8, size)
        result = self._output(name, out, size, UINT8)
        self.launch(
            *(name, None, size * 8 // bits),
            *(self.table(inputs), len(inputs), size, bits),
            *(factor, *self.random(dither), self.address(result)),
        )
        return result

    def add_exponential(
        self, source: int, target: int, size: int, *, bits: int, dither: NDArray[np.uint32]
    ) -> None:
        """The operation of an MPI reduction: target = round(source + target), in place.

        `source` and `target` are addresses of `size` bytes of codes, as MPI hands them to an
        operation. The result is a pure function of `dither` and of the two blocks, symmetric in the
        blocks: ranks that compute the same pair get the same bytes, and different hops of a
        reduction round independently. Saturates at level 1. Raises ValueError for `bits` other than
        4 and 8.
        """
        name = "add_exponential"
        require(name, "bits", bits in lanes.EXPONENTIAL_BITS, "4 or 8", bits)
        # Its threads take eight bytes each, of either width.
        self.launch(name, None, size, source, target, size, bits, *self.random(dither))

    def mean_standard(
        self,
        payloads: Sequence[Array],
        norms: Array,
        *,
        count: int,
        block_size: int,
        bits: int,
        levels: int,
        square: bool = False,
    ) -> Array:
        """The mean of what several ranks' payloads of `count` elements stand for, float32.

        They are quantized by the same `norms`, with `levels` levels on each side of zero, even ones
        or, with `square`, square ones (see `quantize_standard`), and need not fit their lanes when
        added: the sums are integers of 32 bits. Elements of a block whose norm is not finite become
        NaN; no |result| exceeds its norm.
        """
        name = "mean_standard"
        self._check_norms(name, norms, count, block_size)
        require(name, "bits", bits in lanes.STANDARD_BITS, "between 2 and 16", bits)
        check_square(name, square, bits)
        divisor = lanes.units(levels, square) * len(payloads)
        summed = "levels**2 x ranks" if square else "levels x ranks"
        require(name, summed, 1 <= divisor < 2**31, "between 1 and 2**31 - 1", divisor)
        words = lanes.standard_words(count, bits)
        for index, payload in enumerate(payloads):
            self._check_array(name, f"payloads[{index}]", payload, INT32, words)
        mean = self.empty(count, np.float32)
        self.launch(
            *(name, None, count),
            *(self.table(payloads), len(payloads), count, block_size, self.address(norms)),
            *(bits, square, divisor, self.address(mean)),
        )
        return mean

    def add(self, rows: Sequence[Array], out: Array) -> None:
        """Write the sum of several float32 arrays, added in their order, to `out`.

        It may be one of them.
        """
        require("add", "rows", len(rows) >= 1, "at least one array", len(rows))
        for index, row in enumerate((out, *rows)):
            name = f"rows[{index - 1}]" if index else "out"
            self._check_array("add", name, row, np.float32, out.size)
        arguments = self.table(rows), len(rows), out.size, self.address(out)
        self.launch("add", None, out.size, *arguments)

    # ------------------------------------------------------------------------------------- tables

    @abstractmethod
    def pack_table(self, dtype: str, segments: NDArray[Any], factor: float, flat: Array) -> None:
        """Write the elements of all segments times `factor` to `flat`, as float32.

        Their places there are those of codes. Zeros stand for segments without elements, and up to
        a segment's `stop`.
        """

    @abstractmethod
    def unpack_table(self, dtype: str, segments: NDArray[Any], flat: Array) -> None:
        """Write what lies in `flat` where `pack_table` has put elements, to the elements."""

    @abstractmethod
    def reduce_table(
        self,
        inputs: Sequence[Array],
        segments: NDArray[Any],
        *,
        bits: int,
        factor: float,
        out: Array,
    ) -> None:
        """`reduce_exponential` of the segments of several inputs, a row each, to `out`."""

    @abstractmethod
    def measure_table(
        self, norm: str, dtype: str, segments: NDArray[Any], block_size: int, norms: Array
    ) -> None:
        """Run "absmax" or "l2norm" over the blocks of all segments."""

    @abstractmethod
    def quantize_table(
        self,
        dtype: str,
        segments: NDArray[Any],
        norms: Array,
        payload: Array,
        *,
        block_size: int,
        bits: int,
        levels: int,
        square: bool,
    ) -> None:
        """Codes of all segments; exponential ones where `levels` is 0."""

    @abstractmethod
    def dequantize_table(
        self,
        dtype: str,
        segments: NDArray[Any],
        norms: Array,
        payload: Array,
        *,
        block_size: int,
        bits: int,
        divisor: int,
        square: bool,
    ) -> None:
        """What the codes of all segments stand for; exponential ones where `divisor` is 0."""
