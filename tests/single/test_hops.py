"""Sums over many hops: the operation of MPI stays unbiased along chains and trees.

One addition is judged in test_quantizers.py. Here the hops follow each other, and what could go
wrong is their dependence: rounding decisions that share random numbers bias the sum and inflate its
variance. The checker must reject exactly that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from reference import (
    Array,
    Z,
    decode_exponential,
    encode_exponential,
    neighbours,
    pack_exponential,
    top_level,
    unpack_exponential,
)

from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host

KEY = dither(0, "mpi_ops.exponential_sum", 0, 0, Stage.REDUCE)
# Independent sums per case. The mean of their errors is known to sigma / 256.
SAMPLES = 2**16
# One hop multiplies the second moment of a sum by at most this.
FACTOR = 9 / 8

Add = Callable[[Array, Array, int], Array]  # packed codes of two ranks, and their bits


def operation(first: Array, second: Array, bits: int) -> Array:
    """What MPI does: in place, keyed by the two blocks."""
    target = second.copy()
    addresses = (first.ctypes.data, target.ctypes.data)
    host.add_exponential(*addresses, target.size, bits=bits, dither=KEY)
    return target


def same_random_numbers(first: Array, second: Array, bits: int) -> Array:
    """A key that ignores the blocks: an element has the same random number at every hop."""
    return host.reduce_exponential([first, second], bits=bits, dither=KEY)


@dataclass
class Hops:
    """Adds, and keeps what each hop did."""

    add: Add
    bits: int
    errors: list[Array] = field(default_factory=list)  # of each hop: result minus exact sum
    variances: list[Array] = field(default_factory=list)  # of each hop, given its two inputs
    exact: list[Array] = field(default_factory=list)

    def __call__(self, first: Array, second: Array) -> Array:
        total = self.add(first, second, self.bits)
        y = self.values(first) + self.values(second)
        assert np.all(np.abs(y) <= 1), "the test lets a sum saturate"
        low, high = neighbours(np.abs(y), self.bits)
        self.exact.append(y)
        self.errors.append(self.values(total) - y)
        self.variances.append((np.abs(y) - low) * (high - np.abs(y)))
        return total

    def values(self, packed: Array) -> Array:
        return decode_exponential(unpack_exponential(packed, self.bits, SAMPLES), self.bits)


def chain(inputs: Sequence[Array], add: Hops) -> Array:
    """((a + b) + c) + d, as a ring or a linear algorithm adds."""
    total = inputs[0]
    for own in inputs[1:]:
        total = add(total, own)
    return total


def tree(inputs: Sequence[Array], add: Hops) -> Array:
    """(a + b) + (c + d), as recursive doubling adds."""
    if len(inputs) == 1:
        return inputs[0]
    half = (len(inputs) + 1) // 2
    return add(tree(inputs[:half], add), tree(inputs[half:], add))


TOPOLOGIES = {"chain": chain, "tree": tree}


def rank_codes(ranks: int, bits: int, highest: int, doublings: int, mixed: bool) -> list[Array]:
    """Packed codes of every rank, up to level `highest`, of random sign if `mixed`.

    An element has at most `doublings` + 1 inputs that are not zero: more could saturate in a chain.
    """
    rng = np.random.default_rng([ranks, bits, highest, doublings, mixed])
    x = 2.0 ** (highest - top_level(bits)) * rng.random((ranks, SAMPLES)) ** 2
    low, high = neighbours(x, bits)
    values = np.where(rng.random(x.shape) * (high - low) < x - low, high, low)
    if ranks > doublings + 1:
        values[rng.random(x.shape).argsort(axis=0) > doublings] = 0
    if mixed:
        values *= rng.choice([-1.0, 1.0], x.shape)
    return [pack_exponential(encode_exponential(own, bits), bits) for own in values]


def check(add: Add, topology: str, inputs: list[Array], bits: int) -> None:
    """Assert that the errors of a sum have mean zero and the variances of their hops, added up.

    The variance of a hop is known from its two inputs. Hops that are unbiased whatever came before
    have uncorrelated errors, so the variances add, and an error is within Z standard deviations.
    """
    recorded = Hops(add, bits)
    total = recorded.values(TOPOLOGIES[topology](inputs, recorded))
    exact = np.sum([recorded.values(own) for own in inputs], axis=0)
    error = total - exact
    variance = np.sum(recorded.variances, axis=0)
    for name, direction in (("up", 1.0), ("away from zero", np.sign(exact))):
        off = np.sum(error * direction)
        allowed = Z * np.sqrt(np.sum(variance))
        assert abs(off) <= allowed, f"biased {name} by {off}, allowed {allowed}"
    off = np.sum(error**2 - variance)
    allowed = Z * np.sqrt(np.sum((error**2 - variance) ** 2))
    assert abs(off) <= allowed, f"variance is off by {off}, allowed {allowed}"
    for y, own in zip(recorded.exact, recorded.errors, strict=True):
        growth = (y + own) ** 2 - FACTOR * y**2
        assert np.sum(growth) <= Z * np.sqrt(np.sum(growth**2)), "a hop adds too much variance"


# Bits, highest level of the inputs, and additions that may double them. From the first, a sum of 8
# hops may just reach level 1; the second is where sums are rounded to zero or the smallest level.
# 4-bit codes have room for 5 doublings.
LEVELS = [(8, top_level(8) - 8, 8), (8, 3, 8), (4, top_level(4) - 5, 5)]
LEVEL_NAMES = ["8 bit with headroom", "8 bit at the lowest levels", "4 bit with headroom"]
Case = tuple[int, int, int]
every_level = pytest.mark.parametrize("case", LEVELS, ids=LEVEL_NAMES)
every_sign = pytest.mark.parametrize("mixed", [False, True], ids=["one sign", "both signs"])
every_topology = pytest.mark.parametrize("topology", TOPOLOGIES)
HOPS = range(2, 9)
REJECTED = "biased|variance is off"


@every_level
@every_sign
@every_topology
def test_sums_over_hops_are_unbiased(topology: str, mixed: bool, case: Case) -> None:
    bits, highest, doublings = case
    for hops in HOPS:
        check(operation, topology, rank_codes(hops + 1, bits, highest, doublings, mixed), bits)


@every_level
@every_sign
@every_topology
def test_random_numbers_shared_by_the_hops_fail_the_check(
    topology: str, mixed: bool, case: Case
) -> None:
    bits, highest, doublings = case
    for hops in HOPS:
        inputs = rank_codes(hops + 1, bits, highest, doublings, mixed)
        with pytest.raises(AssertionError, match=REJECTED):
            check(same_random_numbers, topology, inputs, bits)


def rounds_too_far(first: Array, second: Array, bits: int) -> Array:
    """Rounds the rounded sum a second time, to half or twice a level: unbiased, but noisier."""
    total = operation(first, second, bits)
    values = decode_exponential(unpack_exponential(total, bits, SAMPLES), bits)
    up = np.random.default_rng(1).random(SAMPLES) < 1 / 3
    moved = np.where((np.abs(values) == 1) | (values == 0), values, values * np.where(up, 2, 0.5))
    return pack_exponential(encode_exponential(moved, bits), bits)


def test_a_second_rounding_at_every_hop_fails_the_check() -> None:
    inputs = rank_codes(3, 8, 100, 8, mixed=True)
    with pytest.raises(AssertionError, match=REJECTED):
        check(rounds_too_far, "chain", inputs, 8)
