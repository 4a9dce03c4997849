"""Kernels on NVIDIA GPUs: device.cu, compiled at run time, behind the checks of `interface`.

The functions are those of `interface.Kernels`, for CuPy arrays and for buffers on the device, and
give the bytes that `host` gives (see `l2norm` for the one exception). A call enqueues its kernel on
CuPy's current stream of the current device and returns; nothing waits for the device. (Within
`on_device_of` a buffer, that is the buffer's device and the stream that it names.)

A call is one launch, however many segments its table has; `l2norm` with blocks of more than PIECE
elements is two, `absmax` with such blocks one after a memset. Tables are kept on the device, and a
call that has the same tensors as an earlier one copies nothing. Memory comes from CuPy's pool: the
results, the tables, and 8 bytes for each PIECE elements of larger blocks for `l2norm`.

Importing this module imports CuPy, so callers import it where they have a buffer on a device.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import numpy as np
from cupy.cuda import runtime
from cupy_backends.cuda.libs import nvrtc
from numpy.typing import DTypeLike, NDArray

from .. import lanes
from . import code_cache, host
from .interface import SEGMENT, SIGNATURES, Buffer, Kernels, Tensors

# The flags are part of the arithmetic, like those of the host library: no fused multiply-add, IEEE
# division, and denormals as they are. CuPy's own compiling would add -ftz=true behind these, which
# is why the kernels are not a cupy.RawModule.
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")

# C++ types of the elements, as device.cu knows them.
ELEMENTS = {
    "float32": "float",
    "float64": "double",
    "float16": "gq::Half",
    "bfloat16": "gq::BFloat16",
}

THREADS = 256  # of a thread block, at most 1024
MAXIMUM_GRID = 1 << 16  # thread blocks; more work than that is done in several turns
GROUP_ROWS = lanes.GROUP // lanes.ROW  # of a column, they take one Philox block
# Elements of a block that half a warp measures; larger blocks are measured by several.
PIECE = 2048

_SOURCES = Path(__file__).parent
# Parameters of the kernels, as in interface.py. In the place of a dtype, which is part of a module,
# those over tables have a table and the number of its tasks; dithers are in it, but for their step.
_SIGNATURES = {
    "absmax": "tlpp",
    "l2norm": "tlppp",
    "l2norm_of_partial": "tlppp",
    "quantize_standard": "tlpiiiup",
    "dequantize_standard": "tlpiilp",
    "quantize_exponential": "tlpiiup",
    "dequantize_exponential": "tlpiip",
    "reduce_exponential": "tpiifup",
    "add_exponential": SIGNATURES["add_exponential"],
    "mean_standard": SIGNATURES["mean_standard"],
    "pack": "tfp",
    "unpack": "tp",
    "add": SIGNATURES["add"],
}
# Numbers of lanes for which quantize_standard and mean_standard have kernels of their own, as they
# have for each number of dense lanes.
_OWN_KERNEL = (2, 4, 8)

# The same fields as Segment in device.cu.
_TABLE = np.dtype([("segment", SEGMENT), ("task", np.int64)])
# Tables that are kept: those of all stages of some hundred buckets.
_TABLES_KEPT = 2048
_STEP = 2  # the word of a dither that says which step it is (`mpi_ops.dither`)


def _pointer(memory: Any) -> Any:
    """An address, or the array that has to live until the kernel is launched."""
    return memory if isinstance(memory, cupy.ndarray) else np.uint64(memory)


_TYPES: dict[str, tuple[Any, ...]] = {
    "p": (_pointer,),
    "l": (np.int64,),
    "i": (np.int32,),
    "u": (np.uint32,),
    "f": (np.float32,),
    "r": (np.uint64, np.uint64),
    "t": (_pointer, np.int32, np.int64),
}


# ---------------------------------------------------------------------------------------- compiling


def source() -> str:
    """device.cu with elements.h in it, so that the compiler needs no path to it."""
    include, header = '#include "elements.h"', (_SOURCES / "elements.h").read_text()
    return (_SOURCES / "device.cu").read_text().replace(include, header)


def compile_kernels(dtype: str | None, target: str, *options: str) -> tuple[bytes, str]:
    """Machine code and the compiler's log; needs NVRTC, but no GPU and no driver.

    `dtype` is a key of ELEMENTS, or None for the kernels of exponential codes. `target` is an
    architecture as NVRTC names it: "sm_80" gives a cubin, "compute_80" gives PTX. Raises
    RuntimeError with the log if compiling fails.
    """
    program = nvrtc.createProgram(source(), "device.cu", [], [])
    try:
        nvrtc.compileProgram(program, [*_options(dtype, target), *options])
        get = nvrtc.getCUBIN if target.startswith("sm_") else nvrtc.getPTX
        return get(program), nvrtc.getProgramLog(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise RuntimeError(
            f"mpi_ops.kernels.device: NVRTC could not compile for {target}: {error}\n{log}"
        ) from error
    finally:
        nvrtc.destroyProgram(program)


def _options(dtype: str | None, target: str) -> list[str]:
    element = [] if dtype is None else [f"-DGQ_ELEMENT={ELEMENTS[dtype]}"]
    sizes = [f"-DGQ_THREADS={THREADS}", f"-DGQ_PIECE={PIECE}"]
    return [*OPTIONS, *sizes, *element, f"-arch={target}"]


def _target(capability: int) -> str:
    """The architecture to compile for."""
    known = nvrtc.getSupportedArchs()
    if capability in known:
        return f"sm_{capability}"
    older = [arch for arch in known if arch < capability]
    if not older:
        version = ".".join(map(str, nvrtc.getVersion()))
        raise RuntimeError(
            f"mpi_ops.kernels.device: the GPU must have compute capability {min(known)} or more "
            f"for NVRTC {version}, got {capability}; install CuPy and NVRTC of an older CUDA."
        )
    # A newer GPU than NVRTC knows: its driver compiles the PTX of an older one.
    return f"compute_{max(older)}"


@cache
def _machine_code(dtype: str | None, capability: int) -> bytes:
    target = _target(capability)
    parts = [source(), *_options(dtype, target), *map(str, nvrtc.getVersion())]
    return code_cache.cached(parts, lambda: compile_kernels(dtype, target)[0])


@cache
def _module(dtype: str | None, device: int) -> Any:
    module = cupy.cuda.Module()
    module.load(_machine_code(dtype, int(cupy.cuda.Device(device).compute_capability)))
    return module


@cache
def _kernel(name: str, dtype: str | None, device: int) -> Any:
    return _module(dtype, device).get_function(f"gq_{name}")


@cache
def _argument_types(name: str) -> tuple[Any, ...]:
    return tuple(kind for letter in _SIGNATURES[name] for kind in _TYPES[letter])


def _launch(name: str, dtype: str | None, warps: int, *arguments: Any, variant: str = "") -> None:
    if warps == 0:
        return
    grid = min(-(-warps * lanes.ROW // THREADS), MAXIMUM_GRID)
    typed = zip(_argument_types(name), arguments, strict=True)
    kernel = _kernel(name + variant, dtype, runtime.getDevice())
    kernel((grid,), (THREADS,), tuple(kind(argument) for kind, argument in typed))


@lru_cache(maxsize=_TABLES_KEPT)
def _uploaded(content: bytes, device: int, stream: Any, thread: int) -> Any:
    """A table, copied to the current device on the current stream, on which alone it is read.

    It is never changed, so kernels that are in flight may read it still.
    """
    return KERNELS.upload(np.frombuffer(content, np.uint8))


def _there(array: NDArray[Any]) -> Any:
    """The bytes of a small array for kernels on the current device and stream; of few contents."""
    stream = cupy.cuda.get_current_stream()
    # CuPy's streams are equal where their pointers are, and this pointer is that of another stream
    # in each thread.
    thread = threading.get_ident() if stream.ptr == runtime.streamPerThread else 0
    return _uploaded(array.tobytes(), runtime.getDevice(), stream, thread)


def _variant(name: str, bits: int, square: bool) -> str:
    """What the name of a kernel of standard codes ends with."""
    own, dense = lanes.WORD_BITS // bits, lanes.dense(bits, square)
    if name == "dequantize_standard":
        return "_dense" if dense else ""
    if dense:
        return f"_{own}_dense"
    of_squares = square and name == "quantize_standard"
    return (f"_{own}" if own in _OWN_KERNEL else "") + ("_square" if of_squares else "")


@cache
def problem(device: int) -> str | None:
    """Why kernels cannot run on a GPU, with the remedy; None if they can.

    Loads a module, which shows whether the driver takes what NVRTC makes.
    """
    try:
        runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        return (
            f"CuPy cannot use the driver ({error}): install a CuPy of the driver's CUDA "
            "(`nvidia-smi` shows which), or a newer driver"
        )
    try:
        with cupy.cuda.Device(device):
            _module(None, device)
    except (ImportError, RuntimeError) as error:  # of NVRTC, of the driver, or of this module
        return (
            f"the kernels do not load ({error}): install CuPy and NVRTC of the driver's CUDA "
            "(`nvidia-smi` shows which)"
        )
    return None


# ------------------------------------------------------------------------------------------ kernels


# Called where CuPy finds no memory, before it looks once more: gives back what somebody else keeps
# of a device and does not use. None: nobody does.
release_memory: Callable[[], object] | None = None


class Device(Kernels):
    """The kernels for device memory."""

    memory = "device"
    array_type = cupy.ndarray
    xp = cupy

    def address(self, array: Any) -> int:
        pointer: int = array.data.ptr
        return pointer

    def empty(self, size: int, dtype: DTypeLike) -> Any:
        try:
            return cupy.empty(size, dtype=dtype)
        except MemoryError:
            if release_memory is None:
                raise
        release_memory()
        return cupy.empty(size, dtype=dtype)

    def random(self, dither: NDArray[np.uint32]) -> tuple[Any, ...]:
        return tuple(dither.view(np.uint64))

    def table(self, arrays: Sequence[Any]) -> Any:
        return _there(np.array([self.address(array) for array in arrays], dtype=np.uint64))

    def on_device_of(self, buffer: Buffer | Tensors) -> AbstractContextManager[None]:
        pointer = buffer.pointer if isinstance(buffer, Buffer) else int(buffer.pointers.max())
        return on(device_of(pointer), buffer.stream)

    def upload(self, array: Any) -> Any:
        if isinstance(array, cupy.ndarray):
            return array
        staged, there = pinned(array.size, array.dtype), self.empty(array.size, array.dtype)
        staged[:] = array
        begin_copy(staged, there)
        return there

    def staging(self, array: Any) -> Any:
        if isinstance(array, cupy.ndarray):
            return array
        return self.empty(array.size, array.dtype)

    def download(self, staged: Any, array: Any) -> None:
        if staged is not array:
            array[:] = begin_copy(staged, pinned(array.size, array.dtype)).wait()

    def copy(self, source: Any, target: Any) -> None:
        # For an assignment of one element CuPy would compile a kernel, in the middle of a step.
        stream = cupy.cuda.get_current_stream()
        pointers = target.data.ptr, source.data.ptr
        runtime.memcpyAsync(*pointers, source.nbytes, runtime.memcpyDefault, stream.ptr)

    def wait(self) -> None:
        cupy.cuda.get_current_stream().synchronize()

    def measure(self, name: str, x: Buffer, block_size: int, norms: Any, bounds: Any) -> None:
        self._measure(name, x.dtype, _one(x.pointer, x.size), block_size, norms, bounds)

    def launch(self, name: str, dtype: str | None, elements: int, *arguments: Any) -> None:
        """The same. A tensor by itself is a table of one segment."""
        if name in ("quantize_standard", "quantize_exponential"):
            x, size, block, norms, *settings, key, stream, codes = arguments
            own = _one(x, size, np.array([key, stream]).view(np.uint32))
            self._quantize(name, dtype, own, block, norms, settings, codes)
        elif name in ("dequantize_standard", "dequantize_exponential"):
            codes, size, block, norms, *settings, out = arguments
            self._dequantize(name, dtype, _one(out, size), block, norms, settings, codes)
        elif name == "reduce_exponential":
            inputs, number, size, bits, factor, key, stream, out = arguments
            own = _one(0, size, np.array([key, stream]).view(np.uint32))
            self._reduce(own, inputs, number, bits, factor, out)
        else:
            variant = _variant(name, *arguments[5:7]) if name == "mean_standard" else ""
            warps = -(-lanes.rows(elements) // GROUP_ROWS)
            _launch(name, dtype, warps, *arguments, variant=variant)

    # ------------------------------------------------------------------------------------- tables

    def measure_table(
        self, norm: str, dtype: str, segments: NDArray[Any], block_size: int, norms: Any
    ) -> None:
        self._measure(norm, dtype, segments, block_size, norms, None)

    def quantize_table(
        self,
        dtype: str,
        segments: NDArray[Any],
        norms: Any,
        payload: Any,
        *,
        block_size: int,
        bits: int,
        levels: int,
        square: bool,
    ) -> None:
        name = "quantize_standard" if levels else "quantize_exponential"
        settings = (bits, levels, square) if levels else (bits, 0)
        places = self.address(norms), self.address(payload)
        self._quantize(name, dtype, segments, block_size, places[0], settings, places[1])

    def dequantize_table(
        self,
        dtype: str,
        segments: NDArray[Any],
        norms: Any,
        payload: Any,
        *,
        block_size: int,
        bits: int,
        divisor: int,
        square: bool,
    ) -> None:
        name = "dequantize_standard" if divisor else "dequantize_exponential"
        settings = (bits, square, divisor) if divisor else (bits, 0)
        places = self.address(norms), self.address(payload)
        self._dequantize(name, dtype, segments, block_size, places[0], settings, places[1])

    def reduce_table(
        self,
        inputs: Sequence[Any],
        segments: NDArray[Any],
        *,
        bits: int,
        factor: float,
        out: Any,
    ) -> None:
        own = segments.copy()
        own["elements"] = lanes.exponential_bytes(own["elements"], bits)
        self._reduce(own, self.table(inputs), len(inputs), bits, factor, self.address(out))

    def pack_table(self, dtype: str, segments: NDArray[Any], factor: float, flat: Any) -> None:
        present = segments["elements"] * (segments["x"] != 0)
        room = np.maximum(present, segments["stop"] - segments["payload"])
        tasks = -(-room // lanes.GROUP)
        _over("pack", dtype, segments, tasks, factor, self.address(flat))

    def unpack_table(self, dtype: str, segments: NDArray[Any], flat: Any) -> None:
        tasks = -(-segments["elements"] // lanes.GROUP) * (segments["x"] != 0)
        _over("unpack", dtype, segments, tasks, self.address(flat))

    # -------------------------------------------------------------------------------- one launch

    def _measure(
        self,
        name: str,
        dtype: str,
        segments: NDArray[Any],
        block_size: int,
        norms: Any,
        bounds: Any,
    ) -> None:
        block = np.maximum(lanes.rows(segments["elements"]), 1) * lanes.ROW
        if block_size:
            block = np.minimum(block, block_size)
        blocks = -(-segments["elements"] // block)
        pieces = -(-block // PIECE)  # of each block
        several = pieces > 1
        tasks = -(-blocks * pieces // 2)
        places = 0 if bounds is None else self.address(bounds), self.address(norms)
        if name == "absmax":
            if several.any():
                norms.fill(0)
            _over(name, dtype, segments, tasks, block_size, *places)
            return
        partial = self.empty(2 * int(tasks.sum()) if several.any() else 0, np.float64)
        arguments = (block_size, self.address(partial), *places)
        _over(name, dtype, segments, tasks, *arguments)
        if several.any():
            sums = segments.copy()
            sums["payload"] = 2 * (np.cumsum(tasks) - tasks)
            _over("l2norm_of_partial", dtype, sums, blocks * several, *arguments)

    def _quantize(
        self,
        name: str,
        dtype: str | None,
        segments: NDArray[Any],
        block_size: int,
        norms: int,
        settings: Sequence[int],
        codes: int,
    ) -> None:
        bits, variant = settings[0], ""
        size, rows = lanes.exponential_bytes, GROUP_ROWS
        if name == "quantize_standard":
            size, rows = lanes.standard_words, _walk(bits)
            variant = _variant(name, bits, square=bool(settings[2]))
        present = segments["elements"] * (segments["x"] != 0)
        # Zeros that stand behind codes are written with them.
        room = np.maximum(size(present, bits), segments["stop"] - segments["payload"])
        tasks = -(-room // size(rows * lanes.ROW, bits))
        segments, step = _without_step(segments)
        arguments = (block_size, norms, *settings, step, codes)
        _over(name, dtype, segments, tasks, *arguments, variant=variant)

    def _dequantize(
        self,
        name: str,
        dtype: str | None,
        segments: NDArray[Any],
        block_size: int,
        norms: int,
        settings: Sequence[int],
        codes: int,
    ) -> None:
        rows, variant = GROUP_ROWS, ""
        if name == "dequantize_standard":
            bits, square, _ = settings
            rows, variant = _walk(bits), _variant(name, bits, bool(square))
        tasks = -(-lanes.rows(segments["elements"]) // rows) * (segments["x"] != 0)
        arguments = (block_size, norms, *settings, codes)
        _over(name, dtype, segments, tasks, *arguments, variant=variant)

    def _reduce(
        self,
        segments: NDArray[Any],
        inputs: Any,
        number: int,
        bits: int,
        factor: float,
        out: int,
    ) -> None:
        """Of segments whose elements are bytes."""
        tasks = -(-segments["elements"] // lanes.exponential_bytes(lanes.GROUP, bits))
        segments, step = _without_step(segments)
        settings = (inputs, number, bits, factor, step, out)
        _over("reduce_exponential", None, segments, tasks, *settings)


def _one(
    x: int, elements: int, random: NDArray[np.uint32] | tuple[int, ...] = (0, 0, 0, 0)
) -> NDArray[Any]:
    """The table of a tensor by itself."""
    return np.array([(x, elements, 0, 0, 0, tuple(random), 0)], dtype=SEGMENT)


def _without_step(segments: NDArray[Any]) -> tuple[NDArray[Any], np.uint32]:
    """Segments whose dithers count from the step of the first one, and that step.

    So they are the same in every step.
    """
    own = segments.copy()
    steps = own["random"][:, _STEP]
    step = np.uint32(steps[0] if len(steps) else 0)
    steps -= step
    return own, step


def _walk(bits: int) -> int:
    """Rows that fill whole payload rows of standard codes, and whole groups."""
    return math.lcm(lanes.WORD_BITS // bits, GROUP_ROWS)


def _over(
    name: str,
    dtype: str | None,
    segments: NDArray[Any],
    tasks: NDArray[np.int64],
    *arguments: Any,
    variant: str = "",
) -> None:
    """Run a kernel over a table, a warp for each of a segment's `tasks`."""
    ends = np.cumsum(tasks)
    table = np.empty(len(segments), _TABLE)
    table["segment"], table["task"] = segments, ends - tasks
    total = int(ends[-1]) if len(ends) else 0
    if total:
        own = (_there(table), len(table), total)
        _launch(name, dtype, total, *own, *arguments, variant=variant)


