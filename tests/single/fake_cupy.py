"""A stand-in for CuPy on a machine without a GPU: device.cu runs on the CPU (see emulation/).

`installed()` puts the modules that device.py imports into `sys.modules`. Device memory is memory of
the host whose last byte lies at the end of a page, with a page behind it that nobody may touch: a
kernel that reads or writes too far ends the test run. Everything is done when a call returns.

There are two devices. What is given to a kernel has to lie on the current one, as its stream does.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import importlib
import mmap
import os
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mpi_ops.kernels.code_cache import VARIABLE

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("emulation") / "emulation.cpp"
# The same arithmetic as setup.py and OPTIONS of device.py ask for.
COMPILE = ["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-shared", "-fPIC"]
FAKED = ("cupy", "cupy.cuda", "cupy.cuda.runtime", "cupy_backends", "cupy_backends.cuda")
FAKED += ("cupy_backends.cuda.libs", "cupy_backends.cuda.libs.nvrtc", "mpi_ops.kernels.device")

# ------------------------------------------------------------------------------------------- memory

_libc = ctypes.CDLL(None, use_errno=True)
_allocations: dict[int, tuple[int, int]] = {}  # address, size and device of what is alive
DEVICES = 2


# What lives until the streams are done: what was given to one may be freed before it is.
_kept: list[Any] = []
# Bytes of each copy to host memory, and from it.
downloads: list[int] = []
uploads: list[int] = []
# Bytes of each copy on the device.
copies: list[int] = []
# Bytes of all memory that CuPy's pools were asked for, on the device and pinned.
allocations: list[int] = []
# Bytes of each memset.
memsets: list[int] = []
# What the host has blocked for: events and streams.
waits: list[Any] = []
# Streams that have still to copy to a place on the device.
_arriving: dict[int, Stream] = {}


def clear_counts() -> None:
    for counts in (downloads, uploads, copies, allocations, memsets, waits, Module.launches):
        counts.clear()


def memory(size: int, device: int | None = None) -> np.ndarray:
    """`size` bytes of 0xA5 at the end of a page, on a device; None: on the current one."""
    pages = -(-max(size, 1) // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, pages + mmap.PAGESIZE)
    whole = np.frombuffer(region, dtype=np.uint8)
    guard = ctypes.c_void_p(whole.ctypes.data + pages)
    assert _libc.mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    inside = whole[pages - size : pages]
    inside[:] = 0xA5
    if Stream.deferred:
        _kept.append(inside)
    _allocations[inside.ctypes.data] = size, Device.current() if device is None else device
    weakref.finalize(region, _allocations.pop, inside.ctypes.data, None)
    return inside


def devices_of(addresses: Collection[int]) -> list[int | None]:
    """The devices on which memory lies; None: it is the host's."""
    known = sorted(_allocations.copy().items())  # another thread may allocate or free meanwhile
    found: list[int | None] = []
    for address in addresses:
        place = bisect.bisect(known, address, key=lambda own: own[0]) - 1
        start, (size, device) = known[max(place, 0)] if known else (0, (0, 0))
        found.append(device if start <= address < start + size else None)
    return found


def device_of(address: int) -> int | None:
    return devices_of([address])[0]


def is_device(pointer: int) -> bool:
    return device_of(pointer) is not None


