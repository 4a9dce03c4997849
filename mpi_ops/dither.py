"""Randomness as data: the Philox key and stream of one quantization.

The generator has no state. Its key identifies (seed, tensor name), its stream (step, rank, stage)
and its counter the element, so the dither is reproducible, and independent between ranks, tensors,
steps and stages.
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


def dither(seed: int, name: str, step: int, rank: int, stage: Stage) -> NDArray[np.uint32]:
    """Key (2 words) and stream (2 words) for the kernels, as a uint32 array of four.

    `seed` is any integer; `step` is taken modulo 2**32; 0 <= `rank` <= 2**24 - 1.
    """
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little")
    words = (key & 0xFFFFFFFF, key >> 32, step & 0xFFFFFFFF, rank << 8 | stage)
    return np.array(words, dtype=np.uint32)
