"""Inputs that every rank can compute for every rank, and the law that a compressed mean follows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import Any

import horovod.torch as hvd
import torch

from gq_horovod.path import auto
from gq_horovod.path.config import Config, Plan
from gq_horovod.path.pipeline import pipelines
from gq_horovod.torch import GlobalQSGD
from mpi_ops.nodes import Placement, placement, rounds

Tensors = Sequence[torch.Tensor]

# A sound quantizer fails one comparison with probability at most 2 exp(-Z**2 / 2) = 3e-8, and the
# suite makes some 10**4. The dither is fixed by seeds, so what passes once passes always.
Z = 6.0
GROUPED = 2.0  # see Law

# Bits and levels that every test of values runs with; None is the default width.
CONFIGURATIONS = [
    ("standard", 4),
    ("standard", 8),
    ("standard", None),
    ("exponential", 4),
    ("exponential", 8),
    ("two-hop", 4),
    ("two-hop", 8),
]

# The launcher runs the tests of GlobalQSGD with each.
TRANSPORT = os.environ.get("GQ_TEST_TRANSPORT", "horovod")

_instances: dict[Any, GlobalQSGD] = {}


def compressor(levels: str = "standard", bits: int | None = None, **options: Any) -> GlobalQSGD:
    """One instance per configuration, because the first use of each costs an agreement."""
    options = {"min_elements": 0, "transport": TRANSPORT, **options}
    key = (levels, bits, *sorted(options.items()))
    if key not in _instances:
        _instances[key] = GlobalQSGD(levels=levels, bits=bits, **options)
    return _instances[key]


def plan_of(compression: GlobalQSGD, ranks: int) -> Plan:
    config: Config = compression.config
    return config.plan(ranks // ranks_per_node(compression, ranks))


def ranks_per_node(compression: Any, ranks: int) -> int:
    """How many of so many ranks add their tensors exactly before codes are made."""
    config: Config = compression.config
    # None with TensorFlow, in whose jobs the Horovod of PyTorch is not initialized.
    if not PLACEMENT or not PLACEMENT[0].has_levels:
        return 1
    if ranks < hvd.size() or not config.hierarchical or config.no_nodes:
        return 1
    return PLACEMENT[0].ranks_per_node


def by_nodes(inputs: Tensors, compression: GlobalQSGD) -> list[torch.Tensor]:
    """What codes are made of: the inputs, or the mean of each node's."""
    own = ranks_per_node(compression, len(inputs))
    if own == 1:
        return [tensor.detach().reshape(-1).double() for tensor in inputs]
    flat = [tensor.detach().reshape(-1).float() / own for tensor in inputs]
    nodes = PLACEMENT[0].nodes
    return [reduce(torch.add, [flat[rank] for rank in ranks]).double() for ranks in nodes]


PLACEMENT: list[Placement] = []  # of all ranks


def place(node: Callable[[], int]) -> None:
    """Find out where all ranks are, by the number of this one's node."""
    nodes = hvd.allgather(torch.tensor([node()]), name="test.placement").tolist()
    found = placement(nodes)
    assert isinstance(found, Placement), found
    PLACEMENT[:] = [found]


# ------------------------------------------------------------------------------------------- inputs


