"""What can be done with gradients on a GPU: by Horovod, as it was built, and by our kernels."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from functools import cache
from typing import Any

import horovod.torch as hvd
import torch

from ..log import Log

_log = Log(__name__)

# 0: norms and codes of gradients on a GPU pass through host memory, also where Horovod has NCCL.
VARIABLE = "GQ_HOROVOD_GPU_CODES"

_BUILD = "build it with HOROVOD_GPU_OPERATIONS=NCCL"
_HIERARCHICAL = "HOROVOD_HIERARCHICAL_ALLGATHER"


def number_of(variable: str) -> int:
    """A variable as Horovod reads numbers: what its text begins with; 0 where that is none."""
    found = re.match(r"\s*[+-]?\d+", os.environ.get(variable, ""))
    return int(found[0]) if found else 0


def horovod_takes_them() -> bool:
    """Whether Horovod can be given tensors on a GPU: one built without CUDA stops with an error."""
    return bool(hvd.cuda_built() or hvd.rocm_built())


def reduces_there(device: torch.device) -> bool:
    """Whether Horovod reduces a tensor of this device on a GPU, and not a copy in host memory."""
    return device.type == "cuda" and bool(hvd.nccl_built())


@cache
def kernels_problem(index: int) -> str | None:
    """Why our kernels cannot run on the GPU of this index, with the remedy; None if they can."""
    try:
        from mpi_ops.kernels import device
    except ImportError as error:
        return (
            f"CuPy does not import ({error}): `pip install 'gq-horovod[cuda13]'` (or cuda12, for "
            "an older driver)"
        )
    # PyTorch keeps what it has freed, which may be all that is left, and CuPy cannot ask it.
    device.release_memory = torch.cuda.empty_cache
    return device.problem(index)


def allgather_problem() -> str | None:
    """Why Horovod's Allgather cannot take what lies on a GPU, with the remedy; None if it can.

    Horovod 0.28.1 asks for MPI's hierarchical one before NCCL's (CreateOperationManager), also for
    tensors on a GPU, and copies from there as if it were host memory: a segmentation fault.
    """
    if not hvd.mpi_enabled():
        return None
    if _HIERARCHICAL in os.environ:
        # Of a single host Horovod leaves it out.
        taken = number_of(_HIERARCHICAL) > 0 and hvd.size() != hvd.local_size()
        cause = f"{_HIERARCHICAL} asks for"
    else:
        taken, cause = number_of("HOROVOD_AUTOTUNE") > 0, "HOROVOD_AUTOTUNE tries"
    if not taken:
        return None
    return f"{cause} an Allgather that works in host memory alone; set {_HIERARCHICAL}=0"


def resident(device: torch.device) -> bool:
    """Whether codes of this rank's gradients can stay on its GPU: Horovod takes them there.

    `device` is that of the first tensor that is reduced. Where that is the host's, gradients may
    lie on the current GPU; a rank that has not used one yet cannot say so. No other GPU is looked
    at: a process takes memory on every one that it looks at.
    """
    if os.environ.get(VARIABLE, "1") == "0":
        return False
    if not hvd.nccl_built() or allgather_problem() is not None:
        return False
    if device.type == "cuda":
        return kernels_problem(device.index) is None
    return torch.cuda.is_initialized() and kernels_problem(torch.cuda.current_device()) is None


def may_be_resident() -> bool:
    """Whether codes can stay on any rank's GPU: that of Horovod's build, the same on all."""
    return bool(hvd.nccl_built())


@cache
def say_once(index: int) -> None:
    """Log, on the first rank, what keeps gradients on the GPU of this index from its kernels.

    And on the second rank of a host, that it has the GPU of the first one.
    """
    if hvd.local_rank() == 1 and index == 0 and torch.cuda.device_count() > 1:
        _log.say(
            logging.WARNING,
            "gpu-shared",
            f"gradients of rank {hvd.rank()}, the second of its host, lie on the first of "
            f"{torch.cuda.device_count()} GPUs, which the first rank has, too; call "
            "torch.cuda.set_device(hvd.local_rank()) after hvd.init(), before anything is on a GPU",
            gpus=torch.cuda.device_count(),
        )
    if hvd.rank() != 0:
        return
    problems = []
    if not horovod_takes_them():
        problems.append(
            "Horovod was built without CUDA, so hooks copy what is not compressed to the host, and "
            f"wait for the GPU; {_BUILD}"
        )
    elif not hvd.nccl_built():
        problems.append(
            f"Horovod was built without NCCL, so codes travel through host memory; {_BUILD}"
        )
    elif (problem := allgather_problem()) is not None:
        problems.append(f"codes travel through host memory, because {problem}")
    if (problem := kernels_problem(index)) is not None:
        problems.append(f"{problem}; until then they are copied to the host whole")
    for problem in problems:
        _log.say(
            logging.WARNING,
            "gpu",
            f"gradients lie on a GPU, but {problem}",
            problem=problem,
        )


def say_that_others_cannot(function: str) -> None:
    """Log that codes could stay on this rank's GPU, and not on those of all ranks."""
    _log.say(
        logging.WARNING,
        "gpu",
        f"{function}: codes travel through host memory, because another rank cannot keep them on "
        "its GPU; `gq-horovod doctor`, started as the ranks are, says which one and why, or "
        f"{VARIABLE} or Horovod's variables are not the same on all ranks",
        function=function,
    )


