"""What a training step costs with each way of reducing gradients, from a description of a cluster.

Two models. `paper_*` is that of the paper (arXiv 2305.18627), for one Allreduce. `cost` and
`step_time` extend it: the operations that GlobalQSGD really starts, the bytes that its codec really
makes, kernels, Horovod's cycle and fusion, and overlap with the backward pass. docs/advisor.md says
where each formula comes from, how well it predicts, and what it leaves out.

Everything here is arithmetic; importing this module starts no MPI and imports no framework.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mpi_ops import wire
from mpi_ops.chunks import chunk_elements, columns, forwarded
from mpi_ops.dither import MAXIMUM_RANK

from ..path import token
from ..path.buckets import cut
from ..path.config import Config

FLOAT32_BYTES = 4
FLOAT16_BYTES = 2


# ------------------------------------------------------------------------------------ the paper's


def paper_allreduce(ranks: int, size: float, latency: float, beta: float, gamma: float) -> float:
    """Seconds of one Allreduce: T = 2 log n α + 2 log n S/β + log n S/γ (arXiv 2305.18627).

    A tree that reduces and then broadcasts the whole vector; log is to base 2.

    Args:
        ranks: n, at least 1.
        size: S, bytes.
        latency: α, seconds per message.
        beta: β, network bandwidth in bytes/s.
        gamma: γ, throughput of the reduction kernel in bytes/s.
    """
    hops = math.log2(ranks)
    return 2 * hops * latency + 2 * hops * size / beta + hops * size / gamma


def paper_compressed_allreduce(
    ranks: int, size: float, latency: float, beta: float, gamma: float, omega: float
) -> float:
    """The same for float32 compressed to 8 bits: S/4, and a reduction kernel ω times slower."""
    return paper_allreduce(ranks, size / 4, latency, beta, gamma / omega)


# --------------------------------------------------------------------------------------- a cluster

# A share of the bandwidth, above 0 and at most 1: of payloads of all sizes, or (bytes, share) of
# some sizes, in growing order.
Efficiency = float | tuple[tuple[float, float], ...]

MOST_RANKS = MAXIMUM_RANK + 1  # each of them has a dither

# How codes travel: Allreduce; Alltoall and Allgather; messages of transport="mpi".
WAYS = ("allreduce", "gather", "message")


# From so many bytes of each rank an Allgather goes around a ring: Open MPI's Allgatherv, which
# Horovod calls. Gloo's and NCCL's do so for less, too.
RING_BYTES = 4096


class Pattern(NamedTuple):
    """What one rank sends in an exchange among all."""

    rounds: int  # one after the other: each begins when the one before has arrived
    messages: int  # in all rounds together
    leaving: float  # bytes that leave its host, from all ranks there, as a multiple of the payload
    inside: float = 0.0  # bytes that it sends to others of its host, likewise


@dataclass(frozen=True)
class Kernels:
    """γ: throughput of what a rank computes, in bytes read plus written per second.

    The defaults are those of one core of a Xeon server with AVX-512 (docs/benchmarks.md, "Kernels":
    ratios to a memcpy of 21 GB/s), rounded down. `gq-horovod calibrate` measures them.
    """

    norm: float = 12e9  # largest magnitude of each block
    quantize: float = 11e9  # float32 in, payload out
    square: float = 6e9  # the same to the square levels of two-hop codes
    reduce: float = 7e9  # decode, average and round exponential codes
    dequantize: float = 19e9  # payload in, float32 out
    cast: float = 10e9  # float32 to float16, or back
    sum: float = 10e9  # add two arrays, as Allreduce does

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            _require_positive("Kernels", name, value, "bytes per second")


@dataclass(frozen=True)
class Cluster:
    """What the model knows of a cluster. Raises ValueError on values that cannot be.

    The defaults of latency and efficiencies are for TCP on cloud Ethernet, and are guesses until
    `gq-horovod calibrate` has measured them.
    """

    ranks: int  # n, at least 2
    bandwidth: float  # β of a host's link in each direction, bits/s
    latency: float = 50e-6  # α, seconds from the start of a small message to its arrival
    message_overhead: float = 5e-6  # seconds of processor time of each further message in flight
    ranks_per_host: int = 1
    # Bits/s in each direction at which a rank of a host exchanges floats with all others there.
    inner_bandwidth: float = 8e9
    # What the payload reaches of the bandwidth:
    allreduce_efficiency: Efficiency = 0.6  # Allreduce, beside its sums
    gather_efficiency: Efficiency = 0.6  # Alltoall and Allgather
    message_efficiency: Efficiency = 0.6  # messages between pairs of ranks, transport="mpi"
    # Share of the shorter one of kernels and communication that the longer one does not hide, with
    # codes that travel in each of these ways. 0: all but the first piece is hidden. 1: they take
    # turns, as where ranks share cores.
    allreduce_exposed: float = 0.0
    gather_exposed: float = 0.0
    message_exposed: float = 0.0
    # Share of computation during which codes advance where more gradients are still to come. 1: as
    # if nothing else went on. Less where messages wait for a hook, or threads for a core.
    allreduce_hidden: float = 1.0
    gather_hidden: float = 1.0
    message_hidden: float = 1.0
    # Seconds that a lone operation of Horovod waits before it starts: its thread looks for work
    # once in HOROVOD_CYCLE_TIME (1 ms by default) and negotiates with the other ranks.
    cycle_time: float = 1e-3
    operation_overhead: float = 50e-6  # seconds of each further operation in flight
    fusion_threshold: int = 128 << 20  # bytes, HOROVOD_FUSION_THRESHOLD
    kernels: Kernels = field(default_factory=Kernels)

    def __post_init__(self) -> None:
        for name, least in (("ranks", 2), ("ranks_per_host", 1), ("fusion_threshold", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"Cluster: {name} must be an integer of at least {least}, got {value!r}."
                )
        if self.ranks > MOST_RANKS:
            raise ValueError(f"Cluster: ranks must be at most {MOST_RANKS}, got {self.ranks}.")
        if self.ranks_per_host > self.ranks:
            raise ValueError(
                f"Cluster: ranks_per_host must be at most ranks ({self.ranks}), got "
                f"{self.ranks_per_host}; ranks counts those of all hosts."
            )
        for name in ("bandwidth", "inner_bandwidth"):
            _require_positive("Cluster", name, getattr(self, name), "bits per second")
        for name in ("latency", "message_overhead", "cycle_time", "operation_overhead"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ValueError(
                    f"Cluster: {name} must be a number of seconds, 0 or more, got {value!r}."
                )
        for way in WAYS:
            for name in (f"{way}_exposed", f"{way}_hidden"):
                value = getattr(self, name)
                if not _is_number(value) or not 0 <= value <= 1:
                    raise ValueError(f"Cluster: {name} must be a share, 0 to 1, got {value!r}.")
            name = f"{way}_efficiency"
            value = getattr(self, name)
            if not _is_efficiency(value):
                raise ValueError(
                    f"Cluster: {name} must be a share of the bandwidth, above 0 and at most 1, or "
                    f"pairs of bytes and such a share by growing bytes, got {value!r}."
                )

    # What differs where gradients lie on a GPU: see `gpu_nodes`.

    @property
    def sums(self) -> float:
        """Bytes per second at which Allreduce adds."""
        return self.kernels.sum

    def crossing(self, size: float) -> float:
        """Seconds in which `size` bytes pass between gradients and network: one memory, none."""
        return 0.0

    # Ranks of a host may reduce among themselves first: `Method.hierarchical`.

    @property
    def hierarchical(self) -> bool:
        """Whether they can: there are several hosts, with as many ranks on each, but not one."""
        several = 1 < self.ranks_per_host < self.ranks
        return several and self.ranks % self.ranks_per_host == 0

    @property
    def of_one_place(self) -> Cluster:
        """The ranks with one place in their hosts, with their share of the links."""
        hosts, bandwidth = self.ranks // self.ranks_per_host, self.bandwidth / self.ranks_per_host
        return replace(self, ranks=hosts, ranks_per_host=1, bandwidth=bandwidth)

    def inside(self, size: float) -> float:
        """Seconds of an Alltoall, or an Allgather, of `size` bytes among the ranks of a host.

        h-1 messages at once: α + (h-2)o + (h-1)/h·8S/β_i.
        """
        sent = (self.ranks_per_host - 1) / self.ranks_per_host * size
        further = max(self.ranks_per_host - 2, 0) * self.message_overhead
        return self.latency + further + 8 * sent / self.inner_bandwidth

    # Bytes as a multiple of the vector's: those that leave a host, from all its ranks, and those
    # that a rank sends to others of its host. Ranks are placed in blocks.

    @property
    def _ring(self) -> tuple[float, float]:
        """Half of a ring: only the last rank of a host sends to another host."""
        passed = (self.ranks - 1) / self.ranks
        several = self.ranks_per_host > 1
        return passed if self.ranks > self.ranks_per_host else 0.0, passed if several else 0.0

    @property
    def _direct(self) -> tuple[float, float]:
        """Every rank of a host sends its part to every other rank."""
        elsewhere = self.ranks - self.ranks_per_host
        return self.ranks_per_host * elsewhere / self.ranks, (self.ranks_per_host - 1) / self.ranks

    def _seconds(self, pattern: Pattern, size: float, efficiency: Efficiency) -> float:
        """Of a pattern whose payload is `size` bytes: r·α + (m-r)·o + 8·leaving·S/β'.

        Latencies of messages in flight together overlap, what the processor does for each does not
        (o and α as in LogP, Culler et al. 1993). What stays inside the host travels meanwhile.
        """
        waits = pattern.rounds * self.latency
        further = (pattern.messages - pattern.rounds) * self.message_overhead
        link = pattern.leaving / (self.bandwidth * share_reached(efficiency, size))
        return waits + further + 8 * size * max(link, pattern.inside / self.inner_bandwidth)

    @property
    def to_each(self) -> Pattern:
        """Each rank sends an n-th of its payload to every other one: all at once."""
        return Pattern(1, self.ranks - 1, *self._direct)

    def to_all(self, size: float) -> Pattern:
        """Each rank's n-th of `size` bytes goes to all.

        Bruck's algorithm for short pieces, and a ring.
        """
        if size / self.ranks < RING_BYTES:
            hops = math.ceil(math.log2(self.ranks))
            return Pattern(hops, hops, *self._direct)
        return Pattern(self.ranks - 1, self.ranks - 1, *self._ring)

    @property
    def by_rows_and_columns(self) -> tuple[Pattern, Pattern]:
        """As `to_each`, and then shares to all, through one rank between: some 2√n messages each.

        That is how `mpi_ops.exchange` does it where pieces are short. Of R rows of C ranks one
        sends R pieces of codes to C-1 of its row and C to R-1 of its column, but of shares one to
        R-1 and R to C-1: n-1, as without them.
        """
        n, c = self.ranks, columns(self.ranks)
        r = n // c
        leaving, inside = self._direct
        back = Pattern(2, r + c - 2, leaving, inside)
        twice = (2 * n - r - c) / (n - 1)
        return back._replace(leaving=twice * leaving, inside=twice * inside), back

    def hops(self, size: float) -> tuple[Pattern, Pattern]:
        """The messages that bring `size` bytes of codes to their shares, and these to all ranks.

        Arguments:
            size: of one rank's codes, which are as many pieces as there are ranks.
        """
        if forwarded(self.ranks, math.ceil(size / self.ranks)):
            return self.by_rows_and_columns
        return self.to_each, self.to_each

    def both_hops(self, size: float) -> float:
        """Seconds of them."""
        return sum(self._seconds(own, size, self.message_efficiency) for own in self.hops(size))

    def allreduce(self, size: float) -> float:
        """Seconds of a bare Allreduce of `size` bytes: the fastest of three, and the sums.

        Ring: 2(n-1)α + 2(n-1)/n·8S/β'. Recursive halving and doubling (Rabenseifner):
        2⌈log2 n⌉α + 2h(n-h)/n·8S/β', h the ranks of a host. (Thakur, Rabenseifner and Gropp,
        "Optimization of Collective Communication Operations in MPICH", 2005; h from placing ranks
        in blocks.) Where there are n/h hosts of h ranks, also halving among the ranks of one place
        between two exchanges inside: 2(1 + ⌈log2 n/h⌉)α + 2(h-2)o + 2(n-h)/n·8S/β'. Each rank adds
        (n-1)/n·S bytes, reading two and writing one: 3(n-1)/n·S/γ.
        """
        n, hops = self.ranks, math.ceil(math.log2(self.ranks))
        ways = [Pattern(n - 1, n - 1, *self._ring), Pattern(hops, hops, *self._direct)]
        if self.hierarchical:
            h, hosts = self.ranks_per_host, self.of_one_place.ranks
            hops = math.ceil(math.log2(hosts))
            ways.append(Pattern(1 + hops, h - 1 + hops, (hosts - 1) / hosts, (h - 1) / h))
        half = min(self._seconds(own, size, self.allreduce_efficiency) for own in ways)
        return 2 * half + 3 * (n - 1) / n * size / self.sums

    def alltoall(self, size: float) -> float:
        """Seconds of an Alltoall in which a rank has `size` bytes, its own part included."""
        return self._seconds(self.to_each, size, self.gather_efficiency)

    def allgather(self, size: float) -> float:
        """Seconds of an Allgather of `size` bytes in all."""
        return self._seconds(self.to_all(size), size, self.gather_efficiency)


@lru_cache(maxsize=4096)  # asked for every chunk, at every bandwidth that `break_even` tries
def share_reached(efficiency: Efficiency, size: float) -> float:
    """The share of the bandwidth that a payload of `size` bytes reaches.

    Between two sizes it is linear in log(bytes); beyond the first and the last it stays.
    """
    if not isinstance(efficiency, tuple):
        return efficiency
    sizes, shares = zip(*efficiency, strict=True)
    return float(np.interp(math.log(max(size, 1)), np.log(sizes), shares))


def _is_efficiency(value: object) -> bool:
    if not isinstance(value, tuple):
        return _is_share(value)
    if not value or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in value):
        return False
    sizes = [size for size, _ in value]
    growing = all(_is_number(size) and size > 0 for size in sizes) and sizes == sorted(set(sizes))
    return growing and all(_is_share(share) for _, share in value)


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 < value <= 1  # type: ignore[operator]


def _is_number(value: object) -> bool:
    """Whether it is a finite number. An integer may be too large to be converted to one."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def _require_positive(owner: str, name: str, value: object, unit: str) -> None:
    if not _is_number(value) or value <= 0:  # type: ignore[operator]
        raise ValueError(f"{owner}: {name} must be a positive number of {unit}, got {value!r}.")


