"""Kernels on NVIDIA GPUs: device.cu, compiled at run time, behind the checks of `interface`.

The functions are those of `interface.Kernels`, for CuPy arrays and for buffers on the device, and
give the bytes that `host` gives (see `l2norm` for the one exception). A call enqueues its kernel on
CuPy's current stream of the current device and returns; nothing waits for the device. (Within
`on_device_of` a buffer, that is the buffer's device and the stream that it names.) Memory comes
from CuPy's pool: the results, the pointers of `reduce_exponential`, and 8 bytes for 2048 elements
where `l2norm` has blocks larger than that.

Importing this module imports CuPy, so callers import it where they have a buffer on a device.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cupy
import numpy as np
from cupy.cuda import runtime
from cupy_backends.cuda.libs import nvrtc
from numpy.typing import DTypeLike, NDArray

from .. import lanes
from . import code_cache, host
from .interface import SIGNATURES, Buffer, Kernels, Tensors

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
ELEMENTS_PER_THREAD = 8  # one Philox block
# Elements of a block that half a warp measures; larger blocks are measured by several.
SEGMENT = 2048
HALF_WARP = 16

_SOURCES = Path(__file__).parent
_SIGNATURES = {
    **SIGNATURES,
    "absmax": "dplllp",
    "l2norm": "dplllpp",
    "l2norm_of_partial": "dplllp",
    # For a part of a tensor: the group in its dither that it begins with; its place in all codes.
    "quantize_standard": SIGNATURES["quantize_standard"] + "l",
    "reduce_exponential": SIGNATURES["reduce_exponential"] + "ll",
    "bound_norms": "ppl",
}
# What of them a call for whole tensors leaves out.
_PART = {"quantize_standard": (0,), "reduce_exponential": (0, 0)}
# Numbers of lanes for which these have kernels of their own.
_OWN_KERNEL = (2, 4, 8)


def _pointer(memory: Any) -> Any:
    """An address, or the array that has to live until the kernel is launched."""
    return memory if isinstance(memory, cupy.ndarray) else np.uint64(memory)


# The dtype is part of the module here, and the dither is two words of 64 bits.
_TYPES: dict[str, tuple[Any, ...]] = {
    "d": (),
    "p": (_pointer,),
    "l": (np.int64,),
    "i": (np.int32,),
    "f": (np.float32,),
    "r": (np.uint64, np.uint64),
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
    return [*OPTIONS, f"-DGQ_THREADS={THREADS}", *element, f"-arch={target}"]


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


def _launch(name: str, dtype: str | None, threads: int, *arguments: Any, variant: str = "") -> None:
    if threads == 0:
        return
    grid = min(-(-threads // THREADS), MAXIMUM_GRID)
    typed = zip(_argument_types(name), arguments, strict=True)
    kernel = _kernel(name + variant, dtype, runtime.getDevice())
    kernel((grid,), (THREADS,), tuple(kind(argument) for kind, argument in typed))


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


class Device(Kernels):
    """The kernels for device memory."""

    memory = "device"
    array_type = cupy.ndarray
    xp = cupy

    def address(self, array: Any) -> int:
        pointer: int = array.data.ptr
        return pointer

    def random(self, dither: NDArray[np.uint32]) -> tuple[Any, ...]:
        return tuple(dither.view(np.uint64))

    def table(self, arrays: Sequence[Any]) -> Any:
        return cupy.asarray(np.array([self.address(array) for array in arrays], dtype=np.uint64))

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

    def bound_norms(self, own: Any, norms: Any) -> None:
        _launch("bound_norms", None, own.size, self.address(own), self.address(norms), own.size)

    def wait(self) -> None:
        cupy.cuda.get_current_stream().synchronize()

    def measure(self, name: str, x: Buffer, block_size: int, norms: Any) -> None:
        block = min(block_size, lanes.whole_tensor_block(x.size))
        segments = norms.size * -(-block // SEGMENT)
        several = block > SEGMENT
        shape = (x.size, block, SEGMENT)
        threads = segments * HALF_WARP
        if name == "absmax":
            if several:
                norms.fill(0)
            _launch(name, x.dtype, threads, x.pointer, *shape, self.address(norms))
            return
        partial = self.empty(segments if several else 0, np.float64)
        pointers = (self.address(partial), self.address(norms))
        _launch(name, x.dtype, threads, x.pointer, *shape, *pointers)
        if several:
            threads = norms.size * lanes.ROW
            _launch("l2norm_of_partial", x.dtype, threads, pointers[0], *shape, pointers[1])

    def launch(
        self,
        name: str,
        dtype: str | None,
        elements: int,
        *arguments: Any,
        part: tuple[int, ...] = (),
    ) -> None:
        """The same; `part` is what _SIGNATURES have for parts of tensors."""
        threads = -(-lanes.rows(elements) // ELEMENTS_PER_THREAD) * lanes.ROW
        variant = ""
        if name in ("quantize_standard", "mean_standard"):
            number = lanes.WORD_BITS // arguments[4 if name == "quantize_standard" else 5]  # lanes
            variant = f"_{number}" if number in _OWN_KERNEL else ""
            variant += "_square" if name == "quantize_standard" and arguments[6] else ""
        part = part or _PART.get(name, ())
        _launch(name, dtype, threads, *arguments, *part, variant=variant)

    # ------------------------------------------------------------------------------------- tables

    def measure_table(
        self, norm: str, dtype: str, segments: NDArray[Any], block_size: int, norms: Any
    ) -> None:
        for x, block, own in _each(dtype, segments, block_size):
            target = norms[own["norms"] :][: lanes.blocks(x.size, block)]
            if x.pointer:
                self._norms(norm, x, block, target)
            else:
                target.fill(0)

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
        for x, block, own in _each(dtype, segments, block_size):
            measure = lanes.standard_words if levels else lanes.exponential_bytes
            size = measure(x.size, bits) if x.pointer else 0
            place = own["payload"]
            payload[place + size : own["stop"]].fill(0)
            if not x.pointer:
                continue
            out = payload[place : place + size]
            by = norms[own["norms"] :][: lanes.blocks(x.size, block)]
            dither = np.ascontiguousarray(own["random"])
            if levels:
                self.launch(
                    *("quantize_standard", dtype, x.size, x.pointer, x.size, block),
                    *(self.address(by), bits, levels, square, *self.random(dither)),
                    self.address(out),
                    part=(own["group"],),
                )
            else:
                self.quantize_exponential(
                    x, by, block_size=block, bits=bits, dither=dither, out=out
                )

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
        for x, block, own in _each(dtype, segments, block_size):
            if not x.pointer:
                continue
            measure = lanes.standard_words if divisor else lanes.exponential_bytes
            codes = payload[own["payload"] :][: measure(x.size, bits)]
            by = norms[own["norms"] :][: lanes.blocks(x.size, block)]
            if divisor:
                self.dequantize_standard(
                    *(codes, by, x), block_size=block, bits=bits, divisor=divisor, square=square
                )
            else:
                self.dequantize_exponential(codes, by, x, block_size=block, bits=bits)

    def reduce_table(
        self,
        inputs: Sequence[Any],
        segments: NDArray[Any],
        *,
        bits: int,
        factor: float,
        out: Any,
    ) -> None:
        table = self.table(inputs)
        for own in segments:
            size = lanes.exponential_bytes(int(own["elements"]), bits)
            dither = np.ascontiguousarray(own["random"])
            self.launch(
                *("reduce_exponential", None, size * 8 // bits, table, len(inputs), size, bits),
                *(factor, *self.random(dither), self.address(out)),
                part=(own["payload"], own["group"]),
            )


def _each(dtype: str, segments: NDArray[Any], block_size: int) -> Iterator[tuple[Buffer, int, Any]]:
    """The segments of a table, with their block sizes."""
    for own in segments:
        x = Buffer(int(own["x"]), dtype, int(own["elements"]), None, "device")
        yield x, block_size or lanes.whole_tensor_block(x.size), own


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


class Copying(NamedTuple):
    """A copy in flight."""

    event: Any
    target: Any

    def ready(self) -> bool:
        """Whether it is complete, and with it what its stream had to do before."""
        return bool(self.event.done)

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
