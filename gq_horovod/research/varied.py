"""Two-hop levels whose width varies between blocks: what that would give.

    ranks = VariedRanks(Config(levels="two-hop", bits=5), world_size=4)
    mean, sent = ranks.average("step", gradients)     # for the bytes of 5 bits in every block

All ranks have the norms of all blocks before they quantize. So each can choose a width for every
block from them, the same on all ranks, and without a byte more on the wire. The squared error of a
block grows with the square of its norm, and falls with that of its number of levels. For the least
sum of them a block of small norm has few bits, and all blocks have about the same distance between
levels. This is how rates are allotted to sources of different variance (reverse water-filling:
Cover and Thomas, Elements of Information Theory, 10.3.3), with widths that exist.

Optimizers such as Adam scale the gradient of each parameter to about the same size, so that errors
count beside the block that they are in. All blocks then want the same width. `power` lies between:
2 is for the least squared error, 0 for one width.

It is an experiment on the kernels that there are: blocks of one width are reduced together, as a
tensor of that width. So errors and bytes are those of real codes. A job would also have to bring
these blocks together and apart, which is not built. Widths depend on norms alone, so the mean stays
unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from mpi_ops.kernels.host import Buffer
from mpi_ops.wire import wire

from ..path.config import Config, Plan
from .simulation import SimulatedRanks

__all__ = ["WIDTHS", "VariedRanks", "allot"]

# Those of two-hop levels that differ in their bytes.
WIDTHS = (2, 3, 4, 5, 6, 8, 10, 16)

_MANY = 2**20  # elements, beside which the padding of a share is nothing


def allot(
    norms: NDArray[np.float32],
    levels: NDArray[np.int64],
    bits: NDArray[np.float64],
    budget: float,
    power: float,
) -> NDArray[np.int64]:
    """Return the place of each block's width among the widths.

    Arguments:
        norms: (B,), of blocks of one size; where not finite, the width does not matter.
        levels: (W,), on each side of zero, ascending.
        bits: (W,), of an element on the wire.
        budget: bits of an element, in the mean over blocks.
        power: of the norm, with which errors count.

    The least sum of norm^power / levels² of those that a Lagrange multiplier finds: at most
    `budget`, or the smallest width everywhere if that is more.
    """
    finite = np.where(np.isfinite(norms), norms, 0).astype(np.float64)
    errors = (finite / max(finite.max(initial=0.0), np.finfo(np.float64).tiny)) ** power
    costs = errors[None, :] / (levels.astype(np.float64) ** 2)[:, None]
    chosen = np.zeros(len(norms), np.int64)
    low, high = -200.0, 20.0  # of the multiplier's logarithm, to the base 2
    for _ in range(60):
        middle = (low + high) / 2
        tried = np.argmin(costs + 2.0**middle * bits[:, None], axis=0)
        if bits[tried].mean() > budget:
            low = middle
        else:
            high, chosen = middle, tried
    return chosen


class VariedRanks:
    """A job of `world_size` ranks in this process, with widths that vary between blocks."""

    def __init__(self, config: Config, world_size: int, power: float = 1.0) -> None:
        """Make them.

        Arguments:
            config: options, with two-hop levels and a block size; `bits` is the budget.
            world_size: ranks, 1 or more.
            power: of a block's norm, with which its error counts.

        Raises ValueError for other levels, for a tensor's or a bucket's norm, for no ranks.
        """
        if config.levels != "two-hop" or not isinstance(config.block_size, int | str):
            raise ValueError(
                "VariedRanks: expected two-hop levels and blocks, got "
                f"levels={config.levels!r}, block_size={config.block_size!r}."
            )
        plans = [replace(config, bits=width).plan(world_size) for width in WIDTHS]
        self.block_size = plans[0].block_for(_MANY)
        self._ranks = [SimulatedRanks(replace(config, bits=own), world_size) for own in WIDTHS]
        self._levels = np.array([plan.level_count for plan in plans])
        self._bits = np.array([_bits(plan) for plan in plans])
        self._budget = _bits(config.plan(world_size))
        self._power = power

    def average(
        self, name: str, gradients: Sequence[NDArray[np.float32]]
    ) -> tuple[NDArray[np.float32], float]:
        """The mean over ranks, and the bytes that a rank sends if the ranks form a ring.

        Arguments:
            name: of the gradients; calls are counted, and each takes other random numbers.
            gradients: (B · block_size,), one for each rank; tensors begin with a block.
        """
        blocks = np.stack(gradients).reshape(len(gradients), -1, self.block_size)
        norms = np.abs(blocks).max(axis=2).max(axis=0)
        chosen = allot(norms, self._levels, self._bits, self._budget, self._power)
        mean = np.empty(blocks.shape[1:], np.float32)
        sent = 0.0
        for place, ranks in enumerate(self._ranks):
            own = chosen == place
            if own.any():
                parts = [part.reshape(-1) for part in blocks[:, own]]
                result = np.empty_like(parts[0])
                sent += ranks.reduce(
                    f"{name}.{WIDTHS[place]}", list(map(Buffer.of, parts)), Buffer.of(result)
                )
                mean[own] = result.reshape(-1, self.block_size)
        return mean.reshape(-1), sent


def _bits(plan: Plan) -> float:
    """Of an element on the wire."""
    return wire(_MANY, plan).bits_per_element(_MANY)