# ----------------------------------------------------------------------------------------- methods


@dataclass(frozen=True)
class Method:
    """A way of reducing gradients."""

    name: str
    argument: str  # of hvd.DistributedOptimizer
    element_bytes: int = FLOAT32_BYTES  # on the wire, where nothing is quantized
    config: Config | None = None  # where GlobalQSGD quantizes
    # Whether the advisor may recommend it unasked. 4 bits are too coarse for some models: the
    # paper's 4-bit runs diverged. Exponential levels have more error still (docs/tune.md).
    recommended: bool = True
    # Whether the ranks of a host first exchange floats, so that the codes are of their mean.
    hierarchical: bool = False

    @property
    def complexity(self) -> int:
        """0: nothing is quantized. 1: the default is. 2: something else, which has to be chosen."""
        if self.config is None:
            return 0
        default = Config()
        own = (self.config.levels, self.config.bits, self.config.transport)
        return 1 if own == (default.levels, default.bits, default.transport) else 2

    def parties(self, cluster: Cluster) -> Cluster:
        """The ranks that exchange codes with each other."""
        return cluster.of_one_place if self.hierarchical else cluster

    def why_not(self, cluster: Cluster) -> str | None:
        """Why this cannot run on a cluster, or None."""
        if self.hierarchical and not cluster.hierarchical:
            return (
                f"hierarchical: expected several hosts with as many ranks on each, got "
                f"{cluster.ranks} ranks, {cluster.ranks_per_host} on a host; leave it out."
            )
        try:
            if self.config is not None:
                self.config.plan(self.parties(cluster).ranks)
        except ValueError as error:
            return str(error)
        return None


