"""Two-hop levels: every rank rounds the mean of one share again, by norms of the mean's own.

A group of ranks is simulated in one process: the stages are the project's, and what would travel is
handed over.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from reference import (
    DENSE,
    SQUARE_LEVELS,
    Array,
    Z,
    buffer,
    square_law,
    square_level,
    square_places,
    standard_law,
)

from gq_horovod.path.config import Config, Plan
from gq_horovod.research import theory
from mpi_ops import codec, lanes
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host

INFINITY = 0x7F800000


def global_norms(x: Array, plan: Plan) -> Array:
    return np.maximum.reduce([codec.norms(buffer(own), plan) for own in x])


def all_codes(x: Array, norms: Array, plan: Plan, step: int) -> Array:
    """Every rank's codes, cut into shares: (rank, share, word)."""
    size = codec.shard_size(x.shape[1], plan)
    codes = np.empty((len(x), len(x), size), dtype=codec.payload_dtype(plan))
    for rank, own in enumerate(x):
        random = dither(0, "w", step, rank, Stage.QUANTIZE)
        codec.quantize(buffer(own), norms, plan, random, out=codes[rank].reshape(-1))
    return codes


def all_shares(codes: Array, norms: Array, plan: Plan, count: int, step: int) -> list[Array]:
    """What every rank makes of its share."""
    shares = []
    for rank in range(len(codes)):
        own = codec.norms_of_share(norms, count, rank, plan)
        random = dither(0, "w", step, rank, Stage.REDUCE)
        shares.append(codec.reduce(codes[:, rank], plan, random, norms=own))
        assert shares[-1].size == codec.reduced_size(count, plan)
    return shares


def reduce_all(x: Array, plan: Plan, step: int = 0) -> Array:
    """The mean that every rank gets, of the dtype of x, (ranks, elements)."""
    norms = global_norms(x, plan)
    codes = all_codes(x, norms, plan, step)
    shares = all_shares(codes, norms, plan, x.shape[1], step)
    mean = np.full(x.shape[1] + 1, 77, dtype=x.dtype)
    codec.dequantize(np.concatenate(shares), norms, plan, buffer(mean[:-1]))
    assert mean[-1] == 77
    return mean[:-1]


def decoded(x: Array, plan: Plan, step: int) -> Array:
    """The mean of the codes of the first hop."""
    norms = global_norms(x, plan)
    alone = replace(plan, levels="standard", world_size=1)
    total = np.zeros(x.shape[1])
    own = np.empty(x.shape[1], dtype=np.float32)
    for codes in all_codes(x, norms, plan, step):
        codec.dequantize(codes.reshape(-1), norms, alone, buffer(own))
        total += own
    return total / len(x)


