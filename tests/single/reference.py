"""What the kernels have to compute, written a second time, and the statistics that judge them.

The models are plain NumPy in float64 and share no code with the package. Their words: a *level
unit* is norm / levels; `random` are an element's 32 bits; `y` is an element in units of its norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from mpi_ops.kernels.host import Buffer

Array = NDArray[Any]

ROW = 32
DTYPES = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
INF_BITS = 0x7F800000
NAN_BITS = 0x7FC00000

# --------------------------------------------------------------------------------------- randomness

MASK = 0xFFFFFFFF


def philox4x32(counter: Any, key: Any, rounds: int) -> tuple[Any, Any, Any, Any]:
    """Philox4x32 as published (Salmon et al., SC 2011), on Python integers or uint64 arrays."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        first, second = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (second >> 32) ^ c1 ^ k0, second & MASK
        c2, c3 = (first >> 32) ^ c3 ^ k1, first & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def mix64(value: int) -> int:
    """SplitMix64's finalizer, on a Python integer taken modulo 2**64."""
    value %= 2**64
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
    return value ^ value >> 31


# Irreducible polynomials over GF(2), by degree, as lists of exponents.
POLYNOMIALS = {
    1: (1, 0),
    2: (2, 1, 0),
    3: (3, 1, 0),
    4: (4, 1, 0),
    5: (5, 2, 0),
    6: (6, 1, 0),
    7: (7, 1, 0),
    8: (8, 4, 3, 1, 0),
}


def field_product(a: int, b: int, degree: int) -> int:
    """The product in GF(2**degree): that of the polynomials, then the remainder of the division."""
    product = 0
    for bit in range(degree):
        product ^= (a << bit) * (b >> bit & 1)
    polynomial = sum(1 << exponent for exponent in POLYNOMIALS[degree])
    for bit in range(2 * degree, degree - 1, -1):
        if product >> bit & 1:
            product ^= polynomial << (bit - degree)
    return product


def dither_mask(group: int, dither: Array) -> int:
    """What a rank XORs to both halves of the words of a group, 32 bits; 0 without strata."""
    k0, k1, s0, s1 = (int(word) for word in dither)
    strata, rank = s1 >> 4 & 15, s1 >> 8 & 255
    if strata == 0:
        return 0
    key, stream = k1 << 32 | k0, (s1 - (rank << 8)) << 32 | s0
    shared = mix64((key ^ mix64(stream)) + (group + 1) * 0x9E3779B97F4A7C15)
    factor = 1 + ((shared >> 32) * (2**strata - 1) >> 32)
    own = mix64(shared + (rank + 1) * 0xD1342543DE82EF95) >> 32
    stratum = field_product(factor, rank, strata)
    halves = [stratum << (16 - strata) | own >> shift & 0xFFFF >> strata for shift in (16, 0)]
    return halves[0] << 16 | halves[1]