def global_qsgd(
    name: str, config: Config, recommended: bool = True, hierarchical: bool | None = None
) -> Method:
    """A setting of GlobalQSGD, with the Python that a user writes for it.

    `hierarchical` as in GlobalQSGD; None: as where each host has one rank, and not written.
    """
    changed = {f.name: getattr(config, f.name) for f in fields(config)}
    words = [f"{key}={value!r}" for key, value in changed.items() if value != getattr(Config, key)]
    if hierarchical is not None:
        words.append(f"hierarchical={hierarchical}")
    argument = f"compression=GlobalQSGD({', '.join(words)})" if words else "compression=GlobalQSGD"
    return Method(
        *(name, argument),
        config=config,
        recommended=recommended,
        hierarchical=bool(hierarchical),
    )


NONE = Method("none", "compression=hvd.Compression.none")
FP16 = Method("fp16", "compression=hvd.Compression.fp16", element_bytes=FLOAT16_BYTES)
STANDARD = global_qsgd("standard", Config(levels="standard"))
EXPONENTIAL = global_qsgd("exponential", Config(levels="exponential"), recommended=False)
TWO_HOP = global_qsgd("two-hop", Config())
TWO_HOP_MPI = global_qsgd("two-hop, mpi", Config(transport="mpi"))
STANDARD_MPI = global_qsgd("standard, mpi", Config(levels="standard", transport="mpi"))
EXPONENTIAL_MPI = global_qsgd(
    "exponential, mpi", Config(levels="exponential", transport="mpi"), recommended=False
)
METHODS = (
    NONE,
    FP16,
    STANDARD,
    global_qsgd("standard 4 bit", Config(levels="standard", bits=4), recommended=False),
    EXPONENTIAL,
    global_qsgd("exponential 4 bit", Config(levels="exponential", bits=4), recommended=False),
    TWO_HOP,
    global_qsgd("two-hop 4 bit", Config(bits=4), recommended=False),
    STANDARD_MPI,
    global_qsgd(
        "standard 4 bit, mpi",
        Config(levels="standard", bits=4, transport="mpi"),
        recommended=False,
    ),
    EXPONENTIAL_MPI,
    global_qsgd(
        "exponential 4 bit, mpi",
        Config(levels="exponential", bits=4, transport="mpi"),
        recommended=False,
    ),
    TWO_HOP_MPI,
    global_qsgd("two-hop 4 bit, mpi", Config(bits=4, transport="mpi"), recommended=False),
)


