"""How far apart levels are, and what rounding to them costs: the formulas of the kernels' rounding.

docs/theory.md derives them; `gq_horovod.research.theory` has the rest. Words: s levels on each side
of zero; y is an element in units of its norm; a *position* is an element in units of a level: s·y
where levels are even, and where they are square, linear between them.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .dither import MAXIMUM_STRATA, strata_for

Array = NDArray[np.float64]

# Fractional bits of a standard position (mpi_ops/kernels/elements.h, quantize_standard).
FIXED_POINT = 2**16
# Ranks whose dithers repel each other (mpi_ops/kernels/elements.h, Dither).
COHORT = 2**MAXIMUM_STRATA
# Largest relative variance of rounding y to one of the powers of two around it (docs/theory.md).
EXPONENTIAL_WORST = 1 / 8
# The same on average over y that are uniform on a logarithmic scale: 3 / (4 ln 2) - 1.
EXPONENTIAL_TYPICAL = 0.75 / math.log(2) - 1


def fixed_point(position: ArrayLike) -> Array:
    """A position as the kernel has it, with 16 fractional bits."""
    result: Array = np.rint(np.multiply(position, float(FIXED_POINT))) / FIXED_POINT
    return result


def square_position(y: ArrayLike, levels: int) -> Array:
    """Where `y` = x/norm lies among square levels ±(k/s)²: k on level k, linear in between. Exact.

    k + (s²|y| - k²)/(2k+1) for k² <= s²|y| <= (k+1)², with the sign of y.
    """
    magnitude = np.minimum(np.abs(np.asarray(y, dtype=np.float64)), 1.0) * levels**2
    low = np.floor(np.sqrt(magnitude))
    result: Array = np.copysign(low + (magnitude - low**2) / (2 * low + 1), y)
    return result


def square_width(position: ArrayLike) -> Array:
    """Distance of the two square levels around a position, in units of norm/s²: 2k+1."""
    result: Array = np.abs(2 * np.floor(fixed_point(position)) + 1)
    return result


def repelled_factor(ranks: int) -> float:
    """What repelling dithers leave of the variance of a sum, for independent uniform fractions.

    1 - (n-1)(M+1)/(2M²), from the mean of `repelled_covariance` over fractions that are independent
    and uniform: 0.53 for 4 ranks and 0.50 for 64. M = 2^strata for n ranks; 1 for one rank.
    """
    n = min(ranks, COHORT)
    parts = 2 ** strata_for(n)
    return 1 - (n - 1) * (parts + 1) / (2 * parts**2)
