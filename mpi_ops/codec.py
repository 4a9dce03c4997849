"""The stages of a reduction that compute: norm, quantize, reduce, dequantize, for a given plan.

Every transport is made of these four and of its own communication. They work on the tables of a
`layout`, for tensors that are reduced together; those for a single `Buffer` make a table of it.
Tensors on a GPU are measured, quantized and dequantized there, on the stream that they name (CuPy's
current one if they name none). Norms and payloads may be CuPy arrays then, and nothing is waited
for: a stage has been called when its function returns, and follows what that stream had to do. Or
they are NumPy arrays, and pass through host memory: a stage is complete when its function returns.
What writes the tensors must be complete before, or on that stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import lanes
from .kernels import host
from .kernels.interface import INFINITY as INFINITY
from .kernels.interface import INT32, ITEM_BYTES, SEGMENT, Buffer, Kernels, Tensors, require
from .layout import Parcel, layout
from .scheme import Plan
from .sizes import payload_dtype as payload_dtype
from .sizes import payload_size as payload_size
from .sizes import reduced_size as reduced_size
from .sizes import shard_size as shard_size
from .sizes import share_elements as share_elements

# Of NumPy, or of CuPy where tensors lie on a GPU.
Norms = NDArray[np.int32]
Payload = NDArray[Any]  # int32 or uint8, see payload_dtype


def kernels_for(tensor: Buffer | Tensors | Payload) -> Kernels:
    """The kernels of the memory in which a tensor lies, or several, or norms and codes."""
    memory = tensor.memory if isinstance(tensor, Buffer | Tensors) else ""
    if memory == "host" or isinstance(tensor, np.ndarray):
        return host.KERNELS
    from .kernels import device  # imports CuPy

    return device.KERNELS


def near(norms: Norms, x: Tensors) -> Norms:
    """Norms where the kernels for `x` read them: no stage that gets these brings them there."""
    kernels = kernels_for(x)
    with kernels.on_device_of(x):
        there: Norms = kernels.upload(norms)
    return there


def values(array: Any) -> NDArray[Any]:
    """Norms or codes in host memory. Waits for the current stream where they lie on a GPU."""
    if isinstance(array, np.ndarray):
        return array
    found = np.empty(array.size, array.dtype)
    kernels_for(array).download(array, found)
    return found


# ------------------------------------------------------------------------------- of many tensors


def measure(
    x: Tensors,
    segments: NDArray[Any],
    plan: Plan,
    out: Norms,
    gaps: bool = False,
    spare: Norms | None = None,
) -> None:
    """Write this rank's norm of each block to `out`; global norms are their maximum over ranks.

    `gaps`: whether there is more room in it than norms, which becomes zeros. `spare`: where the
    largest norm is kept meanwhile, where all become it; None: new memory.
    """
    kernels = kernels_for(x)
    with kernels.on_device_of(x):
        staged = kernels.staging(out)
        if gaps:
            staged.fill(0)
        norm = "l2norm" if plan.norm == "l2" else "absmax"
        kernels.measure_table(norm, x.dtype, segments, plan.block_size or 0, staged)
        if plan.one_norm and staged.size > 1:
            # Norms of tensors on a GPU that are sent from host memory have their spare place there.
            there = spare is not None and kernels_for(spare) is kernels_for(staged)
            _spread(largest(staged, spare if there else None), staged)
        kernels.download(staged, out)


def largest(norms: Norms, out: Norms | None = None) -> Norms:
    """The largest of some norms, where they lie, in `out`; called on the current stream."""
    kernels = kernels_for(norms)
    # As bit patterns, norms have the order of the floats that they are, NaN included.
    own = Buffer(kernels.address(norms), "float32", norms.size, norms, kernels.memory)
    found: Norms = kernels.absmax(own, lanes.whole_tensor_block(own.size), out=out)
    return found


def _spread(norm: Norms, norms: Norms) -> None:
    """Make all norms this one.

    By copies, twice as many elements each time: CuPy would compile a kernel for one number to all.
    """
    kernels = kernels_for(norms)
    kernels.copy(norm, norms[:1])
    done = 1
    while done < norms.size:
        more = min(done, norms.size - done)
        kernels.copy(norms[:more], norms[done : done + more])
        done += more


def quantize_parcel(
    x: Tensors, segments: NDArray[Any], norms: Norms, plan: Plan, out: Payload
) -> None:
    """Write the codes of a parcel to `out`. Where that is longer, the rest becomes zero codes."""
    kernels = kernels_for(x)
    with kernels.on_device_of(x):
        staged = kernels.staging(out)
        kernels.quantize_table(
            *(x.dtype, segments, kernels.upload(norms), staged),
            block_size=plan.block_size or 0,
            bits=plan.bits,
            levels=plan.level_count,
            square=plan.square,
        )
        kernels.download(staged, out)


def reduce_share(
    pieces: Sequence[Payload] | Payload,
    segments: NDArray[Any],
    plan: Plan,
    out: Payload,
    norms: Norms | None = None,
) -> Payload:
    """Write what becomes of one share of all ranks' codes to `out`, and return it.

    Standard: the exact sum of the lanes. Exponential: the mean, rounded once. Two-hop: the norms of
    the mean's blocks, and the mean rounded by them; takes the `norms` of the share (see
    `norms_of_share`). `segments` are the share's (`Parcel.share`), with their dithers. Where all
    arrays are on a GPU (not for standard levels) that is where they are reduced, on CuPy's current
    stream.
    """
    if plan.levels == "standard":
        total: Payload = np.add.reduce(pieces, axis=0, dtype=np.int32, out=out)
        return total
    if plan.levels == "two-hop":
        assert norms is not None
        _requantize(list(pieces), segments, norms, plan, out)
        return out
    kernels_for(out).reduce_table(
        list(pieces), segments, bits=plan.bits, factor=1.0 / plan.world_size, out=out
    )
    end = 0
    if len(segments):
        last = segments[-1]
        end = int(last["payload"]) + payload_size(int(last["elements"]), plan)
    out[end:].fill(0)  # what lies beyond the tensors
    return out


def _requantize(
    pieces: list[Payload], segments: NDArray[Any], norms: Norms, plan: Plan, out: Payload
) -> None:
    """Decode all ranks' codes of a share, and quantize their mean."""
    count = pieces[0].size // lanes.ROW * (lanes.ROW * (lanes.WORD_BITS // plan.bits))
    block_size = plan.block_for(count)
    kernels = kernels_for(out)
    mean = kernels.mean_standard(
        pieces,
        norms,
        count=count,
        block_size=block_size,
        bits=plan.bits,
        levels=plan.level_count,
        square=plan.square,
    )
    number = lanes.blocks(count, block_size)
    own_norms, codes = out[:number], out[number:]
    measure_one = kernels.l2norm if plan.norm == "l2" else kernels.absmax
    # No mean exceeds the norm that it was decoded with, but for rounding, which must not make Inf.
    measure_one(Buffer.of(mean), block_size, out=own_norms, bounds=norms)
    own = segments.copy()
    own["x"] = kernels.address(mean) + ITEM_BYTES["float32"] * own["x"] if count else 0
    kernels.quantize_table(
        *("float32", own, own_norms, codes),
        block_size=plan.block_size or 0,
        bits=plan.bits,
        levels=plan.level_count,
        square=plan.square,
    )
    if not len(own):
        codes.fill(0)