WITHIN = ("hierarchical", "flat")  # whether ranks of a host reduce among themselves first


def methods_for(cluster: Cluster, methods: Sequence[Method] = METHODS) -> list[Method]:
    """`methods`; where hosts have several ranks those with codes twice, hierarchical and flat."""
    if not cluster.hierarchical:
        return list(methods)
    plain = [method for method in methods if method.config is None]
    coded = [(method, method.config) for method in methods if method.config is not None]
    return plain + [
        global_qsgd(f"{own.name}, {way}", config, own.recommended, hierarchical)
        for way, hierarchical in zip(WITHIN, (True, False), strict=True)
        for own, config in coded
    ]


# ------------------------------------------------------------------------------------------- bytes


def fused(sizes: Sequence[float], threshold: int) -> list[float]:
    """Bytes of the messages that Horovod makes of operations of these sizes, in their order.

    Operations are put together while they fit in `threshold` bytes; a larger one goes alone
    (Horovod's documentation, "Tensor Fusion").
    """
    messages: list[float] = []
    for size in sizes:
        if messages and messages[-1] + size <= threshold:
            messages[-1] += size
        else:
            messages.append(size)
    return messages


# -------------------------------------------------------------------------------------------- cost


@dataclass(frozen=True)
class Cost:
    """Of reducing all gradients of one step."""

    seconds: float  # from the first gradient to the last mean, nothing else going on
    kernels: float  # seconds of these that a rank's processor computes
    bytes: float  # that a rank sends: 2(n-1)/n times payload, norms and tokens
    inner_bytes: float = 0.0  # of floats that it sends to others of its host before and after

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            *(getattr(self, own.name) + getattr(other, own.name) for own in fields(Cost)),
        )