@contextmanager
def on(device: int | None, stream: Any) -> Iterator[None]:
    """Call kernels on a device, and on a stream; None: on the current one."""
    with cupy.cuda.Device(device), nullcontext() if stream is None else stream:
        yield


# -------------------------------------------------------------------------------------- copies


def pinned(size: int, dtype: DTypeLike) -> NDArray[Any]:
    """An array in host memory that a GPU copies from and to while the host goes on; from a pool."""
    size_bytes = size * np.dtype(dtype).itemsize
    # Views keep the memory.
    return np.frombuffer(cupy.cuda.alloc_pinned_memory(max(size_bytes, 1)), dtype, size)


_DONE, _NOT_READY = 0, 600  # of cudaEventQuery


class Copying(NamedTuple):
    """A copy in flight."""

    event: Any
    target: Any

    def ready(self) -> bool:
        """Whether it is complete, and with it what its stream had to do before.

        Raises CUDARuntimeError where the GPU has failed, also at something else: CuPy's `done` is
        false for ever then.
        """
        status = runtime.eventQuery(self.event.ptr)
        if status not in (_DONE, _NOT_READY):
            raise runtime.CUDARuntimeError(status)
        return bool(status == _DONE)

    def wait(self) -> Any:
        """The target, after blocking until it is complete."""
        self.event.synchronize()
        return self.target


