"""What the CUDA kernels must do, for test modules whose fixture `device` says on what they run.

The comparison is with the host kernels, bit for bit. `test_device_emulated.py` runs these tests on
a CPU, `tests/gpu/test_device.py` on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from reference import (
    DTYPES,
    INF_BITS,
    NAN_BITS,
    ROW,
    SQUARE_LEVELS,
    Array,
    buffer,
    float_bits,
)

from mpi_ops import codec, lanes
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host
from mpi_ops.kernels.interface import Buffer, Tensors
from mpi_ops.layout import layout
from mpi_ops.scheme import Scheme
from mpi_ops.stages import Stages

KEY = dither(7, "layer.weight", step=2**31 + 5, rank=3, stage=Stage.QUANTIZE)
# Of a rank whose dither repels those of others, at whatever index of the strata.
REPELLING = dither(7, "layer.weight", 5, 300, Stage.QUANTIZE, strata=8)
SIZES = [0, 1, 31, 32, 33, 255, 256, 257, 1000, 9001]
FLT_MAX = float(np.finfo(np.float32).max)


@pytest.fixture(params=["one turn", "several turns"])
def grid(request: pytest.FixtureRequest, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids as large as the work, and a grid of three warps, smaller than all but tiny work."""
    if request.param == "several turns":
        monkeypatch.setattr(device, "MAXIMUM_GRID", 1)
        monkeypatch.setattr(device, "THREADS", 3 * ROW)


def on_device(device: Any, array: Array) -> tuple[Any, Buffer]:
    """A copy of an array, and its buffer; CuPy has no bfloat16, so the buffer names it."""
    plain = array if array.dtype.kind == "f" else array.view(np.uint16)
    copied = device.cupy.asarray(plain)
    return copied, Buffer(copied.data.ptr, array.dtype.name, array.size, copied, "device")


def block_sizes(count: int) -> list[int]:
    """A row, blocks that do not fill groups of eight rows, the default, one that is one segment."""
    sizes = [32, 96, 256, 2048, 2080, lanes.whole_tensor_block(count), 1 << 40]
    return [size for size in sizes if size <= 96 or size < 4 * count or size == 1 << 40]


