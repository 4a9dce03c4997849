"""The formulas of theory and mpi_ops.rounding against the real kernels, n ranks in one process.

A case runs as many reductions as make Z standard deviations of the measured squared error at most
5 % of it, and then asserts that distance. The standard deviation comes from the laws of
`reference`, which share no code with the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
from reference import (
    Array,
    buffer,
    exponential_law,
    pack_lanes,
    square_law,
    standard_law,
    unpack_lanes,
)

from gq_horovod.path.config import Config
from gq_horovod.research import theory
from mpi_ops import codec, lanes, wire
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host
from mpi_ops.rounding import EXPONENTIAL_TYPICAL
from mpi_ops.scheme import Plan

ELEMENTS = 4096
RANKS = (1, 2, 4, 16, 64)
KINDS = ("gaussian", "student t3", "mixed scales")
BLOCKS = (None, 256)
Z = 4.5  # two-sided 7e-6 for a case
ACCURACY = 0.05
GROUPED = 2.0  # see check_quantization


@cache
def vectors(kind: str, ranks: int) -> Array:
    """Gradients of every rank, float32 (rank, element)."""
    rng = np.random.default_rng([KINDS.index(kind), ranks])
    shape = (ranks, ELEMENTS)
    if kind == "student t3":
        return rng.standard_t(3, shape).astype(np.float32)
    x = rng.standard_normal(shape)
    if kind == "mixed scales":  # layers of 100 elements, whose borders are no borders of blocks
        x *= np.repeat(10 ** rng.uniform(-2, 0, 41), 100)[:ELEMENTS]
    return x.astype(np.float32)


def true_mean(x: Array) -> Array:
    return x.astype(np.float64).mean(axis=0)


# What a reduction gives: the mean of the decoded codes, and the delivered mean.
Reduction = Callable[[Array, Plan, int], tuple[Array, Array]]


def global_norms(x: Array, plan: Plan) -> Array:
    return np.maximum.reduce([codec.norms(buffer(own), plan) for own in x])


def quantized(x: Array, norms: Array, plan: Plan, step: int) -> list[Array]:
    """The payload of every rank."""
    return [
        codec.quantize(
            buffer(own), norms, plan, dither(1, "w", step, rank, Stage.QUANTIZE, plan.strata)
        )
        for rank, own in enumerate(x)
    ]


def kernels(x: Array, plan: Plan, step: int) -> tuple[Array, Array]:
    """The stages of the project."""
    norms = global_norms(x, plan)
    payloads = quantized(x, norms, plan, step)
    if plan.levels == "two-hop":  # of the first hop; test_two_hop.py judges the second, given it
        args = {"count": x.shape[1], "block_size": plan.block_for(x.shape[1]), "bits": plan.bits}
        averaged = host.mean_standard(
            payloads, norms, levels=plan.level_count, square=plan.square, **args
        ).astype(np.float64)
        return averaged, averaged
    random = dither(1, "w", step, 0, Stage.REDUCE)
    mean, own = np.empty((2, x.shape[1]), dtype=np.float32)
    codec.dequantize(codec.reduce(payloads, plan, random), norms, plan, buffer(mean))
    if plan.levels == "standard":  # their sum is exact: there is no second error
        return mean.astype(np.float64), mean.astype(np.float64)
    total = np.zeros(x.shape[1])
    for payload in payloads:  # a code alone decodes to its own value
        codec.dequantize(payload, norms, plan, buffer(own))
        total += own
    return total / len(x), mean.astype(np.float64)


def check_quantization(
    reduction: Reduction, x: Array, plan: Plan, strata: int | None = None
) -> None:
    """Assert that the squared error has the variance of the formula; and that of the last rounding.

    Given the mean M of the codes, the last rounding has the variance of rounding M. `strata` are
    those of the reduction's dithers, by default those of the plan.
    """
    norms = theory.element_norms(x, plan)
    y = x.astype(np.float64) / norms
    if plan.levels != "exponential":
        law_of = square_law if plan.square else standard_law
        laws = [law_of(own, plan.level_count) for own in y]
    else:
        laws = [exponential_law(own, plan.bits) for own in y]
    law = sum(laws[1:], laws[0]) * (1 / len(x))
    expected = theory.quantization_variance(x, plan, strata).sum()
    spread = np.sqrt(np.sum(law.variance_of_square * norms**4))
    if plan.strata and strata != 0:
        # Groups of 256 elements share the ranks' distances, so fewer of them are independent.
        spread *= GROUPED
    steps = max(math.ceil((Z * spread / (ACCURACY * expected)) ** 2), 2)
    assert steps < 4000, "the case needs more samples than the test has time for"
    mean, bound = true_mean(x), theory.mean_bound(x, plan, strata).sum()
    firsts = []
    second = given = total = 0.0
    allowed_second = 0.0
    for step in range(steps):
        averaged, delivered = reduction(x, plan, step)
        firsts.append(np.sum((averaged - mean) ** 2))
        total += np.sum((delivered - mean) ** 2)
        if plan.levels == "exponential":
            rounding = exponential_law(averaged / norms, plan.bits)
            second += np.sum((delivered - averaged) ** 2)
            given += np.sum(rounding.variance * norms**2)
            allowed_second += np.sum(rounding.variance_of_square * norms**4)
    off = abs(np.mean(firsts) / expected - 1)
    allowed = Z * spread / expected / math.sqrt(steps)
    assert off <= allowed <= ACCURACY, f"variance is off by {off:.3f}, allowed {allowed:.3f}"
    if steps >= 20:
        assert np.std(firsts) <= 1.5 * spread, "the spread of the errors is not that of the test"
    off = abs(second - given)
    assert off <= Z * math.sqrt(allowed_second) + 1e-6 * given, f"rounding is off by {off}"
    slack = Z * (spread / math.sqrt(steps) + math.sqrt(allowed_second) / steps)
    assert total / steps <= bound + slack, f"error {total / steps} is above the bound {bound}"


def plans(levels: str, bits: int, ranks: int) -> Iterator[Plan]:
    for block_size in BLOCKS:
        yield Config(levels=levels, bits=bits, block_size=block_size).plan(ranks)


STANDARD = [
    (bits, ranks) for bits in (2, 4, 8, 10, 16) for ranks in RANKS if lanes.levels(bits, ranks)
]


@pytest.mark.parametrize(("bits", "ranks"), STANDARD)
def test_standard_variance_is_exact(bits: int, ranks: int) -> None:
    for kind, plan in itertools.product(KINDS, plans("standard", bits, ranks)):
        check_quantization(kernels, vectors(kind, ranks), plan)


@pytest.mark.parametrize(
    ("bits", "ranks"), [*itertools.product((2, 4, 8, 10), RANKS), (3, 2), (5, 16), (6, 4)]
)
def test_two_hop_variance_is_exact(bits: int, ranks: int) -> None:
    for kind, plan in itertools.product(KINDS, plans("two-hop", bits, ranks)):
        check_quantization(kernels, vectors(kind, ranks), plan)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
def test_exponential_variance_is_exact_and_the_mean_below_its_bound(bits: int, ranks: int) -> None:
    for kind, plan in itertools.product(KINDS, plans("exponential", bits, ranks)):
        check_quantization(kernels, vectors(kind, ranks), plan)


@pytest.mark.parametrize("levels", ["standard", "exponential"])
def test_l2_norm_is_covered(levels: str) -> None:
    for kind in KINDS:
        check_quantization(
            kernels, vectors(kind, 4), Config(levels=levels, bits=8, norm="l2").plan(4)
        )


# ----------------------------------------------------------------------------------------- mutants


def simulated(code: Callable[[Array, Array], Array], shared: bool = False) -> Reduction:
    """Standard dithering in NumPy with another code(position, u)."""

    def reduction(x: Array, plan: Plan, step: int) -> tuple[Array, Array]:
        norms = theory.element_norms(x, plan)
        u = np.random.default_rng(step).random((1 if shared else len(x), x.shape[1]))
        codes = code(x / norms * plan.level_count, u)
        mean = codes.mean(axis=0) * norms / plan.level_count
        return mean, mean

    return reduction


def dithered(position: Array, u: Array) -> Array:
    return np.floor(position + u)


# Biased ones, and unbiased ones with another variance.
MUTANTS = {
    "rounds to nearest": simulated(lambda p, u: np.rint(p)),
    "truncates": simulated(lambda p, u: np.trunc(p)),
    "half the dither": simulated(lambda p, u: dithered(p, u / 2 + 0.25)),
    "half as many levels": simulated(lambda p, u: 2 * dithered(p / 2, u)),
    "one dither for all ranks": simulated(dithered, shared=True),
    "flushes small elements": simulated(lambda p, u: np.where(np.abs(p) < 0.5, 0, dithered(p, u))),
}


def test_the_simulation_passes() -> None:
    check_quantization(
        simulated(dithered), vectors("mixed scales", 4), Config(levels="standard").plan(4), 0
    )


def test_independent_dithers_fail_where_ranks_should_repel_each_other() -> None:
    with pytest.raises(AssertionError, match="variance is off"):
        check_quantization(
            simulated(dithered), vectors("mixed scales", 4), Config(levels="standard").plan(4)
        )


@pytest.mark.parametrize("mutant", MUTANTS)
def test_faulty_quantizers_fail_the_check(mutant: str) -> None:
    with pytest.raises(AssertionError, match="variance is off"):
        check_quantization(
            MUTANTS[mutant], vectors("mixed scales", 4), Config(levels="standard").plan(4), 0
        )


def test_a_mean_that_is_rounded_twice_fails_the_check() -> None:
    plan = Config(levels="exponential").plan(4)

    def twice(x: Array, plan: Plan, step: int) -> tuple[Array, Array]:
        averaged, mean = kernels(x, plan, step)
        up = np.random.default_rng(step).random(len(mean)) < 1 / 3
        return averaged, mean * np.where(up, 2, 0.5)

    with pytest.raises(AssertionError, match="rounding is off"):
        check_quantization(twice, vectors("gaussian", 4), plan)


# ------------------------------------------------------------------------------------- one rounding


def test_standard_variance_has_the_fixed_point_of_the_kernel() -> None:
    """Positions below 2**-17 are always 0, and every other multiple of 2**-16 is exact."""
    assert theory.standard_variance(2.0**-17) == 0  # rint goes to even
    assert theory.standard_variance(1.01 * 2.0**-17) == 2.0**-16 * (1 - 2.0**-16)
    assert theory.standard_variance(-0.25) == theory.standard_variance(0.25) == 0.1875
    plan = Config(levels="standard", bits=8, block_size=32).plan(1)
    x = np.zeros(32, dtype=np.float32)
    x[0], x[1:] = 127.0, 0.99 * 2.0**-17
    norms = global_norms(x[None], plan)
    for step in range(50):
        codes = unpack_lanes(quantized(x[None], norms, plan, step)[0], 8, 32)
        assert codes.tolist() == [127] + 31 * [0]
    assert theory.quantization_variance(x[None], plan).sum() == 0


def test_worst_cases_of_one_rounding() -> None:
    y = np.linspace(1e-4, 1, 100_001)
    for bits in lanes.EXPONENTIAL_BITS:
        smallest = theory.smallest_level(bits)
        variance = theory.exponential_variance(y, bits)
        above = y >= smallest
        assert np.all(variance[above] <= y[above] ** 2 / 8)
        assert np.all(variance <= theory.exponential_bound(y**2, y, smallest))
        assert theory.exponential_variance(4 / 3 * smallest, bits) == pytest.approx(
            (4 / 3 * smallest) ** 2 / 8
        )
    # 2/9 of the smallest level squared is reached, at 4/9 of it.
    excess = theory.exponential_variance(y, 4) - y**2 / 8
    assert excess.max() == pytest.approx(2 / 9 * theory.smallest_level(4) ** 2, rel=1e-4)
    assert y[excess.argmax()] == pytest.approx(4 / 9 * theory.smallest_level(4), rel=0.01)
    octave = 2 ** np.linspace(-1, 0, 100_001)[:-1]
    typical = np.mean(theory.exponential_variance(octave, 8) / octave**2)
    assert typical == pytest.approx(EXPONENTIAL_TYPICAL, abs=1e-5)


def test_headroom_moves_the_smallest_level_only() -> None:
    y = np.random.default_rng(0).uniform(2.0**-3, 1, 1000)
    for headroom in (1, 3):
        same = theory.exponential_variance(y, 4, headroom)
        np.testing.assert_array_equal(same, theory.exponential_variance(y, 4))
        below = 2.0 ** (headroom - 8)
        assert theory.exponential_variance(below, 4, headroom) > theory.exponential_variance(
            below, 4
        )
    np.testing.assert_array_equal(
        theory.exponential_variance(y, 8, 90), theory.exponential_variance(y, 8)
    )


def test_standard_bound_is_above_every_vector() -> None:
    for bits, ranks in STANDARD:
        plan = Config(levels="standard", bits=bits).plan(ranks)
        for kind in KINDS:
            x = vectors(kind, ranks)
            bound = theory.standard_bound(theory.element_norms(x, plan), plan.level_count, ranks)
            assert np.all(theory.quantization_variance(x, plan) <= bound * (1 + 1e-12))
    half = np.full((4, 64), 0.5 / 31, dtype=np.float32)
    half[:, 0] = 1
    plan = Config(levels="standard", bits=8).plan(4)
    # Reached with independent dithers; those that repel each other are exact here, but for a tie.
    independent = theory.quantization_variance(half, plan, strata=0)[1]
    assert independent == pytest.approx(theory.standard_bound(1.0, 31, 4), rel=1e-6)
    assert theory.quantization_variance(half, plan)[1] < 1e-3 * independent


# --------------------------------------------------------------------------------- θ, steps, sums


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize(
    ("levels", "bits"),
    [
        *(("standard", bits) for bits in (8, 16)),
        *(("exponential", bits) for bits in lanes.EXPONENTIAL_BITS),
        *(("two-hop", bits) for bits in (4, 8, 10)),
    ],
)
def test_theta_bounds_what_is_expected(levels: str, bits: int, norm: str) -> None:
    for ranks, block_size, kind in itertools.product((1, 4, 64), BLOCKS, KINDS):
        plan = Config(levels=levels, bits=bits, norm=norm, block_size=block_size).plan(ranks)
        x = vectors(kind, ranks)
        worst, energy = theory.theta(plan, ELEMENTS), np.square(x, dtype=float).sum() / ranks
        assert theory.measured_theta(x, plan) <= worst
        squared_mean = np.sum(true_mean(x) ** 2)
        # What really comes out, once: its spread is far below the distance to a worst case.
        _, delivered = kernels(x, plan, 0)
        error = np.sum((delivered - true_mean(x)) ** 2)
        assert error <= worst / ranks * energy + theory.rho(plan, x.shape[1]) * squared_mean


def test_theta_is_reached() -> None:
    """By one element at the norm, and all others of all ranks at one fraction of a level."""
    for bits, ranks in [(8, 1), (8, 4), (10, 16)]:
        plan = Config(levels="standard", bits=bits, block_size=256).plan(ranks)
        a = (ranks * 256 - 1) / plan.level_count**2
        x = np.full((ranks, 256), (math.sqrt(1 + a) - 1) / a / plan.level_count, np.float32)
        x[0, 0] = 1
        assert theory.measured_theta(x, plan) == pytest.approx(theory.theta(plan, 256), rel=1e-3)


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_theta_of_square_levels_bounds_any_vector(bits: int, norm: str) -> None:
    """And is reached, with the max norm, where all but one lie where theta says."""
    levels = 2 ** (bits - 1) - 1
    for elements in (32, 1024, 16384):
        worst = theory.square_theta(elements, levels, norm)
        y = np.linspace(0, 1, 400_001)[1:]
        place = theory.square_position(y, levels)
        variance = (theory.square_width(place) / levels**2) ** 2 * theory.standard_variance(place)
        if norm == "max":
            ratios = (elements - 1) * variance / (1 + (elements - 1) * y**2)
            assert ratios.max() == pytest.approx(worst, rel=2e-3)
        else:  # no less than equal elements have, with at least one at the norm's length, and near
            least = elements * y**2 >= 1
            reached = (variance / y**2)[least].max()
            assert 0.7 * worst <= reached <= worst * (1 + 1e-6)
    for kind in KINDS:
        plan = Config(levels="two-hop", bits=bits, norm=norm).plan(4)
        x = vectors(kind, 4)
        assert theory.measured_theta(x, plan) <= theory.theta(plan, ELEMENTS)


def test_square_bound_is_above_the_variance() -> None:
    y = np.linspace(0, 1, 100_001)
    for levels in (1, 7, 127):
        place = theory.square_position(y, levels)
        variance = theory.square_width(place) ** 2 * theory.standard_variance(place) / levels**4
        assert np.all(variance <= theory.square_bound(y, levels) * (1 + 1e-9))
        assert np.all(theory.square_position(-y, levels) == -place)


def test_factors_of_the_number_of_steps() -> None:
    assert theory.iteration_factor(0.5, 4) == 1.125
    assert theory.iteration_factor(0.5, 4, 0.125) == 1.25
    assert theory.noise_factor(0.5, 0.125) == 1.625
    assert theory.noise_factor(0.5, heterogeneity=1.0) == 2.0
    assert theory.rho(Config(levels="exponential").plan(4), 1000) == 0.125
    assert theory.rho(Config(levels="exponential").plan(1), 1000) == 0
    assert theory.rho(Config(levels="standard").plan(4), 1000) == 0
    assert theory.hops_factor(2) == (9 / 8) ** 2


@pytest.mark.parametrize("bits", lanes.EXPONENTIAL_BITS)
@pytest.mark.parametrize("topology", theory.TOPOLOGIES)
def test_sums_over_hops_are_below_their_bound(topology: str, bits: int) -> None:
    """The operation of MPI along a chain and a tree; near the bound up to the factor of 1/8."""

    def add(first: Array, second: Array) -> Array:
        total = second.copy()
        host.add_exponential(
            *(first.ctypes.data, total.ctypes.data, total.size), bits=bits, dither=key
        )
        return total

    def tree(parts: list[Array]) -> Array:
        if len(parts) == 1:
            return parts[0]
        half = (len(parts) + 1) // 2
        return add(tree(parts[:half]), tree(parts[half:]))

    for ranks, kind in itertools.product((2, 4), KINDS):
        x = vectors(kind, ranks)
        options = {"block_size": 256, "bits": bits, "headroom": ranks - 1}
        plan = Config(levels="exponential", bits=bits, block_size=256).plan(ranks)
        norms = global_norms(x, plan)
        error, steps = 0.0, 40
        for step in range(steps):
            key = dither(1, "w", step, 0, Stage.REDUCE)
            parts = [
                host.quantize_exponential(
                    *(buffer(own), norms),
                    dither=dither(1, "w", step, rank, Stage.QUANTIZE),
                    **options,
                )
                for rank, own in enumerate(x)
            ]
            total = parts[0]
            for own in parts[1:]:
                total = add(total, own)
            out = np.empty(ELEMENTS, dtype=np.float32)
            total = tree(parts) if topology == "tree" else total
            host.dequantize_exponential(total, norms, buffer(out), **options)
            error += np.sum((out.astype(np.float64) / ranks - true_mean(x)) ** 2) / steps
        bound = theory.hops_bound(x, plan, topology).sum()
        assert bound / 3 <= error <= bound


def test_hops_of_equal_inputs_stay_below_the_factor() -> None:
    plan = Config(levels="exponential").plan(16)
    x = np.full((16, 32), 0.7, dtype=np.float32)
    for topology, hops in (("tree", 5), ("chain", 16)):
        relative = theory.hops_bound(x, plan, topology).max() / 0.7**2
        assert relative <= theory.hops_factor(hops) - 1
    assert theory.hops_factor(6) / theory.hops_factor(0) == pytest.approx(64 ** (math.log2(9 / 8)))


def test_refusals() -> None:
    plan = Config(levels="standard").plan(4)
    with pytest.raises(ValueError, match=r"a row for each of the plan's 4 ranks, got shape \(3, 8"):
        theory.quantization_variance(np.ones((3, 8)), plan)
    with pytest.raises(ValueError, match="hops_bound: plan must have exponential levels"):
        theory.hops_bound(np.ones((4, 8)), plan)
    plan = Config(levels="exponential").plan(4)
    with pytest.raises(ValueError, match="topology must be one of chain, tree, got 'ring'"):
        theory.hops_bound(np.ones((4, 8)), plan, "ring")


# --------------------------------------------------------------------------------------- headroom


def test_partial_sums_by_trying_every_subset() -> None:
    codes = np.random.default_rng(0).integers(-9, 10, (6, 20))
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(6), size) for size in range(1, 7)
    )
    largest = np.max([np.abs(codes[list(subset)].sum(axis=0)) for subset in subsets], axis=0)
    np.testing.assert_array_equal(theory.largest_partial_sum(codes), largest)


@pytest.mark.parametrize("bits", lanes.STANDARD_BITS)
def test_no_order_of_additions_leaves_a_lane(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    for ranks in {1, 2, 3, 7, top // 2, top} & set(range(1, top + 1)):
        levels = lanes.levels(bits, ranks)
        worst = np.full((ranks, 2), levels) * [1, -1]
        assert theory.fits_lane(worst, bits)
        # The next number of levels does not fit; and what the lanes of a word hold fits int32.
        assert not theory.fits_lane(worst // levels * (levels + 1), bits)
        for sign in (1, -1):
            full = np.full(32 // bits * 32, sign * top)
            words = pack_lanes(full, bits)  # asserts that they are int32
            np.testing.assert_array_equal(unpack_lanes(words, bits, len(full)), full)


# --------------------------------------------------------------------------------- bits on the wire


@pytest.mark.parametrize("transport", ["horovod", "mpi"])
def test_bits_on_the_wire_are_those_of_the_payloads(transport: str) -> None:
    count = 100_000
    x = np.ones(count, dtype=np.float32)
    for levels, bits, block_size in [("standard", 8, 256), ("standard", 10, None)] + [
        ("exponential", bits, block_size) for bits in (4, 8) for block_size in BLOCKS
    ]:
        plan = Config(levels=levels, bits=bits, block_size=block_size).plan(4)
        norms = codec.norms(buffer(x), plan)
        sizes = wire.wire(count, plan, transport)
        assert sizes.norms == norms.nbytes
        payload = codec.quantize(buffer(x), norms, plan, dither(0, "w", 0, 0, Stage.QUANTIZE))
        chunks = len(wire.parcel_bytes((count,), plan, transport))
        # Padding to whole rows, for each rank and chunk where ranks reduce shards.
        assert 0 <= sizes.payload - payload.nbytes <= chunks * 4 * lanes.ROW * 4
        assert sizes.sent == 1.5 * (sizes.payload + sizes.norms)
        nominal = 32 / (32 // bits) + 32 / (block_size or count)
        assert sizes.bits_per_element(count) == pytest.approx(nominal, rel=0.01 * chunks)