def cost(method: Method, sizes: Sequence[int], cluster: Cluster) -> Cost:
    """Seconds and bytes of reducing tensors of `sizes` float32 elements with `method`.

    Tensors of fewer than the method's `min_elements` go uncompressed, as in GlobalQSGD.
    Raises ValueError for a negative size or a width that cannot hold the sum of so many ranks.
    """
    if any(size < 0 for size in sizes):
        raise ValueError(f"cost: sizes must be 0 or more elements each, got {min(sizes)}.")
    sizes = [size for size in sizes if size]
    if method.config is None:
        return _plain(sizes, method.element_bytes, cluster)
    large = [size for size in sizes if size >= method.config.min_elements]
    small = [size for size in sizes if size < method.config.min_elements]
    return _plain(small, FLOAT32_BYTES, cluster) + _quantized(large, method, cluster)


def _operations(sizes: Sequence[float], cluster: Cluster) -> float:
    """Seconds of Horovod Allreduces of these bytes that are in flight together."""
    if not sizes:
        return 0.0
    messages = fused(sizes, cluster.fusion_threshold)
    started = cluster.cycle_time + len(sizes) * cluster.operation_overhead
    return started + _total(cluster.allreduce, messages)


def _total(seconds: Callable[[float], float], sizes: Sequence[float]) -> float:
    """Of all sizes, most of which are alike."""
    return sum(count * seconds(size) for size, count in Counter(sizes).items())


