"""Sums of standard codes fit their lanes: for any number of ranks, any input, any order."""

from __future__ import annotations

import numpy as np
import pytest
from reference import ROW, Array, allowance, buffer, float_bits, pack_lanes, unpack_lanes

from mpi_ops import codec, lanes, sizes
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host
from mpi_ops.scheme import Scheme

WORLD_SIZES = range(1, 201)
KEY = dither(0, "w", 0, 0, Stage.QUANTIZE)


def codes_of_all_ranks(signs: Array, bits: int, levels: int) -> Array:
    """Words (rank, word) of elements that are the norm times `signs` (rank, element)."""
    return host.quantize_standard(
        buffer(signs.astype(np.float32).reshape(-1)),
        float_bits(1.0),
        block_size=lanes.whole_tensor_block(signs.size),
        bits=bits,
        levels=levels,
        dither=KEY,
    ).reshape(len(signs), -1)


@pytest.mark.parametrize("bits", lanes.STANDARD_BITS)
def test_sums_of_the_largest_codes_never_overflow(bits: int) -> None:
    count = 32 // bits * ROW  # one row of words
    rng = np.random.default_rng(bits)
    for world_size in WORLD_SIZES:
        levels = lanes.levels(bits, world_size)
        if levels == 0:
            continue
        for signs in (
            np.ones((world_size, count)),
            -np.ones((world_size, count)),
            rng.choice([-1, 1], (world_size, count)),
        ):
            words = codes_of_all_ranks(signs, bits, levels)
            np.testing.assert_array_equal(words[0], pack_lanes(signs[0] * levels, bits))
            # No sum of any subset of the ranks is above that of the positive words alone, or
            # below that of the negative ones; so no partial sum in any order leaves int32.
            wide = words.astype(np.int64)
            assert np.all(np.where(wide > 0, wide, 0).sum(axis=0) < 2**31)
            assert np.all(np.where(wide < 0, wide, 0).sum(axis=0) >= -(2**31))
            order = rng.permutation(world_size)
            total = np.add.reduce(words[order], axis=0, dtype=np.int32)
            assert total[0] == sum(words[:, 0].tolist())  # Python integers do not wrap
            true = (signs * levels).sum(axis=0)
            np.testing.assert_array_equal(unpack_lanes(total, bits, count), true)
            mean = np.empty(count, dtype=np.float32)
            host.dequantize_standard(
                total,
                float_bits(1.0),
                buffer(mean),
                block_size=count,
                bits=bits,
                divisor=levels * world_size,
            )
            # A division and a multiplication of float32, of numbers up to 1.
            assert np.all(np.abs(mean - signs.mean(axis=0)) <= 2.0**-23)


def test_one_level_more_would_overflow() -> None:
    """The rule leaves no room unused, so a test that never overflows is not trivially true."""
    for bits in lanes.STANDARD_BITS:
        top = 2 ** (bits - 1) - 1
        for world_size in range(1, top + 1):
            levels = lanes.levels(bits, world_size)
            assert levels * world_size <= top < (levels + 1) * world_size
            if world_size in (1, 2, 3, top):
                total = world_size * pack_lanes(np.full(ROW, levels + 1), 2 * bits).astype(int)
                assert unpack_lanes(total, bits, ROW)[0] != world_size * (levels + 1)


def test_unrounded_levels_overflow_int8() -> None:
    """127 / n levels, as the authors' code has it: the largest codes are 127 / n rounded up."""
    world_size, samples = 4, 1 << 16
    levels = 127 / world_size  # 31.75: the code of the norm is 32 with probability 3/4
    u = np.random.default_rng(0).random((world_size, samples))
    codes = np.floor(levels + u).astype(np.int8)
    total = np.add.reduce(codes, axis=0, dtype=np.int8)
    wrapped = total < 0  # a sum of positive codes
    chance = 0.75**world_size  # all four round up: 128
    off = abs(wrapped.mean() - chance)
    assert off <= allowance(chance * (1 - chance), 1.0, samples)
    assert wrapped.mean() > 0.3
    floored = np.floor(lanes.levels(8, world_size) + u).astype(np.int8)
    assert np.all(np.add.reduce(floored, axis=0, dtype=np.int8) == 124)


@pytest.mark.parametrize("minimum_levels", [1, 2, 7, 100])
def test_minimum_bits_is_the_smallest_width_that_works(minimum_levels: int) -> None:
    for world_size in range(1, 600):
        bits = lanes.minimum_bits(world_size, minimum_levels)
        assert lanes.levels(bits, world_size) >= minimum_levels
        assert lanes.levels(bits - 1, world_size) < minimum_levels


def test_default_bits() -> None:
    widths = [lanes.default_bits(world_size) for world_size in (1, 18, 19, 73, 74, 4681, 32767)]
    assert widths == [8, 8, 10, 10, 16, 16, 16]
    for world_size in range(1, 4682):  # 32767 // 7
        assert lanes.levels(lanes.default_bits(world_size), world_size) >= 7


def test_sizes_of_payloads() -> None:
    for count in [*range(200), 4095, 4096, 4097]:
        rows = (count + 31) // 32
        assert lanes.rows(count) == rows
        for bits in lanes.STANDARD_BITS:
            assert lanes.standard_words(count, bits) == len(pack_lanes(np.zeros(count), bits))
        assert lanes.exponential_bytes(count, 8) == rows * 32
        assert lanes.exponential_bytes(count, 4) == (rows + 1) // 2 * 32
        for world_size in (1, 2, 3, 7):
            for config in (Scheme(), Scheme(levels="exponential", bits=4)):
                plan = config.plan(world_size)
                shard = codec.shard_size(count, plan)
                needed = codec.payload_size(count, plan)
                unit = codec.payload_size(sizes.share_unit(plan), plan)
                assert shard % unit == unit % 32 == 0
                assert needed <= shard * world_size < needed + unit * world_size
        block = lanes.whole_tensor_block(count)
        assert block >= max(count, 1)
        assert block % 32 == 0
        assert lanes.blocks(count, block) == (1 if count else 0)
