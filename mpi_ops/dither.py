"""Randomness as data: the Philox key and stream of one quantization.

The generator has no state. Its key identifies (seed, tensor name), its stream (step, rank, stage)
and its counter the element, so the dither is reproducible, and independent between tensors, steps
and stages. Between ranks it is independent too, or repels: then their errors partly cancel where
their codes are added (kernels/elements.h says how).
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Stage(IntEnum):
    """Where in a reduction a random number is used; stages of one step never share numbers."""

    QUANTIZE = 0
    REDUCE = 1


MAXIMUM_RANK = 2**24 - 1
MAXIMUM_STRATA = 8
NEAREST = 15  # in the place of strata: no random numbers, values round to the nearest level


def strata_for(ranks: int) -> int:
    """Bits of as many strata as so many ranks need; beyond 256 ranks, cohorts of 256 have them."""
    return min((ranks - 1).bit_length(), MAXIMUM_STRATA)


def dither(
    seed: int, name: str, step: int, rank: int, stage: Stage, strata: int = 0
) -> NDArray[np.uint32]:
    """Key (2 words) and stream (2 words) for the kernels, as a uint32 array of four.

    Arguments:
        seed: any integer.
        name: of what is quantized.
        step: taken modulo 2**32.
        rank: 0 to 2**24 - 1.
        stage: what the numbers are for.
        strata: 0 for numbers that are independent of other ranks'; else those of ranks below
            2**strata (modulo 256) repel each other, in `quantize_standard` alone. 0 to 8, see
            `strata_for`; the same on all ranks. Or NEAREST, there alone as well.
    """
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little")
    words = (key & 0xFFFFFFFF, key >> 32, step & 0xFFFFFFFF, rank << 8 | strata << 4 | stage)
    return np.array(words, dtype=np.uint32)