class ndarray:
    """What the package uses of cupy.ndarray. Like it, never becomes a NumPy array unasked."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Any:
        if name not in ("dtype", "size", "shape", "strides", "flags", "nbytes"):
            raise AttributeError(name)
        return getattr(self._values, name)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, key: Any) -> ndarray:
        return ndarray(self._values[key])

    def __setitem__(self, key: Any, value: Any) -> None:
        raise AssertionError("CuPy compiles a kernel for one element; use Kernels.copy()")

    @property
    def data(self) -> Any:
        return types.SimpleNamespace(ptr=self._values.ctypes.data)

    @property
    def device(self) -> Any:
        return types.SimpleNamespace(id=device_of(self._values.ctypes.data) or 0)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        own = self._values
        strides = None if own.flags.c_contiguous else own.strides
        address = (own.ctypes.data, False)
        return {
            "shape": own.shape,
            "typestr": own.dtype.str,
            "data": address,
            "strides": strides,
            "version": 3,
        }

    def __imul__(self, factor: float) -> ndarray:
        self._values *= factor
        return self

    def fill(self, value: Any) -> None:
        assert value == 0, "CuPy compiles a kernel for this"
        memsets.append(self.nbytes)
        Stream.current().require(self._values.ctypes.data)
        Stream.current().give(lambda: self._values.fill(0))

    def reshape(self, *shape: int) -> ndarray:
        return ndarray(self._values.reshape(*shape))

    def get(self) -> np.ndarray:
        Stream.current().synchronize()
        downloads.append(self._values.nbytes)
        return self._values.copy()


def empty(shape: Any, dtype: Any = float) -> ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if size:
        allocations.append(size)
    return ndarray(memory(size).view(dtype).reshape(shape))


def asarray(values: Any) -> ndarray:
    if isinstance(values, ndarray):
        return values
    if hasattr(values, "__cuda_array_interface__"):
        described = values.__cuda_array_interface__
        dtype, shape = np.dtype(described["typestr"]), described["shape"]
        size = int(np.prod(shape)) * dtype.itemsize
        region = (ctypes.c_uint8 * size).from_address(described["data"][0])
        region._owner = values
        return ndarray(np.frombuffer(region, dtype).reshape(shape))
    if isinstance(values, list):
        values = np.stack([own._values for own in values])
    array = empty(values.shape, values.dtype)
    array._values[...] = values
    return array


def ascontiguousarray(values: ndarray) -> ndarray:
    return values if values.flags.c_contiguous else asarray(values._values.copy())


# ------------------------------------------------------------------------------- compile and launch


class CUDARuntimeError(RuntimeError):
    """Of the driver."""


class NVRTCError(RuntimeError):
    """Of the compiler."""


class Module:
    """A loaded module; its machine code is the name of an emulated library."""

    built: dict[str, ctypes.CDLL]
    # Of all kernels: name, grid, threads of a block, stream.
    launches: list[tuple[str, int, int, Stream]]
    # Where in the first argument of a kernel the addresses of tensors are; None: nowhere.
    addresses: Callable[[str, np.ndarray], list[int]]

    def load(self, code: bytes) -> None:
        self._library, self._device = self.built[code.decode()], Device.current()

    def get_function(self, name: str) -> Any:
        return lambda grid, block, args: self._launch(name, grid, block, args)

    def _launch(self, name: str, grid: Any, block: Any, arguments: Any) -> None:
        # Like CuPy: its arrays are pointers, and NumPy's scalars are passed by value.
        values = [np.uint64(own.data.ptr) if isinstance(own, ndarray) else own for own in arguments]
        assert all(isinstance(own, np.generic) for own in values), arguments
        kinds = "".join(own.dtype.kind for own in values)
        cells = [np.array(own) for own in values]
        places = (ctypes.c_void_p * len(cells))(*(own.ctypes.data for own in cells))
        sizes = (ctypes.c_int * len(cells))(*(own.itemsize for own in cells))
        emulate = self._library.emulate
        emulate.restype = ctypes.c_char_p

        stream = Stream.current()
        assert self._device == Device.current(), f"{name} was loaded on another device"
        stream.require(*map(int, values))

        def run(keep: Any = (cells, arguments)) -> None:
            if isinstance(arguments[0], ndarray):
                stream.require(*self.addresses(name, arguments[0]._values))
            problem = emulate(
                name.encode(), grid[0], block[0], len(cells), kinds.encode(), sizes, places
            )
            assert problem is None, f"{name}: {problem.decode()}"

        for own in arguments:
            if isinstance(own, ndarray):
                arriving = _arriving.get(own.data.ptr, stream)
                assert arriving is stream, f"{name} reads what another stream is still copying"
        stream.running += 1
        stream.give(run)
        self.launches.append((name, grid[0], block[0], stream))


class Device:
    """One of the devices."""

    compute_capability = "80"
    _entered: ClassVar[list[int]] = []

    def __init__(self, number: int) -> None:
        assert number in range(DEVICES)
        self._number = number

    @classmethod
    def current(cls) -> int:
        return cls._entered[-1] if cls._entered else 0

    def __enter__(self) -> Device:
        self._entered.append(self._number)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._entered.pop() == self._number


class Stream:
    """Knows whether it is the current one, and how many kernels nobody has waited for.

    Where streams are deferred, those that do not block do nothing before somebody waits. As CuPy's,
    they are equal where their pointers are.
    """

    PER_THREAD: ClassVar[int] = 2  # the pointer of the default stream of each thread

    deferred: ClassVar[bool] = False
    _entered: ClassVar[list[Stream]] = []
    _made: ClassVar[dict[int, Stream]] = {}
    _threads: ClassVar[threading.local] = threading.local()

    def __init__(self, null: bool = False, non_blocking: bool = False, priority: int = 0) -> None:
        assert non_blocking != null
        self.ptr = 0 if null else self.PER_THREAD + len(self._made)
        self.device = None if null else Device.current()  # None: any
        self._made[self.ptr] = self
        self.running = 0
        self._work: list[Callable[[], Any]] = []

    @classmethod
    def current(cls) -> Stream:
        """Of the current device."""
        here = (own for own in reversed(cls._entered) if own.device in (None, Device.current()))
        return next(here, DEFAULT_STREAM)

    @classmethod
    def of(cls, pointer: int) -> Stream:
        return cls.per_thread() if pointer == cls.PER_THREAD else cls._made[pointer]

    @classmethod
    def per_thread(cls) -> Stream:
        """The default stream of this thread."""
        own = getattr(cls._threads, "stream", None)
        if own is None:
            own = cls._threads.stream = cls(non_blocking=True)
            own.ptr = cls.PER_THREAD
        return own

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and self.ptr == other.ptr

    def __hash__(self) -> int:
        return hash(self.ptr)

    def __enter__(self) -> Stream:
        assert self.device in (None, Device.current()), "a stream of another device"
        self._entered.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._entered.pop() is self

    def require(self, *addresses: int) -> None:
        """What it works on lies on its device, or in host memory."""
        own = Device.current() if self.device is None else self.device
        assert {*devices_of(addresses)} <= {None, own}, "memory of another device"

    def give(self, work: Callable[[], Any]) -> None:
        """Something to do after all that it has."""
        self._work.append(work)
        if self.ptr == 0 or not self.deferred:
            self.flush()

    def flush(self) -> None:
        """Do it all."""
        while self._work:
            self._work.pop(0)()

    def drop(self) -> None:
        """What a device that has failed does not do; its memory may be gone by now."""
        self._work.clear()
        for target in [own for own, stream in _arriving.items() if stream is self]:
            del _arriving[target]

    def synchronize(self) -> None:
        waits.append(self)
        self.flush()
        self.running = 0


DEFAULT_STREAM = Stream(null=True)


class Event:
    """What a stream had to do; where streams are deferred, done the third time somebody asks.

    As CuPy's, it is never done where the device has failed.
    """

    waits_allowed: ClassVar[bool] = True
    failure: ClassVar[int] = 0  # CUDA's number of what the device has failed at

    def __init__(self, disable_timing: bool = False) -> None:
        self._asked, self._stream, self.ptr = 0, DEFAULT_STREAM, self

    def query(self) -> int:
        """What cudaEventQuery returns; CuPy raises nothing."""
        if self.failure:
            self._stream.drop()
            return self.failure
        return 0 if self.done else 600

    def record(self, stream: Stream) -> None:
        self._stream = stream

    @property
    def done(self) -> bool:
        if self.failure:
            return False
        self._asked += 1
        if self._asked >= 3 or not Stream.deferred:
            self._stream.flush()
            self._stream.running = 0
            return True
        return False

    def synchronize(self) -> None:
        assert self.waits_allowed or self._asked >= 3, "waits for the GPU"
        self._stream.synchronize()


def pinned(size: int) -> bytearray:
    """Memory of the host, of 0x5A."""
    allocations.append(size)
    return bytearray(b"\x5a" * size)


def pointer_attributes(pointer: int) -> Any:
    if pointer == 0:
        raise CUDARuntimeError("cudaErrorInvalidValue")
    own = device_of(pointer)
    return types.SimpleNamespace(type=0 if own is None else 2, device=own or 0)


def copy(target: int, source: int, size: int, *_: Any) -> None:
    ctypes.memmove(target, source, size)
    if is_device(source) != is_device(target):
        (downloads if is_device(source) else uploads).append(size)
    elif is_device(source):
        copies.append(size)


def copy_later(target: int, source: int, size: int, kind: int, stream: int) -> None:
    """On a stream; whoever calls it keeps the memory."""
    own = Stream.of(stream)
    own.require(target, source)

    def arrive() -> None:
        copy(target, source, size)
        _arriving.pop(target, None)

    _arriving[target] = own
    own.give(arrive)


def machine_code(program: dict[str, Any]) -> bytes:
    """The element type stands for the machine code."""
    (element,) = [o.partition("=")[2] for o in program["options"] if "GQ_ELEMENT" in o] or [""]
    return element.encode()


def modules() -> dict[str, types.ModuleType]:
    """What `import` shall find."""
    cupy, cuda, runtime, nvrtc = (
        types.ModuleType(name)
        for name in ("cupy", "cupy.cuda", "cupy.cuda.runtime", "cupy_backends.cuda.libs.nvrtc")
    )
    for module, names in (
        (
            cupy,
            {
                "ndarray": ndarray,
                "empty": empty,
                "asarray": asarray,
                "ascontiguousarray": ascontiguousarray,
            },
        ),
        (
            cuda,
            {
                "Module": Module,
                "Device": Device,
                "Stream": Stream,
                "Event": Event,
                "alloc_pinned_memory": pinned,
                "get_current_stream": Stream.current,
            },
        ),
        (
            runtime,
            {
                "getDevice": Device.current,
                "getDeviceCount": lambda: DEVICES,
                "pointerGetAttributes": pointer_attributes,
                "eventQuery": Event.query,
                "CUDARuntimeError": CUDARuntimeError,
                "streamPerThread": Stream.PER_THREAD,
                "memoryTypeDevice": 2,
                "memoryTypeManaged": 3,
                "memcpy": copy,
                "memcpyAsync": copy_later,
                "memcpyDeviceToHost": 2,
                "memcpyDefault": 4,
            },
        ),
        (
            nvrtc,
            {
                "NVRTCError": NVRTCError,
                "getSupportedArchs": lambda: (70, 80, 90),
                "getVersion": lambda: (12, 9),
                "createProgram": lambda source, *_: {"source": source},
                "compileProgram": lambda program, options: program.update(options=options),
                "getCUBIN": machine_code,
                "getPTX": machine_code,
                "getProgramLog": lambda program: "",
                "destroyProgram": lambda program: None,
            },
        ),
    ):
        vars(module).update(names)
    cupy.cuda, cuda.runtime = cuda, runtime
    backends = [types.ModuleType(name) for name in FAKED if name.startswith("cupy_backends")]
    found = {module.__name__: module for module in (*backends, cupy, cuda, runtime, nvrtc)}
    found["cupy_backends.cuda.libs"].nvrtc = nvrtc
    return found


def build(directory: Path, elements: dict[str, str], piece: int) -> dict[str, ctypes.CDLL]:
    """The emulated kernels of each element type, and under "" those of codes.

    What an earlier call has put into the directory is not built again.
    """
    directory.mkdir(exist_ok=True)
    built = {}
    for element in ["", *elements.values()]:
        library = directory / f"{element.removeprefix('gq::') or 'codes'}.so"
        define = [f"-DGQ_PIECE={piece}", *([f"-DGQ_ELEMENT={element}"] if element else [])]
        include = f"-I{ROOT / 'mpi_ops' / 'kernels'}"
        options = [*define, include, "-Wno-unknown-pragmas", "-o", str(library)]
        if not library.exists():
            subprocess.run([*COMPILE, *options, str(SOURCE)], check=True)
        built[element] = ctypes.CDLL(str(library))
    return built


def _in_table(device: types.ModuleType, name: str, table: np.ndarray) -> list[int]:
    """Addresses of tensors that a kernel finds in its table."""
    own = max((own for own in device._SIGNATURES if name.startswith(f"gq_{own}")), key=len)
    if not device._SIGNATURES[own].startswith("t"):
        return []
    return [int(x) for x in table.view(device._TABLE)["segment"]["x"]]


@contextlib.contextmanager
def installed(
    directory: Path, dtypes: Collection[str] = ("float32", "float64", "float16", "bfloat16")
) -> Iterator[types.ModuleType]:
    """device.py on top of the emulation, whose libraries are put into `directory`."""
    import mpi_ops.kernels as package

    before = {name: sys.modules.pop(name, None) for name in FAKED}
    sys.modules.update(modules())
    kept = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = ""  # no code of a real compiler is looked for
    try:
        device = importlib.import_module("mpi_ops.kernels.device")
        elements = {dtype: device.ELEMENTS[dtype] for dtype in dtypes}
        Module.built, Module.launches = build(directory, elements, device.PIECE), []
        Module.addresses = staticmethod(partial(_in_table, device))
        yield device
    finally:
        os.environ.pop(VARIABLE)
        if kept is not None:
            os.environ[VARIABLE] = kept
        vars(package).pop("device", None)
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        if before["mpi_ops.kernels.device"] is not None:
            package.device = before["mpi_ops.kernels.device"]
