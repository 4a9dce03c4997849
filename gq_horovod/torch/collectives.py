"""What the pipeline waits for, by PyTorch and Horovod: operations in flight, and GPUs at work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import horovod.torch as hvd
import numpy as np
import torch
from numpy.typing import NDArray

from ..path.pipeline import Array
from . import gpus, numbering

_HOST = torch.device("cpu")
_NO_STREAM: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()


class Written(NamedTuple):
    """What a GPU had to do when a gradient was handed over; `Handle` of the pipeline."""

    event: torch.cuda.Event

    def ready(self) -> bool:
        return bool(self.event.query())

    def wait(self) -> None:
        self.event.synchronize()

    def precede(self, stream: torch.cuda.Stream) -> None:
        """Let what the stream is given from here on wait for it."""
        stream.wait_event(self.event)


class Every(NamedTuple):
    """Several of them; complete when all are."""

    parts: list[Any]

    def ready(self) -> bool:
        # Those of one stream are complete in their order.
        return all(part.ready() for part in reversed(self.parts))

    def wait(self) -> None:
        for part in self.parts:
            part.wait()


def written(tensor: torch.Tensor) -> Written | None:
    """What has to be complete before anybody else's kernels read a tensor of this moment.

    PyTorch gives a GPU its work far ahead. A hook that waited for it would leave the GPU without
    work afterwards, until the next layer's is there.
    """
    if not tensor.is_cuda:
        return None
    return Written(torch.cuda.current_stream(tensor.device).record_event())


class Operation(NamedTuple):
    """A Horovod operation in flight; `Handle` of the pipeline."""

    number: int
    session: object  # after another hvd.init() the same number is that of something else
    in_place: Any = None  # the CuPy array that has the result

    def ready(self) -> bool:
        if self.session is not numbering.session():
            raise RuntimeError("GlobalQSGD: Horovod was shut down while a tensor was in flight.")
        return bool(hvd.poll(self.number))

    def wait(self) -> Array:
        output = hvd.synchronize(self.number)
        if isinstance(output, tuple):  # alltoall also returns the received splits
            output = output[0]
        if output.is_cuda:
            return gpus.as_array(output, self.in_place)
        array: Array = output.numpy()
        return array


@dataclass(frozen=True)
class Collectives:
    """Horovod's operations on NumPy arrays, among the ranks of one process set.

    And on CuPy arrays, which the stream of our kernels writes and reads.
    """

    process_set: Any

    def allreduce_max(self, array: NDArray[np.int32], name: str) -> Operation:
        return self._start(hvd.allreduce_async_, array, name, op=hvd.Max)

    def allreduce_sum(self, array: Array, name: str) -> Operation:
        return self._start(hvd.allreduce_async_, array, name, op=hvd.Sum)

    def alltoall(self, array: Array, name: str, sizes: Sequence[int] | None = None) -> Operation:
        """Of equal pieces, or of pieces of these sizes."""
        splits = None if sizes is None else torch.tensor(sizes, dtype=torch.int32, device=_HOST)
        return self._start(hvd.alltoall_async, array, name, splits=splits)

    def allgather(self, array: Array, name: str, sizes: Sequence[int] | None = None) -> Operation:
        """Horovod finds out the sizes by itself."""
        return self._start(hvd.allgather_async, array, name)

    def _start(
        self, function: Callable[..., int], array: Any, name: str, **options: Any
    ) -> Operation:
        if torch.is_inference_mode_enabled():
            # Horovod's thread, which is in no such mode, allocates what an Alltoall returns.
            with torch.inference_mode(False):
                return self._start(function, array, name, **options)
        in_place = None
        if isinstance(array, np.ndarray):
            tensor, stream = torch.from_numpy(array), _NO_STREAM
        else:
            in_place = array if function is hvd.allreduce_async_ else None
            tensor = gpus.as_tensor(array)
            # Horovod takes it when the current stream has done what it has to do now.
            stream = torch.cuda.stream(gpus.kernel_stream(tensor.device))
        with numbering.OURS, stream:
            number = function(tensor, name=name, process_set=self.process_set, **options)
        return Operation(number, numbering.session(), in_place)


def complete(number: int) -> bool:
    """Whether a Horovod operation is; the main thread may take it away meanwhile."""
    try:
        return bool(hvd.poll(number))
    except Exception:
        return True
