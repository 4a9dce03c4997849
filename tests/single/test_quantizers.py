"""Whether the quantizers are right: their codes bit for bit, their bias and their variance.

Every statistical checker takes the quantizer as an argument. The kernels must pass it, a plain
NumPy model must pass it, and each of a list of faulty variants of that model must fail it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from reference import (
    DTYPES,
    ROW,
    SQUARE_LEVELS,
    Array,
    allowance,
    buffer,
    check_law,
    decode_exponential,
    encode_exponential,
    exponential_law,
    exponential_levels,
    float_bits,
    neighbours,
    pack_exponential,
    pack_lanes,
    pack_square,
    random_bits,
    square_codes,
    square_law,
    square_level,
    square_places,
    standard_codes,
    standard_law,
    top_level,
    unpack_exponential,
    unpack_square,
)

from mpi_ops import lanes
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host

BLOCK = 96
KEY = dither(3, "layer.weight", step=4, rank=5, stage=Stage.QUANTIZE)
# The ranks' numbers are independent, or repel each other.
KEYS = [KEY, dither(3, "layer.weight", 4, 5, Stage.QUANTIZE, strata=3)]
SIZES = [1, 31, 32, 33, 255, 256, 257, 1000, 4095, 4096, 4097]
# What a failed check says.
FAILED = r"biased: mean is off|variance is off"


def spread(norms: Array, count: int) -> Array:
    """The norm of each element, in float64."""
    return np.repeat(norms.astype(np.float64), BLOCK)[:count]


def random_norms(count: int, rng: np.random.Generator) -> Array:
    """A different norm for every block, so that borders of blocks are borders of scales."""
    return (10 ** rng.uniform(-2, 3, lanes.blocks(count, BLOCK))).astype(np.float32)


# ------------------------------------------------------------------------- bit for bit: quantizing


@pytest.mark.parametrize("key", KEYS, ids=["independent", "repelling"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", lanes.STANDARD_BITS)
def test_standard_codes_bit_for_bit(bits: int, dtype: str, key: Array) -> None:
    """Where nothing has to be rounded the codes are exactly floor(levels * x / norm + u)."""
    for levels in {1, 2 ** (bits - 1) - 1}:
        for count in SIZES:
            rng = np.random.default_rng(count)
            norms = 2.0 ** rng.integers(-8, 9, lanes.blocks(count, BLOCK))
            x = rng.integers(-128, 129, count) / 128 * spread(norms, count)
            payload = host.quantize_standard(
                buffer(x.astype(DTYPES[dtype])),
                float_bits(norms),
                block_size=BLOCK,
                bits=bits,
                levels=levels,
                dither=key,
            )
            codes = standard_codes(x, spread(norms, count), levels, random_bits(count, key))
            np.testing.assert_array_equal(payload, pack_lanes(codes, bits))


@pytest.mark.parametrize("bits", [2, 5, 8, 10])
def test_standard_codes_of_any_float(bits: int) -> None:
    """In general the codes differ only where float32 cannot tell the two sides of a step apart."""
    count, levels = 40000, 2 ** (bits - 1) - 1
    rng = np.random.default_rng(bits)
    norms = random_norms(count, rng)
    y = rng.uniform(-1, 1, count)
    x = (y * spread(norms, count)).astype(np.float32)
    payload = host.quantize_standard(
        buffer(x), float_bits(norms), block_size=BLOCK, bits=bits, levels=levels, dither=KEY
    )
    random = random_bits(count, KEY)
    exact = levels * (x / spread(norms, count)) + (random // 65536 + 0.5) / 65536
    # Four roundings of float32, then one to a multiple of 2**-16.
    unsure = levels * 2.0**-22 + 2.0**-17
    certain = np.abs(exact - np.round(exact)) > unsure
    assert np.mean(~certain) <= 2 * unsure + allowance(2 * unsure, 1.0, count)
    got = host_lanes(payload, bits, count)
    expected = standard_codes(x, spread(norms, count), levels, random)
    np.testing.assert_array_equal(got[certain], expected[certain])
    assert np.all(np.abs(got - expected) <= 1)


SQUARE = range(2, lanes.SQUARE_BITS + 1)


@pytest.mark.parametrize("key", KEYS, ids=["independent", "repelling"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bits", SQUARE)
def test_square_codes_bit_for_bit(bits: int, dtype: str, key: Array) -> None:
    """Sixteenths of the way between neighbours, where nothing has to be rounded."""
    levels = SQUARE_LEVELS[bits]
    for count in SIZES:
        rng = np.random.default_rng(count)
        scale = 2.0 ** rng.integers(-8, 9, lanes.blocks(count, BLOCK))  # of one s-th squared
        number, sixteenths = rng.integers(0, levels, count), rng.integers(0, 17, count)
        units = rng.choice([-1, 1], count) * (number**2 + (2 * number + 1) * sixteenths / 16)
        norms = scale * levels**2
        payload = host.quantize_standard(
            buffer((units * spread(scale, count)).astype(DTYPES[dtype])),
            float_bits(norms),
            block_size=BLOCK,
            bits=bits,
            levels=levels,
            dither=key,
            square=True,
        )
        # The sixteenths, and not what division makes of them: that may be a tie.
        place = np.sign(units) * (number + sixteenths / 16)
        codes = np.floor(place + (random_bits(count, key) // 65536 + 0.5) / 65536)
        np.testing.assert_array_equal(payload, pack_square(codes.astype(np.int64), bits))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", SQUARE)
def test_square_codes_of_any_float(bits: int, dtype: str) -> None:
    """They differ only where float32 cannot tell the two sides of a step apart; and decoding."""
    count, levels = 40000, SQUARE_LEVELS[bits]
    rng = np.random.default_rng(bits)
    norms = random_norms(count, rng)
    norm = spread(norms, count)
    x = (rng.uniform(-1, 1, count) ** 3 * norm * 0.99).astype(DTYPES[dtype])
    args = {"block_size": BLOCK, "bits": bits, "square": True}
    payload = host.quantize_standard(
        buffer(x), float_bits(norms), levels=levels, dither=KEY, **args
    )
    random = random_bits(count, KEY)
    y = x.astype(np.float64) / norm
    exact = square_places(y, levels) + (random // 65536 + 0.5) / 65536
    # Five roundings of float32, of which those before the root count k^2/(2k+1) times; 2**-16.
    unsure = levels * 2.0**-21 + 2.0**-17
    certain = np.abs(exact - np.round(exact)) > unsure
    assert np.mean(~certain) <= 2 * unsure + allowance(2 * unsure, 1.0, count)
    got = unpack_square(payload, bits, count)
    expected = square_codes(x, norm, levels, random)
    np.testing.assert_array_equal(got[certain], expected[certain])
    assert np.all(np.abs(got - expected) <= 1)
    assert np.abs(got).max() <= levels
    decoded = np.empty(count, np.float32)
    host.dequantize_standard(payload, float_bits(norms), buffer(decoded), divisor=levels**2, **args)
    np.testing.assert_allclose(decoded, square_level(got, levels) * norm, rtol=2.0**-22)


def host_lanes(payload: Array, bits: int, count: int) -> Array:
    """The lanes of words, by the kernel: with norm = divisor it returns them as they are."""
    top = 2 ** (bits - 1) - 1
    out = np.empty(count, dtype=np.float32)
    block = lanes.whole_tensor_block(count)
    host.dequantize_standard(
        payload, float_bits(top), buffer(out), block_size=block, bits=bits, divisor=top
    )
    return out.astype(np.int64)


def exponential_inputs(count: int, bits: int, rng: np.random.Generator) -> Array:
    """Multiples of 2**-23 of the norm over many magnitudes; with zeros, levels and the norm."""
    y = np.ldexp(rng.integers(-(2**10), 2**10 + 1, count), -10 - rng.integers(0, 13, count))
    y[rng.random(count) < 0.1] = 0.0
    level = rng.random(count) < 0.1
    return np.where(level, np.ldexp(np.sign(y), -rng.integers(0, 7, count)), y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("headroom", [0, 1, 5])
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_exponential_codes_bit_for_bit(bits: int, headroom: int, dtype: str) -> None:
    for count in SIZES:
        rng = np.random.default_rng(count)
        norms = 2.0 ** rng.integers(-3, 1, lanes.blocks(count, BLOCK))
        x = (exponential_inputs(count, bits, rng) * spread(norms, count)).astype(DTYPES[dtype])
        packed = host.quantize_exponential(
            buffer(x),
            float_bits(norms),
            block_size=BLOCK,
            bits=bits,
            dither=KEY,
            headroom=headroom,
        )
        y = x.astype(np.float64) / spread(norms, count) / 2**headroom
        values = exponential_levels(y, bits, random_bits(count, KEY))
        expected = pack_exponential(encode_exponential(values, bits), bits)
        np.testing.assert_array_equal(
            unpack_exponential(packed, bits, count), unpack_exponential(expected, bits, count)
        )


def test_exponential_codes_below_the_smallest_level() -> None:
    """Eight bits, norm 1: denormal floats round between 0 and 2**-126 as exactly as others."""
    count = 4096
    pattern = np.random.default_rng(0).integers(0, 2**24, count, dtype=np.int32)
    x = pattern.view(np.float32)  # half of them denormal, the rest below 2**-125
    packed = host.quantize_exponential(
        buffer(x), float_bits(1.0), block_size=count, bits=8, dither=KEY
    )
    values = exponential_levels(x.astype(np.float64), 8, random_bits(count, KEY))
    np.testing.assert_array_equal(packed, encode_exponential(values, 8))


def just_reached(count: int) -> tuple[Array, Array]:
    """Mantissas 1 <= m < 2 that with their 23 random bits just reach 2, or just do not; which."""
    reached = np.random.default_rng(0).integers(0, 2, count)
    random = random_bits(count, KEY) // 512
    random[random == 0] = 1  # would have to be 2 itself
    return 2 - (random + 1 - reached) / 2**23, reached


@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_every_random_bit_decides(bits: int) -> None:
    """In quantizing, and in reducing 24 codes that are the binary digits of a number."""
    count = 4096
    mantissa, reached = just_reached(count)
    exponent = np.random.default_rng(1).integers(3 - top_level(bits), 0, count)
    x = np.ldexp(mantissa, exponent).astype(np.float32)
    codes = host.quantize_exponential(
        buffer(x), float_bits(1.0), block_size=count, bits=bits, dither=KEY
    )
    expected = exponent + reached + top_level(bits)
    decided = random_bits(count, KEY) >= 512
    got = unpack_exponential(codes, bits, count)
    np.testing.assert_array_equal(got[decided], expected[decided])
    if bits == 8:
        digits = (mantissa * 2**23).astype(np.int64) >> np.arange(24)[:, None] & 1
        inputs = [
            (digit * (126 - 23 + place)).astype(np.uint8) for place, digit in enumerate(digits)
        ]
        result = host.reduce_exponential(inputs, bits=8, dither=KEY)
        np.testing.assert_array_equal(result[decided], 126 + reached[decided])


@pytest.mark.parametrize("number", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_reduced_codes_bit_for_bit(bits: int, number: int) -> None:
    top = top_level(bits)
    for count in SIZES:
        rng = np.random.default_rng(count)
        # Levels within 2**20 of each other are added exactly; level 0 is zero.
        level = rng.integers(max(top - 16, 1), top + 1, (number, count))
        level[rng.random(level.shape) < 0.2] = 0
        codes = level + (top + 1) * rng.integers(0, 2, level.shape)
        packed = [pack_exponential(code, bits) for code in codes]
        random = random_bits(count, KEY)
        for factor in (1.0, 0.25, 1 / number):
            result = host.reduce_exponential(packed, bits=bits, dither=KEY, factor=factor)
            total = decode_exponential(codes, bits).sum(axis=0)
            mean = (total.astype(np.float32) * np.float32(factor)).astype(np.float64)
            values = exponential_levels(mean, bits, random)
            got = decode_exponential(unpack_exponential(result, bits, count), bits)
            np.testing.assert_array_equal(got, values)


# ----------------------------------------------------------------------- bit for bit: dequantizing


@pytest.mark.parametrize("bits", lanes.STANDARD_BITS)
def test_standard_dequantization(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    for divisor in {1, top, 7 * top}:
        count = 4097
        rng = np.random.default_rng(divisor)
        norms = random_norms(count, rng)
        lane = rng.integers(-min(top, divisor), min(top, divisor) + 1, count)
        out = np.empty(count, dtype=np.float32)
        host.dequantize_standard(
            pack_lanes(lane, bits),
            float_bits(norms),
            buffer(out),
            block_size=BLOCK,
            bits=bits,
            divisor=divisor,
        )
        exact = spread(norms, count) * lane / divisor
        # Two roundings of float32, and a division of the norm.
        assert np.all(np.abs(out - exact) <= 2.0**-22 * np.abs(exact))
        assert np.all(np.abs(out) <= spread(norms, count))


@pytest.mark.parametrize("headroom", [0, 1, 20])
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_exponential_dequantization_is_exact(bits: int, headroom: int) -> None:
    count = 4097
    rng = np.random.default_rng(headroom)
    norms = random_norms(count, rng)
    codes = rng.integers(0, 2**bits, count)
    out = np.empty(count, dtype=np.float32)
    host.dequantize_exponential(
        pack_exponential(codes, bits),
        float_bits(norms),
        buffer(out),
        block_size=BLOCK,
        bits=bits,
        headroom=headroom,
    )
    exact = decode_exponential(codes, bits) * 2.0**headroom * spread(norms, count)
    np.testing.assert_array_equal(out, exact.astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_of_every_dtype_are_the_float32_result_rounded(dtype: str) -> None:
    count = 4097
    rng = np.random.default_rng(1)
    norms = random_norms(count, rng)
    words = pack_lanes(rng.integers(-127, 128, count), 8)
    codes = rng.integers(0, 256, -(-count // ROW) * ROW).astype(np.uint8)
    results = {}
    for name in ("float32", dtype):
        standard, exponential = (np.empty(count, dtype=DTYPES[name]) for _ in range(2))
        args = {"block_size": BLOCK, "bits": 8}
        host.dequantize_standard(words, float_bits(norms), buffer(standard), divisor=127, **args)
        host.dequantize_exponential(codes, float_bits(norms), buffer(exponential), **args)
        results[name] = np.concatenate([standard, exponential])
    np.testing.assert_array_equal(results[dtype], results["float32"].astype(DTYPES[dtype]))


# ---------------------------------------------------------------------------------- norms of blocks


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms(dtype: str) -> None:
    for count in [0, *SIZES]:
        x = np.random.default_rng(count).normal(size=count).astype(DTYPES[dtype])
        as_float = x.astype(np.float32).astype(np.float64)
        borders = range(0, count, BLOCK)
        largest = [np.max(np.abs(as_float[begin : begin + BLOCK])) for begin in borders]
        length = [np.sqrt(np.sum(as_float[begin : begin + BLOCK] ** 2)) for begin in borders]
        np.testing.assert_array_equal(host.absmax(buffer(x), BLOCK), float_bits(largest))
        l2 = host.l2norm(buffer(x), BLOCK).view(np.float32)
        # Rounded up to float32, from a sum in double.
        assert np.all(l2 >= np.array(length) * (1 - 2.0**-48))
        assert np.all(l2 <= np.array(length) * (1 + 2.0**-22))
        assert np.all(l2 >= np.array(largest))


# --------------------------------------------------------------------- statistics: standard levels

# Mean over ranks of quantized x (rank, element) with the norms of blocks: (x, norms, bits, levels).
StandardMean = Callable[[Array, Array, int, int], Array]

# Positions in units of a level: zeros, levels, halves, just beside levels, far below the first.
POSITIONS = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 0.25, -0.25, 0.75, -0.75, 1 / 3, -1 / 3]
POSITIONS += [0.99, -0.99, 0.01, -0.01, 1e-3, -1e-3, 1e-41]
# Positions from the outermost level, for the ends of the range.
ENDS = [0.0, -0.4]


def check_standard(mean: StandardMean, bits: int, world_size: int, samples: int) -> None:
    """Assert that `mean` is unbiased with variance sum f (1 - f) (norm / (levels * ranks))**2."""
    levels = lanes.levels(bits, world_size)
    ends = [sign * (levels + end) for end in ENDS for sign in (1, -1)]
    position = np.array(POSITIONS + ends)
    count = samples * len(position)  # an odd number of values: each comes to each lane and column
    rng = np.random.default_rng(bits)
    norms = random_norms(count, rng)
    norm = spread(norms, count)
    # Ranks hold different values at one element.
    place = np.stack([np.tile(np.roll(position, rank), samples) for rank in range(world_size)])
    x = (place / levels * norm).astype(np.float32)
    y = x / norm
    laws = [standard_law(own.reshape(samples, -1), levels) for own in y]
    law = sum(laws[1:], laws[0]) * (1 / world_size)
    got = mean(x, norms, bits, levels) / norm
    # Of a level: fixed point with 16 fractional bits; of the norm: five roundings of float32.
    check_law(got.reshape(samples, -1), law, 2.0**-17 / levels + 5 * 2.0**-24)


def kernel_standard(x: Array, norms: Array, bits: int, levels: int) -> Array:
    world_size, count = x.shape
    total = np.zeros(lanes.standard_words(count, bits), dtype=np.int32)
    for rank in range(world_size):
        total += host.quantize_standard(
            buffer(x[rank]),
            float_bits(norms),
            block_size=BLOCK,
            bits=bits,
            levels=levels,
            dither=dither(0, "w", 0, rank, Stage.QUANTIZE),
        )
    out = np.empty(count, dtype=np.float32)
    host.dequantize_standard(
        total,
        float_bits(norms),
        buffer(out),
        block_size=BLOCK,
        bits=bits,
        divisor=levels * world_size,
    )
    return out.astype(np.float64)


def numpy_standard(rounding: Callable[..., Array], shared: bool = False) -> StandardMean:
    """A model whose codes are rounding(levels * x / norm, u, v) with uniform u and v in [0, 1)."""

    def mean(x: Array, norms: Array, bits: int, levels: int) -> Array:
        norm = spread(norms, x.shape[1])
        rng = np.random.default_rng(11)
        u, v = rng.random((2, 1 if shared else len(x), x.shape[1]))
        return rounding(levels * x / norm, u, v).mean(axis=0) / levels * norm

    return mean


@pytest.mark.parametrize("world_size", [1, 3, 64])
@pytest.mark.parametrize("bits", lanes.STANDARD_BITS)
def test_standard_is_unbiased_with_the_variance_of_theory(bits: int, world_size: int) -> None:
    if bits < lanes.minimum_bits(world_size):
        with pytest.raises(ValueError, match="levels must be between 1 and"):
            kernel_standard(np.ones((1, ROW)), np.ones(1), bits, lanes.levels(bits, world_size))
        return
    check_standard(kernel_standard, bits, world_size, samples=16384 if world_size < 64 else 512)


def test_standard_model_passes_the_same_check() -> None:
    for world_size in (1, 3):
        check_standard(numpy_standard(lambda y, u, v: np.floor(y + u)), 8, world_size, 16384)


STANDARD_MUTANTS = {
    "rounds to nearest": lambda y, u, v: np.rint(y),
    "truncates": lambda y, u, v: np.trunc(y),
    "floor without dither": lambda y, u, v: np.floor(y),
    "truncates after the dither": lambda y, u, v: np.trunc(y + u),
    "rounds after the dither": lambda y, u, v: np.rint(y + u),
    "no dither for negatives": lambda y, u, v: np.where(y < 0, np.rint(y), np.floor(y + u)),
    "half the dither": lambda y, u, v: np.floor(y + u / 2 + 0.25),
    "dither on 3 bits": lambda y, u, v: np.floor(y + np.floor(u * 8) / 8),
    "twice the dither, unbiased": lambda y, u, v: np.floor(y + u + v - 0.5),
    "small values flushed to zero": lambda y, u, v: np.where(np.abs(y) < 0.02, 0, np.floor(y + u)),
    "sign forgotten": lambda y, u, v: np.floor(np.abs(y) + u),
}


@pytest.mark.parametrize("mutant", STANDARD_MUTANTS)
def test_faulty_standard_rounding_fails_the_check(mutant: str) -> None:
    for world_size in (1, 3):
        with pytest.raises(AssertionError, match=FAILED):
            check_standard(numpy_standard(STANDARD_MUTANTS[mutant]), 8, world_size, 16384)


def test_dither_shared_by_the_ranks_fails_the_check() -> None:
    """Each rank alone is right then, and the mean is unbiased, but its variance is not."""
    shared = numpy_standard(lambda y, u, v: np.floor(y + u), shared=True)
    check_standard(shared, 8, 1, 16384)
    with pytest.raises(AssertionError, match="variance is off"):
        check_standard(shared, 8, 3, 16384)


# ----------------------------------------------------------------------- statistics: square levels


def check_square(mean: StandardMean, bits: int, world_size: int, samples: int) -> None:
    """Assert that `mean` is unbiased with variance sum (high - y) (y - low) norm**2 / ranks**2."""
    levels = SQUARE_LEVELS[bits]
    numbers = {0, levels // 2, levels - 1}
    shares = [0.0, 0.5, 1 / 3, 0.99, 0.01, 1e-3]
    places = [k**2 + (2 * k + 1) * share for k in numbers for share in shares]
    units = np.array([sign * place for place in places for sign in (1, -1)] + [levels**2])
    count = samples * len(units)
    norms = random_norms(count, np.random.default_rng(bits))
    norm = spread(norms, count)
    place = np.stack([np.tile(np.roll(units, rank), samples) for rank in range(world_size)])
    x = (place / levels**2 * norm).astype(np.float32)
    y = x / norm
    laws = [square_law(own.reshape(samples, -1), levels) for own in y]
    law = sum(laws[1:], laws[0]) * (1 / world_size)
    got = mean(x, norms, bits, levels) / norm
    # Of the widest level: 16 fractional bits; of the norm: some roundings of float32.
    tolerance = 2.0**-17 * (2 * levels - 1) / levels**2 + 8 * 2.0**-24
    check_law(got.reshape(samples, -1), law, tolerance)


def kernel_square(x: Array, norms: Array, bits: int, levels: int) -> Array:
    args = {"block_size": BLOCK, "bits": bits, "levels": levels, "square": True}
    payloads = [
        host.quantize_standard(
            buffer(own), float_bits(norms), dither=dither(0, "w", 0, rank, Stage.QUANTIZE), **args
        )
        for rank, own in enumerate(x)
    ]
    mean = host.mean_standard(payloads, float_bits(norms), count=x.shape[1], **args)
    return mean.astype(np.float64)


def numpy_square(rounding: Callable[..., Array]) -> StandardMean:
    """A model whose codes are rounding(y, place, levels, u), u uniform in [0, 1)."""

    def mean(x: Array, norms: Array, bits: int, levels: int) -> Array:
        norm = spread(norms, x.shape[1])
        u = np.random.default_rng(12).random(x.shape)
        codes = rounding(x / norm, square_places(x / norm, levels), levels, u)
        return square_level(codes, levels).mean(axis=0) * norm

    return mean


def test_square_levels_are_unbiased_with_the_variance_of_theory() -> None:
    for bits, world_size in itertools.product(SQUARE, (1, 3)):
        check_square(kernel_square, bits, world_size, samples=8192)
    check_square(kernel_square, 4, 64, samples=512)


def test_square_model_passes_the_same_check() -> None:
    check_square(numpy_square(lambda y, place, levels, u: np.floor(place + u)), 4, 3, 8192)


SQUARE_MUTANTS: dict[str, Callable[..., Array]] = {
    # As if the root could be rounded in place of the value: every element comes out too large.
    "rounds the root": lambda y, place, levels, u: np.floor(
        np.copysign(np.sqrt(np.abs(y)) * levels, y) + u
    ),
    "rounds to nearest": lambda y, place, levels, u: np.rint(place),
    "half the dither": lambda y, place, levels, u: np.floor(place + u / 2 + 0.25),
    "half as many levels": lambda y, place, levels, u: 2 * np.floor(place / 2 + u),
}


@pytest.mark.parametrize("mutant", SQUARE_MUTANTS)
def test_faulty_square_levels_fail_the_check(mutant: str) -> None:
    with pytest.raises(AssertionError, match=FAILED):
        check_square(numpy_square(SQUARE_MUTANTS[mutant]), 4, 1, 8192)


# ------------------------------------------------------------------ statistics: exponential levels

# Values of quantized x with the norms of blocks: (x, norms, bits, headroom).
Exponential = Callable[[Array, Array, int, int], Array]


def check_exponential(quantize: Exponential, bits: int, headroom: int, samples: int) -> None:
    """Assert that `quantize` is unbiased with variance (high - y) (y - low) norm**2."""
    smallest = 2.0 ** (1 - top_level(bits)) * 2.0**headroom  # in units of the norm
    positive = [0.0, 1.0, 0.5, 0.7, 4 / 3 / 2, 0.3, 3 / 16, 0.129, 0.01, 1e-5]
    positive += [smallest, smallest * 1.5, smallest * 4 / 3, smallest / 2, smallest / 10]
    position = np.array([sign * value for value in positive for sign in (1, -1)] + [1e-40])
    count = samples * len(position)
    norms = random_norms(count, np.random.default_rng(bits)) + 1  # results are normal numbers
    norm = spread(norms, count)
    x = (np.tile(position, samples) * norm).astype(np.float32)
    y = (x / norm / 2**headroom).reshape(samples, -1)
    got = (quantize(x, norms, bits, headroom) / norm / 2**headroom).reshape(samples, -1)
    # Four roundings of float32; below the smallest level one of a number up to twice as large.
    tolerance = 4 * 2.0**-24 * np.maximum(np.abs(y), smallest / 2**headroom)
    check_law(got, exponential_law(y, bits), tolerance)


def kernel_exponential(x: Array, norms: Array, bits: int, headroom: int) -> Array:
    args = {"block_size": BLOCK, "bits": bits, "headroom": headroom}
    codes = host.quantize_exponential(buffer(x), float_bits(norms), dither=KEY, **args)
    out = np.empty(len(x), dtype=np.float32)
    host.dequantize_exponential(codes, float_bits(norms), buffer(out), **args)
    return out.astype(np.float64)


def numpy_exponential(rounding: Callable[..., Array]) -> Exponential:
    """A model with another rounding."""

    def quantize(x: Array, norms: Array, bits: int, headroom: int) -> Array:
        scale = spread(norms, len(x)) * 2.0**headroom
        return round_values(x / scale, bits, rounding, seed=12) * scale

    return quantize


def round_values(values: Array, bits: int, rounding: Callable[..., Array], seed: int) -> Array:
    """Levels for values: rounding(y, low, high, u, minus) where low <= y <= high."""
    y = np.minimum(np.abs(values), 1.0)
    u = np.random.default_rng(seed).random(len(y))
    return np.copysign(rounding(y, *neighbours(y, bits), u, values < 0), values)


def dithered(y: Array, low: Array, high: Array, u: Array, minus: object = None) -> Array:
    """Unbiased rounding to low or high, for either sign."""
    return np.where(u * (high - low) < y - low, high, low)


def log_share(y: Array, low: Array, high: Array) -> Array:
    """How far y is between its levels on a logarithmic scale."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(low > 0, np.log2(y / low), 0.0)


