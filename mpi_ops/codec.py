"""The stages of a reduction that compute: norm, quantize, reduce, dequantize, for a given plan.

Every transport is made of these four and of its own communication. A *payload* is what travels:
int32 words of lanes (standard levels) or bytes of codes (exponential levels). All four run where
the tensor lies: norms and payloads are NumPy arrays for a tensor in host memory, and CuPy arrays
for one on a device, where they are enqueued on CuPy's current stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import lanes
from .kernels import host
from .kernels.interface import Array, Buffer, Kernels
from .scheme import Plan

Norms = Array  # int32
Payload = Array  # int32 or uint8, see payload_dtype


def kernels_for(data: Buffer | Payload) -> Kernels:
    """The kernels of the memory in which a buffer or an array lies."""
    on_host = data.memory == "host" if isinstance(data, Buffer) else isinstance(data, np.ndarray)
    if on_host:
        return host.KERNELS
    from .kernels import device  # imports CuPy, which made the data

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
    return measure(x, plan.block_for(x.size))


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
        out = kernels.empty(size, payload_dtype(plan))
    out[size:] = 0
    block_size = plan.block_for(x.size)
    if plan.levels == "standard":
        kernels.quantize_standard(
            x,
            norms,
            block_size=block_size,
            bits=plan.bits,
            levels=plan.level_count,
            dither=dither,
            out=out[:size],
        )
    else:
        kernels.quantize_exponential(
            x, norms, block_size=block_size, bits=plan.bits, dither=dither, out=out[:size]
        )
    return out


def reduce(
    pieces: Sequence[Payload] | Payload,
    plan: Plan,
    dither: NDArray[np.uint32],
    out: Payload | None = None,
) -> Payload:
    """Standard: the exact sum of the lanes. Exponential: the mean, rounded once with `dither`."""
    kernels = kernels_for(pieces[0])
    if plan.levels == "standard":
        xp = kernels.xp
        return xp.sum(xp.asarray(pieces), axis=0, dtype=np.int32, out=out)
    return kernels.reduce_exponential(
        list(pieces), bits=plan.bits, factor=1.0 / plan.world_size, dither=dither, out=out
    )


def dequantize(payload: Payload, norms: Norms, plan: Plan, out: Buffer) -> None:
    """Write the mean over ranks that a reduced payload stands for to `out`."""
    kernels = kernels_for(out)
    payload = payload[: payload_size(out.size, plan)]
    block_size = plan.block_for(out.size)
    if plan.levels == "standard":
        kernels.dequantize_standard(
            payload,
            norms,
            out,
            block_size=block_size,
            bits=plan.bits,
            divisor=plan.level_count * plan.world_size,
        )
    else:
        kernels.dequantize_exponential(payload, norms, out, block_size=block_size, bits=plan.bits)
