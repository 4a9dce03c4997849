"""What the CUDA kernels must do with tables of segments; see `device_cases`.

A table gives the bytes of the host, and those of one launch for each of its segments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from device_cases import NORMS, REPELLING, on_device, random_bytes, same, tensor
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

from mpi_ops import lanes
from mpi_ops.dither import NEAREST
from mpi_ops.kernels import host
from mpi_ops.kernels.interface import ITEM_BYTES, SEGMENT

# Ends anywhere; empty ones first, last and beside each other; more than one vote of a warp finds.
SIZES = [0, 1, 31, 0, 0, 32, 33, 255, 256, 257, 1000, 5, 4099, 7, 300, 2048, *range(40, 75), 0]
ABSENT = [5, 9, 20]  # places of tensors that a rank has not
BLOCKS = [0, 32, 96, 256, 4096]  # 0: a block of each segment


def block_of(count: int, block: int) -> int:
    return block or lanes.whole_tensor_block(count)


def table(
    dtype: str, block: int, codes: Callable[[int], int], sizes: list[int] = SIZES
) -> tuple[Array, Array]:
    """Segments whose tensors lie one after the other, and the memory in which they do.

    An element that a kernel takes from the next tensor is seldom a zero, and nothing is aligned to
    more than an element. `codes` says how much the codes of a tensor take; there is room behind
    some, which becomes zeros or is left alone. `x` counts bytes from where the memory begins.
    """
    random = np.random.default_rng(len(dtype) + block)
    flat = np.concatenate([tensor(count, dtype) for count in (1, *sizes, max(BLOCKS))])
    own = np.zeros(len(sizes), dtype=SEGMENT)
    own["elements"] = sizes
    own["x"] = ITEM_BYTES[dtype] * (1 + np.cumsum(sizes) - sizes)
    own["x"][ABSENT] = 0
    norms = payload = 0
    for place, count in enumerate(sizes):
        own["norms"][place], own["payload"][place] = norms, payload
        norms += lanes.blocks(count, block_of(count, block)) + place % 2
        payload += codes(count) + ROW * (place % 4)
        own["stop"][place] = payload if place % 3 else 0
    own["random"] = random.integers(0, 2**32, own["random"].shape)  # steps that wrap around, too
    own["random"][::2, 3] = REPELLING[3]
    own["random"][1::4, 3] |= NEAREST << 4
    own["group"][::5] = (1 << 40) + np.arange(len(own))[::5]
    return own, flat


def placed(segments: Array, pointer: int) -> Array:
    """The same in memory that begins there."""
    own = segments.copy()
    own["x"][own["x"] != 0] += np.uint64(pointer)
    return own


def launches(segments: Array) -> Iterator[list[Array]]:
    """All segments in one, and each in one of its own."""
    yield [segments]
    yield [segments[place : place + 1] for place in range(len(segments))]


def norms_for(segments: Array) -> Array:
    """Norms of every range, Inf and NaN among them, and different ones of tensors side by side."""
    every = np.concatenate([float_bits(NORMS), np.array([INF_BITS, NAN_BITS], dtype=np.int32)])
    last = segments["norms"][-1] + lanes.rows(segments["elements"].max())
    return np.resize(every, int(last))


def check_quantized(dtype: str, segments: Array, flat: Array, out: Array, device: Any) -> Any:
    """A function that compares what `quantize_table` makes of `out` with given settings."""
    norms, memory = norms_for(segments), on_device(device, flat)[1]

    def check(**settings: Any) -> None:
        expected = out.copy()
        own = placed(segments, buffer(flat).pointer)
        host.KERNELS.quantize_table(dtype, own, norms, expected, **settings)
        for parts in launches(placed(segments, memory.pointer)):
            got, by = device.cupy.asarray(out), device.cupy.asarray(norms)
            for part in parts:
                device.KERNELS.quantize_table(dtype, part, by, got, **settings)
            same(got, expected)

    return check


def check_dequantized(dtype: str, segments: Array, flat: Array, codes: Array, device: Any) -> Any:
    """The same of `dequantize_table`."""
    norms, asarray = norms_for(segments), device.cupy.asarray

    def check(**settings: Any) -> None:
        expected = flat.copy()
        own = placed(segments, buffer(expected).pointer)
        host.KERNELS.dequantize_table(dtype, own, norms, codes, **settings)
        for parts in launches(segments):
            got, memory = on_device(device, flat)
            for part in parts:
                there = placed(part, memory.pointer)
                device.KERNELS.dequantize_table(
                    dtype, there, asarray(norms), asarray(codes), **settings
                )
            same(got, expected)

    return check


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["absmax", "l2norm"])
def test_norms_of_a_table(norm: str, dtype: str, device: Any) -> None:
    for block in BLOCKS:
        segments, flat = table(dtype, block, lambda count: 0)
        memory, size = on_device(device, flat)[1], int(segments["norms"][-1]) + 9
        own = placed(segments, buffer(flat).pointer)
        expected = np.full(size, 77, np.int32)
        host.KERNELS.measure_table(norm, dtype, own, block, expected)
        there = placed(segments, memory.pointer)
        for part in launches(there):
            got = np.full(size, 77, np.int32)
            for each in part:
                out = device.cupy.asarray(np.full(size, 77, np.int32))
                device.KERNELS.measure_table(norm, dtype, each, block, out)
                for segment in each:
                    count = int(segment["elements"])
                    own = slice(
                        segment["norms"],
                        segment["norms"] + lanes.blocks(count, block_of(count, block)),
                    )
                    got[own] = out.get()[own]
            exact = norm == "absmax" or 0 < block <= device.PIECE
            assert np.all(np.abs(got - expected) <= (0 if exact else 1))


@pytest.mark.parametrize("norm", ["absmax", "l2norm"])
def test_nothing_between_norms_is_written_where_blocks_are_small(norm: str, device: Any) -> None:
    segments, flat = table("float32", 256, lambda count: 0)
    expected = np.full(int(segments["norms"][-1]) + 9, 77, np.int32)
    own = placed(segments, buffer(flat).pointer)
    host.KERNELS.measure_table(norm, "float32", own, 256, expected)
    got = device.cupy.asarray(np.full_like(expected, 77))
    memory = on_device(device, flat)[1]
    own = placed(segments, memory.pointer)
    device.KERNELS.measure_table(norm, "float32", own, 256, got)
    same(got, expected)


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", lanes.STANDARD_BITS)
def test_standard_codes_of_a_table(bits: int, dtype: str, device: Any) -> None:
    block = BLOCKS[bits % len(BLOCKS)]
    segments, flat = table(dtype, block, lambda count: lanes.standard_words(count, bits))
    size = int(segments["payload"][-1]) + 4 * ROW
    codes = random_bytes(4 * size).view(np.int32)
    quantize = check_quantized(dtype, segments, flat, codes, device)
    dequantize = check_dequantized(dtype, segments, flat, codes, device)
    for square in {False, bits <= lanes.SQUARE_BITS}:
        shared = {"block_size": block, "bits": bits, "square": square}
        quantize(levels=SQUARE_LEVELS[bits] if square else 2 ** (bits - 1) - 1, **shared)
        dequantize(divisor=3 * 2 ** (bits - 1), **shared)


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_exponential_codes_of_a_table(bits: int, block: int, dtype: str, device: Any) -> None:
    segments, flat = table(dtype, block, lambda count: lanes.exponential_bytes(count, bits))
    codes = random_bytes(int(segments["payload"][-1]) + 4 * ROW)
    shared = {"block_size": block, "bits": bits, "square": False}
    check_quantized(dtype, segments, flat, codes, device)(levels=0, **shared)
    check_dequantized(dtype, segments, flat, codes, device)(divisor=0, **shared)


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_reduced_codes_of_a_table(bits: int, number: int, device: Any) -> None:
    asarray = device.cupy.asarray
    segments, _ = table("float32", 0, lambda count: lanes.exponential_bytes(count, bits))
    size = int(segments["payload"][-1]) + ROW
    inputs = [random_bytes(size, seed) for seed in range(number)]
    settings = {"bits": bits, "factor": 1 / number}
    expected = np.full(size, 77, np.uint8)
    host.KERNELS.reduce_table(inputs, segments, out=expected, **settings)
    for parts in launches(segments):
        out = asarray(np.full(size, 77, np.uint8))
        for part in parts:
            device.KERNELS.reduce_table([*map(asarray, inputs)], part, out=out, **settings)
        same(out, expected)


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_table_is_packed_as_floats_and_unpacked(dtype: str, device: Any) -> None:
    asarray = device.cupy.asarray
    segments, flat = table(dtype, 0, lambda count: count)
    size = int(segments["payload"][-1]) + 4 * ROW
    packed = np.full(size, 77, np.float32)
    own = placed(segments, buffer(flat).pointer)
    host.KERNELS.pack_table(dtype, own, 0.25, packed)
    memory = on_device(device, flat)[1]
    for parts in launches(placed(segments, memory.pointer)):
        got = asarray(np.full(size, 77, np.float32))
        for part in parts:
            device.KERNELS.pack_table(dtype, part, 0.25, got)
        np.testing.assert_array_equal(got.get(), packed)  # a GPU has other NaNs
    expected = flat.copy()
    own = placed(segments, buffer(expected).pointer)
    host.KERNELS.unpack_table(dtype, own, np.abs(packed))
    for parts in launches(segments):
        there, memory = on_device(device, flat)
        for part in parts:
            place = placed(part, memory.pointer)
            device.KERNELS.unpack_table(dtype, place, asarray(np.abs(packed)))
        same(there, expected)


@pytest.mark.usefixtures("grid")
@pytest.mark.parametrize("count", [0, 1, 33, 2047, 2049, 70001])
@pytest.mark.parametrize("number", [1, 2, 8])
def test_rows_of_floats_are_added_in_their_order(number: int, count: int, device: Any) -> None:
    random = np.random.default_rng(count)
    rows = [random.standard_normal(count, np.float32) * 10.0**place for place in range(number)]
    rows = [row.astype(np.float32) for row in rows]
    expected = rows[0].copy()
    for row in rows[1:]:
        expected += row
    own = [row.copy() for row in rows]
    host.KERNELS.add(own, own[-1])  # in place of one of them
    np.testing.assert_array_equal(own[-1], expected)
    out = device.cupy.asarray(np.full(count, 77, np.float32))
    device.KERNELS.add([*map(device.cupy.asarray, rows)], out)
    same(out, expected)


@pytest.mark.usefixtures("grid")
def test_a_table_of_more_segments_than_a_warp_finds_in_two_votes(device: Any) -> None:
    sizes = [place % 3 for place in range(1100)]
    segments, flat = table("float32", 32, lambda count: ROW, sizes)
    codes = random_bytes(4 * (int(segments["payload"][-1]) + 4 * ROW)).view(np.int32)
    norms, memory = norms_for(segments), on_device(device, flat)[1]
    settings = {"block_size": 32, "bits": 8, "levels": 127, "square": False}
    expected, got = codes.copy(), device.cupy.asarray(codes)
    own = placed(segments, buffer(flat).pointer)
    host.KERNELS.quantize_table("float32", own, norms, expected, **settings)
    own = placed(segments, memory.pointer)
    device.KERNELS.quantize_table("float32", own, device.cupy.asarray(norms), got, **settings)
    same(got, expected)


def test_a_table_without_elements(device: Any) -> None:
    """And one of no segments."""
    for segments in (np.zeros(0, dtype=SEGMENT), np.zeros(3, dtype=SEGMENT)):
        out = device.cupy.asarray(np.full(8, 77, np.int32))
        settings = {"block_size": 256, "bits": 8, "square": False}
        for norm in ("absmax", "l2norm"):
            device.KERNELS.measure_table(norm, "float32", segments, 256, out)
        device.KERNELS.quantize_table("float32", segments, out, out, levels=127, **settings)
        device.KERNELS.dequantize_table("float32", segments, out, out, divisor=1, **settings)
        device.KERNELS.pack_table("float32", segments, 1.0, out)
        device.KERNELS.unpack_table("float32", segments, out)
        same(out, np.full(8, 77, np.int32))