@pytest.mark.parametrize(("bits", "headroom"), [(8, 0), (8, 3), (8, 90), (4, 0), (4, 3)])
def test_exponential_is_unbiased_with_the_variance_of_theory(bits: int, headroom: int) -> None:
    check_exponential(kernel_exponential, bits, headroom, samples=32768)


@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_exponential_model_passes_the_same_check(bits: int) -> None:
    check_exponential(numpy_exponential(dithered), bits, 0, 32768)


EXPONENTIAL_MUTANTS = {
    "rounds to nearest": lambda y, low, high, u, minus: np.where(y - low < high - y, low, high),
    "truncates": lambda y, low, high, u, minus: low,
    "rounds up": lambda y, low, high, u, minus: high,
    "uniform in the exponent": lambda y, low, high, u, minus: np.where(
        u < log_share(y, low, high), high, low
    ),
    "no dither for negatives": lambda y, low, high, u, minus: np.where(
        minus, np.where(y - low < high - y, low, high), dithered(y, low, high, u)
    ),
    "half the dither": lambda y, low, high, u, minus: dithered(y, low, high, u / 2 + 0.25),
    "dither on 3 bits": lambda y, low, high, u, minus: dithered(y, low, high, np.floor(u * 8) / 8),
    "flushes below the smallest level": lambda y, low, high, u, minus: np.where(
        low == 0, 0, dithered(y, low, high, u)
    ),
    "stops at the smallest level": lambda y, low, high, u, minus: np.where(
        low == 0, high, dithered(y, low, high, u)
    ),
    "skips a level, unbiased": lambda y, low, high, u, minus: np.where(
        high > low, dithered(y, low, 2 * high, u), low
    ),
    "half the result": lambda y, low, high, u, minus: dithered(y, low, high, u) / 2,
}


