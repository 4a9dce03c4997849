"""Where tensors lie and what memory they need: staging, buffers of kernels, results, bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import gpus

DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def dense(tensor: torch.Tensor) -> bool:
    """Whether a tensor has its elements in memory, one after the other with some strides."""
    return tensor.layout is torch.strided and tensor.device.type in ("cpu", "cuda")


def readable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy, where kernels can read it, contiguous."""
    if not tensor.is_cpu and not (
        tensor.is_cuda and gpus.kernels_problem(tensor.get_device()) is None
    ):
        tensor = tensor.to("cpu")
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def memory_of(tensor: torch.Tensor) -> tuple[str, Any]:
    """Where a tensor lies, for kernels, and the stream for those on a device."""
    if not tensor.is_cuda:
        return "host", None
    from mpi_ops.kernels import device  # imports CuPy

    return "device", device.own_stream(tensor.get_device())


def new_output(like: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Memory for a mean, which kernels may write to at once."""
    if not like.is_cuda:
        return torch.empty_like(like, dtype=dtype)
    # Memory of PyTorch's stream may be in use there still, by work that nobody has waited for. That
    # of the kernels' own stream is not. It goes back when PyTorch's stream is done with it.
    with torch.cuda.stream(gpus.kernel_stream(like.device)):
        output = torch.empty_like(like, dtype=dtype)
    output.record_stream(torch.cuda.current_stream(like.device))
    return output


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Strides for a result of this tensor's layout; None where they are those of a contiguous one.

    Those of a dense tensor, also where this one is not.
    """
    if tensor.is_contiguous():
        return None
    like = torch.empty_like(tensor, device="meta")
    return None if like.is_contiguous() else like.stride()


def bytes_of(parameter: torch.Tensor) -> NDArray[np.uint8]:
    """The bytes of a tensor of any dtype and strides, on any device."""
    flat = parameter.detach().to("cpu").contiguous().reshape(-1)
    array: NDArray[np.uint8] = flat.view(torch.uint8).numpy()
    return array
