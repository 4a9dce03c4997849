"""How short QSGD's codes become with an entropy coder: bits per element of a given gradient.

The QSGD of this package sends codes of a fixed width, or with `coding="elias"` in Elias' gamma
codes. Its paper (Alistarh et al., NeurIPS 2017) sends Elias' omega codes, of all elements or, for
sparse gradients, of those that are not zero and of the gaps between them. These functions say how
long each is, and what no code of single elements can go below: the empirical entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mpi_ops import codec, lanes
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels import host
from mpi_ops.kernels.host import Buffer

from ..path.config import Plan
from .baselines import QSGDConfig

Integers = NDArray[np.int64]

_NORM_BITS = 32


class CodeLength(NamedTuple):
    """Bits per element, with the norms (32 bits for each block)."""

    fixed: float  # as they travel here, without what fills up the last words
    entropy: float
    elias_omega: float
    elias_gamma: float  # as coding="elias" sends them, without lengths of streams
    elias_gaps: float  # gamma codes of the gaps between codes that are not zero, and of those


def qsgd_code_length(gradient: NDArray[Any], config: QSGDConfig | None = None) -> CodeLength:
    """Bits per element that QSGD needs for a gradient.

    Arguments:
        gradient: float16, float32 or float64 of any shape, with at least one element.
        config: the options of QSGD; None for the defaults.

    Each code is an integer c. Elias' codes hold |c| + 1, and one bit for the sign where c is not
    zero; with gaps they hold |c| itself, and how many places further it is than the one before.
    Deterministic in the gradient and `config.seed`. Raises ValueError for an empty gradient
    or one that is not finite, and TypeError for another dtype.
    """
    config = config or QSGDConfig()
    x = np.ascontiguousarray(gradient).reshape(-1)
    if x.size == 0 or not np.isfinite(x).all():
        got = "none" if x.size == 0 else "NaN or Inf"
        raise ValueError(
            f"qsgd_code_length: gradient must have finite elements, got {got}; leave such a step "
            "out."
        )
    plan = config.plan(1)
    codes = standard_codes(x, plan, config.seed)
    norms = _NORM_BITS * lanes.blocks(x.size, plan.block_for(x.size)) / x.size
    return CodeLength(
        fixed=plan.bits + norms,
        entropy=entropy(codes) + norms,
        elias_omega=_signed(codes, elias_omega_bits) + norms,
        elias_gamma=_signed(codes, elias_gamma_bits) + norms,
        elias_gaps=_gaps(codes) + norms,
    )


def standard_codes(x: NDArray[Any], plan: Plan, seed: int = 0) -> Integers:
    """The codes of a flat gradient, between -plan.level_count and plan.level_count."""
    buffer = Buffer.of(x)
    random = dither(seed, "codes", 0, 0, Stage.QUANTIZE)
    payload = codec.quantize(buffer, codec.norms(buffer, plan), plan, random)
    # A norm equal to the divisor decodes each lane to its integer.
    top = 2 ** (plan.bits - 1) - 1
    lanes_of = np.empty(x.size, dtype=np.float32)
    host.dequantize_standard(
        payload,
        np.array([top], dtype=np.float32).view(np.int32),
        Buffer.of(lanes_of),
        block_size=lanes.whole_tensor_block(x.size),
        bits=plan.bits,
        divisor=top,
    )
    return lanes_of.astype(np.int64)


def entropy(codes: Integers) -> float:
    """Empirical entropy of single codes, in bits: the sum of -p log2 p over the values."""
    _, counts = np.unique(codes, return_counts=True)
    p = counts / codes.size
    return float(-(p * np.log2(p)).sum()) + 0.0  # not -0.0


def elias_gamma_bits(numbers: Integers) -> Integers:
    """Length of Elias' gamma code of integers from 1: 2 floor(log2 n) + 1.

    P. Elias, "Universal codeword sets and representations of the integers", IEEE Transactions on
    Information Theory 21(2), 1975.
    """
    return 2 * _floor_log2(numbers) + 1


def elias_omega_bits(numbers: Integers) -> Integers:
    """Length of Elias' omega (recursive) code of integers from 1, as QSGD's paper uses it.

    From the same paper of Elias: one final zero; and while n > 1, n in binary, whose length less
    one is the next n.
    """
    rest = np.array(numbers, dtype=np.int64)
    bits = np.ones_like(rest)
    while np.any(more := rest > 1):
        length = _floor_log2(rest)
        bits += np.where(more, length + 1, 0)
        rest = np.where(more, length, rest)
    return bits


def _signed(codes: Integers, bits_of: Callable[[Integers], Integers]) -> float:
    """Mean bits of a code: its magnitude, from 1, and a sign where it is not zero."""
    magnitudes = np.abs(codes)
    return float(np.mean(bits_of(magnitudes + 1) + (magnitudes > 0)))


def _gaps(codes: Integers) -> float:
    """Mean bits of an element where only codes that are not zero are written."""
    (places,) = np.nonzero(codes)
    gaps = np.diff(places, prepend=-1)
    magnitudes = np.abs(codes[places])
    total = elias_gamma_bits(gaps) + 1 + elias_gamma_bits(magnitudes)
    return float(total.sum() / codes.size)


def _floor_log2(numbers: Integers) -> Integers:
    _, exponents = np.frexp(np.asarray(numbers, dtype=np.float64))  # exact below 2**53
    logarithms: Integers = exponents.astype(np.int64) - 1
    return logarithms