@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
@pytest.mark.parametrize("mutant", EXPONENTIAL_MUTANTS)
def test_faulty_exponential_rounding_fails_the_check(mutant: str, bits: int) -> None:
    with pytest.raises(AssertionError, match=FAILED):
        check_exponential(numpy_exponential(EXPONENTIAL_MUTANTS[mutant]), bits, 0, 32768)


# ---------------------------------------------------------- statistics: reducing exponential codes

# Codes of factor * sum of the codes of several ranks (rank, element): (codes, bits, factor).
Reduce = Callable[[Array, int, float], Array]


def check_reduce(reduce: Reduce, bits: int, number: int, samples: int, mean: bool = True) -> None:
    """Assert that `reduce` rounds a sum (and a mean) once, without bias, and saturates at 1."""
    top = top_level(bits)
    rng = np.random.default_rng(number)
    level = rng.integers(max(top - 9, 1), top + 1, (number, 61))
    level[rng.random(level.shape) < 0.2] = 0
    codes = level + (top + 1) * rng.integers(0, 2, level.shape)
    codes[:, 0] = top  # the largest sum, positive and negative
    codes[:, 1] = 2 * top + 1
    codes[:, 2] = 1  # the smallest level
    codes[:, 3:5] = 0
    codes[:2, 3] = [top, 2 * top + 1]  # cancel
    codes[0, 4] = 1  # the mean is below the smallest level
    for factor in (1.0, 1 / number) if mean else (1.0,):
        y = decode_exponential(codes, bits).sum(axis=0) * np.float32(factor)
        law = exponential_law(np.tile(y, (samples, 1)), bits)
        got = decode_exponential(reduce(np.tile(codes, samples), bits, factor), bits)
        # A product, and below the smallest level a sum, in float32; sums of these codes are exact.
        tolerance = 2 * 2.0**-24 * np.maximum(np.abs(y), 2.0 ** (1 - top))
        check_law(got.reshape(samples, -1), law, tolerance)