def random_bits(count: int, dither: Array) -> Array:
    """The 32 random bits of each element, as int64: its own half of a word, then the other half.

    Eight rows of 32 elements form a group. The elements of one column of a group share the block
    with counter group * 32 + column; row h takes half h of its eight. With strata the ranks of a
    cohort draw the same words, and each XORs its masks to them.
    """
    row, column = np.divmod(np.arange(count), ROW)
    group, half = np.divmod(row, 8)
    counter = (group * ROW + column).astype(np.uint64)
    masks = np.array([dither_mask(number, dither) for number in range(-(-count // 256))], np.uint64)
    k0, k1, s0, s1 = (int(word) for word in dither)
    s1 -= (s1 >> 8 & 255) << 8 if s1 >> 4 & 15 else 0
    constant = [np.full(count, word, dtype=np.uint64) for word in (s0, s1)]
    blocks = philox4x32([counter & MASK, counter >> 32, *constant], [k0, k1], 7)
    word = np.stack(blocks)[half // 2, np.arange(count)] ^ masks[group]
    swapped = (word << 16 | word >> 16) & MASK
    return np.where(half % 2, word, swapped).astype(np.int64)


# ----------------------------------------------------------------------------------------- packing


def pack_lanes(codes: Array, bits: int) -> Array:
    """int32 words of codes: row r, column j holds the elements (r * lanes + k) * 32 + j."""
    lanes = 32 // bits
    rows = -(-len(codes) // (ROW * lanes))
    padded = np.zeros((rows, lanes, ROW), dtype=np.int64)
    padded.reshape(-1)[: len(codes)] = codes
    weights = 2 ** (bits * np.arange(lanes, dtype=np.int64))
    words = (padded * weights[None, :, None]).sum(axis=1).reshape(-1)
    assert np.all(words == words.astype(np.int32))
    return words.astype(np.int32)


def unpack_lanes(words: Array, bits: int, count: int) -> Array:
    """The lanes of balanced-radix words: take the remainder nearest to zero, divide, repeat."""
    rest = words.astype(np.int64).reshape(-1, 1, ROW)
    lanes = []
    for _ in range(32 // bits):
        lane = (rest + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
        lanes.append(lane)
        rest = (rest - lane) // 2**bits
    return np.concatenate(lanes, axis=1).reshape(-1)[:count]


# Square levels on each side of zero: as many as fit a word where that is more than fit a lane.
SQUARE_LEVELS = {2: 1, 3: 4, 4: 7, 5: 19, 6: 41, 7: 63, 8: 127}
DENSE = (3, 5, 6)


def pack_square(codes: Array, bits: int) -> Array:
    """int32 words of codes of square levels: dense lanes are digits, the first one the highest."""
    if bits not in DENSE:
        return pack_lanes(codes, bits)
    lanes, radix = 32 // bits, 2 * SQUARE_LEVELS[bits] + 1
    rows = -(-len(codes) // (ROW * lanes))
    padded = np.zeros((rows, lanes, ROW), dtype=np.int64)
    padded.reshape(-1)[: len(codes)] = codes
    words = np.zeros((rows, ROW), dtype=np.int64)
    for lane in range(lanes):
        words = words * radix + padded[:, lane]
    assert np.all(words == words.astype(np.int32))
    return words.reshape(-1).astype(np.int32)


def unpack_square(words: Array, bits: int, count: int) -> Array:
    """The codes of words of ranks: remainders nearest to zero, from the last lane on."""
    if bits not in DENSE:
        return unpack_lanes(words, bits, count)
    top = SQUARE_LEVELS[bits]
    rest = words.astype(np.int64).reshape(-1, 1, ROW)
    lanes = []
    for _ in range(32 // bits):
        lane = (rest + top) % (2 * top + 1) - top
        lanes.insert(0, lane)
        rest = (rest - lane) // (2 * top + 1)
    return np.concatenate(lanes, axis=1).reshape(-1)[:count]


def pack_exponential(codes: Array, bits: int) -> Array:
    """Bytes of codes: with four bits the low nibble is the even row, the high one the odd."""
    if bits == 8:
        rows = -(-len(codes) // ROW)
        return np.pad(codes, (0, rows * ROW - len(codes))).astype(np.uint8)
    rows = -(-len(codes) // (2 * ROW))
    pairs = np.pad(codes, (0, rows * 2 * ROW - len(codes))).reshape(rows, 2, ROW)
    return (pairs[:, 0] + 16 * pairs[:, 1]).reshape(-1).astype(np.uint8)


def unpack_exponential(packed: Array, bits: int, count: int) -> Array:
    """The codes in the bytes of `count` elements, as int64."""
    wide = packed.astype(np.int64)
    if bits == 8:
        return wide[:count]
    pairs = wide.reshape(-1, 1, ROW)
    return np.concatenate([pairs % 16, pairs // 16], axis=1).reshape(-1)[:count]


# ------------------------------------------------------------------------------------------- codes


def standard_codes(x: Array, norm: Array | float, levels: int, random: Array) -> Array:
    """floor(levels * x / norm + u), u the middle of one of 65536 equal parts of [0, 1)."""
    u = (random // 65536 + 0.5) / 65536
    return np.floor(levels * (x.astype(np.float64) / norm) + u).astype(np.int64)


def square_level(code: Array, levels: int) -> Array:
    """What a code of square levels stands for, in norms."""
    return np.sign(code) * (np.abs(code) / levels) ** 2


def square_places(y: Array, levels: int) -> Array:
    """Where y lies among square levels: the number of the level below, and the share of the way up.

    Found by looking through all of them.
    """
    numbers = np.arange(-levels, levels + 1)
    values = square_level(numbers, levels)
    below = np.clip(np.searchsorted(values, y, side="right") - 1, 0, 2 * levels - 1)
    share = (y - values[below]) / (values[below + 1] - values[below])
    return numbers[below] + np.clip(share, 0.0, 1.0)


def square_codes(x: Array, norm: Array | float, levels: int, random: Array) -> Array:
    """Codes of square levels, by the random numbers of `standard_codes`."""
    u = (random // 65536 + 0.5) / 65536
    return np.floor(square_places(x.astype(np.float64) / norm, levels) + u).astype(np.int64)


def top_level(bits: int) -> int:
    """Number of the level 1; the smallest level above zero has number 1."""
    return 2 ** (bits - 1) - 1


def neighbours(y: Array, bits: int) -> tuple[Array, Array]:
    """The exponential levels around 0 <= y <= 1; equal where y is a level."""
    smallest = 2.0 ** (1 - top_level(bits))
    _, exponent = np.frexp(np.maximum(y, smallest))
    low = np.where(y < smallest, 0.0, np.ldexp(1.0, exponent - 1))
    high = np.where(y < smallest, smallest, 2 * low)
    high = np.where(y == low, low, high)
    return low, high


def exponential_levels(y: Array, bits: int, random: Array) -> Array:
    """Signed values of the levels to which y, clipped to [-1, 1], is rounded with 23 bits."""
    magnitude = np.minimum(np.abs(y), 1.0)
    low, high = neighbours(magnitude, bits)
    share = (magnitude - low) / np.where(high > low, high - low, 1.0)
    up = share + (random // 512) / 2**23 >= 1
    return np.copysign(np.where(up, high, low), y)


def encode_exponential(values: Array, bits: int) -> Array:
    """Codes of signed values that are levels."""
    _, exponent = np.frexp(np.abs(values))
    number = np.where(values == 0, 0, exponent - 1 + top_level(bits))
    return number + (top_level(bits) + 1) * np.signbit(values)


def decode_exponential(codes: Array, bits: int) -> Array:
    """Signed values of codes."""
    sign, number = np.divmod(codes.astype(np.int64), top_level(bits) + 1)
    magnitude = np.where(number == 0, 0.0, np.ldexp(1.0, number - top_level(bits)))
    return np.where(sign == 1, -magnitude, magnitude)


# -------------------------------------------------------------------------------------- statistics

# A sound quantizer fails one comparison with probability at most 2 exp(-Z**2 / 2) = 3e-8.
Z = 6.0


@dataclass(frozen=True)
class Law:
    """Mean, variance, fourth cumulant and width of the range of random numbers.

    Cumulants of independent numbers add, and so do the widths.
    """

    mean: Any
    variance: Any
    fourth: Any
    width: Any

    def __add__(self, other: Law) -> Law:
        return Law(
            self.mean + other.mean,
            self.variance + other.variance,
            self.fourth + other.fourth,
            self.width + other.width,
        )

    def __mul__(self, factor: float) -> Law:
        return Law(
            self.mean * factor,
            self.variance * factor**2,
            self.fourth * factor**4,
            self.width * abs(factor),
        )

    @property
    def variance_of_square(self) -> Any:
        """Variance of (number - mean)**2: fourth + 2 * variance**2."""
        return np.maximum(self.fourth + 2 * self.variance**2, 0.0)


def two_point(x: Array, low: Array, high: Array) -> Law:
    """Unbiased rounding of x to low or high, which takes high with probability share."""
    width = high - low
    share = (x - low) / np.where(width > 0, width, 1.0)
    p = share * (1 - share)
    return Law(x, p * width**2, p * (1 - 6 * p) * width**4, width)


def standard_law(y: Array, levels: int) -> Law:
    """Rounding of y to multiples of 1 / levels: the variance is f (1 - f) / levels**2."""
    low = np.floor(y * levels) / levels
    return two_point(y, low, low + 1 / levels)


def square_law(y: Array, levels: int) -> Law:
    """Rounding of y to square levels: the variance is (high - y) (y - low)."""
    low = np.floor(square_places(y, levels))
    return two_point(y, square_level(low, levels), square_level(low + 1, levels))


def exponential_law(y: Array, bits: int) -> Law:
    """Rounding of y to exponential levels: the variance is (high - |y|) (|y| - low)."""
    magnitude = np.minimum(np.abs(y), 1.0)
    law = two_point(magnitude, *neighbours(magnitude, bits))
    return Law(np.copysign(law.mean, y), law.variance, law.fourth, law.width)


def allowance(variance: Array, width: Array, samples: int) -> Array:
    """How far the mean of independent samples may be from its expectation.

    Z sigma / sqrt(N), and the second term of Bernstein's inequality, which makes it hold for rare
    events too, where the mean is not yet normal.
    """
    return Z * np.sqrt(variance / samples) + Z**2 * width / (3 * samples)


def check_law(samples: Array, law: Law, tolerance: Array | float) -> None:
    """Assert that the columns of `samples` (sample, value) have the mean and variance of `law`.

    `tolerance` bounds what the arithmetic, without any randomness, may add to a sample.
    """
    number = len(samples)
    error = samples - law.mean
    slack = np.broadcast_to(tolerance, error.shape).max(axis=0)
    width = law.width.max(axis=0)
    off = np.abs(error.mean(axis=0))
    allowed = allowance(law.variance.mean(axis=0), width, number) + slack
    assert np.all(off <= allowed), f"biased: mean is off by {off}, allowed {allowed}"
    off = np.abs((error**2 - law.variance).mean(axis=0))
    allowed = allowance(law.variance_of_square.mean(axis=0), width**2, number)
    allowed += 2 * slack * width + slack**2
    assert np.all(off <= allowed), f"variance is off by {off}, allowed {allowed}"


# ------------------------------------------------------------------------------------------ memory


def float_bits(norms: Any) -> NDArray[np.int32]:
    """Bit patterns of float32 numbers, as norms travel."""
    return np.atleast_1d(np.asarray(norms, dtype=np.float32)).view(np.int32)


def buffer(array: Array) -> Buffer:
    """The memory of an array, short."""
    return Buffer.of(array)


def guarded(size: int, dtype: Any) -> tuple[Array, Array, Array]:
    """An array of `size` elements in the middle of known bytes: the array, and those around it."""
    item = np.dtype(dtype).itemsize
    margin = 64 * item
    memory = np.full(2 * margin + size * item, 0xA5, dtype=np.uint8)
    inside = memory[margin : margin + size * item].view(dtype)
    return inside, memory[:margin], memory[margin + size * item :]