def gradient(
    rank: int, shape: int | Sequence[int], tag: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """A rank's gradient: normal, of a scale that changes every 96 elements, every 11th a zero."""
    generator = torch.Generator().manual_seed(1000 * tag + rank)
    x = torch.randn(shape, generator=generator)
    flat = x.view(-1)
    flat *= 2.0 ** -(torch.arange(flat.numel()) // 96 % 6)
    flat[5::11] = 0
    return x.to(dtype)


def gradients(shape: int | Sequence[int], tag: int = 0, **options: Any) -> list[torch.Tensor]:
    """The gradients of all ranks."""
    return [gradient(rank, shape, tag, **options) for rank in range(hvd.size())]


# ---------------------------------------------------------------------------------------------- law


def norms_of(inputs: torch.Tensor, plan: Plan, shares: int = 1) -> torch.Tensor:
    """The global norm of each element's block; `inputs` is (ranks, elements) in float64.

    `shares` are those of which each is measured by another rank of a node.
    """
    count = inputs.shape[1]
    if plan.block_size is None and shares > 1:  # that of a tensor is the largest of its parts'
        (own,) = rounds((count,), plan, shares, count)
        parts = [inputs[:, part.start : part.stop] for parts in own.shares for part in parts]
        return torch.stack([norms_of(part, plan).amax() for part in parts]).amax().expand(count)
    block = plan.block_for(count)
    padded = torch.nn.functional.pad(inputs, (0, -count % block)).view(len(inputs), -1, block)
    local = padded.norm(dim=2) if plan.norm == "l2" else padded.abs().amax(dim=2)
    return local.amax(dim=0).repeat_interleave(block)[:count]


def neighbours(y: torch.Tensor, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """The level that y rounds to, and the distance to the next one that it may round to instead."""
    if plan.levels != "exponential" and not plan.square:
        low = (y * plan.level_count).floor() / plan.level_count
        return low, torch.full_like(y, 1 / plan.level_count)
    if plan.levels != "exponential":  # sign(k)·k² in units of 1/s²
        magnitude = y.abs() * plan.level_count**2
        below = magnitude.sqrt().floor()
        down = (y < 0) & (magnitude > below**2)  # away from zero is down
        number = torch.where(down, -below - 1, below.copysign(y))
        return number * number.abs() / plan.units, (2 * number + 1).abs() / plan.units
    smallest = 2.0 ** (2 - 2 ** (plan.bits - 1))
    _, exponent = torch.frexp(y.abs())
    low = torch.where(y.abs() < smallest, 0.0, torch.ldexp(torch.ones_like(y), exponent - 1))
    width = torch.where(low == 0, smallest, low)
    return low.copysign(y), width.copysign(y)


def field_product(a: int, b: int, degree: int) -> int:
    """The product in the field of 2**degree elements, degree <= 3."""
    product = 0
    for bit in range(degree):
        product ^= (a << bit) * (b >> bit & 1)
    for bit in range(2 * degree, degree - 1, -1):
        if product >> bit & 1:
            product ^= (0b11, 0b111, 0b1011)[degree - 1] << (bit - degree)
    return product


def inside_parts(share: torch.Tensor, strata: int) -> list[torch.Tensor]:
    """Probabilities of rounding up, given where the ranks stand; each of these is as likely.

    `share` are the ranks' own, (ranks, elements). With strata the ranks stand in different ones of
    2**strata parts of [0, 1), by every factor and every shift of the field, and independently
    inside of them.
    """
    if strata == 0:
        return [share]
    size, found = 2**strata, []
    for factor, shift in product(range(1, size), range(size)):
        parts = [field_product(factor, rank, strata) ^ shift for rank in range(len(share))]
        found.append((size * share - torch.tensor(parts)[:, None]).clamp(0, 1))
    return found


def outcomes(
    x: torch.Tensor, norms: torch.Tensor, plan: Plan
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every (probability, value) that the mean of the rows of x can take, element by element."""
    scale = torch.where(norms > 0, norms, 1.0)
    y = x / scale
    low, width = neighbours(y, plan)
    share = (y - low) / width
    places = [(1 - own, own) for own in inside_parts(share, plan.strata)]
    for up in product((0, 1), repeat=len(x)):
        choice = torch.tensor(up, dtype=torch.float64)[:, None]
        probability = torch.zeros_like(norms)
        for own in places:
            factors = [own[direction][rank] for rank, direction in enumerate(up)]
            probability += reduce(torch.mul, factors) / len(places)
        mean = (low + choice * width).mean(dim=0)
        if plan.levels != "exponential":
            yield probability, mean * scale
        else:  # the mean of the codes is rounded to a code again
            below, distance = neighbours(mean, plan)
            above = (mean - below) / distance
            yield probability * (1 - above), below * scale
            yield probability * above, (below + distance) * scale


def farthest(ways: Sequence[auto.Way]) -> float:
    """How far a mean may be from the exact one, in norms, whichever of the ways it took."""
    widths = []
    for plan in (way.plan for way in ways if way.plan is not None):
        own = (2 * plan.level_count - 1 if plan.square else 1) / plan.units
        widths.append(own if plan.in_flight else 2 * own)  # which rounds the mean again
    return max(widths)


@dataclass(frozen=True)
class Law:
    """Exact moments and range of each element of a compressed mean; float64, one per element."""

    mean: torch.Tensor
    variance: torch.Tensor
    fourth: torch.Tensor  # central moment
    low: torch.Tensor
    high: torch.Tensor
    slack: torch.Tensor  # what the arithmetic may add: float32, then the result's dtype
    level: torch.Tensor  # at most, of a second rounding; zero where there is none
    # How many times further sums of squares may be off than those of independent elements: where
    # ranks repel each other, 256 elements share the distances between them.
    grouped: float = 1.0


def law_of(inputs: Tensors, compression: GlobalQSGD, factor: float = 1.0) -> Law:
    """The law of `factor` times the mean of `inputs`, by enumeration of all roundings.

    With two-hop levels, of those of the first hop. What the second makes of a block depends on all
    of its elements (tests/single/test_two_hop.py judges it, given the first).
    """
    dtype = inputs[0].dtype
    plan = plan_of(compression, len(inputs))
    x = torch.stack(by_nodes(inputs, compression))
    norms = norms_of(x, plan, ranks_per_node(compression, len(inputs)))
    pairs = list(outcomes(x, norms, plan))
    probability = torch.stack([pair[0] for pair in pairs])
    value = torch.stack([pair[1] for pair in pairs])
    # The enumeration is right: it is unbiased, as the paper says, and leaves nothing out.
    torch.testing.assert_close(probability.sum(dim=0), torch.ones_like(norms))
    exact = (probability * value).sum(dim=0)
    torch.testing.assert_close(exact, x.mean(dim=0), rtol=0, atol=1e-12 * float(norms.max()))
    value = (value.to(dtype) * factor).to(dtype).double()
    mean = (probability * value).sum(dim=0)
    error = value - mean
    infinity = torch.tensor(torch.inf, dtype=torch.float64)
    # Four roundings of float32, each half a unit of at most the norm; and a result that this moves
    # across the middle between two numbers of its dtype goes to the other one.
    coarsest = 0.0  # distance of two levels of a second rounding, in norms
    if plan.levels == "two-hop":
        coarsest = (2 * plan.level_count - 1 if plan.square else 1) / plan.units
    slack = 2.0**-22 * norms * factor + torch.finfo(dtype).eps * value.abs().amax(dim=0)
    return Law(
        mean=mean,
        variance=(probability * error**2).sum(dim=0),
        fourth=(probability * error**4).sum(dim=0),
        low=torch.where(probability > 0, value, infinity).amin(dim=0),
        high=torch.where(probability > 0, value, -infinity).amax(dim=0),
        slack=slack,
        level=norms * coarsest * factor,
        grouped=GROUPED if plan.strata else 1.0,
    )


def _allowed(variance: torch.Tensor, width: torch.Tensor) -> float:
    """How far a sum of independent numbers may be from its mean: Bernstein's inequality.

    Z sigma, and a second term that makes it hold for rare events too, where the sum is not normal.
    """
    return Z * float(variance.sum()) ** 0.5 + Z**2 * float(width.max()) / 3


def check_mean(
    result: torch.Tensor, inputs: Tensors, compression: GlobalQSGD, *, factor: float = 1.0
) -> None:
    """Assert that `result` is a sample of the law: range, mean, and variance from both sides."""
    assert result.shape == inputs[0].shape
    assert result.dtype == inputs[0].dtype
    law = law_of(inputs, compression, factor)
    got = result.detach().reshape(-1).double()
    assert bool((got >= law.low - law.level - law.slack).all()), "below the lowest possible mean"
    assert bool((got <= law.high + law.level + law.slack).all()), "above the highest possible mean"
    check_errors((got - law.mean)[None, :], law)


def check_errors(errors: torch.Tensor, law: Law) -> None:
    """Assert that the rows of `errors`, independent samples, have mean zero and the law's variance.

    Three sums are compared: of the errors, of the errors away from zero (shrinkage is a bias too),
    and of their squares. A second rounding is unbiased, and adds at most a quarter of its level's
    square.
    """
    samples = len(errors)
    slack = float(law.slack.sum()) * samples
    width = law.high - law.low + law.level
    most = law.variance + law.level**2 / 4
    allowed = _allowed(most * samples, width) + slack
    for name, sign in (("up", 1.0), ("away from zero", law.mean.sign())):
        off = float((errors * sign).sum())
        assert abs(off) <= allowed, f"biased {name} by {off}, allowed {allowed}"
    fourth = law.fourth + law.level**2 * width**2
    allowed = law.grouped * _allowed((fourth - law.variance**2).clamp(min=0) * samples, width**2)
    allowed += samples * float((2 * law.slack * width + law.slack**2).sum())
    off = float((errors**2 - law.variance).sum())
    second = samples * float((law.level**2 / 4).sum())
    assert -allowed <= off <= second + allowed, (
        f"sum of squares is off by {off}, allowed {allowed} and {second} more"
    )


def check_averages(errors: torch.Tensor, law: Law) -> None:
    """Assert that averaging the rows of `errors` shrinks their variance as independent ones do."""
    repetitions = len(errors)
    average = errors.mean(dim=0)
    variance = law.variance / repetitions
    # The variance of a squared average, from its fourth cumulant: kappa / R**3 + 2 variance**2.
    cumulant = law.fourth - 3 * law.variance**2
    second = law.level**2 / 4 / repetitions  # a second rounding adds up to this
    of_square = float((cumulant / repetitions**3 + 2 * (variance + second) ** 2).sum())
    off = float((average**2 - variance).sum())
    slack = float((2 * law.slack * (law.high - law.low)).sum())
    allowed = law.grouped * Z * of_square**0.5 + slack
    assert -allowed <= off <= float(second.sum()) + allowed


# ----------------------------------------------------------------------------------------- replicas


def all_bytes(tensors: Tensors, process_set: Any = hvd.global_process_set) -> torch.Tensor:
    """The bytes of some tensors, a row for each rank."""
    own = torch.cat([t.detach().contiguous().reshape(-1).view(torch.uint8) for t in tensors])
    gathered = hvd.allgather(own, name="test.replicas", process_set=process_set)
    return gathered.view(process_set.size(), -1)


def unfinished() -> bool:
    """Whether anything is under way on this rank, whoever has begun it."""
    return any(not own.done for line in pipelines() for own in line._in_flight.values())


def check_replicas(*tensors: torch.Tensor, process_set: Any = hvd.global_process_set) -> None:
    """Assert that every rank holds the same bytes."""
    rows = all_bytes(tensors, process_set)
    differing = [rank for rank, row in enumerate(rows) if not torch.equal(row, rows[0])]
    assert not differing, f"ranks {differing} differ from rank 0"
