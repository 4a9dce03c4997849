"""Where the norms and codes of a bucket lie while it is reduced, and how they get to the network.

Kernels work where tensors lie. Norms and codes of tensors on a GPU lie there too. An operation that
takes what lies on a GPU gets them as they are (`Resident`), and any other one gets copies in pinned
host memory (`Staged`), which the GPU makes while nobody waits for it.

All of it is kept from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpi_ops import codec
from mpi_ops.kernels.interface import Tensors

Array = NDArray[Any]  # of NumPy, or of CuPy


class Handle(Protocol):
    """Something in flight."""

    def ready(self) -> bool:
        """Whether wait() would return at once."""

    def wait(self) -> Any:
        """The result, after blocking until it is there. Raises if it failed."""


Waiting = Generator[Handle, Any, Any]


class Memory:
    """What norms and codes lie in: host memory, wherever the tensors are."""

    def __init__(self) -> None:
        self._arrays: dict[str, Array] = {}
        self._parts: dict[str, Memory] = {}

    def part(self, name: str) -> Memory:
        """Memory of the same kind, for what goes on beside the rest; the same one for a name."""
        if name not in self._parts:
            own = self._parts[name] = copy(self)
            own._arrays, own._parts = {}, {}
        return self._parts[name]

    def take(self, name: str, size: int, dtype: Any) -> Array:
        """An array for kernels: one that was given out before under that name, or a new one."""
        return self._take(name, size, dtype, self._empty)

    def _empty(self, size: int, dtype: Any) -> Array:
        return np.empty(size, dtype)

    def _take(self, name: str, size: int, dtype: Any, empty: Callable[[int, Any], Array]) -> Array:
        own = self._arrays.get(name)
        if own is None or own.size < size or own.dtype != dtype:
            own = self._arrays[name] = empty(size, dtype)
        # Rounds of one slot differ in size by a little.
        return own if own.size == size else own[:size]

    def entered(self) -> AbstractContextManager[object]:
        """What to call kernels in that are given no tensors."""
        return nullcontext()

    def send(self, name: str, array: Array, tail: Sequence[int] = ()) -> Waiting:
        """What an operation is to be given of an array of `take`, whose end becomes `tail`."""
        array[array.size - len(tail) :] = tail
        yield from ()
        return array

    def receive(self, name: str, array: Array) -> Array:
        """What an operation has given, for kernels."""
        return array

    def largest(self, norms: Array) -> list[Array]:
        """The largest of some norms for `read`; nothing where whoever sends them can look."""
        return []

    def read(self, *parts: Array) -> Waiting:
        """The values of a few numbers that an operation has given."""
        yield from ()
        return list(parts)

    def values(self, array: Array) -> Array:
        """The values of norms or codes, in host memory. Blocks."""
        with self.entered():
            return codec.values(array)


class _OnGpu(Memory):
    """Memory of the GPU on which tensors lie, used on the stream that they name."""

    def __init__(self, x: Tensors) -> None:
        from mpi_ops.kernels import device  # imports CuPy

        super().__init__()
        self._device = device
        self._number, self._stream = device.device_of(int(x.pointers.max())), x.stream

    def entered(self) -> AbstractContextManager[object]:
        return self._device.on(self._number, self._stream)

    def _empty(self, size: int, dtype: Any) -> Array:
        with self.entered():
            return self._device.KERNELS.empty(size, dtype)

    def _pinned(self, name: str, size: int, dtype: Any) -> Array:
        """An array in host memory that the GPU copies from and to, as by `take`."""
        return self._take(f"{name}, pinned", size, dtype, self._device.pinned)


class Staged(_OnGpu):
    """Of tensors on a GPU, for operations that take host memory."""

    def send(self, name: str, array: Array, tail: Sequence[int] = ()) -> Waiting:
        sent = self._pinned(name, array.size, array.dtype)
        with self.entered():
            copied = self._device.begin_copy(array, sent)
        yield copied
        sent[sent.size - len(tail) :] = tail
        return sent

    def receive(self, name: str, array: Array) -> Array:
        there = self.take(f"{name}, received", array.size, array.dtype)
        sent = self._arrays.get(f"{name}, pinned")
        if sent is None or not np.may_share_memory(array, sent):  # not an operation in place
            pinned = self._pinned(f"{name}, received", array.size, array.dtype)
            pinned[:] = array
            array = pinned
        with self.entered():
            self._device.begin_copy(array, there)
        return there


class Resident(_OnGpu):
    """Of tensors on a GPU, for operations that take what lies there."""

    def send(self, name: str, array: Array, tail: Sequence[int] = ()) -> Waiting:
        if tail:
            pinned = self._pinned(f"{name}, tail", len(tail), array.dtype)
            pinned[:] = tail
            with self.entered():
                self._device.begin_copy(pinned, array[array.size - len(tail) :])
        yield from ()
        return array

    def largest(self, norms: Array) -> list[Array]:
        found = self.take("largest", 1, np.int32)
        with self.entered():
            return [codec.largest(norms, found)]

    def read(self, *parts: Array) -> Waiting:
        found, copies = [], []
        with self.entered():
            for place, part in enumerate(parts):
                pinned = self._pinned(f"read.{place}", part.size, part.dtype)
                found.append(pinned)
                if part.size:
                    copies.append(self._device.begin_copy(part, pinned))
        if copies:
            yield copies[-1]  # which comes after the others
        return [own.copy() for own in found]  # the next one who reads gets the same memory


def memory_for(x: Tensors, resident: bool) -> Memory:
    """Memory for norms and codes of tensors; `resident`: operations take what lies on a GPU."""
    if codec.kernels_for(x).memory == "host":
        return Memory()
    return Resident(x) if resident else Staged(x)