def kernel_reduce(codes: Array, bits: int, factor: float) -> Array:
    packed = [pack_exponential(own, bits) for own in codes]
    result = host.reduce_exponential(packed, bits=bits, dither=KEY, factor=factor)
    return unpack_exponential(result, bits, codes.shape[1])


def kernel_add(codes: Array, bits: int, factor: float = 1.0) -> Array:
    """The operation of MPI: the sum of two, in place."""
    assert factor == 1
    source, target = (pack_exponential(own, bits) for own in codes)
    host.add_exponential(source.ctypes.data, target.ctypes.data, source.size, bits=bits, dither=KEY)
    return unpack_exponential(target, bits, codes.shape[1])


def numpy_reduce(rounding: Callable[..., Array]) -> Reduce:
    """A model that decodes, adds and rounds."""

    def reduce(codes: Array, bits: int, factor: float) -> Array:
        total = decode_exponential(codes, bits).sum(axis=0) * factor
        return encode_exponential(round_values(total, bits, rounding, seed=13), bits)

    return reduce


def chain(codes: Array, bits: int, factor: float) -> Array:
    """Rounds after every addition: unbiased, with more variance than one rounding."""
    values = decode_exponential(codes, bits) * factor
    total = values[0]
    for hop, own in enumerate(values[1:]):
        total = round_values(total + own, bits, dithered, seed=20 + hop)
    return encode_exponential(round_values(total, bits, dithered, seed=40), bits)