def dequantize_parcel(
    payload: Payload, segments: NDArray[Any], norms: Norms, plan: Plan, out: Tensors
) -> None:
    """Write the mean over ranks that a parcel's reduced payload stands for to `out`.

    The payload is all ranks' reduced shares, one after the other, or the sum of all payloads.
    """
    kernels = kernels_for(out)
    divisor = plan.units * plan.world_size
    if plan.levels == "two-hop":
        norms, divisor = payload, plan.units
    with kernels.on_device_of(out):
        there = kernels.upload(payload)
        kernels.dequantize_table(
            *(out.dtype, segments, there if norms is payload else kernels.upload(norms), there),
            block_size=plan.block_size or 0,
            bits=plan.bits,
            divisor=divisor,
            square=plan.square,
        )
        if there is not payload:  # the values came from the host, and go with it
            kernels.wait()


def pack(x: Tensors, segments: NDArray[Any], factor: float, out: NDArray[np.float32]) -> None:
    """Write the elements of all segments times `factor` to their places in `out`, as float32."""
    kernels = kernels_for(x)
    with kernels.on_device_of(x):
        staged = kernels.staging(out)
        kernels.pack_table(x.dtype, segments, factor, staged)
        kernels.download(staged, out)


def add(rows: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    """Write the sum of several rows, added in their order, to `out`, where they lie as well."""
    kernels_for(out).add(list(rows), out)


def unpack(flat: NDArray[np.float32], segments: NDArray[Any], out: Tensors) -> None:
    """Write what lies in `flat` at the places of segments of `out` to their elements."""
    kernels = kernels_for(out)
    with kernels.on_device_of(out):
        there = kernels.upload(flat)
        kernels.unpack_table(out.dtype, segments, there)
        if there is not flat:  # the values came from the host, and go with it
            kernels.wait()


def norms_of_share(norms: Norms, count: int, rank: int, plan: Plan) -> Norms:
    """The norms of the share that `rank` reduces, out of those of `count` elements.

    Of what lies beyond them they are zero, as are the codes.
    """
    if plan.block_size is None:
        return norms
    size = share_elements(count, plan) // plan.block_size
    there = norms[rank * size : (rank + 1) * size]
    if there.size == size:
        return there
    kernels = kernels_for(norms)
    own: Norms = kernels.empty(size, INT32)
    own.fill(0)
    kernels.copy(there, own[: there.size])
    return own


# ----------------------------------------------------------------------------------- of one tensor


def _parcel(count: int, plan: Plan) -> Parcel | None:
    """A tensor as a whole; None of no elements."""
    return next(iter(layout((count,), plan, max(count, 1)).parcels), None)


def _check_norms(function: str, norms: Norms, count: int, plan: Plan) -> None:
    expected = lanes.blocks(count, plan.block_for(count))
    require(function, "norms", norms.size == expected, f"{expected} norms", norms.size)


def norms(x: Buffer, plan: Plan) -> Norms:
    """This rank's norm of each block; the global norms are their maximum over ranks."""
    result: Norms = np.empty(lanes.blocks(x.size, plan.block_for(x.size)), INT32)
    segments = np.zeros(1, dtype=SEGMENT)
    segments["x"], segments["elements"] = x.pointer, x.size
    measure(Tensors.of(x), segments, plan, result)
    return result


def quantize(
    x: Buffer,
    norms: Norms,
    plan: Plan,
    dither: NDArray[np.uint32],
    out: Payload | None = None,
) -> Payload:
    """The payload of `x`. Where `out` is longer than it, the rest becomes zero codes."""
    size = payload_size(x.size, plan)
    if out is None:
        out = np.empty(size, payload_dtype(plan))
    require("quantize", "out", out.size >= size, f"{size} elements or more", out.size)
    _check_norms("quantize", norms, x.size, plan)
    segments = np.zeros(1, dtype=SEGMENT)
    segments["x"], segments["elements"], segments["random"] = x.pointer, x.size, dither
    segments["stop"] = out.size
    quantize_parcel(Tensors.of(x), segments, norms, plan, out)
    return out


def reduce(
    pieces: Sequence[Payload] | Payload,
    plan: Plan,
    dither: NDArray[np.uint32],
    out: Payload | None = None,
    norms: Norms | None = None,
    first: int = 0,
) -> Payload:
    """One share of all ranks' codes of a tensor, reduced; see `reduce_share`.

    Arguments:
        pieces: the codes of the share, of each rank.
        plan, norms: as in `reduce_share`.
        dither: of the tensor.
        out: for the result.
        first: the share's first element in the tensor, a multiple of lanes.GROUP.
    """
    size = pieces[0].size
    per_row = lanes.ROW * (8 * payload_dtype(plan).itemsize // plan.bits)
    count = size // lanes.ROW * per_row
    if out is None:
        number = lanes.blocks(count, plan.block_for(count)) if plan.levels == "two-hop" else 0
        out = np.empty(number + size, dtype=payload_dtype(plan))
    segments = np.zeros(1 if count else 0, dtype=SEGMENT)
    segments["elements"], segments["random"], segments["stop"] = count, dither, size
    segments["group"] = first // lanes.GROUP
    return reduce_share(pieces, segments, plan, out, norms)


def dequantize(payload: Payload, norms: Norms, plan: Plan, out: Buffer) -> None:
    """Write the mean over ranks that a reduced payload stands for to `out`.

    The payload is all ranks' reduced shares, one after the other, or the sum of all payloads.
    """
    parcel = _parcel(out.size, plan)
    if parcel is not None:
        whole = payload_size(out.size, plan)
        if plan.levels == "two-hop":
            whole = parcel.reduced_size * plan.world_size
        require("dequantize", "payload", payload.size >= whole, f"{whole} elements", payload.size)
        if plan.levels != "two-hop":
            _check_norms("dequantize", norms, out.size, plan)
        to = Tensors.of(out)
        dequantize_parcel(payload, parcel.results(to), norms, plan, to)