def _plain(sizes: Sequence[int], element_bytes: int, cluster: Cluster) -> Cost:
    """Horovod's own Allreduce. float16 is cast before and after: 12 bytes per element moved."""
    total = sum(sizes)
    cast = 0.0
    if element_bytes == FLOAT16_BYTES:
        cast = 2 * (FLOAT32_BYTES + FLOAT16_BYTES) * total / cluster.kernels.cast
    network = _operations([element_bytes * size for size in sizes], cluster)
    if sizes:  # out and back, while other messages are on their way
        copies = cluster.crossing(2 * element_bytes * total)
        # A whole model that is given as one number goes in messages of the fusion threshold.
        whole = math.ceil(element_bytes * total / max(cluster.fusion_threshold, 1))
        network = pipelined(copies, network, max(len(sizes), whole))
    return Cost(network + cast, cast, wire.sent_bytes(element_bytes * total, cluster.ranks))


def _quantized(sizes: Sequence[int], method: Method, cluster: Cluster) -> Cost:
    """GlobalQSGD: T = inner exchanges + norms + pipeline(kernels, codes).

    Norms are measured and reduced by a Max-Allreduce; then quantizing, reducing and decoding of
    some chunks goes on while others travel. Where the ranks of a host first reduce among
    themselves, each has the norms and the codes of its share of every bucket.
    """
    config = method.config
    if not sizes or config is None:
        return Cost(0.0, 0.0, 0.0)
    parties, kernels = method.parties(cluster), cluster.kernels
    n = parties.ranks
    plan = config.plan(n)
    together = in_buckets(sizes, config, n)
    inner, floats = 0.0, 0.0
    shares = together
    if method.hierarchical:
        h = cluster.ranks_per_host
        shares = [(math.ceil(sum(members) / h),) for members in together]
        floats = 2 * (h - 1) / h * FLOAT32_BYTES * sum(sizes)
        inner = _inside([sum(members) for members in together], cluster)
    norm_bytes = [
        # And a flag for each of several tensors.
        wire.NORM_BYTES * (sum(wire.norm_count(own, plan) for own in members) + _flags(members))
        for members in together
    ]
    if config.transport == "mpi":  # and each rank's proposal of a number
        norm_bytes = [size + 4 * cluster.ranks for size in norm_bytes]
    payloads = [
        size for members in shares for size in wire.parcel_bytes(members, plan, config.transport)
    ]
    elements, payload = sum(map(sum, shares)), sum(payloads)

    measure = FLOAT32_BYTES * elements / kernels.norm
    norms = _operations(norm_bytes, cluster) + cluster.crossing(2 * sum(norm_bytes))
    tokens = len(sizes) * (cluster.operation_overhead + cluster.allreduce(token.BYTES))
    moved = FLOAT32_BYTES * elements + payload
    quantize = kernels.square if plan.square else kernels.quantize
    compute = moved / quantize + moved / kernels.dequantize
    if plan.levels == "exponential":  # reads n shares, writes one
        compute += payload * (1 + 1 / n) / kernels.reduce
    elif plan.levels == "two-hop":  # n shares decoded and added in the cache; one measured, rounded
        share = FLOAT32_BYTES * elements / n
        compute += moved / kernels.dequantize + 3 * share * (n - 1) / kernels.sum
        compute += share / kernels.norm + moved / n / quantize
    elif config.transport == "mpi":  # n - 1 additions to a share
        compute += 3 * payload * (n - 1) / n / kernels.sum

    way = _way(config)
    if way == "message":
        network = _total(parties.both_hops, payloads)
    elif way == "allreduce":
        network = _operations(payloads, parties)
    else:
        started = cluster.cycle_time + len(payloads) * cluster.operation_overhead
        network = 2 * started
        network += _total(parties.alltoall, payloads) + _total(parties.allgather, payloads)
    exposed = getattr(cluster, f"{way}_exposed")
    # Codes out and back; where a share is reduced beside the gradients, others' shares come in and
    # the result goes out as well.
    crossing = (3 + 1 / n) * payload if way == "gather" else 2 * payload
    network = pipelined(cluster.crossing(crossing), network, len(payloads))

    seconds = measure + norms + tokens + pipelined(compute, network, len(payloads), exposed)
    sent = wire.sent_bytes(payload, n)
    sent += wire.sent_bytes(sum(norm_bytes) + token.BYTES * len(sizes), cluster.ranks)
    return Cost(seconds + inner, measure + compute, sent, floats)


