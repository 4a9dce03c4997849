"""The token: what Horovod itself reduces while our own operations reduce the gradient.

`compress` hands Horovod a token of four float64 numbers in place of the gradient: 1, and a
fingerprint of the tensor. Horovod reduces it with the op and the scaling that the user chose, all
of them linear, so the fingerprint comes back as itself, times the first number, if all ranks
reduced the same tensor. The scaling itself is not read off the token: ranks that have called
hvd.join() send zeros, which Horovod averages with the others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from .config import ConfigMismatchError

NUMBERS = 4  # in a token
BYTES = 8 * NUMBERS  # that Horovod reduces for a tensor: float64

# Fingerprints are small integers, so that sums over any number of ranks stay exact enough.
_FINGERPRINT_RANGE = 251


def make(name: str, shape: Sequence[int], dtype: str, bucket: str = "") -> tuple[float, ...]:
    """Token of a tensor: 1, then its fingerprint, and that of the bucket in which it is."""
    text = f"{name}\0{','.join(map(str, shape))}\0{dtype}" + (f"\0{bucket}" if bucket else "")
    digest = hashlib.blake2b(text.encode(), digest_size=NUMBERS - 1).digest()
    return (1.0, *(1.0 + byte % _FINGERPRINT_RANGE for byte in digest))


def check(
    reduced: Sequence[float],
    own: tuple[float, ...],
    name: str,
    world_size: int,
    function: str = "GlobalQSGD",
) -> None:
    """Raise ConfigMismatchError where the ranks reduced different tensors under one name."""
    if tuple(reduced) == own:  # the mean of equal tokens, most often
        return
    scale = reduced[0]
    # One rank that differs by 1 moves the mean by 1 / world_size; rounding moves it far less.
    tolerance = 0.25 / world_size
    agree = math.isfinite(scale) and scale != 0.0
    if agree:
        agree = all(
            abs(theirs / scale - mine) <= tolerance
            for theirs, mine in zip(reduced[1:], own[1:], strict=True)
        )
    if not agree:
        raise ConfigMismatchError(
            f"{function}: the ranks disagree about tensor {name!r}: the reduced fingerprint is "
            f"{list(reduced)}, this rank's is {list(own)}. Every rank has to reduce a tensor of "
            "the same name, shape and dtype, and an optimizer of the same parameters."
        )
