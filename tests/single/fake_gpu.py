"""Tensors of PyTorch that play those of two GPUs: their memory is that of `fake_cupy`.

Where they go to the host is noted. What PyTorch has for streams and events is replaced, so a test
says when the GPU has done what it was given.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fake_cupy
import horovod.torch as hvd
import numpy as np
import pytest
import torch
from horovod.torch import mpi_ops as hvd_ops

from gq_horovod.torch import buckets, collectives, gpus, numbering

GPU = torch.device("cuda", 0)
SECOND = torch.device("cuda", 1)
# Bytes of each tensor that was copied to the host, since somebody has cleared it.
crossings: list[int] = []
# The streams on which those copies were made.
readers: list[Stream] = []
# Of record_stream(): addresses, and the streams that use what lies there.
recorded: list[tuple[int, Stream]] = []

_TO_HOST = ("cpu", "numpy", "tolist", "item", "__array__", "__bool__", "__float__", "__int__")


class GpuTensor(torch.Tensor):
    """A tensor on the first GPU."""

    device = GPU
    is_cuda, is_cpu = True, False

    def get_device(self) -> int:
        return self.device.index

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        own = plain(self).detach()
        described = fake_cupy.ndarray(own.numpy()).__cuda_array_interface__
        assert own.data_ptr() == described["data"][0]
        return described

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        places = [*args[1:], kwargs.get("device")]
        leaves = name == "to" and any(str(place).partition(":")[0] == "cpu" for place in places)
        leaves = leaves or (name == "copy_" and not isinstance(args[0], GpuTensor))
        if leaves or name in _TO_HOST:
            source = next(own for own in args if isinstance(own, GpuTensor))
            crossings.append(source.nbytes)
            readers.append(Stream.current(source.device))
            with torch._C.DisableTorchFunctionSubclass():
                return function(*(plain(own) for own in args), **kwargs)
        if kwargs.get("device") in KINDS:
            del kwargs["device"]
        args = tuple(
            "cpu" if isinstance(own, torch.device) and own in KINDS else own for own in args
        )
        if Stream.entered and name not in ("empty_like", "record_stream"):
            Stream.current(args[0].device).kernels.flush()  # it comes after what that has to do
        result = super().__torch_function__(function, types, args, kwargs)
        if "meta" in map(str, places):
            return result.as_subclass(torch.Tensor)
        return _there(result)


class SecondGpuTensor(GpuTensor):
    """A tensor on the second GPU."""

    device = SECOND


KINDS = {own.device: own for own in (GpuTensor, SecondGpuTensor)}


def plain(tensor: Any) -> Any:
    """The same memory, for PyTorch itself to work with."""
    if not isinstance(tensor, GpuTensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def _there(result: Any) -> Any:
    """A result in memory of the GPU, whatever PyTorch has allocated for it."""
    if not isinstance(result, GpuTensor):
        return result
    with torch._C.DisableTorchFunctionSubclass():
        own = result.as_subclass(torch.Tensor)
        known = own.numel() == 0 or fake_cupy.is_device(own.data_ptr())
        if known or not own.is_leaf or own.requires_grad:
            return result
        return on_gpu(own, result.device)


def on_gpu(tensor: torch.Tensor, device: torch.device = GPU) -> torch.Tensor:
    """A copy on a GPU, with the strides of the original."""
    with torch._C.DisableTorchFunctionSubclass():
        memory = torch.from_numpy(fake_cupy.memory(tensor.nbytes, device.index)).view(tensor.dtype)
        there = memory.as_strided(tensor.shape, tensor.stride()).copy_(plain(tensor.detach()))
    return there.as_subclass(KINDS[device])


_plain_to = torch.Tensor.to


def _to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Tensor.to, which knows the way to a GPU."""
    device = next((own for own in (*args, kwargs.get("device")) if own in KINDS), None)
    if isinstance(self, GpuTensor) or device is None:
        return _plain_to(self, *args, **kwargs)
    dtype = next((own for own in args if isinstance(own, torch.dtype)), self.dtype)
    return on_gpu(_plain_to(self, dtype), device)


_to.__name__ = "to"  # by which __torch_function__ knows it