def wraps(codes: Array, bits: int, factor: float) -> Array:
    """Goes on counting above level 1, into the sign."""
    total = decode_exponential(codes, bits).sum(axis=0) * factor
    rounded = encode_exponential(round_values(total, bits, dithered, seed=21), bits)
    return np.where(np.abs(total) > 1, (rounded + 1) % 2**bits, rounded)


def adds_magnitudes(codes: Array, bits: int, factor: float) -> Array:
    """Takes every sum for one of equal signs."""
    values = decode_exponential(codes, bits)
    total = np.copysign(np.abs(values).sum(axis=0) * factor, values[0])
    return encode_exponential(round_values(total, bits, dithered, seed=22), bits)


def forgets_the_last(codes: Array, bits: int, factor: float) -> Array:
    """Adds one input too few."""
    return numpy_reduce(dithered)(codes[:-1], bits, factor)


REDUCE_MUTANTS = {
    **{
        name: numpy_reduce(EXPONENTIAL_MUTANTS[name])
        for name in EXPONENTIAL_MUTANTS
        if name != "half the result"  # not a level for the smallest
    },
    "rounds at every hop": chain,
    "wraps": wraps,
    "adds magnitudes": adds_magnitudes,
    "forgets the last": forgets_the_last,
}


@pytest.mark.parametrize("number", [2, 3, 4, 8])
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_reduction_rounds_once_without_bias(bits: int, number: int) -> None:
    check_reduce(kernel_reduce, bits, number, samples=16384)


