"""check_replicas=k: whether all ranks still have the same parameters, compared every k steps.

Every rank puts digests of its parameters into its own rows of a table of zeros; a Max-allreduce
fills in the others' rows. Rows that stay zero are those of ranks that have called hvd.join().

It knows no framework.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpi_ops.agreement import by_value

from ..path.pipeline import Handle

_WORDS = 2  # of 31 bits in a digest
_LISTED = 5  # tensors in an error message


class ReplicaMismatchError(RuntimeError):
    """Ranks have different parameters, which they should have updated alike."""


def digest(data: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Two words, never zero and not negative, of the bytes of a parameter."""
    found = hashlib.blake2b(data.data, digest_size=4 * _WORDS).digest()
    words = np.frombuffer(found, dtype=np.uint32) >> 1
    return np.maximum(words, 1).astype(np.int32)


def table(digests: Sequence[NDArray[np.int32]], rank: int, ranks: int) -> NDArray[np.int32]:
    """What a rank contributes: ranks × tensors × 2 words, flat, all zero but its own."""
    result = np.zeros((ranks, len(digests), _WORDS), dtype=np.int32)
    result[rank] = np.reshape(digests, (len(digests), _WORDS))
    return result.reshape(-1)


class Steps:
    """Counts an optimizer's steps by the gradients that it reduces, in whatever order."""

    def __init__(self) -> None:
        self._reduced: dict[str, int] = {}
        self._begun = 0

    def begin(self, name: str) -> int | None:
        """Count a gradient; the number of the step if it is the first one of it, else None."""
        count = self._reduced.get(name, 0) + 1
        self._reduced[name] = count
        if count <= self._begun:
            return None
        self._begun = count
        return count - 1


@dataclass(frozen=True)
class Check:
    """A comparison under way."""

    names: list[str]  # of the tensors
    ranks: list[int]  # of the process set, in the world
    step: int
    handle: Handle

    def finish(self, function: str) -> None:
        """Raise ReplicaMismatchError, on every rank, if any tensor differs."""
        found = self.handle.wait().reshape(len(self.ranks), len(self.names), _WORDS)
        require_same(found, self.names, self.ranks, self.step, function)


def require_same(
    found: NDArray[np.int32], names: list[str], ranks: list[int], step: int, function: str
) -> None:
    """Raise ReplicaMismatchError, naming tensors and ranks, unless all digests are equal."""
    present = found.any(axis=(1, 2))  # the others have called hvd.join()
    different = []
    for index, name in enumerate(names):
        digests = {
            rank: found[row, index].astype(">u4").tobytes().hex()
            for row, rank in enumerate(ranks)
            if present[row]
        }
        having = by_value(digests)
        if len(having) > 1:
            listed = ", ".join(f"{text} on {where}" for text, where in having.items())
            different.append(f"{name!r} is {listed}")
    if different:
        more = f"; and {len(different) - _LISTED} more tensors" if len(different) > _LISTED else ""
        raise ReplicaMismatchError(
            f"{function}(check_replicas): before step {step} the parameters differ between ranks "
            f"(digests): {'; '.join(different[:_LISTED])}{more}. Broadcast parameters and "
            "optimizer state before training (hvd.broadcast_parameters, "
            "hvd.broadcast_optimizer_state), and update parameters in the same way on every rank."
        )
