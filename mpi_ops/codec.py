"""The stages of a reduction that compute: norm, quantize, reduce, dequantize, for a given plan.

Every transport is made of these four and of its own communication. A *payload* is what travels:
int32 words of lanes (standard levels) or bytes of codes (exponential levels). Norms and payloads
are NumPy arrays, wherever the tensor lies: a tensor on a GPU is measured, quantized and dequantized
there, on CuPy's current stream, and only what travels passes through host memory. A stage is
complete when its function returns. What writes the tensor must be complete before, or on that
stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import lanes
from .kernels import host
from .kernels.interface import Buffer, Kernels
from .scheme import Plan

Norms = NDArray[np.int32]
Payload = NDArray[Any]  # int32 or uint8, see payload_dtype


def kernels_for(tensor: Buffer) -> Kernels:
    """The kernels of the memory in which a tensor lies."""
    if tensor.memory == "host":
        return host.KERNELS
    from .kernels import device  # imports CuPy

    return device.KERNELS


def payload_dtype(plan: Plan) -> np.dtype[Any]:
    """Element type of a payload."""
    return np.dtype(np.int32 if plan.levels == "standard" else np.uint8)


def payload_size(count: int, plan: Plan) -> int:
    """Elements of the payload of `count` elements."""
    if plan.levels == "standard":
        return lanes.standard_words(count, plan.bits)
    return lanes.exponential_bytes(count, plan.bits)


def shard_size(count: int, plan: Plan) -> int:
    """Payload elements that each of plan.world_size ranks reduces: whole rows, the same for all."""
    rows = payload_size(count, plan) // lanes.ROW
    return -(-rows // plan.world_size) * lanes.ROW


def norms(x: Buffer, plan: Plan) -> Norms:
    """This rank's norm of each block; the global norms are their maximum over ranks."""
    kernels = kernels_for(x)
    measure = kernels.l2norm if plan.norm == "l2" else kernels.absmax
    block_size = plan.block_for(x.size)
    result = np.empty(lanes.blocks(x.size, block_size), dtype=np.int32)
    with kernels.on_device_of(x):
        staged = measure(x, block_size, out=kernels.staging(result))
        kernels.download(staged, result)
    return result


def quantize(
    x: Buffer,
    norms: Norms,
    plan: Plan,
    dither: NDArray[np.uint32],
    out: Payload | None = None,
) -> Payload:
    """The payload of `x`. Where `out` is longer than it, the rest becomes zero codes."""
    kernels = kernels_for(x)
    size = payload_size(x.size, plan)
    if out is None:
        out = np.empty(size, payload_dtype(plan))
    out[size:] = 0
    block_size = plan.block_for(x.size)
    payload = out[:size]
    with kernels.on_device_of(x):
        staged = kernels.staging(payload)
        if plan.levels == "standard":
            kernels.quantize_standard(
                x,
                kernels.upload(norms),
                block_size=block_size,
                bits=plan.bits,
                levels=plan.level_count,
                dither=dither,
                out=staged,
            )
        else:
            kernels.quantize_exponential(
                x,
                kernels.upload(norms),
                block_size=block_size,
                bits=plan.bits,
                dither=dither,
                out=staged,
            )
        kernels.download(staged, payload)
    return out


def reduce(
    pieces: Sequence[Payload] | Payload,
    plan: Plan,
    dither: NDArray[np.uint32],
    out: Payload | None = None,
) -> Payload:
    """Standard: the exact sum of the lanes. Exponential: the mean, rounded once with `dither`."""
    if plan.levels == "standard":
        total: Payload = np.add.reduce(pieces, axis=0, dtype=np.int32, out=out)
        return total
    reduced: Payload = host.reduce_exponential(
        list(pieces), bits=plan.bits, factor=1.0 / plan.world_size, dither=dither, out=out
    )
    return reduced


def dequantize(payload: Payload, norms: Norms, plan: Plan, out: Buffer) -> None:
    """Write the mean over ranks that a reduced payload stands for to `out`."""
    kernels = kernels_for(out)
    payload = payload[: payload_size(out.size, plan)]
    block_size = plan.block_for(out.size)
    with kernels.on_device_of(out):
        if plan.levels == "standard":
            kernels.dequantize_standard(
                kernels.upload(payload),
                kernels.upload(norms),
                out,
                block_size=block_size,
                bits=plan.bits,
                divisor=plan.level_count * plan.world_size,
            )
        else:
            kernels.dequantize_exponential(
                kernels.upload(payload),
                kernels.upload(norms),
                out,
                block_size=block_size,
                bits=plan.bits,
            )
        kernels.wait()