@cache
def say_what_waits(device: torch.device, function: str) -> None:
    """Log, on the first rank, that codes wait for the backward pass, if they do on this GPU."""
    stream = torch.cuda.current_stream(device)
    if hvd.rank() != 0 or stream != torch.cuda.default_stream(device):
        return
    _log.say(
        logging.INFO,
        "gpu-stream",
        f"{function}: gradients are reduced by Alltoall, for which Horovod waits until PyTorch's "
        "default stream has nothing to do, so little of it hides behind the backward pass; train "
        f"within torch.cuda.stream(torch.cuda.Stream()), or compare with {VARIABLE}=0",
        function=function,
    )


def placed(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small tensor in host memory on a device. Does not wait for it."""
    return tensor.to(device, non_blocking=True)


@cache
def kernel_stream(device: torch.device) -> torch.cuda.ExternalStream:
    """The stream of our kernels, for PyTorch."""
    from mpi_ops.kernels.device import own_stream  # imports CuPy

    return torch.cuda.ExternalStream(own_stream(device.index).ptr, device=device)


def on_kernel_stream(device: torch.device) -> Any:
    """Let PyTorch work on the stream of our kernels, in `with`, if that is a GPU."""
    if device.type == "cuda":
        return torch.cuda.stream(kernel_stream(device))
    return contextlib.nullcontext()


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory of what our kernels have written, if they have. Blocks."""
    if tensor.is_cuda:
        follow_kernels(tensor.device)
    return tensor.to("cpu", copy=True)


def as_tensor(array: Any) -> torch.Tensor:
    """A CuPy array as a tensor that shares its memory. Orders nothing."""
    return torch.as_tensor(array, device=torch.device("cuda", array.device.id))


def as_array(reduced: torch.Tensor, in_place: Any = None) -> Any:
    """What Horovod has made, as a CuPy array that shares its memory, for our kernels.

    `in_place` is the array that it was made of, where the result has replaced it.
    """
    import cupy

    own = kernel_stream(reduced.device)
    if _completes_early():  # Horovod has told its stream to wait, which is PyTorch's default one
        own.wait_stream(torch.cuda.default_stream(reduced.device))
    if in_place is not None:
        return in_place
    reduced.record_stream(own)
    with cupy.cuda.Device(reduced.device.index):  # on another one it would be a copy
        return cupy.asarray(reduced)


def follow_kernels(device: torch.device) -> None:
    """Let what PyTorch does from here on wait for the kernels that were called so far."""
    torch.cuda.current_stream(device).wait_stream(kernel_stream(device))


def _completes_early() -> bool:
    """Whether Horovod calls operations complete that a GPU is still at."""
    return any(
        number_of(variable) > 0
        for variable in ("HOROVOD_ENABLE_ASYNC_COMPLETION", "HOROVOD_ENABLE_XLA_OPS")
    )


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """A stream that has nothing to do."""
    return torch.cuda.Stream(device)


def values_of(reduced: torch.Tensor) -> list[float]:
    """The numbers of a small tensor that Horovod has reduced.

    Horovod says that an operation is complete when the GPU is done with it, so nobody has to wait
    for what else PyTorch's stream has to do. (Not if it is told to say so before.)
    """
    if reduced.is_cpu:
        values: list[float] = reduced.tolist()
        return values
    device = reduced.device
    early = _completes_early()
    with torch.cuda.stream(torch.cuda.default_stream(device) if early else _side_stream(device)):
        values = reduced.tolist()
    return values


def follow_horovod(reduced: torch.Tensor) -> None:
    """Let what PyTorch does from here on wait for what Horovod has reduced."""
    if reduced.is_cuda and _completes_early():
        default = torch.cuda.default_stream(reduced.device)
        torch.cuda.current_stream(reduced.device).wait_stream(default)


def refuse_capture(device: torch.device, function: str) -> None:
    """Raise RuntimeError where a CUDA graph is captured: operations are no part of one."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{function}: expected no CUDA graph to be captured while gradients are reduced, "
            "because Horovod's operations are no part of a graph, and a replay would leave them "
            "out; capture the model alone (torch.cuda.make_graphed_callables, or "
            "torch.compile(mode='reduce-overhead')), and call backward() and step() outside."
        )


CACHED = (kernels_problem, say_once, say_what_waits, kernel_stream, _side_stream)