def tensor(count: int, dtype: str) -> Array:
    """Values of many magnitudes, zeros of both signs, denormals, Inf, and NaN of every kind."""
    rng = np.random.default_rng(count)
    x = (rng.normal(size=count) * 10.0 ** rng.integers(-3, 4, count)).astype(DTYPES[dtype])
    x[::7], x[3::14] = 0, -0.0
    bits = x.view(f"u{x.itemsize}")
    bits[5::101] = rng.integers(0, 2**10, len(bits[5::101]))
    special = np.array([np.nan, np.inf, -np.inf]).astype(DTYPES[dtype]).view(bits.dtype)
    # Two blocks in three are without them, whatever the size of a block.
    where = np.flatnonzero(rng.random(count) < 0.01)
    where = where[where // 512 % 3 == 1]
    bits[where] = rng.choice(special, len(where))
    odd = where[::3]
    sign = np.uint64(1) << np.uint64(8 * x.itemsize - 1)
    noise = rng.integers(0, 2**7, len(odd), dtype=np.uint64) | sign
    bits[odd] |= noise.astype(bits.dtype)
    return x


NORMS = [1.0, 3.7, 0.0, 1e-45, 1e-38, 1e-30, 1e30, FLT_MAX, 0.1, 2.0**-60, 2.0**100]


def norms_of(count: int, block: int) -> Array:
    """Norms of every range, and between them Inf and several NaN."""
    odd = [INF_BITS, NAN_BITS, INF_BITS + 1, 0x7FFFFFFF]
    every = np.concatenate([float_bits(NORMS), np.array(odd, dtype=np.int32)])
    start = count % len(every)
    return np.resize(np.roll(every, -start), lanes.blocks(count, block))


def random_bytes(size: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def same(got: Any, expected: Array) -> None:
    """Bytes, not numbers: every NaN counts."""
    values = got.get()
    assert values.dtype.itemsize == expected.dtype.itemsize
    np.testing.assert_array_equal(values.view(np.uint8), expected.view(np.uint8))


def shapes(dtype: str) -> Iterator[tuple[int, int, Array]]:
    for count in SIZES:
        x = tensor(count, dtype)
        for block in block_sizes(count):
            yield count, block, x


# ---------------------------------------------------------------------------- the bytes of the host


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("dtype", DTYPES)
def test_absmax(dtype: str, device: Any) -> None:
    for _, block, x in shapes(dtype):
        same(device.absmax(on_device(device, x)[1], block), host.absmax(buffer(x), block))


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("dtype", DTYPES)
def test_l2norm(dtype: str, device: Any) -> None:
    for _, block, x in shapes(dtype):
        got = device.l2norm(on_device(device, x)[1], block).get()
        expected = host.l2norm(buffer(x), block)
        if min(block, lanes.whole_tensor_block(x.size)) <= device.PIECE:
            np.testing.assert_array_equal(got, expected)
        else:  # another order of additions: the last place
            np.testing.assert_array_less(np.abs(got - expected), 2)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_l2norm_adds_in_the_order_of_the_host(dtype: str, device: Any) -> None:
    """Squares that count if they are added to each other first, and vanish beside a one."""
    seen = set()
    for place in range(48):
        x = np.full(64, 2.0**-28).astype(DTYPES[dtype])
        x[place] = 1
        got = device.l2norm(on_device(device, x)[1], 64).get()
        np.testing.assert_array_equal(got, host.l2norm(buffer(x), 64))
        seen.add(int(got[0]))
    assert len(seen) == 2


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", lanes.STANDARD_BITS)
def test_quantize_standard(bits: int, dtype: str, device: Any) -> None:
    asarray = device.cupy.asarray
    top = 2 ** (bits - 1) - 1
    for count, block, x in shapes(dtype):
        norms = norms_of(count, block)
        args = {"block_size": block, "bits": bits, "dither": REPELLING if count % 2 else KEY}
        for square in {False, bits <= lanes.SQUARE_BITS}:
            args["square"] = square
            args["levels"] = 1 if block == 32 else SQUARE_LEVELS[bits] if square else top
            got = device.quantize_standard(on_device(device, x)[1], asarray(norms), **args)
            same(got, host.quantize_standard(buffer(x), norms, **args))


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", lanes.STANDARD_BITS)
def test_dequantize_standard(bits: int, dtype: str, device: Any) -> None:
    asarray = device.cupy.asarray
    for count, block, x in shapes(dtype):
        norms = norms_of(count, block)
        words = random_bytes(4 * lanes.standard_words(count, bits)).view(np.int32)
        args = {"block_size": block, "bits": bits, "divisor": 3 * 2 ** (bits - 1)}
        for square in {False, bits <= lanes.SQUARE_BITS}:
            args["square"] = square
            expected = np.empty_like(x)
            host.dequantize_standard(words, norms, buffer(expected), **args)
            got, out = on_device(device, np.zeros_like(x))
            device.dequantize_standard(asarray(words), asarray(norms), out, **args)
            same(got, expected)


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("headroom", [0, 1, 90, 126])
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_exponential(bits: int, headroom: int, dtype: str, device: Any) -> None:
    asarray = device.cupy.asarray
    args = {"bits": bits, "headroom": headroom}
    for count, block, x in shapes(dtype):
        norms = norms_of(count, block)
        args["block_size"] = block
        got = device.quantize_exponential(
            on_device(device, x)[1], asarray(norms), dither=KEY, **args
        )
        same(got, host.quantize_exponential(buffer(x), norms, dither=KEY, **args))

        codes = random_bytes(lanes.exponential_bytes(count, bits))
        expected = np.empty_like(x)
        host.dequantize_exponential(codes, norms, buffer(expected), **args)
        got, out = on_device(device, np.zeros_like(x))
        device.dequantize_exponential(asarray(codes), asarray(norms), out, **args)
        same(got, expected)


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_reduce_exponential(bits: int, number: int, device: Any) -> None:
    asarray = device.cupy.asarray
    for count in SIZES:  # of bytes, not only whole rows
        inputs = [random_bytes(count, seed) for seed in range(number)]
        copies = [asarray(own) for own in inputs]
        for factor in (1.0, 1 / number):
            args = {"bits": bits, "dither": KEY, "factor": factor}
            same(device.reduce_exponential(copies, **args), host.reduce_exponential(inputs, **args))
        for own, copied in zip(inputs, copies, strict=True):
            same(copied, own)
        # In place.
        device.reduce_exponential(copies, out=copies[-1], **args)
        same(copies[-1], host.reduce_exponential(inputs, **args))


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_add_exponential(bits: int, device: Any) -> None:
    asarray = device.cupy.asarray
    for count in SIZES:
        source, target = random_bytes(count, 1), random_bytes(count, 2)
        source_copy, target_copy = asarray(source), asarray(target)
        args = {"bits": bits, "dither": KEY}
        device.add_exponential(source_copy.data.ptr, target_copy.data.ptr, count, **args)
        host.add_exponential(source.ctypes.data, target.ctypes.data, count, **args)
        same(target_copy, target)
        same(source_copy, source)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_codec_gives_the_same_payloads(
    levels: str, norm: str, world_size: int, device: Any
) -> None:
    for bits, block, dtype in itertools.product((4, 8), (256, None), ("float32", "float16")):
        scheme = Scheme(levels=levels, bits=bits, block_size=block, norm=norm)
        plan = scheme.plan(world_size)
        x = np.random.default_rng(0).normal(size=1000).astype(dtype)
        copied = on_device(device, x)[1]
        norms = codec.norms(buffer(x), plan)
        np.testing.assert_array_equal(codec.norms(copied, plan), norms)
        size = codec.payload_size(x.size, plan)
        pieces = []
        for rank in range(world_size):
            random = dither(0, "w", 0, rank, Stage.QUANTIZE, plan.strata)
            pieces.append(np.full(size + 64, 77, dtype=codec.payload_dtype(plan)))
            codec.quantize(buffer(x), norms, plan, random, out=pieces[-1])
            other = np.full_like(pieces[-1], 78)
            assert codec.quantize(copied, norms, plan, random, out=other) is other
            np.testing.assert_array_equal(other, pieces[-1])
            own = codec.quantize(copied, norms, plan, random)
            np.testing.assert_array_equal(own, pieces[-1][:size])
        if levels == "two-hop":
            shares = np.zeros((world_size, codec.shard_size(x.size, plan) * world_size), np.int32)
            for share, piece in zip(shares, pieces, strict=True):
                share[:size] = piece[:size]
            shares = shares.reshape(world_size, world_size, -1)
            reduced = np.concatenate(
                [
                    codec.reduce(
                        shares[:, rank],
                        plan,
                        dither(0, "w", 0, rank, Stage.REDUCE),
                        norms=codec.norms_of_share(norms, x.size, rank, plan),
                    )
                    for rank in range(world_size)
                ]
            )
        else:
            reduced = codec.reduce(pieces, plan, dither(0, "w", 0, 0, Stage.REDUCE))
        mean = np.empty_like(x)
        codec.dequantize(reduced, norms, plan, buffer(mean))
        got, out = on_device(device, np.zeros_like(x))
        codec.dequantize(reduced, norms, plan, out)
        same(got, mean)


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("bits", lanes.STANDARD_BITS)
def test_mean_standard(bits: int, number: int, device: Any) -> None:
    asarray = device.cupy.asarray
    for count in SIZES:
        words = lanes.standard_words(count, bits)
        payloads = [random_bytes(4 * words, seed).view(np.int32) for seed in range(number)]
        for block in block_sizes(count):
            norms = norms_of(count, block)
            args = {"count": count, "block_size": block, "bits": bits}
            for square in {False, bits <= lanes.SQUARE_BITS}:
                args["square"] = square
                args["levels"] = SQUARE_LEVELS[bits] if square else 2 ** (bits - 1) - 1
                got = device.mean_standard([*map(asarray, payloads)], asarray(norms), **args)
                same(got, host.mean_standard(payloads, norms, **args))


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("name", ["absmax", "l2norm"])
@pytest.mark.parametrize("block", [32, 2048, 1 << 40])
def test_norms_keep_to_bounds(block: int, name: str, device: Any) -> None:
    """Those that are finite."""
    asarray = device.cupy.asarray
    x = np.abs(tensor(9001, "float32"))
    own = getattr(host, name)(buffer(x), block)
    odd = np.array([INF_BITS - 1, INF_BITS, NAN_BITS, 0x7FFFFFFF, 0, 1], dtype=np.int32)
    values = np.concatenate([odd, float_bits([1e-3, 1.0, FLT_MAX])])
    for start in range(len(values)):
        bounds = np.resize(np.roll(values, start), own.size)
        expected = np.where(bounds < INF_BITS, np.minimum(own, bounds), own)
        got = getattr(host, name)(buffer(x), block, bounds=bounds)
        np.testing.assert_array_equal(got, expected)
        there = on_device(device, x)[1]
        got = getattr(device, name)(there, block, bounds=asarray(bounds)).get()
        exact = name == "absmax" or block <= device.PIECE
        assert np.all(np.abs(got - expected) <= (0 if exact else 1))
        finite = bounds < INF_BITS
        assert np.all(got[finite] <= bounds[finite])


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize(
    ("levels", "bits", "block"),
    [
        *(("two-hop", bits, 256) for bits in (2, 3, 4, 5, 6, 8, 10)),
        ("two-hop", 8, 96),
        ("two-hop", 8, None),
        ("exponential", 8, None),
        ("exponential", 4, 256),
    ],
)
def test_shares_of_a_bucket(
    levels: str, bits: int, block: int | None, norm: str, device: Any
) -> None:
    """Shares begin anywhere in a tensor, and hold several, and ends of tensors and of parcels."""
    asarray = device.cupy.asarray
    plan = Scheme(levels=levels, bits=bits, block_size=block, norm=norm).plan(3)
    counts = (1000,) if not plan.mixes_tensors else (1000, 33, 5000, 4096, 7, 2000)
    own = layout(counts, plan, 6000)
    rng = np.random.default_rng(bits)
    inputs = [[rng.normal(size=count).astype(np.float32) for count in counts] for _ in range(3)]
    inputs[1][0][700] = np.inf
    steps = np.arange(len(counts), dtype=np.uint32)
    every = [
        Stages(own, tuple(f"w{place}" for place in range(len(counts))), 5, rank)
        for rank in range(3)
    ]
    tensors = [
        Tensors(np.array([buffer(x).pointer for x in xs], dtype=np.uint64), "float32", xs)
        for xs in inputs
    ]
    measured = np.zeros((3, own.norm_count), dtype=np.int32)
    for stages, x, out in zip(every, tensors, measured, strict=True):
        stages.measure(x, out)
    norms = measured.max(axis=0)
    dtype = codec.payload_dtype(plan)
    for parcel in own.parcels:
        codes = np.stack(
            [
                stages.quantize(parcel, x, steps, norms, np.empty(parcel.size, dtype))
                for stages, x in zip(every, tensors, strict=True)
            ]
        )
        pieces = codes.reshape(3, 3, -1)
        for rank, stages in enumerate(every):
            mine = np.ascontiguousarray(pieces[:, rank]).reshape(-1)
            expected = np.full(parcel.reduced_size, 77, dtype)
            stages.reduce(parcel, mine, steps, norms, expected)
            out = asarray(np.full(parcel.reduced_size, 78, dtype))
            assert stages.reduce(parcel, asarray(mine), steps, asarray(norms), out) is out
            same(out, expected)


@pytest.mark.parametrize("places", list(itertools.product(["host", "device"], repeat=2)))
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_the_operation_adds_wherever_the_codes_lie(
    bits: int, places: tuple[str, str], device: Any
) -> None:
    asarray = device.cupy.asarray
    assert device.prepare_addition()
    source, target = random_bytes(999, 1), random_bytes(999, 2)
    arrays = [
        own.copy() if place == "host" else asarray(own)
        for own, place in zip((source, target), places, strict=True)
    ]
    addresses = [own.ctypes.data if isinstance(own, np.ndarray) else own.data.ptr for own in arrays]
    device.add_anywhere(*addresses, 999, bits=bits, dither=KEY)
    host.add_exponential(source.ctypes.data, target.ctypes.data, 999, bits=bits, dither=KEY)
    results = [own if isinstance(own, np.ndarray) else own.get() for own in arrays]
    np.testing.assert_array_equal(results, [source, target])