@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_operation_of_mpi_rounds_without_bias(bits: int) -> None:
    check_reduce(kernel_add, bits, 2, samples=16384, mean=False)


@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_operation_of_mpi_is_a_function_of_its_blocks(bits: int) -> None:
    """The same bytes wherever a pair is added, other randomness for every other pair and seed."""
    count = 4096
    rng = np.random.default_rng(0)
    first, second = rng.integers(1, top_level(bits), (2, count))
    pair = kernel_add(np.stack([first, second]), bits)
    np.testing.assert_array_equal(pair, kernel_add(np.stack([first, second]), bits))
    np.testing.assert_array_equal(pair, kernel_add(np.stack([second, first]), bits))
    # Change one code of each group of 256: its other sums are rounded anew.
    other = first.copy()
    other[::256] = 1 + other[::256] % (top_level(bits) - 1)
    changed = kernel_add(np.stack([other, second]), bits)
    kept = np.arange(count) % 256 != 0
    distance = np.abs(first - second)
    undecided = kept & (distance > 0) & (distance < 3)  # either result has 1/4 or more
    differ = np.mean(changed[undecided] != pair[undecided])
    assert differ > 0.25
    np.testing.assert_array_equal(changed[kept & (distance == 0)], pair[kept & (distance == 0)])


