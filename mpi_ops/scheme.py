"""How gradients are quantized: options, validated once, and what follows for a world size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

from . import lanes
from .dither import NEAREST, strata_for

# One norm for 256 elements costs 4/256 bytes each and shrinks the error of heavy-tailed gradients
# many times (docs/design.md, "Blocks").
DEFAULT_BLOCK_SIZE = 256


class ConfigMismatchError(RuntimeError):
    """Ranks of one job run with different configurations, or disagree about a tensor."""


def one_of(choices: Sequence[str]) -> str:
    """The choices, as an error lists what it expected: 'a', 'b' or 'c'."""
    *others, last = map(repr, choices)
    return f"{', '.join(others)} or {last}" if others else last


@dataclass(frozen=True)
class Scheme:
    """Options of the quantizers. Raises ValueError or TypeError on values that cannot work."""

    FUNCTION: ClassVar[str] = "mpi_ops.allreduce"  # what errors name
    LEVELS: ClassVar[tuple[str, ...]] = ("standard", "exponential", "two-hop")

    # "standard": evenly spaced levels, summed in flight by Allreduce. "exponential": powers of two,
    # whose error does not grow with the number of ranks, reduced by Alltoall and Allgather.
    # "two-hop": reduced in the same way: each rank decodes one share of all ranks' codes and rounds
    # its mean again, by norms of its own, so all levels of a code are used. Up to 8 bits they are
    # the squares of evenly spaced ones, finer where most elements are; beyond, evenly spaced.
    # The default: a training ends where it would uncompressed, whatever the number of ranks
    # (docs/quality.md), in as many bytes as the others and in as much time over MPI.
    levels: str = "two-hop"
    # Bits per code on the wire. None: 8, and for standard levels more with more ranks. Two-hop
    # codes take the widest lanes of which a word has as many: `lanes.widest`.
    bits: int | None = None
    # Elements that share a norm, a multiple of 32. "auto": 256; one norm per tensor for 8-bit
    # exponential levels, whose relative error does not depend on the norm. None: one per tensor.
    block_size: int | Literal["auto"] | None = "auto"
    # Norm of a block on one rank; the global norm is its maximum over ranks. "max" is the better
    # one; "l2" is QSGD's.
    norm: Literal["max", "l2"] = "max"
    # Key of the dither. Runs with the same seed, data and number of ranks are reproducible.
    seed: int = 0

    def __post_init__(self) -> None:
        if self.levels not in self.LEVELS:
            self._fail("levels", one_of(self.LEVELS), self.levels, "choose one of them")
        if self.norm not in ("max", "l2"):
            self._fail("norm", "'max' or 'l2'", self.norm, "choose one of them")
        self._require_integer("seed", self.seed)
        if self.bits is not None:
            self._check_bits(self.bits)
        self._check_block_size()

    def _fail(self, argument: str, expected: str, got: object, remedy: str) -> None:
        raise ValueError(f"{self.FUNCTION}: {argument} must be {expected}, got {got!r}; {remedy}.")

    def _require_integer(self, argument: str, value: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(
                f"{self.FUNCTION}: {argument} must be an integer, got {value!r} of type "
                f"{type(value).__name__}; pass an int."
            )

    def _check_bits(self, bits: int) -> None:
        self._require_integer("bits", bits)
        if self.levels != "exponential" and bits not in lanes.STANDARD_BITS:
            self._fail(
                "bits",
                f"between 2 and 16 for {self.levels} levels",
                bits,
                "leave it out for the default",
            )
        if self.levels == "exponential" and bits not in lanes.EXPONENTIAL_BITS:
            self._fail(
                "bits", "4 or 8 for exponential levels", bits, "leave it out for the default of 8"
            )

    def _check_block_size(self) -> None:
        if self.block_size in ("auto", None):
            return
        self._require_integer("block_size", self.block_size)
        assert isinstance(self.block_size, int)
        if self.block_size <= 0 or self.block_size % lanes.ROW:
            self._fail(
                "block_size",
                f"a positive multiple of {lanes.ROW}, 'auto' or None",
                self.block_size,
                "256 suits most models, None means one norm per tensor",
            )

    def plan(self, world_size: int) -> Plan:
        """The settings for `world_size` ranks. Raises ValueError if `bits` cannot hold the sum."""
        if self.levels == "exponential":
            bits = 8 if self.bits is None else self.bits
            return Plan(self.levels, bits, 0, self._block_size(bits), self.norm, world_size)
        if self.levels == "two-hop":
            return self._two_hop(world_size)
        bits = lanes.default_bits(world_size) if self.bits is None else self.bits
        levels = lanes.levels(bits, world_size)
        if levels == 0:
            needed = lanes.minimum_bits(world_size)
            remedy = (
                f"use bits={needed} or more, or leave bits out"
                if needed in lanes.STANDARD_BITS
                else "use levels='two-hop', whose codes are not added in their lanes"
            )
            self._fail(
                "bits",
                f"at least {needed} for standard levels on {world_size} ranks "
                "(the sum of all codes has to fit its lane)",
                bits,
                remedy,
            )
        return Plan(self.levels, bits, levels, self._block_size(bits), self.norm, world_size)

    def _two_hop(self, world_size: int) -> Plan:
        """The plan of two-hop levels, which are added as integers of 32 bits."""

        def fits(bits: int) -> bool:
            units = lanes.units(lanes.two_hop_levels(bits), bits <= lanes.SQUARE_BITS)
            return units * world_size < 2**31

        wanted = 8 if self.bits is None else self.bits
        # Wider lanes cost nothing where a word has as many of them.
        bits = next(filter(fits, range(lanes.widest(wanted), 1, -1)))
        if self.bits is not None and bits < wanted:
            expected = f"one whose levels of {world_size} ranks add up in 32 bits"
            self._fail("bits", expected, wanted, f"pass bits={bits}")
        return Plan(
            *(self.levels, bits, lanes.two_hop_levels(bits), self._block_size(bits), self.norm),
            *(world_size, bits <= lanes.SQUARE_BITS),
        )

    def _block_size(self, bits: int) -> int | None:
        if self.block_size != "auto":
            return self.block_size
        whole = self.levels == "exponential" and bits == 8
        return None if whole else DEFAULT_BLOCK_SIZE

    def describe(self) -> dict[str, Any]:
        """The options as plain data, for comparison between ranks and for logs."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """A configuration resolved for a world size: everything that a reduction has to know."""

    levels: str
    bits: int
    level_count: int  # levels on each side of zero; 0 for exponential ones
    block_size: int | None  # None: one block
    norm: str
    world_size: int
    square: bool = False  # code k of s stands for sign(k)·(k/s)² of its norm, and not for k/s
    one_norm: bool = False  # whether all tensors of a bucket have the largest of their norms
    nearest: bool = False  # whether ranks quantize to the nearest level, and not by a dither

    @property
    def units(self) -> int:
        """The norm as a multiple of what code 1 stands for."""
        return lanes.units(self.level_count, self.square)

    @property
    def alone(self) -> Plan:
        """The plan by which one rank's codes are decoded; not of exponential levels."""
        return replace(self, levels="standard", world_size=1)

    @property
    def in_flight(self) -> bool:
        """Whether codes are summed by Allreduce itself, and not by one rank for each share."""
        return self.levels == "standard"

    @property
    def mixes_tensors(self) -> bool:
        """Whether a share may be of several tensors; not where it has one norm."""
        return self.levels != "two-hop" or self.block_size is not None

    @property
    def strata(self) -> int:
        """Of the dithers with which the ranks quantize (see `dither`).

        Exponential levels round magnitudes, so dithers that repel would add errors up where signs
        differ.
        """
        if self.nearest:
            return NEAREST
        return 0 if self.levels == "exponential" else strata_for(self.world_size)

    def block_for(self, count: int) -> int:
        """Elements per norm in a tensor of `count` elements."""
        return self.block_size or lanes.whole_tensor_block(count)