def gradients(ranks: int, count: int, seed: int = 0) -> Array:
    """Float32 of every rank: normal, of a scale that changes every 96 elements, every 11th zero."""
    x = np.random.default_rng(seed).standard_normal((ranks, count), dtype=np.float32)
    x *= np.float32(2.0) ** -(np.arange(count) // 96 % 6)
    x[:, 5::11] = 0
    return x


PLANS = [
    pytest.param(bits, block_size, ranks, id=f"{bits} bits-{block_size}-{ranks} ranks")
    for bits, block_size, ranks in (
        *itertools.product((2, 4, 8, 10), (None, 32, 256), (1, 2, 3, 16)),
        *itertools.product(DENSE, (None, 256), (3,)),
    )
]


@pytest.mark.parametrize(("bits", "block_size", "ranks"), PLANS)
def test_any_size_comes_back_within_a_level_of_each_hop(
    bits: int, block_size: int | None, ranks: int
) -> None:
    plan = Config(levels="two-hop", bits=bits, block_size=block_size).plan(ranks)
    assert plan.level_count == SQUARE_LEVELS.get(bits, 511)  # whatever the number of ranks is
    for count in (1, 31, 33, 255, 257, 1000, 4097, 70_001):
        x = gradients(ranks, count)
        error = np.abs(reduce_all(x, plan) - x.mean(axis=0, dtype=np.float64))
        coarsest = (2 * plan.level_count - 1 if plan.square else 1) / plan.units
        level = theory.element_norms(x, plan) * coarsest
        assert np.all(error <= 2 * level * (1 + 1e-5)), count


@pytest.mark.parametrize("ranks", [1, 3, 4, 7])
@pytest.mark.parametrize("block_size", [32, 256, 4096, None])
@pytest.mark.parametrize("bits", [4, 5, 6, 8, 10, 16])
def test_shares_are_whole_rows_and_whole_blocks(
    bits: int, block_size: int | None, ranks: int
) -> None:
    plan = Config(levels="two-hop", bits=bits, block_size=block_size).plan(ranks)
    for count in (1, 100, 4096, 10_001):
        share = codec.share_elements(count, plan)
        assert share * ranks >= count
        assert share % (block_size or lanes.ROW) == 0
        assert codec.shard_size(count, plan) == lanes.standard_words(share, bits)
        assert share % (32 // bits * lanes.ROW) == 0
        norms = 1 if block_size is None else share // block_size
        assert codec.reduced_size(count, plan) == norms + codec.shard_size(count, plan)


@pytest.mark.parametrize("ranks", [1, 3, 100])
@pytest.mark.parametrize(
    ("bits", "square"),
    [(bits, bits <= lanes.SQUARE_BITS) for bits in (*SQUARE_LEVELS, 16)] + [(4, False), (8, False)],
)
def test_codes_that_their_lanes_cannot_hold_are_added_exactly(
    bits: int, square: bool, ranks: int
) -> None:
    count, top = 1000, SQUARE_LEVELS[bits] if square else 2 ** (bits - 1) - 1
    x = np.full((ranks, count), 1, dtype=np.float32)  # all at the largest level
    x[:, ::2] = -1
    x[:, ::3] = 0
    ones = np.full(lanes.blocks(count, 64), 1, dtype=np.float32).view(np.int32)
    payloads = [
        host.quantize_standard(
            *(buffer(own), ones),
            block_size=64,
            bits=bits,
            levels=top,
            dither=dither(0, "w", 0, 0, Stage.QUANTIZE),
            square=square,
        )
        for own in x
    ]
    args = {"count": count, "block_size": 64, "bits": bits, "levels": top, "square": square}
    mean = host.mean_standard(payloads, ones, **args)
    assert np.array_equal(mean, x[0])
    poisoned = np.where(np.arange(ones.size) == 1, INFINITY, ones).astype(np.int32)
    mean = host.mean_standard(payloads, poisoned, **args)
    assert np.isnan(mean[64:128]).all()
    assert np.isfinite(mean[128:]).all()
    with pytest.raises(ValueError, match=r"payloads\[1\] must be a contiguous int32 array"):
        host.mean_standard([payloads[0], payloads[0][1:]], ones, **args)


# --------------------------------------------------------------------------- unbiased, with mutants

Reduction = Callable[[Array, Plan, int], Array]


def check_second_hop(reduction: Reduction, bits: int) -> None:
    """Assert that rounding the mean of the codes is unbiased, and has the variance of its levels.

    Given the codes, errors are independent between elements and steps.
    """
    ranks, count, steps = 3, 4096, 64
    plan = Config(levels="two-hop", bits=bits).plan(ranks)
    x = gradients(ranks, count)
    off = away = squares = expected = fourth = 0.0
    for step in range(steps):
        mean = decoded(x, plan, step)
        norms = np.abs(mean).reshape(-1, 256).max(axis=1).repeat(256)
        scale = np.divide(plan.units, norms, out=np.zeros_like(norms), where=norms > 0)
        y = mean * scale / plan.units
        law = (square_law if plan.square else standard_law)(y, plan.level_count) * plan.units
        error = (reduction(x, plan, step) - mean) * scale
        off += error.sum()
        away += (error * np.sign(mean)).sum()
        squares += np.square(error).sum()
        expected += law.variance.sum()
        fourth += law.variance_of_square.sum()
    allowed = Z * np.sqrt(expected)
    rounding = 1e-4 * steps * count  # of float32, in units of up to 2**15
    assert abs(off) <= allowed + rounding, f"biased by {off}, allowed {allowed}"
    assert abs(away) <= allowed + rounding, f"biased away from zero by {away}, allowed {allowed}"
    allowed = Z * np.sqrt(max(fourth, 0.0)) + rounding
    assert abs(squares - expected) <= allowed, f"variance is off: {squares}, not {expected}"


@pytest.mark.parametrize("bits", [*DENSE, 4, 8, 10])
def test_the_second_hop_is_unbiased(bits: int) -> None:
    check_second_hop(reduce_all, bits)


def requantized(x: Array, plan: Plan, step: int, rounding: str) -> Array:
    """A model of the second hop in NumPy, sound or not."""
    mean = decoded(x, plan, step)
    norms = np.abs(mean).reshape(-1, 256).max(axis=1).repeat(256)
    if rounding == "old norms":
        norms = theory.element_norms(x, plan)
    u = np.random.default_rng(step).random(mean.size)
    u = {"to nearest": np.full_like(u, 0.5), "half the dither": u / 2 + 0.25}.get(rounding, u)
    places = square_places(mean / norms, plan.level_count)
    if rounding == "even levels":
        places = mean / norms * plan.level_count
    codes = np.floor(places + u)
    if rounding == "shrinks":
        codes = np.sign(codes) * np.minimum(np.abs(codes), plan.level_count - 1)
    return square_level(codes, plan.level_count) * norms


def test_the_model_passes() -> None:
    check_second_hop(partial(requantized, rounding="sound"), 8)


@pytest.mark.parametrize(
    "rounding", ["old norms", "to nearest", "half the dither", "shrinks", "even levels"]
)
def test_faulty_second_hops_fail_the_check(rounding: str) -> None:
    with pytest.raises(AssertionError, match=r"biased|variance"):
        check_second_hop(partial(requantized, rounding=rounding), 4)


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("ranks", [2, 4, 64])
def test_the_error_of_the_mean_is_within_its_bound(ranks: int, norm: str) -> None:
    plan = Config(levels="two-hop", bits=4, norm=norm).plan(ranks)
    x = gradients(ranks, 4096)
    exact = x.mean(axis=0, dtype=np.float64)
    errors = [np.sum((reduce_all(x, plan, step) - exact) ** 2) for step in range(20)]
    bound = theory.mean_bound(x, plan).sum()
    first = theory.quantization_variance(x, plan).sum()
    assert first < np.mean(errors) <= bound
    energy = np.square(x, dtype=np.float64).sum() / ranks
    worst = theory.theta(plan, 4096) / ranks * energy + theory.rho(plan, 4096) * np.sum(exact**2)
    assert np.mean(errors) <= worst


def test_more_ranks_do_not_need_more_bits() -> None:
    """The aim: 8 bits and 64 ranks, where standard levels would have a single one."""
    x = np.random.default_rng(0).standard_normal((64, 8192), dtype=np.float32)
    exact = x.mean(axis=0, dtype=np.float64)
    plan = Config(levels="two-hop").plan(64)
    assert plan.bits == 8
    relative = np.sum((reduce_all(x, plan) - exact) ** 2) / np.sum(exact**2)
    assert 1e-5 < relative < 1e-3


# --------------------------------------------------------------------------------- special values


@pytest.mark.parametrize("block_size", [256, None])
def test_what_is_not_finite_reaches_every_rank(block_size: int | None) -> None:
    plan = Config(levels="two-hop", block_size=block_size).plan(3)
    for poison in (np.nan, -np.nan, np.inf, -np.inf):
        x = gradients(3, 2000)
        x[1, 300] = poison
        result = reduce_all(x, plan)
        affected = np.zeros(2000, bool)
        affected[256:512] = True
        if block_size is None:  # one norm for the tensor
            affected[:] = True
        np.testing.assert_array_equal(np.isnan(result), affected)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_extreme_values(dtype: type) -> None:
    plan = Config(levels="two-hop").plan(4)
    assert not reduce_all(np.zeros((4, 1000), dtype), plan).any()
    largest = min(float(np.finfo(dtype).max), float(np.finfo(np.float32).max))
    smallest = max(np.finfo(dtype).tiny, np.finfo(np.float32).tiny)
    for value in (largest, -largest, smallest):
        x = np.full((4, 1000), value, dtype)
        result = reduce_all(x, plan)
        assert np.isfinite(result).all()
        np.testing.assert_allclose(result.astype(np.float64), float(value), rtol=1e-3)
    x = np.zeros((4, 1000), dtype)
    x[::2, 7], x[1::2, 7] = largest, -largest  # cancels in the mean
    assert not reduce_all(x, plan).any()


def test_norms_of_what_lies_beyond_the_tensor_are_zero() -> None:
    plan = Config(levels="two-hop", bits=8, block_size=32).plan(3)
    norms = np.arange(1, 6, dtype=np.int32)  # of 150 elements; a share has two blocks of 64
    count = 150
    size = codec.share_elements(count, plan) // 32
    padded = np.concatenate([codec.norms_of_share(norms, count, rank, plan) for rank in range(3)])
    assert size * 3 == padded.size
    assert padded[:5].tolist() == [1, 2, 3, 4, 5]
    assert not padded[5:].any()
    assert norms.max() < INFINITY