@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_reduction_model_passes_the_same_check(bits: int) -> None:
    check_reduce(numpy_reduce(dithered), bits, 4, samples=16384)


@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
@pytest.mark.parametrize("mutant", REDUCE_MUTANTS)
def test_faulty_reduction_fails_the_check(mutant: str, bits: int) -> None:
    with pytest.raises(AssertionError, match=FAILED):
        check_reduce(REDUCE_MUTANTS[mutant], bits, 4, samples=16384)


def paper_rule(a: int, b: int, bits: int) -> dict[float, float]:
    """Probability of each result of adding two codes, by the paper's cases; saturated at level 1.

    With the level distance d: equal signs go one level up from the larger with probability 2**-d,
    opposite signs one level down with probability 2**-(d - 1), and to zero for d = 0.
    """
    top = top_level(bits)
    (large_sign, large), (small_sign, small) = sorted(
        (divmod(code, top + 1) for code in (a, b)), key=lambda pair: -pair[1]
    )
    sign = -1.0 if large_sign else 1.0

    def value(level: int) -> float:
        return sign * 2.0 ** (min(level, top) - top)

    distance = large - small
    if large == 0:
        return {0.0: 1.0}
    if small == 0:
        return {value(large): 1.0}
    if large_sign == small_sign:
        up = 2.0**-distance if large < top else 1.0
        return {value(large + 1): up, **({value(large): 1 - up} if up < 1 else {})}
    if distance == 0:
        return {0.0: 1.0}
    down = 2.0 ** -(distance - 1)
    return {value(large - 1): down, **({value(large): 1 - down} if down < 1 else {})}


