"""Lanes, levels, blocks and headroom: the sizes that every quantizer and every transport share.

A *code* is the integer that stands for one element. Standard codes are summed inside *lanes* of
`bits` bits, several to an int32 word (balanced radix: word = sum of lane_k * 2**(bits*k), lanes
signed). Two-hop codes of 3, 5 and 6 bits have *dense* lanes, of the largest radix that fits a word.
A *block* is the run of elements that share one norm. Elements are handled in rows of
`ROW`, the width of a GPU warp; payloads are padded to whole rows.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Count = TypeVar("Count", int, NDArray[np.int64])  # of elements, of one tensor or of each of several

ROW = 32
# Elements that share a call of the random generator (kGroupRows rows in kernels/elements.h). Where
# a part of a tensor begins with a whole group, it has the numbers that the whole tensor would have.
GROUP = 8 * ROW
WORD_BITS = 32
STANDARD_BITS = range(2, 17)
EXPONENTIAL_BITS = (4, 8)
# Two-hop codes of so many bits or fewer have square levels: the kernel compares 65536 * s**2 as a
# float with 24 bits, and sums of the squares of many ranks have to fit 32 bits.
SQUARE_BITS = 8

# What the default lane width keeps at least: levels s on each side of zero. The squared error of
# the mean is at most n * (norm / (2 s n))**2 per element, so at 7 levels the standard deviation of
# the mean's error is at most norm / (14 * sqrt(n)).
DEFAULT_MINIMUM_LEVELS = 7
# Widths that the default chooses from: they fill an int32 word with 4, 3 and 2 lanes.
DEFAULT_WIDTHS = (8, 10, 16)


def levels(bits: int, world_size: int) -> int:
    """Levels s on each side of zero, such that the sum of all ranks' codes never leaves its lane.

    s = floor((2**(bits-1) - 1) / world_size); every partial sum, in any order, is within
    world_size * s <= 2**(bits-1) - 1. Zero means that `bits` is too small for `world_size`.
    """
    return (2 ** (bits - 1) - 1) // world_size


def two_hop_levels(bits: int) -> int:
    """Levels s on each side of zero of two-hop codes, whose words are not added.

    All that a lane of `bits` bits can hold. Up to SQUARE_BITS all that a word can: the largest s
    with (2s+1)**lanes <= 2**32, which is more than 2**(bits-1) - 1 for 3, 5 and 6 bits (see
    `dense`). 7 bits have lanes of their own width, which `widest` leaves to world sizes that 8 bits
    are too many for.
    """
    count = WORD_BITS // bits
    found = levels(bits, 1)
    if bits <= SQUARE_BITS and bits == widest(bits):
        while (2 * found + 3) ** count <= 2**WORD_BITS:
            found += 1
    return found


def widest(bits: int) -> int:
    """The largest width of which a word has as many lanes as of `bits` bits: 8 for 7, 16 for 11."""
    return WORD_BITS // (WORD_BITS // bits)


def dense(bits: int, square: bool) -> bool:
    """Whether the radix of lanes is 2s+1 in place of a power of two (Dense in elements.h)."""
    return square and two_hop_levels(bits) > levels(bits, 1)


def units(levels: int, square: bool) -> int:
    """The norm as a multiple of what code 1 stands for, of `levels` even or square levels."""
    return levels**2 if square else levels


def minimum_bits(world_size: int, minimum_levels: int = 1) -> int:
    """Smallest lane width that leaves at least `minimum_levels` levels (may exceed 16)."""
    return (minimum_levels * world_size).bit_length() + 1


def default_bits(world_size: int) -> int:
    """Lane width of the default configuration: 8 bits up to 18 ranks, 10 up to 73, 16 beyond."""
    for bits in DEFAULT_WIDTHS:
        if levels(bits, world_size) >= DEFAULT_MINIMUM_LEVELS:
            return bits
    return DEFAULT_WIDTHS[-1]


def rows(count: Count) -> Count:
    """Rows of `ROW` elements that hold `count` elements."""
    return -(-count // ROW)


def blocks(count: int, block_size: int) -> int:
    """Norms of a tensor of `count` elements; an empty tensor has none."""
    return -(-count // block_size)


def whole_tensor_block(count: int) -> int:
    """Block size that makes one block of all `count` elements."""
    return max(rows(count), 1) * ROW


def standard_words(count: Count, bits: int) -> Count:
    """int32 words that carry `count` standard codes of `bits` bits."""
    return -(-rows(count) // (WORD_BITS // bits)) * ROW


def exponential_bytes(count: Count, bits: int) -> Count:
    """Bytes that carry `count` exponential codes of `bits` bits."""
    return -(-rows(count) // (8 // bits)) * ROW