class Stream:
    """A stream of PyTorch's, or that of the kernels; the current one is the last that was entered.

    What PyTorch itself does is done at once.
    """

    entered: ClassVar[list[Stream]] = []
    defaults: ClassVar[dict[Any, Stream]]

    def __init__(self, pointer: int = 0, device: Any = GPU) -> None:
        self.kernels, self.device = fake_cupy.Stream.of(pointer), device

    waits: ClassVar[list[tuple[Stream, Stream]]] = []  # who has waited for whom

    def wait_stream(self, stream: Stream) -> None:
        self.waits.append((self, stream))
        stream.kernels.flush()

    def record_event(self) -> Any:
        return types.SimpleNamespace(stream=self)

    def wait_event(self, event: Any) -> None:
        if event is not None:
            event.come()

    def synchronize(self) -> None:
        raise AssertionError("waits for all that a stream has to do")

    @classmethod
    def current(cls, device: Any = GPU) -> Stream:
        here = (own for own in reversed(cls.entered) if own.device == device)
        return next(here, cls.defaults[device])


Stream.defaults = {device: Stream(device=device) for device in KINDS}


@contextlib.contextmanager
def _entering(stream: Stream) -> Iterator[None]:
    Stream.entered.append(stream)
    try:
        yield
    finally:
        Stream.entered.pop()


def _record_stream(tensor: torch.Tensor, stream: Stream) -> None:
    """Its memory is not given out again before the stream is done."""
    recorded.append((tensor.data_ptr(), stream))
    fake_cupy._kept.append(tensor)


class Written(collectives.Written):
    """A gradient that was written when its hook came; `Handle` of the pipeline."""

    def ready(self) -> bool:
        return True

    def wait(self) -> None:
        pass


_plain_as_tensor = torch.as_tensor


def _as_tensor(array: Any, **options: Any) -> torch.Tensor:
    if isinstance(array, fake_cupy.ndarray):
        # On another one it would be a copy.
        assert options == {"device": torch.device("cuda", array.device.id)}
        return torch.from_numpy(array._values).as_subclass(KINDS[options["device"]])
    return _plain_as_tensor(array, **options)


def _after_the_current_stream(original: Any) -> Any:
    """A function of Horovod's, which reads a tensor when the current stream is done."""

    def start(tensor: Any, *rest: Any) -> int:
        own = tensor[0] if isinstance(tensor, (tuple, list)) else tensor
        if own.is_cuda:
            Stream.current(own.device).kernels.flush()
        return original(tensor, *rest)

    return start


@contextlib.contextmanager
def installed(
    directory: Path, monkeypatch: pytest.MonkeyPatch, dtypes: tuple[str, ...] = ("float32",)
) -> Iterator[Any]:
    """A GPU with CuPy beside PyTorch; gives device.py. Horovod has been built for it, with NCCL.

    The stream of the kernels does what it is given as late as it may.
    """
    with fake_cupy.installed(directory, dtypes) as device, monkeypatch.context() as patch:
        patch.setattr(fake_cupy.Stream, "deferred", True)
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "current_stream", Stream.current)
        patch.setattr(torch.cuda, "default_stream", Stream.defaults.__getitem__)
        patch.setattr(torch.cuda, "ExternalStream", Stream)
        patch.setattr(torch.cuda, "Stream", lambda device=GPU: Stream(device=device))
        patch.setattr(torch.cuda, "stream", _entering)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.Tensor, "record_stream", _record_stream)
        patch.setattr(torch.Tensor, "to", _to)
        patch.setattr(torch, "as_tensor", _as_tensor)
        patch.setattr(buckets, "written", lambda values: Written(None) if values.is_cuda else None)
        patch.setattr(gpus, "horovod_takes_them", lambda: True)
        patch.setattr(hvd, "nccl_built", lambda: 1)
        for name in ("_allreduce_async", "_alltoall_async", "_allgather_async"):
            patch.setattr(hvd_ops, name, _after_the_current_stream(getattr(hvd_ops, name)))
        for cached in gpus.CACHED:
            cached.cache_clear()
        for noted in (crossings, readers, recorded, Stream.waits, fake_cupy.downloads):
            noted.clear()
        places = set() if (library := numbering.library()) is None else {*library.places}
        yield device
        for number in range(fake_cupy.DEVICES):
            device.own_stream(number).flush()
        if (library := numbering.library()) is not None:
            library.places = places
    for cached in gpus.CACHED:
        cached.cache_clear()
    fake_cupy._kept.clear()


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """The values, for a test to look at."""
    return plain(tensor).numpy()