# With both arrays: whoever has begun a copy may forget it, and pools give memory out again.
_copying: deque[tuple[Copying, Any]] = deque()
_keeping = threading.Lock()


def begin_copy(source: Any, target: Any) -> Copying:
    """Copy between a contiguous array on the device and one of `pinned`, on the current stream."""
    stream = cupy.cuda.get_current_stream()
    addresses = [
        own.data.ptr if isinstance(own, cupy.ndarray) else own.ctypes.data
        for own in (target, source)
    ]
    runtime.memcpyAsync(*addresses, source.nbytes, runtime.memcpyDefault, stream.ptr)
    event = cupy.cuda.Event(disable_timing=True)
    event.record(stream)
    copying = Copying(event, target)
    with _keeping:
        while _copying and _copying[0][0].ready():
            _copying.popleft()
        _copying.append((copying, source))
    return copying


@cache
def own_stream(device: int) -> Any:
    """A stream for kernels that are not to wait for what the device's other streams have to do."""
    with cupy.cuda.Device(device):
        try:  # of what is ready, first: short kernels whose results the network waits for
            return cupy.cuda.Stream(non_blocking=True, priority=-1)
        except TypeError:  # an older CuPy
            return cupy.cuda.Stream(non_blocking=True)


KERNELS = Device()
mean_standard = KERNELS.mean_standard
absmax = KERNELS.absmax
l2norm = KERNELS.l2norm
quantize_standard = KERNELS.quantize_standard
dequantize_standard = KERNELS.dequantize_standard
quantize_exponential = KERNELS.quantize_exponential
dequantize_exponential = KERNELS.dequantize_exponential
reduce_exponential = KERNELS.reduce_exponential
add_exponential = KERNELS.add_exponential