def _inside(sizes: Sequence[int], cluster: Cluster) -> float:
    """Seconds of what ranks of a host exchange before and after the codes of such buckets.

    Who takes part, by a Max-Allreduce of a few numbers; an Alltoall of floats, and their sums; an
    Allgather of the results. Nothing of it is hidden behind codes of other buckets: an upper bound.
    """
    h, total = cluster.ranks_per_host, FLOAT32_BYTES * sum(sizes)
    started = 3 * (cluster.cycle_time + len(sizes) * cluster.operation_overhead)
    seconds = started + len(sizes) * cluster.allreduce(wire.NORM_BYTES)
    seconds += 2 * _total(cluster.inside, [FLOAT32_BYTES * size for size in sizes])
    # Out and in for the exchange; then a share out, and those of others in.
    seconds += cluster.crossing((2 * (h - 1) / h + 1) * total)
    return seconds + 3 * (h - 1) / h * total / cluster.kernels.sum


def in_buckets(sizes: Sequence[int], config: Config, parties: int) -> list[tuple[int, ...]]:
    """Elements of the tensors of each bucket of an optimizer, in the order in which they go.

    `sizes` are those of the tensors in the order of model.parameters(), `parties` is the number of
    those that exchange codes.
    """
    own = sizes[::-1]
    limit = config.bucket_limit(config.plan(parties))
    places = cut([FLOAT32_BYTES * size for size in own], config.first_bucket_bytes, limit)
    return [tuple(own[place] for place in chosen) for chosen in places]


def _flags(members: Sequence[int]) -> int:
    return len(members) if len(members) > 1 else 0


def _way(config: Config) -> str:
    """How the codes travel: one of WAYS."""
    if config.transport == "mpi":
        return "message"
    return "allreduce" if config.levels == "standard" else "gather"


def pipelined(first: float, second: float, pieces: int, exposed: float = 0.0) -> float:
    """Seconds of two stages of `first` and `second` seconds that work on `pieces` equal pieces.

    max + min/pieces: the slower stage is busy all the time but for one piece of the other. With one
    piece, their sum. `exposed` is the share of the shorter stage that is not hidden where that is
    more, as where the stages share a core.
    """
    return max(first, second) + min(first, second) * max(1 / pieces, exposed)


# -------------------------------------------------------------------------------------------- step


