"""The stages of a reduction that compute: norm, quantize, reduce, dequantize, for a given plan.

Every transport is made of these four and of its own communication. A *payload* is what travels:
int32 words of lanes (standard and two-hop levels) or bytes of codes (exponential levels). Norms and
payloads are NumPy arrays, wherever the tensor lies: a tensor on a GPU is measured, quantized and
dequantized there, on its buffer's stream (CuPy's current one if it names none), and only what
travels passes through host memory. A stage is complete when its function returns. What writes the
tensor must be complete before, or on that stream.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import lanes
from .kernels import host
from .kernels.interface import INT32, UINT8, Buffer, Kernels
from .scheme import Plan

Norms = NDArray[np.int32]
Payload = NDArray[Any]  # int32 or uint8, see payload_dtype

INFINITY = 0x7F800000  # bit pattern of the smallest norm that is not finite


def kernels_for(tensor: Buffer) -> Kernels:
    """The kernels of the memory in which a tensor lies."""
    if tensor.memory == "host":
        return host.KERNELS
    from .kernels import device  # imports CuPy

    return device.KERNELS


def payload_dtype(plan: Plan) -> np.dtype[Any]:
    """Element type of a payload."""
    return UINT8 if plan.levels == "exponential" else INT32


def payload_size(count: int, plan: Plan) -> int:
    """Elements of the payload of `count` elements."""
    if plan.levels == "exponential":
        return lanes.exponential_bytes(count, plan.bits)
    return lanes.standard_words(count, plan.bits)


def _row_elements(plan: Plan) -> int:
    """Elements that a row of the payload stands for."""
    return lanes.ROW * (8 * payload_dtype(plan).itemsize // plan.bits)


def share_elements(count: int, plan: Plan) -> int:
    """Elements whose codes each of plan.world_size ranks reduces: the same for all, a few too many.

    Whole rows of the payload; and whole blocks where a share has norms of its own.
    """
    unit = _row_elements(plan)
    if plan.levels == "two-hop":
        unit = math.lcm(unit, plan.block_size or lanes.ROW)
    return -(-count // (unit * plan.world_size)) * unit


def shard_size(count: int, plan: Plan) -> int:
    """Payload elements that each of plan.world_size ranks reduces."""
    return share_elements(count, plan) // _row_elements(plan) * lanes.ROW


def reduced_size(count: int, plan: Plan) -> int:
    """Payload elements of a reduced share: its norms, if it has its own, and its codes."""
    return _share_norms(count, plan) + shard_size(count, plan)


def _share_norms(count: int, plan: Plan) -> int:
    """Norms that a reduced share of a tensor of `count` elements brings with it."""
    if plan.levels != "two-hop":
        return 0
    share = share_elements(count, plan)
    return lanes.blocks(share, plan.block_for(share))


def norms(x: Buffer, plan: Plan) -> Norms:
    """This rank's norm of each block; the global norms are their maximum over ranks."""
    kernels = kernels_for(x)
    measure = kernels.l2norm if plan.norm == "l2" else kernels.absmax
    block_size = plan.block_for(x.size)
    result: Norms = np.empty(lanes.blocks(x.size, block_size), INT32)
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
        if plan.levels != "exponential":
            kernels.quantize_standard(
                x,
                kernels.upload(norms),
                block_size=block_size,
                bits=plan.bits,
                levels=plan.level_count,
                dither=dither,
                square=plan.square,
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
    norms: Norms | None = None,
) -> Payload:
    """What becomes of one share of all ranks' codes, as `dequantize` takes it.

    Standard: the exact sum of the lanes. Exponential: the mean, rounded once with `dither`.
    Two-hop: the norms of the mean's blocks, and the mean rounded by them; takes the `norms` of the
    share (see `norms_of_share`).
    """
    if plan.levels == "standard":
        total: Payload = np.add.reduce(pieces, axis=0, dtype=np.int32, out=out)
        return total
    if plan.levels == "two-hop":
        assert norms is not None
        return _requantize(list(pieces), norms, plan, dither, out)
    reduced: Payload = host.reduce_exponential(
        list(pieces), bits=plan.bits, factor=1.0 / plan.world_size, dither=dither, out=out
    )
    return reduced


def norms_of_share(norms: Norms, count: int, rank: int, plan: Plan) -> Norms:
    """The norms of the share that `rank` reduces, out of those of a tensor of `count` elements.

    Of what lies beyond the tensor they are zero, as are its codes.
    """
    if plan.block_size is None:
        return norms
    size = share_elements(count, plan) // plan.block_size
    own = np.zeros(size, dtype=np.int32)
    there = norms[rank * size : (rank + 1) * size]
    own[: there.size] = there
    return own


def _requantize(
    pieces: list[Payload],
    norms: Norms,
    plan: Plan,
    dither: NDArray[np.uint32],
    out: Payload | None,
) -> Payload:
    """Decode all ranks' codes of a share, and quantize their mean."""
    count = pieces[0].size // lanes.ROW * _row_elements(plan)
    block_size = plan.block_for(count)
    mean = host.mean_standard(
        pieces,
        norms,
        count=count,
        block_size=block_size,
        bits=plan.bits,
        levels=plan.level_count,
        square=plan.square,
    )
    buffer = Buffer.of(mean)
    number = lanes.blocks(count, block_size)
    if out is None:
        out = np.empty(number + pieces[0].size, dtype=np.int32)
    own_norms, codes = out[:number], out[number:]
    measure = host.l2norm if plan.norm == "l2" else host.absmax
    measure(buffer, block_size, out=own_norms)
    # No mean exceeds the norm that it was decoded with, but for rounding, which must not make Inf.
    finite = norms < INFINITY
    np.minimum(own_norms, norms, out=own_norms, where=finite)
    host.quantize_standard(
        buffer,
        own_norms,
        block_size=block_size,
        bits=plan.bits,
        levels=plan.level_count,
        dither=dither,
        square=plan.square,
        out=codes,
    )
    return out


def dequantize(payload: Payload, norms: Norms, plan: Plan, out: Buffer) -> None:
    """Write the mean over ranks that a reduced payload stands for to `out`.

    The payload is all ranks' reduced shares, one after the other, or the sum of all payloads.
    """
    kernels = kernels_for(out)
    block_size, divisor = plan.block_for(out.size), plan.units * plan.world_size
    if plan.levels == "two-hop":
        payload, norms, block_size = _shares(payload, plan, out.size)
        divisor = plan.units
    payload = payload[: payload_size(out.size, plan)]
    with kernels.on_device_of(out):
        if plan.levels == "exponential":
            kernels.dequantize_exponential(
                kernels.upload(payload),
                kernels.upload(norms),
                out,
                block_size=block_size,
                bits=plan.bits,
            )
        else:
            kernels.dequantize_standard(
                kernels.upload(payload),
                kernels.upload(norms),
                out,
                block_size=block_size,
                bits=plan.bits,
                divisor=divisor,
                square=plan.square,
            )
        kernels.wait()


def _shares(payload: Payload, plan: Plan, count: int) -> tuple[Payload, Norms, int]:
    """Codes, norms and block size of a tensor out of all ranks' reduced shares."""
    number = _share_norms(count, plan)
    parts = payload.reshape(plan.world_size, reduced_size(count, plan))
    # With one norm for a share, a share is a block.
    block_size = plan.block_size or max(share_elements(count, plan), lanes.ROW)  # of no elements
    norms = np.concatenate(parts[:, :number])[: lanes.blocks(count, block_size)]
    return np.concatenate(parts[:, number:]), norms, block_size