# ------------------------------------------------------------------------------- operations of MPI


def prepare_addition() -> bool:
    """Compile what `add_anywhere` needs for all GPUs of this process; False if it has none.

    Raises RuntimeError if compiling fails. Does not start a context on any GPU.
    """
    try:
        devices = range(runtime.getDeviceCount())
    except runtime.CUDARuntimeError:
        return False
    for device in devices:
        _machine_code(None, int(cupy.cuda.Device(device).compute_capability))
    return len(devices) > 0


def device_of(pointer: int) -> int | None:
    """The device on which memory lies; None for memory of the host."""
    try:
        attributes = runtime.pointerGetAttributes(pointer)
    except runtime.CUDARuntimeError:  # memory that old versions of CUDA do not know
        return None
    on_device = attributes.type in (runtime.memoryTypeDevice, runtime.memoryTypeManaged)
    return int(attributes.device) if on_device else None


def add_anywhere(
    source: int, target: int, size: int, *, bits: int, dither: NDArray[np.uint32]
) -> None:
    """`add_exponential` where the target lies, host or device; it is done when this returns."""
    from_device, to_device = device_of(source), device_of(target)
    if to_device is None:
        if from_device is not None:
            staged = np.empty(size, dtype=np.uint8)
            runtime.memcpy(staged.ctypes.data, source, size, runtime.memcpyDeviceToHost)
            source = staged.ctypes.data
        host.add_exponential(source, target, size, bits=bits, dither=dither)
        return
    with cupy.cuda.Device(to_device):
        stream = cupy.cuda.get_current_stream()
        if from_device != to_device:
            copy = cupy.empty(size, dtype=np.uint8)
            runtime.memcpyAsync(copy.data.ptr, source, size, runtime.memcpyDefault, stream.ptr)
            source = copy.data.ptr
        add_exponential(source, target, size, bits=bits, dither=dither)
        stream.synchronize()