def step_time(
    method: Method, sizes: Sequence[int], cluster: Cluster, compute: float, overlap: float = 0.5
) -> float:
    """Seconds of a training step: compute, and what of the reduction is not hidden behind it.

    T = compute + max(T_reduce - h·overlap·compute, kernels, tail), with h the cluster's share of
    the time beside computation in which codes advance; 1 without codes. Kernels run where the hooks
    run, so only communication is hidden. The tail is the reduction of what becomes ready last: the
    last bucket (without codes, the tensor sizes[0]), or a chunk where sizes is a single number,
    that of a whole model.

    Args:
        method: how gradients are reduced.
        sizes: float32 elements of each tensor in the order of model.parameters(), whose first is
            ready last; or the number of all parameters alone.
        cluster: what is known of the cluster.
        compute: seconds of forward, backward and optimizer together, 0 or more.
        overlap: share of `compute` in which gradients become ready while others are still
            computed, 0 to 1. Backward takes about two thirds of a step, and its first gradients
            come some time after its start, so 0.5 is a cautious choice.

    Raises:
        ValueError: for values out of range.
    """
    if not _is_number(compute) or compute < 0:
        raise ValueError(f"step_time: compute must be seconds, 0 or more, got {compute!r}.")
    if not _is_number(overlap) or not 0 <= overlap <= 1:
        raise ValueError(
            f"step_time: overlap must be a share of the compute time, 0 to 1, got {overlap!r}."
        )
    if not sizes:
        return compute
    last = [sizes[0] if len(sizes) > 1 else min(sizes[0], chunk_elements(cluster.ranks))]
    if method.config is not None and len(sizes) > 1:
        parties = method.parties(cluster).ranks
        last = list(in_buckets(sizes, method.config, parties)[-1][::-1])
    reduction = cost(method, sizes, cluster)
    tail = min(cost(method, last, cluster).seconds, reduction.seconds)
    hidden = overlap * compute
    if method.config is not None:
        hidden *= getattr(cluster, f"{_way(method.config)}_hidden")
    return compute + max(reduction.seconds - hidden, reduction.kernels, tail)


BANDWIDTHS = (1e6, 1e11)  # bits/s: what `break_even` searches; beyond, memory limits first


def break_even(
    method: Method,
    reference: Method,
    sizes: Sequence[int],
    cluster: Cluster,
    compute: float,
    overlap: float = 0.5,
) -> float:
    """Bandwidth in bits/s below which `method` makes a faster step than `reference`.

    0.0 if it does at no bandwidth of `BANDWIDTHS`, infinity if it does at all of them. The
    arguments are those of `step_time`; the bandwidth of `cluster` is not used.
    """

    def pays(bandwidth: float) -> bool:
        there = replace(cluster, bandwidth=bandwidth)
        return step_time(method, sizes, there, compute, overlap) < step_time(
            reference, sizes, there, compute, overlap
        )

    low, high = BANDWIDTHS
    if not pays(low):
        return 0.0
    if pays(high):
        return math.inf
    while high / low > 1.001:  # what it saves shrinks with a faster network, what it costs does not
        middle = math.sqrt(low * high)
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low


# ---------------------------------------------------------------------------- the paper's workloads


@dataclass(frozen=True)
class Workload:
    """A model that the paper trains, on one GPU of each rank."""

    name: str
    parameters: int
    tensors: int
    compute: float  # seconds of a step without communication, on one A100
    measured: bool  # whether that was measured; else it follows from what was
    source: str


_LOGS = "authors' logs, 4 A100 of 80 GB, P2P, standard 8 bit; with their reduction, so at most"
WORKLOADS = (
    # An epoch has 32,768 samples 100 times: 1600 steps of 4 ranks.
    Workload("DeepLight", 607_959_381, 50, 24.2 / 1600, True, f"24.2 s / 1600 steps: {_LOGS}"),
    Workload("Wide-ResNet-101-2", 126_886_696, 314, 0.081, True, f"16 images: {_LOGS}"),
    Workload(
        *("Transformer-XL", 191_950_298, 204, 0.603 * 4 / 64, False),
        f"603 ms · 4/64 streams, as if each took as long: {_LOGS}",
    ),
)


def paper_step_speed_up(parameters: int, cluster: Cluster, compute: float) -> float:
    """Speed-up of a step by the paper's own model: 8 bits, ω = 1, full bandwidth, no overlap."""
    size = FLOAT32_BYTES * parameters
    beta, gamma = cluster.bandwidth / 8, cluster.sums / 3  # a sum moves three bytes for one
    arguments = (cluster.ranks, size, cluster.latency, beta, gamma)
    plain = paper_allreduce(*arguments)
    return (compute + plain) / (compute + paper_compressed_allreduce(*arguments, omega=1.0))


# Speed-ups that the paper and its poster report (arXiv 2305.18627): over the authors' own float32
# tree over send and receive, not over NCCL or Horovod.
PUBLISHED = (
    ("DeepLight, 64 cloud nodes, paper", 3.17),
    ("DeepLight, 64 cloud nodes, poster", 3.16),
    ("largest, abstract", 3.51),
)
