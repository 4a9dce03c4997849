"""How large the quantization error is, and what it costs on the wire: closed forms.

Every function gives its formula; docs/theory.md proves them. "Exact" means that the formula is the
variance itself, up to the rounding of float32 in the kernels; everything else is a bound and says
so. Sizes, norms and levels are those of `mpi_ops`, called, not copied.

Words: n ranks; s levels on each side of zero; y is an element in units of its norm; a *position* is
an element in units of a level: s·y where levels are even, and where they are square, linear between
them. Gradients are arrays of float32, a row for each rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpi_ops import codec
from mpi_ops.kernels.interface import Buffer
from mpi_ops.rounding import (
    COHORT,
    EXPONENTIAL_WORST,
    fixed_point,
    square_position,
    square_width,
)
from mpi_ops.scheme import Plan

Array = NDArray[np.float64]

# A rounding multiplies the second moment by at most this.
HOP_FACTOR = 1 + EXPONENTIAL_WORST


# ------------------------------------------------------------------------------------ one rounding


def standard_variance(position: ArrayLike) -> Array:
    """Variance of the code of an element at `position` = s·x/norm, in squared levels. Exact.

    f(1-f), f the distance to the level below (QSGD, Alistarh et al. 2017, for evenly spaced
    levels). The kernel has 16 fractional bits: f is that of rint(65536·position)/65536, whose
    distance from `position`, at most 2^-17 of a level, is all the bias there is.
    """
    f = standard_share(position)
    result: Array = f * (1 - f)
    return result


def standard_share(position: ArrayLike) -> Array:
    """Probability that an element at `position` is rounded up: the f of `standard_variance`."""
    return fixed_point(position) % 1.0


def square_bound(magnitude: ArrayLike, levels: int) -> Array:
    """Bound of the expected variance of rounding a random y to square levels, from E|y| or more.

    (2s√E|y| + 1)²/(4s⁴) in squared norms: at most a quarter of (2k+1)²/s⁴, the squared distance of
    the two levels around y, with k <= s√|y|; the bound is concave in |y|.
    """
    root = np.sqrt(np.asarray(magnitude, dtype=np.float64))
    result: Array = np.square(2 * levels * root + 1) / (4 * levels**4)
    return result


def smallest_level(bits: int, headroom: int = 0) -> float:
    """Smallest exponential level above zero, in units of the norm: 2^(1-T+headroom).

    T = 2^(bits-1) - 1: 2^-126 with 8 bits and 2^-6 with 4, without headroom.
    """
    return float(2.0 ** (2 - 2 ** (bits - 1) + headroom))


def exponential_variance(y: ArrayLike, bits: int, headroom: int = 0) -> Array:
    """Variance of rounding `y` = x/norm to exponential levels, in squared norms. Exact.

    (high - |y|)(|y| - low) for the levels low <= |y| <= high; below the smallest level S these are
    0 and S. A headroom h multiplies all levels by 2^h, which changes low and high only below
    S·2^h: it costs precision there and nowhere else. |y| saturates at 2^h. (Natural compression,
    Horváth et al. 2019, has these levels without an end; arXiv 2305.18627 uses them with a global
    norm.)
    """
    smallest = smallest_level(bits, headroom)
    magnitude = np.minimum(np.abs(np.asarray(y, dtype=np.float64)), 2.0**headroom)
    _, exponent = np.frexp(np.maximum(magnitude, smallest))
    low = np.where(magnitude < smallest, 0.0, np.ldexp(1.0, exponent - 1))
    high = np.where(magnitude < smallest, smallest, 2 * low)
    result: Array = (high - magnitude) * (magnitude - low)
    return result


def exponential_bound(second_moment: ArrayLike, magnitude: ArrayLike, smallest: float) -> Array:
    """Bound of the expected variance of rounding a random y, from E[y²] and a bound of E|y|.

    E[y²]/8 + min(2S²/9, S·E|y|): at a level or above the variance is at most y²/8, reached at
    4/3 of a level; below the smallest level S it is |y|(S-|y|), at most y²/8 + 2S²/9.
    """
    below = np.minimum(2 / 9 * smallest**2, smallest * np.asarray(magnitude))
    result: Array = EXPONENTIAL_WORST * np.asarray(second_moment) + below
    return result


# ---------------------------------------------------------------------------- the mean over n ranks


def repelled_covariance(shares: ArrayLike, strata: int, widths: ArrayLike = 1.0) -> Array:
    """Sum of the covariances of all ordered pairs of ranks' roundings, in squared levels. Exact.

    Ranks stand in different ones of M = 2^strata equal parts of [0, 1), every pair of parts with
    the same probability, and anywhere inside. Two ranks that round up with probabilities f and f'
    have the covariance (M·f·f' - Σ_k a_k·a'_k) / (M·(M-1)), a_k = min(max(M·f - k, 0), 1) what is
    below f of part k. Never positive: -f(1-f')/(M-1) where f < f' lie in different parts. Ranks of
    different cohorts (of 256) have independent dithers.

    Args:
        shares: probabilities of rounding up, shape (ranks, ...).
        strata: bits, as of `mpi_ops.dither`; 0 for independent dithers.
        widths: distances of the two levels, of the same shape, where they are not 1.

    Returns: an array of the shape of one rank's, at most 0.
    """
    f = np.asarray(shares, dtype=np.float64)
    widths = np.broadcast_to(widths, f.shape)
    total: Array = np.zeros(f.shape[1:])
    if strata == 0:
        return total
    parts = 2**strata
    for first in range(0, len(f), COHORT):
        own, width = f[first : first + COHORT], widths[first : first + COHORT]
        total += parts * ((width * own).sum(axis=0) ** 2 - np.square(width * own).sum(axis=0))
        for part in range(parts):
            below = width * np.clip(parts * own - part, 0.0, 1.0)
            total -= below.sum(axis=0) ** 2 - np.square(below).sum(axis=0)
    return total / (parts * (parts - 1))


def _checked(function: str, gradients: ArrayLike, plan: Plan) -> NDArray[np.float32]:
    x = np.ascontiguousarray(gradients, dtype=np.float32)
    if x.ndim != 2 or len(x) != plan.world_size:
        raise ValueError(
            f"{function}: gradients must have a row for each of the plan's {plan.world_size} "
            f"ranks, got shape {x.shape}; stack the ranks' flat gradients."
        )
    return x


def element_norms(gradients: ArrayLike, plan: Plan) -> Array:
    """The global norm that each element is quantized with, float64 of shape (elements,).

    The maximum over ranks of the norms of blocks, as `mpi_ops.codec` measures them. `gradients`:
    shape (ranks, elements), finite.
    """
    x = _checked("element_norms", gradients, plan)
    largest = np.maximum.reduce([codec.norms(Buffer.of(own), plan) for own in x])
    norms = largest.view(np.float32).astype(np.float64)
    return np.repeat(norms, plan.block_for(x.shape[1]))[: x.shape[1]]


def _in_norms(x: NDArray[np.floating[Any]], norms: Array) -> Array:
    """Elements in units of their norms; 0 where the norm is 0."""
    y: Array = np.divide(x, norms, out=np.zeros(x.shape), where=norms > 0)
    return y


def quantization_variance(gradients: ArrayLike, plan: Plan, strata: int | None = None) -> Array:
    """Variance of each element of the mean of n quantized gradients. Exact.

    (norm/n)²·(Σ_i v(x_i/norm) + C), with v = f(1-f)/s² for even levels, f(1-f)(2k+1)²/s⁴ for square
    ones and v = (high-|y|)(|y|-low) for exponential ones, and C ≤ 0 what the dithers of ranks gain
    by repelling each other: `repelled_covariance` in the same units, and 0 for exponential levels.
    With standard levels this is all the error of the mean, since their codes are added exactly; its
    sum over the elements is the expected squared error, with one norm or with blocks. The others
    round once more: `mean_bound`.

    Args:
        gradients: float32 of shape (ranks, elements), finite; not modified.
        plan: of a `Config` or `Scheme`, for as many ranks.
        strata: of the dithers; by default the plan's. 0: independent ones, which is a bound.

    Returns: float64 of shape (elements,), in squared units of the gradients.
    Raises: ValueError if the shape does not fit the plan.
    """
    x = _checked("quantization_variance", gradients, plan)
    norms = element_norms(x, plan)
    y = _in_norms(x, norms)
    if plan.levels != "exponential":
        position = square_position(y, plan.level_count) if plan.square else y * plan.level_count
        width = square_width(position) if plan.square else np.ones(1)
        variance = (width**2 * standard_variance(position)).sum(axis=0)
        strata = plan.strata if strata is None else strata
        variance += repelled_covariance(standard_share(position), strata, width)
        variance /= plan.units**2
    else:
        variance = exponential_variance(y, plan.bits).sum(axis=0)
    result: Array = variance * (norms / plan.world_size) ** 2
    return result


def standard_bound(norm: ArrayLike, levels: int, ranks: int) -> Array:
    """Largest variance of an element of the mean with standard levels: norm²/(4s²n).

    f(1-f) <= 1/4 for each of n ranks (arXiv 2305.18627; here for each block and its own norm).
    """
    result: Array = np.square(np.asarray(norm, dtype=np.float64)) / (4 * levels**2 * ranks)
    return result


def mean_bound(gradients: ArrayLike, plan: Plan, strata: int | None = None) -> Array:
    """Bound of the variance of each element of the mean that GlobalQSGD delivers.

    Standard levels: exact, `quantization_variance` V. Exponential levels: the n codes are averaged
    and rounded once, so V + E[v(M)] <= V + (mean² + V)/8 + norm²·min(2S²/9, S·Σ|y_i|/n), S the
    smallest level: one factor of 9/8, whatever n is. For one rank the mean is a level already, and
    the result is V. Two-hop levels: V + norm²/(4s²), since the mean's own norm is at most the
    norm, or V + norm²·`square_bound`(√(mean² + V)/norm). Arguments, result and errors as in
    `quantization_variance`.
    """
    variance = quantization_variance(gradients, plan, strata)
    if plan.levels == "two-hop" and not plan.square:
        return variance + standard_bound(element_norms(gradients, plan), plan.level_count, 1)
    if plan.levels == "two-hop":
        norms = element_norms(gradients, plan)
        mean = _checked("mean_bound", gradients, plan).mean(axis=0, dtype=np.float64)
        magnitude = _in_norms(np.sqrt(mean**2 + variance), norms)
        return variance + square_bound(magnitude, plan.level_count) * norms**2
    if plan.levels == "standard" or plan.world_size == 1:
        return variance
    x = _checked("mean_bound", gradients, plan)
    norms = element_norms(x, plan)
    y = _in_norms(x, norms)
    moment = y.mean(axis=0) ** 2 + _in_norms(_in_norms(variance, norms), norms)
    rounding = exponential_bound(moment, np.abs(y).mean(axis=0), smallest_level(plan.bits))
    result: Array = variance + rounding * norms**2
    return result


# ------------------------------------------------------------------------------ pairwise additions


@dataclass(frozen=True)
class _Sum:
    """A partial sum of codes, in norms: what it estimates, Σ|y_i| and a bound of its variance."""

    exact: Array
    magnitude: Array
    variance: Array


def _add(first: _Sum, second: _Sum, smallest: float) -> _Sum:
    """One hop: V <= (9/8)(V_1 + V_2) + exact²/8 + min(2S²/9, S·Σ|y_i|)."""
    exact = first.exact + second.exact
    magnitude = first.magnitude + second.magnitude
    variance = first.variance + second.variance
    variance = variance + exponential_bound(exact**2 + variance, magnitude, smallest)
    return _Sum(exact, magnitude, variance)


def _chain(parts: list[_Sum], smallest: float) -> _Sum:
    total = parts[0]
    for own in parts[1:]:
        total = _add(total, own, smallest)
    return total


def _tree(parts: list[_Sum], smallest: float) -> _Sum:
    if len(parts) == 1:
        return parts[0]
    half = (len(parts) + 1) // 2
    return _add(_tree(parts[:half], smallest), _tree(parts[half:], smallest), smallest)


TOPOLOGIES = {"chain": _chain, "tree": _tree}


def hops_bound(
    gradients: ArrayLike, plan: Plan, topology: str = "tree", headroom: int | None = None
) -> Array:
    """Bound of the variance of each element of the mean, where every addition of two is rounded.

    That is `mpi_ops.exponential_sum` along a "chain" ((a+b)+c)+d or a "tree" (a+b)+(c+d). A hop's
    rounding is unbiased whatever its inputs are, so variances add:
    V <= (9/8)(V_1 + V_2) + (a+b)²/8 + min(2S²/9, S·Σ|y|).

    Args:
        gradients, plan: as in `quantization_variance`, of exponential levels.
        headroom: doublings that the scale leaves room for; by default n-1, with which no sum can
            saturate (`mpi_ops.chain_headroom` has a cap). The bound holds if none does.

    Raises: ValueError for standard levels, whose sums are exact, and for an unknown topology.
    """
    if plan.levels != "exponential":
        raise ValueError(
            f"hops_bound: plan must have exponential levels, got {plan.levels!r}; standard codes "
            "are added exactly, see quantization_variance."
        )
    if topology not in TOPOLOGIES:
        raise ValueError(
            f"hops_bound: topology must be one of {', '.join(TOPOLOGIES)}, got {topology!r}."
        )
    x = _checked("hops_bound", gradients, plan)
    room = plan.world_size - 1 if headroom is None else headroom
    norms = element_norms(x, plan)
    parts = [
        _Sum(y, np.abs(y), exponential_variance(y, plan.bits, room)) for y in _in_norms(x, norms)
    ]
    total = TOPOLOGIES[topology](parts, smallest_level(plan.bits, room))
    result: Array = total.variance * (norms / plan.world_size) ** 2
    return result


def hops_factor(hops: int) -> float:
    """Bound of E[sum²] / (Σ|x_i|)²: (9/8)^hops, the roundings on the longest way to the sum.

    The quantization counts as the first, and no element may be below the smallest level. A tree of
    n ranks has 1 + ⌈log2 n⌉, (9/8)^(log2 n) = n^0.17; a chain has n. For inputs of one sign the
    relative variance of the sum is at most this minus 1.
    """
    return HOP_FACTOR**hops


# ------------------------------------------------------------------------- relative variance, steps


def theta(plan: Plan, count: int) -> float:
    """Largest θ of a tensor of `count` elements: E‖G-x̄‖² <= (θ/n)·Σ‖x_i‖²/n + ρ‖x̄‖².

    ρ is `rho`; B the elements of a block; x̄ the mean. Derived in docs/theory.md.
    Standard levels, max norm: (√(1+(nB-1)/s²)-1)/2, reached. L2 norm: c-1+nB/(4cs²) with
    c = max(1, √(nB)/(2s)), which is √(nB)/s-1 for few levels.
    Exponential levels of one rounding: max(1/8, the same with s = 1/S), S the smallest level; times
    9/8, plus 2n²BS²/9, for the second. L2 norm: with c >= 9/8.
    Two-hop levels: as standard ones, times 1 + ρ; square ones by `square_theta`.
    """
    n, block = plan.world_size, min(plan.block_for(count), count)
    standard = plan.levels != "exponential"
    level = 1 / plan.level_count if standard else smallest_level(plan.bits)
    least = 0.0 if standard else EXPONENTIAL_WORST
    many = n * block * level**2  # nB/s²
    if plan.square:
        return square_theta(n * block, plan.level_count, plan.norm) * (1 + rho(plan, count))
    if plan.norm == "l2":
        c = max(1 + least, math.sqrt(many) / 2)
        first = c - 1 + many / (4 * c)
    else:
        first = max(least, (math.sqrt(1 + max(many - level**2, 0.0)) - 1) / 2)
    if standard:
        return first * (1 + rho(plan, count))
    if n == 1:
        return first
    return HOP_FACTOR * first + 2 / 9 * n * many


def rho(plan: Plan, count: int) -> float:
    """Relative variance that does not fall with n, of rounding the mean of `count` elements itself.

    Exponential levels: 1/8. Two-hop levels: B/(4s²), since the square of a block's norm is at most
    the sum of its squares, for B elements of at most norm²/(4s²) each, or `square_theta` of one
    rank. Standard levels: 0.
    """
    if plan.square:
        return square_theta(min(plan.block_for(count), count), plan.level_count, plan.norm)
    if plan.levels == "two-hop":
        return min(plan.block_for(count), count) / (4 * plan.level_count**2)
    return EXPONENTIAL_WORST if plan.levels == "exponential" and plan.world_size > 1 else 0.0


def square_theta(elements: int, levels: int, norm: str) -> float:
    """Largest Σv(y)/Σy² of `elements` roundings to square levels, by one norm.

    v(y) - ωy² is at most E(ω), the largest of (l+h)²/(4(1+ω)) - l·h over neighbouring levels l and
    h between which it is reached, at y = (l+h)/(2(1+ω)). Max norm: the ω with
    (elements-1)·E(ω) = ω, since one element is at the norm, without error; reached. L2 norm: the
    least ω + elements·E(ω), since Σy² >= 1.
    """
    level = np.square(np.arange(levels + 1) / levels)
    low, high = level[:-1], level[1:]

    def excess(omega: float) -> float:
        reached = (low + high) / (2 * (1 + omega)) >= low
        values = np.square(low + high) / (4 * (1 + omega)) - low * high
        return float(values[reached].max())

    begin, end = 0.0, elements * (2 * levels - 1) ** 2 / (4 * levels**4)  # what all at most have
    for _ in range(100):
        if norm == "l2":  # convex: ω where the sum stops to fall
            third = (end - begin) / 3
            sums = [omega + elements * excess(omega) for omega in (begin + third, end - third)]
            begin, end = (begin, end - third) if sums[0] <= sums[1] else (begin + third, end)
        else:
            middle = (begin + end) / 2
            falls = (elements - 1) * excess(middle) > middle
            begin, end = (middle, end) if falls else (begin, middle)
    return end + elements * excess(end) if norm == "l2" else end


def measured_theta(gradients: ArrayLike, plan: Plan) -> float:
    """θ of given gradients: n·(Σ variance)/(Σ‖x_i‖²/n), of the quantizations alone.

    Of independent dithers, as `theta` is; those that repel each other give less. Far below `theta`
    for real gradients. Zero if all gradients are zero.
    """
    x = _checked("measured_theta", gradients, plan)
    energy = np.square(x, dtype=np.float64).sum() / plan.world_size
    variance = quantization_variance(x, plan, strata=0).sum()
    return float(plan.world_size * variance / energy) if energy > 0 else 0.0


def iteration_factor(theta: float, ranks: int, rho: float = 0.0) -> float:
    """How many times more steps compressed descent needs, where gradients have no noise: 1+ρ+θ/n.

    The step size that is certain to descend shrinks by this factor. (The standard analysis of
    unbiased compressors; the derivation and its assumptions are in docs/theory.md.)
    """
    return 1 + rho + theta / ranks


def noise_factor(theta: float, rho: float = 0.0, heterogeneity: float = 0.0) -> float:
    """The same where gradient noise decides: 1+ρ+θ(1+ζ²/σ²).

    `heterogeneity` is ζ²/σ²: how far the ranks' expected gradients are from their mean, squared,
    over the variance of one rank's stochastic gradient. 0 where all ranks draw from the same data.
    """
    return 1 + rho + theta * (1 + heterogeneity)


# ------------------------------------------------------------------------------ sums never overflow


def largest_partial_sum(codes: ArrayLike) -> NDArray[np.int64]:
    """Largest |sum| that can occur while the rows of `codes` are added, in any order or grouping.

    Every intermediate result is the sum of a subset of the ranks, and the extreme subsets are all
    positive and all negative codes: max(Σ max(q_i, 0), Σ max(-q_i, 0)).

    Args:
        codes: integers of shape (ranks, elements).
    Returns: int64 of shape (elements,).
    """
    q = np.asarray(codes, dtype=np.int64)
    positive = np.maximum(q, 0).sum(axis=0)
    negative = np.maximum(-q, 0).sum(axis=0)
    result: NDArray[np.int64] = np.maximum(positive, negative)
    return result


def fits_lane(codes: ArrayLike, bits: int) -> bool:
    """Whether no partial sum of these codes, in any order, leaves a lane of `bits` bits.

    Then none leaves int32 either: |Σ_k v_k 2^(bk)| <= (2^(b-1)-1)(2^(bK)-1)/(2^b-1) < 2^31 for
    K = ⌊32/b⌋ lanes. True for all codes of at most `lanes.levels(bits, ranks)`.
    """
    return bool(np.all(largest_partial_sum(codes) <= 2 ** (bits - 1) - 1))
