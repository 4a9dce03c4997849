"""Payloads as a format: what one rank packs another unpacks, and what travels can be added."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from reference import (
    DENSE,
    ROW,
    SQUARE_LEVELS,
    Array,
    buffer,
    decode_exponential,
    float_bits,
    pack_lanes,
    pack_square,
    square_level,
    top_level,
    unpack_exponential,
    unpack_lanes,
)

from mpi_ops import lanes
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host

KEY = dither(0, "w", 0, 0, Stage.QUANTIZE)
standard_bits = st.sampled_from(list(lanes.STANDARD_BITS))
exponential_bits = st.sampled_from(lanes.EXPONENTIAL_BITS)
counts = st.integers(1, 300)
seeds = st.integers(0, 2**32 - 1)


def pack(codes: Array, bits: int, levels: int) -> Array:
    """By the kernel: with norm = levels an integer is its own code, whatever the dither."""
    return host.quantize_standard(
        buffer(codes.astype(np.float32)),
        float_bits(levels),
        block_size=lanes.whole_tensor_block(len(codes)),
        bits=bits,
        levels=levels,
        dither=KEY,
    )


def unpack(words: Array, bits: int, count: int) -> Array:
    """By the kernel: with norm = divisor a lane comes back as it is, up to that norm."""
    norm = 2**15
    out = np.empty(count, dtype=np.float32)
    host.dequantize_standard(
        words,
        float_bits(norm),
        buffer(out),
        block_size=lanes.whole_tensor_block(count),
        bits=bits,
        divisor=norm,
    )
    return out.astype(np.int64)


@given(st.data(), standard_bits, counts)
def test_lanes_round_trip_at_every_width(data: st.DataObject, bits: int, count: int) -> None:
    top = 2 ** (bits - 1) - 1
    codes = data.draw(arrays.arrays(np.int64, count, elements=st.integers(-top, top)))
    words = pack(codes, bits, top)
    np.testing.assert_array_equal(words, pack_lanes(codes, bits))
    np.testing.assert_array_equal(unpack_lanes(words, bits, count), codes)
    np.testing.assert_array_equal(unpack(words, bits, count), codes)


@given(st.data(), standard_bits, counts)
def test_any_words_have_the_lanes_of_balanced_radix(
    data: st.DataObject, bits: int, count: int
) -> None:
    """Words of codes are not all words: the lowest lane may be -2**(bits-1) and borrow."""
    size = lanes.standard_words(count, bits)
    words = data.draw(arrays.arrays(np.int32, size))
    np.testing.assert_array_equal(unpack(words, bits, count), unpack_lanes(words, bits, count))


@given(standard_bits, counts, st.integers(1, 40), seeds)
def test_a_sum_of_payloads_is_the_payload_of_the_sum(
    bits: int, count: int, world_size: int, seed: int
) -> None:
    levels = lanes.levels(bits, world_size)
    if levels == 0:
        world_size, levels = 1, lanes.levels(bits, 1)
    rng = np.random.default_rng(seed)
    codes = rng.integers(-levels, levels + 1, (world_size, count))
    # Some elements at the ends, on all ranks alike.
    codes[:, rng.random(count) < 0.2] = levels * rng.choice([-1, 1])
    words = np.zeros(lanes.standard_words(count, bits), dtype=np.int32)
    for own in codes:
        words += pack(own, bits, levels)
    np.testing.assert_array_equal(words, pack_lanes(codes.sum(axis=0), bits))
    np.testing.assert_array_equal(unpack(words, bits, count), codes.sum(axis=0))


# ------------------------------------------------------------------------------------- dense lanes


def decode_square(words: Array, bits: int, count: int) -> Array:
    """What words of square levels stand for, by the kernels, in units of the first level."""
    units, block = SQUARE_LEVELS[bits] ** 2, lanes.whole_tensor_block(count)
    args = {"block_size": block, "bits": bits, "square": True}
    alone = np.empty(count, dtype=np.float32)
    host.dequantize_standard(words, float_bits(units), buffer(alone), divisor=units, **args)
    levels = SQUARE_LEVELS[bits]
    mean = host.mean_standard([words], float_bits(units), count=count, levels=levels, **args)
    np.testing.assert_allclose(mean, alone, rtol=2.0**-22)
    return np.rint(alone)


def ends_of_digits(bits: int) -> Array:
    """Words of codes beside which another digit begins: random ones, then -s or s to the end."""
    count, top = 32 // bits, SQUARE_LEVELS[bits]
    rng = np.random.default_rng(bits)
    codes = rng.integers(-top, top + 1, (4 * (count + 1), count, ROW))
    for place, own in enumerate(codes):
        own[place // 4 :] = top if place % 2 else -top
    return codes.reshape(-1)


def check_dense(pack: Callable[[Array, int], Array], bits: int) -> None:
    """Assert that the kernels read what `pack` has packed."""
    codes = ends_of_digits(bits)
    expected = square_level(codes, 1)
    np.testing.assert_array_equal(decode_square(pack(codes, bits), bits, len(codes)), expected)


@pytest.mark.parametrize("bits", DENSE)
def test_dense_lanes_round_trip(bits: int) -> None:
    check_dense(pack_square, bits)
    codes, top = ends_of_digits(bits), SQUARE_LEVELS[bits]
    for count in (len(codes), len(codes) - 3 * ROW - 1):  # and a last word of fewer lanes
        words = host.quantize_standard(
            buffer(square_level(codes[:count], 1).astype(np.float32)),
            float_bits(top**2),
            block_size=lanes.whole_tensor_block(count),
            bits=bits,
            levels=top,
            dither=KEY,
            square=True,
        )
        np.testing.assert_array_equal(words, pack_square(codes[:count], bits))


def in_radix(radix: Callable[[int], int], backwards: bool = False) -> Callable[[Array, int], Array]:
    """Packing with another radix than that of dense lanes, or the other way round."""

    def pack(codes: Array, bits: int) -> Array:
        rows = codes.reshape(-1, 32 // bits, ROW)
        words = np.zeros((len(rows), ROW), dtype=np.int64)
        for lane in range(32 // bits)[:: -1 if backwards else 1]:
            words = words * radix(bits) + rows[:, lane]
        return words.reshape(-1).astype(np.int32)

    return pack


RIGHT = in_radix(lambda bits: 2 * SQUARE_LEVELS[bits] + 1)
WRONG = {
    "one more": in_radix(lambda bits: 2 * SQUARE_LEVELS[bits] + 2),
    "one less": in_radix(lambda bits: 2 * SQUARE_LEVELS[bits]),
    "a power of two": in_radix(lambda bits: 2**bits),
    "backwards": in_radix(lambda bits: 2 * SQUARE_LEVELS[bits] + 1, backwards=True),
}


@pytest.mark.parametrize("bits", DENSE)
@pytest.mark.parametrize("wrong", WRONG)
def test_another_radix_is_found_out(wrong: str, bits: int) -> None:
    check_dense(RIGHT, bits)
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        check_dense(WRONG[wrong], bits)


@given(st.data(), st.sampled_from(DENSE), counts)
def test_any_words_have_codes_of_dense_lanes(data: st.DataObject, bits: int, count: int) -> None:
    """Of -s to s, so that no sum of words that no rank has made overflows."""
    words = data.draw(arrays.arrays(np.int32, lanes.standard_words(count, bits)))
    roots = np.sqrt(np.abs(decode_square(words, bits, count)))
    np.testing.assert_array_equal(roots, np.rint(roots))
    assert np.all(roots <= SQUARE_LEVELS[bits])


def test_words_hold_as_many_square_levels_as_fit() -> None:
    for bits, levels in SQUARE_LEVELS.items():
        assert lanes.two_hop_levels(bits) == levels
        assert lanes.dense(bits, square=True) == (bits in DENSE)
        assert not lanes.dense(bits, square=False)
        assert bits == 7 or (2 * levels + 1) ** (32 // bits) <= 2**32 < (2 * levels + 3) ** (
            32 // bits
        )
    assert lanes.two_hop_levels(10) == lanes.levels(10, 1)
    widest = [2, 3, 4, 5, 6, 8, 8, 10, 10, *[16] * 6]
    assert [lanes.widest(bits) for bits in lanes.STANDARD_BITS] == widest


@pytest.mark.parametrize("bits", lanes.STANDARD_BITS)
def test_lanes_beyond_the_tensor_are_zero(bits: int) -> None:
    """They are added with the others, so rubbish in them could carry into an element's lane."""
    for count in (1, 33, 100):
        x = np.full(count, -1.0, dtype=np.float32)
        words = pack(x, bits, 1)
        whole = unpack_lanes(words, bits, len(words) * (32 // bits))
        np.testing.assert_array_equal(whole[:count], -1)
        # The rest of the last row of elements are elements of zero, the other rows are absent.
        np.testing.assert_array_equal(whole[count:], 0)


# -------------------------------------------------------------------------------------- exponential


@given(st.data(), exponential_bits, counts, st.integers(0, 8))
def test_any_bytes_decode_to_finite_numbers(
    data: st.DataObject, bits: int, count: int, headroom: int
) -> None:
    size = lanes.exponential_bytes(count, bits)
    codes = data.draw(arrays.arrays(np.uint8, size))
    out = np.empty(count, dtype=np.float32)
    block = lanes.whole_tensor_block(count)
    args = {"block_size": block, "bits": bits, "headroom": headroom}
    norm = data.draw(st.floats(0, 2.0**119, width=32))
    host.dequantize_exponential(codes, float_bits(norm), buffer(out), **args)
    assert np.all(np.isfinite(out))
    assert np.all(np.abs(out) <= norm * 2**headroom)
    values = decode_exponential(unpack_exponential(codes, bits, count), bits)
    exact = values * norm * 2**headroom
    # A product in float32, whose result may be denormal.
    assert np.all(np.abs(out - exact) <= np.maximum(np.abs(exact) * 2.0**-23, 2.0**-149))


@given(st.data(), exponential_bits, st.integers(0, 300), st.integers(1, 5))
def test_reducing_any_bytes_gives_a_neighbour_of_the_sum(
    data: st.DataObject, bits: int, size: int, number: int
) -> None:
    inputs = [data.draw(arrays.arrays(np.uint8, size)) for _ in range(number)]
    result = host.reduce_exponential(inputs, bits=bits, dither=KEY)
    assert result.shape == (size,)
    padded = -size % ROW
    unpacked = [
        decode_exponential(
            unpack_exponential(np.pad(own, (0, padded)), bits, (size + padded) * 8 // bits), bits
        )
        for own in [*inputs, result]
    ]
    total = np.sum(unpacked[:-1], axis=0).clip(-1, 1)
    got = unpacked[-1]
    smallest = 2.0 ** (1 - top_level(bits))
    # Below a factor of two from the sum, but for what float32 loses of the addition.
    lost = 2.0**-23 * np.sum(np.abs(unpacked[:-1]), axis=0)
    assert np.all(np.abs(got - total) <= np.maximum(np.abs(total) + lost, smallest))
    assert np.all(got * total >= 0)


def test_four_bit_codes_have_the_even_row_in_the_low_nibble() -> None:
    x = np.concatenate([np.full(ROW, 1.0), np.full(ROW, -0.5)]).astype(np.float32)
    codes = host.quantize_exponential(buffer(x), float_bits(1.0), block_size=64, bits=4, dither=KEY)
    np.testing.assert_array_equal(codes, 0xE7)  # 1110: minus, level 6; 0111: plus, level 7


def test_codes_of_eight_bits_are_a_sign_and_an_exponent() -> None:
    level = [1.0, -1.0, 0.5, -0.25, 0.0, -0.0, 2.0**-126, -(2.0**-126)]
    x = np.array(level * 4, dtype=np.float32)
    codes = host.quantize_exponential(buffer(x), float_bits(1.0), block_size=32, bits=8, dither=KEY)
    assert codes[:8].tolist() == [127, 255, 126, 128 + 125, 0, 128, 1, 129]


def test_standard_lanes_are_in_the_order_of_rows() -> None:
    """Row r, column j of the words holds the elements (r * lanes + k) * 32 + j, k = 0 lowest."""
    codes = np.zeros(2 * 4 * ROW, dtype=np.int64)
    codes[[5, ROW + 5, 2 * ROW + 5, 3 * ROW + 5]] = [1, -2, 3, 4]
    codes[4 * ROW + 6] = -5
    words = pack(codes, 8, 127)
    assert words[5] == 1 - 2 * 2**8 + 3 * 2**16 + 4 * 2**24
    assert words[ROW + 6] == -5
    assert np.count_nonzero(words) == 2
