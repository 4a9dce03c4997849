"""The random numbers: the published generator, how elements draw from it, and independence."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import (
    ROW,
    Array,
    allowance,
    buffer,
    dither_mask,
    float_bits,
    pack_lanes,
    philox4x32,
    random_bits,
    unpack_lanes,
)

from mpi_ops.dither import MAXIMUM_RANK, Stage, dither
from mpi_ops.kernels import host

# Random123's kat_vectors, lines "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_published_values(line: str) -> None:
    words = [int(word, 16) for word in line.split()]
    counter, key, result = words[:4], words[4:6], words[6:]
    assert host.philox(counter, key, 10).tolist() == result
    assert list(philox4x32(counter, key, 10)) == result


word32 = st.integers(0, 2**32 - 1)


@given(st.tuples(word32, word32, word32, word32), st.tuples(word32, word32))
def test_seven_and_ten_rounds_of_an_independent_implementation(
    counter: tuple[int, ...], key: tuple[int, ...]
) -> None:
    for rounds in (7, 10):
        assert tuple(host.philox(counter, key, rounds)) == philox4x32(counter, key, rounds)


def test_other_numbers_of_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="philox: rounds must be 7 or 10, got 8"):
        host.philox([0] * 4, [0] * 2, 8)


# -------------------------------------------------------------------------- elements to random bits


def halves_by_hand(count: int, key: Array) -> list[int]:
    """The 16 bits that standard dithering adds to each element, one element at a time."""
    halves = []
    stage = int(key[3])
    if stage >> 4 & 15:  # with strata the ranks of a cohort have the same stream
        stage &= ~0xFF00
    for element in range(count):
        row, column = element // 32, element % 32
        group, h = row // 8, row % 8
        block = philox4x32(
            (group * 32 + column, 0, int(key[2]), stage), (int(key[0]), int(key[1])), 7
        )
        word = block[h // 2] ^ dither_mask(group, key)
        halves.append(word >> 16 if h % 2 else word & 0xFFFF)
    return halves


@pytest.mark.parametrize("strata", [0, 2, 8])
@pytest.mark.parametrize("count", [1, 32, 33, 255, 256, 257, 1000])
@pytest.mark.parametrize("bits", [2, 3, 8, 10, 16])
def test_which_random_bits_an_element_draws(count: int, bits: int, strata: int) -> None:
    key = dither(5, "layer.weight", step=3, rank=2, stage=Stage.QUANTIZE, strata=strata)
    halves = halves_by_hand(count, key)
    assert [bit >> 16 for bit in random_bits(count, key).tolist()] == halves
    # With levels = norm, x is in units of a level. Some elements just reach the next level with
    # their dither, others just do not: each of the 16 bits decides. What they lack is in units of
    # the dither, to which x is rounded.
    levels = 2 ** (bits - 1) - 1
    rng = np.random.default_rng(count)
    level = rng.integers(-min(levels, 31), min(levels, 31), count)
    lack = rng.choice([0, 0.25, 0.75, 1], count)
    reached = lack < 0.5
    x = level + (65536 - np.array(halves) - lack) / 65536
    payload = host.quantize_standard(
        buffer(x.astype(np.float32)),
        float_bits(np.full(-(-count // ROW), levels)),
        block_size=ROW,
        bits=bits,
        levels=levels,
        dither=key,
    )
    np.testing.assert_array_equal(payload, pack_lanes(level + reached, bits))


# ------------------------------------------------------------------------------------- independence


def test_every_part_of_the_key_changes_the_stream() -> None:
    seeds, names, steps, ranks = (
        (0, 1, -1, 2**70),
        ("a", "b", "a.b"),
        (0, 1, 2**32 - 1),
        (0, 1, 255),
    )
    keys = {
        tuple(dither(seed, name, step, rank, stage).tolist())
        for seed, name, step, rank, stage in itertools.product(seeds, names, steps, ranks, Stage)
    }
    assert len(keys) == 4 * 3 * 3 * 3 * 2


def test_dither_is_reproducible_and_its_ranges_hold() -> None:
    key = dither(1, "w", 2, 3, Stage.REDUCE)
    assert key.dtype == np.uint32
    assert key.shape == (4,)
    np.testing.assert_array_equal(key, dither(1, "w", 2, 3, Stage.REDUCE))
    np.testing.assert_array_equal(key, dither(1, "w", 2 + 2**32, 3, Stage.REDUCE))
    last = dither(1, "w", 2, MAXIMUM_RANK, Stage.REDUCE)
    assert last[3] == MAXIMUM_RANK << 8 | Stage.REDUCE
    assert dither(1, "w", 2, 3, Stage.REDUCE, strata=8)[3] == 3 << 8 | 8 << 4 | Stage.REDUCE
    np.testing.assert_array_equal(last[:3], key[:3])


COUNT = 1 << 17


def errors(level_share: float, *key: object) -> Array:
    """Rounding errors of `COUNT` elements at one place between two levels, by the kernel."""
    x = np.full(COUNT, level_share, dtype=np.float32)
    payload = host.quantize_standard(
        buffer(x), float_bits(1.0), block_size=COUNT, bits=2, levels=1, dither=dither(*key)
    )
    return unpack_lanes(payload, 2, COUNT) - level_share


def check_uncorrelated(first: Array, second: Array, share: float) -> None:
    """The mean product of independent errors is zero, with the product of their variances."""
    variance = (share * (1 - share)) ** 2
    assert abs(np.mean(first * second)) <= allowance(variance, 1.0, len(first))


BASE = (0, "w", 0, 0, Stage.QUANTIZE)
OTHERS = [
    (1, "w", 0, 0, Stage.QUANTIZE),
    (0, "v", 0, 0, Stage.QUANTIZE),
    (0, "w", 1, 0, Stage.QUANTIZE),
    (0, "w", 0, 1, Stage.QUANTIZE),
    (0, "w", 0, 0, Stage.REDUCE),
]


@pytest.mark.parametrize("share", [0.5, 0.3, 0.9])
@pytest.mark.parametrize("other", OTHERS, ids=["seed", "name", "step", "rank", "stage"])
def test_errors_of_two_streams_are_uncorrelated(other: tuple[object, ...], share: float) -> None:
    check_uncorrelated(errors(share, *BASE), errors(share, *other), share)


# A lag of 32 elements is the next row (the other half of a word), 64 the next word of a block, 256
# the next group of rows.
@pytest.mark.parametrize("share", [0.5, 0.3, 0.9])
@pytest.mark.parametrize("lag", [1, 2, 31, 32, 33, 64, 128, 224, 256, 512, 8192])
def test_errors_of_neighbours_are_uncorrelated(lag: int, share: float) -> None:
    own = errors(share, *BASE)
    check_uncorrelated(own[:-lag], own[lag:], share)


def test_the_correlation_test_sees_shared_randomness() -> None:
    own = errors(0.3, *BASE)
    with pytest.raises(AssertionError):
        check_uncorrelated(own, own, 0.3)
    half = np.where(np.arange(COUNT) % 20 == 0, own, errors(0.3, *OTHERS[0]))  # 5 % shared
    with pytest.raises(AssertionError):
        check_uncorrelated(own, half, 0.3)


def test_every_random_bit_is_fair() -> None:
    """Of the model, which draws the same bits as the kernels."""
    drawn = random_bits(COUNT, dither(*BASE))[:, None] >> np.arange(32) & 1
    assert np.all(np.abs(drawn.mean(axis=0) - 0.5) <= allowance(0.25, 1.0, COUNT))
