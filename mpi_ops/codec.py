"""The stages of a reduction that compute: norm, quantize, reduce, dequantize, for a given plan.

Every transport is made of these four and of its own communication. A *payload* is what travels:
int32 words of lanes (standard levels) or bytes of codes (exponential levels).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import lanes
from .kernels import host as kernels
from .kernels.host import Buffer
from .scheme import Plan

Payload = NDArray[Any]  # int32 or uint8, see payload_dtype


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


def norms(x: Buffer, plan: Plan) -> NDArray[np.int32]:
    """This rank's norm of each block; the global norms are their maximum over ranks."""
    measure = kernels.l2norm if plan.norm == "l2" else kernels.absmax
    return measure(x, plan.block_for(x.size))


def quantize(
    x: Buffer,
    norms: NDArray[np.int32],
    plan: Plan,
    dither: NDArray[np.uint32],
    out: Payload | None = None,
) -> Payload:
    """The payload of `x`. Where `out` is longer than it, the rest becomes zero codes."""
    size = payload_size(x.size, plan)
    if out is None:
        out = np.empty(size, dtype=payload_dtype(plan))
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
    if plan.levels == "standard":
        total: Payload = np.add.reduce(pieces, axis=0, dtype=np.int32, out=out)
        return total
    return kernels.reduce_exponential(
        list(pieces), bits=plan.bits, factor=1.0 / plan.world_size, dither=dither, out=out
    )


def dequantize(payload: Payload, norms: NDArray[np.int32], plan: Plan, out: Buffer) -> None:
    """Write the mean over ranks that a reduced payload stands for to `out`."""
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