@pytest.mark.parametrize("reduce", [kernel_reduce, kernel_add])
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_two_codes_follow_the_case_rule_of_the_paper(bits: int, reduce: Reduce) -> None:
    top = top_level(bits)
    levels = range(top + 1) if bits == 4 else [0, 1, 2, 3, 9, 60, 64, 70, *range(115, top + 1)]
    codes = [level + sign * (top + 1) for level in levels for sign in (0, 1)]
    pairs = np.array([(a, b) for a in codes for b in codes])
    samples = 2048
    tiled = np.tile(pairs.T, samples)
    result = reduce(tiled, bits, 1.0)
    # Symmetric: an MPI library may combine the two in either order.
    np.testing.assert_array_equal(result, reduce(tiled[::-1], bits, 1.0))
    values = decode_exponential(result, bits).reshape(samples, -1)
    for (a, b), column in zip(pairs.tolist(), values.T, strict=True):
        rule = paper_rule(a, b, bits)
        assert set(column.tolist()) <= set(rule), (a, b)
        for value, probability in rule.items():
            off = abs(np.mean(column == value) - probability)
            assert off <= allowance(probability * (1 - probability), 1.0, samples), (a, b)


@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_sums_saturate_at_level_one(bits: int) -> None:
    top = top_level(bits)
    for number in (2, 3, 7, 64, 200):
        for code in (top, 2 * top + 1):
            codes = np.full((number, 2 * ROW), code)
            assert np.all(kernel_reduce(codes, bits, 1.0) == code)
            assert np.all(kernel_reduce(codes, bits, 1 / number) == code)
        mixed = np.random.default_rng(number).integers(0, 2**bits, (number, 8 * ROW))
        total = decode_exponential(mixed, bits).sum(axis=0)
        result = decode_exponential(kernel_reduce(mixed, bits, 1.0), bits)
        saturated = np.abs(total) >= 1
        np.testing.assert_array_equal(result[saturated], np.sign(total[saturated]))


@pytest.mark.parametrize("number", [1, 2, 3, 8])
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_one_rounding_adds_an_eighth_of_the_square_at_most(bits: int, number: int) -> None:
    """E[error**2] <= y**2 / 8, reached at y = 4/3 of a level: 1.25 and 1/12 of it, for instance."""
    samples, top = 1 << 18, top_level(bits)
    # 1/4 + 1/16 + ... approaches 1/3, and n inputs hold one power of two each.
    level = np.array([top - 2 * k for k in range(min(number, top // 2 + 1))])
    codes = np.zeros((number, samples), dtype=np.int64)
    codes[: len(level)] = level[:, None]
    y = decode_exponential(level, bits).sum() / 2
    error = decode_exponential(kernel_reduce(codes, bits, 0.5), bits) / y - 1
    low, high = neighbours(np.array(y), bits)
    expected = (high / y - 1) * (1 - low / y)
    assert expected <= 1 / 8
    width = (high - low) / y
    assert abs(np.mean(error**2) - expected) <= allowance(width**4 / 4, width**2, samples)
    if number > 2:
        assert np.mean(error**2) > 0.12
