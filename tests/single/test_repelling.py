"""Dithers of ranks that repel each other: uniform for each, never worse than independent ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from reference import (
    Array,
    allowance,
    buffer,
    dither_mask,
    field_product,
    float_bits,
    random_bits,
    unpack_lanes,
)

from gq_horovod.path.config import Config
from gq_horovod.research import theory
from mpi_ops.dither import MAXIMUM_RANK, MAXIMUM_STRATA, Stage, dither, strata_for
from mpi_ops.kernels import host
from mpi_ops.rounding import repelled_factor

COUNT = 1 << 16
GROUP = 256  # elements that share a mask


def key(rank: int, strata: int, step: int = 0) -> Array:
    return dither(1, "w", step, rank, Stage.QUANTIZE, strata)


def rounded_up(share: float | Array, rank: int, strata: int, step: int = 0) -> Array:
    """Which of `COUNT` elements at `share` of the way between two levels the kernel rounds up."""
    x = np.broadcast_to(np.float32(share), COUNT).copy()
    random = key(rank, strata, step)
    payload = host.quantize_standard(
        buffer(x), float_bits(1.0), block_size=COUNT, bits=2, levels=1, dither=random
    )
    return unpack_lanes(payload, 2, COUNT)


# ------------------------------------------------------------------------------------------ strata


def test_as_many_strata_as_ranks() -> None:
    numbers = [1, 2, 3, 4, 5, 8, 9, 64, 65, 255, 256, 257, 100_000, MAXIMUM_RANK]
    assert [strata_for(ranks) for ranks in numbers] == [0, 1, 2, 2, 3, 3, 4, 6, 7, 8, 8, 8, 8, 8]
    for ranks in range(1, 300):
        assert min(ranks, 2**MAXIMUM_STRATA) <= 2 ** strata_for(ranks) < max(2 * ranks, 2)


def test_which_plans_have_them() -> None:
    assert Config().plan(1).strata == 0
    assert Config().plan(3).strata == 2
    assert Config(levels="two-hop").plan(64).strata == 6
    assert Config(levels="exponential").plan(64).strata == 0


@pytest.mark.parametrize("degree", range(1, MAXIMUM_STRATA + 1))
def test_products_in_the_field_are_permutations(degree: int) -> None:
    """So is multiplication by any a but 0, and a * d takes every value but 0 as a does."""
    size = 2**degree
    some = range(1, size) if degree < 7 else (1, 2, 77, size - 1)
    for a in some:
        products = [field_product(a, b, degree) for b in range(size)]
        assert sorted(products) == list(range(size))
        assert [field_product(b, a, degree) for b in range(size)] == products


@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 64, 256])
def test_ranks_stand_in_different_strata_at_every_element(ranks: int) -> None:
    strata = strata_for(ranks)
    bits = np.stack([random_bits(COUNT // 16, key(rank, strata)) for rank in range(ranks)])
    places = np.sort(bits >> (32 - strata), axis=0)
    assert np.all(np.diff(places, axis=0) > 0)


def test_pairs_of_ranks_have_every_distance() -> None:
    """Of their strata, with the same probability; and any distance inside them."""
    strata, groups = 3, 7 * 400
    keys = [key(rank, strata) for rank in range(8)]
    masks = np.array([[dither_mask(group, own) for group in range(groups)] for own in keys])
    for first, second in itertools.combinations(range(8), 2):
        distance = masks[first] ^ masks[second]
        counts = np.bincount(distance >> 29, minlength=8)
        assert counts[0] == 0
        assert np.all(np.abs(counts[1:] / groups - 1 / 7) <= allowance(6 / 49, 1.0, groups))
        # Both halves of a word are in the same strata, and differ inside them.
        assert np.array_equal(distance >> 29, distance >> 13 & 7)
        for bit in (*range(13), *range(16, 29)):
            assert abs(np.mean(distance >> bit & 1) - 0.5) <= allowance(0.25, 1.0, groups)


# ------------------------------------------------------------------------------------ of each rank


@pytest.mark.parametrize("share", [0.5, 0.3, 1 / 65536])
@pytest.mark.parametrize(("rank", "strata"), [(0, 1), (1, 1), (2, 2), (63, 6), (255, 8)])
def test_each_rank_rounds_without_bias(rank: int, strata: int, share: float) -> None:
    up = np.mean([rounded_up(share, rank, strata, step).mean() for step in range(8)])
    assert abs(up - share) <= allowance(share * (1 - share), 1.0, 8 * COUNT)


@pytest.mark.parametrize("lag", [1, 32, 64, 256, 8192])
def test_errors_of_one_rank_are_independent(lag: int) -> None:
    error = rounded_up(0.3, 2, 2) - 0.3
    assert abs(np.mean(error[:-lag] * error[lag:])) <= allowance(0.21**2, 1.0, COUNT - lag)


def test_what_is_not_the_same_for_the_ranks_is_independent() -> None:
    """Another step, tensor or cohort, and ranks without strata."""
    own = rounded_up(0.3, 1, 8) - 0.3
    others = [rounded_up(0.3, 1 + 256, 8), rounded_up(0.3, 1, 8, step=1), rounded_up(0.3, 1, 0)]
    for other in others:
        assert abs(np.mean(own * (other - 0.3))) <= allowance(0.21**2, 1.0, COUNT)


# ------------------------------------------------------------------------------------ between ranks


def all_pairs(shares: Array, strata: int) -> float:
    """The sum of covariances by the definition: every factor and every shift of the field."""
    size = 2**strata
    total = 0.0
    for first, second in itertools.permutations(range(len(shares)), 2):
        product = 0.0
        for factor, shift in itertools.product(range(1, size), range(size)):
            # The part of a stratum that is below the share.
            inside = [
                min(max(size * shares[i] - (field_product(factor, i, strata) ^ shift), 0.0), 1.0)
                for i in (first, second)
            ]
            product += inside[0] * inside[1]
        total += product / (size * (size - 1)) - shares[first] * shares[second]
    return total


@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_the_covariance_is_that_of_the_definition(ranks: int) -> None:
    rng = np.random.default_rng(ranks)
    strata = strata_for(ranks)
    shares = np.concatenate([rng.random((ranks, 6)), np.full((ranks, 1), 0.4)], axis=1)
    shares[:, 5] *= 0.01
    expected = [all_pairs(column, strata) for column in shares.T]
    np.testing.assert_allclose(theory.repelled_covariance(shares, strata), expected, atol=1e-12)
    assert np.all(theory.repelled_covariance(shares, strata) <= 1e-12)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 64])
def test_what_is_left_of_the_variance_of_independent_gradients(ranks: int) -> None:
    shares = np.random.default_rng(0).random((ranks, 20_000))
    independent = (shares * (1 - shares)).sum()
    left = 1 + theory.repelled_covariance(shares, strata_for(ranks)).sum() / independent
    assert left == pytest.approx(repelled_factor(ranks), rel=0.01)


def test_cohorts_are_independent() -> None:
    shares = np.random.default_rng(0).random((300, 4))
    whole = theory.repelled_covariance(shares, 8)
    parts = [theory.repelled_covariance(part, 8) for part in (shares[:256], shares[256:])]
    np.testing.assert_allclose(whole, parts[0] + parts[1])


def places_of(kind: str, ranks: int) -> Array:
    """Where the ranks' elements are between two levels, a row for each rank."""
    rng = np.random.default_rng(ranks)
    if kind == "independent":
        return rng.random((ranks, COUNT))
    if kind == "equal":
        return np.broadcast_to(rng.random(COUNT), (ranks, COUNT))
    if kind == "two groups":  # where a lattice of dithers loses
        return np.where(np.arange(ranks)[:, None] < ranks // 2, 0.25, 0.75) * np.ones(COUNT)
    return 0.1 * rng.random((ranks, COUNT))  # far below a level


@pytest.mark.parametrize("kind", ["independent", "equal", "two groups", "small"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 16])
def test_the_variance_of_a_sum_is_that_of_the_formula(ranks: int, kind: str) -> None:
    """Within 6 %, and below that of independent dithers, which would fail the test."""
    shares = np.rint(places_of(kind, ranks) * 65536) / 65536
    strata = strata_for(ranks)
    independent = (shares * (1 - shares)).sum()
    expected = independent + theory.repelled_covariance(shares, strata).sum()
    squares = []
    for step in range(16):
        error = sum(rounded_up(shares[rank], rank, strata, step) for rank in range(ranks))
        error = error - shares.sum(axis=0)
        squares += list((error**2).reshape(-1, GROUP).sum(axis=1))  # groups are independent
    total, spread = np.mean(squares), np.std(squares) / np.sqrt(len(squares))
    expected /= COUNT / GROUP
    assert abs(total - expected) <= 4.5 * spread
    # Where a group has the same places everywhere, few distances decide about all of it.
    assert 4.5 * spread <= (0.6 if kind == "two groups" else 0.06) * expected
    assert total <= independent / (COUNT / GROUP) + 4.5 * spread
    if kind != "small":
        assert total < 0.8 * independent / (COUNT / GROUP)


def test_ranks_that_draw_the_same_numbers_fail() -> None:
    """The mutant without masks: errors of equal elements add up in place of cancelling."""
    up = rounded_up(0.4, 0, 2)
    error = 4 * (up - 0.4)
    independent = 4 * 0.24
    assert np.mean(error**2) > 3.5 * independent


def test_means_of_equal_gradients_are_nearly_exact() -> None:
    """All ranks at one position: a code of the sum is off by less than one, whatever n is."""
    for ranks in (2, 4, 16, 64):
        strata = strata_for(ranks)
        total = sum(rounded_up(0.3, rank, strata) for rank in range(ranks))
        assert np.max(np.abs(total - 0.3 * ranks)) < 1
