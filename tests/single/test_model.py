"""The performance model: the paper's rule, real bytes, and the directions that it must have."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gq_horovod.advisor import model
from gq_horovod.advisor.model import (
    EXPONENTIAL,
    EXPONENTIAL_MPI,
    FP16,
    METHODS,
    NONE,
    STANDARD,
    STANDARD_MPI,
    TWO_HOP,
    TWO_HOP_MPI,
    Cluster,
    Kernels,
    Method,
)
from gq_horovod.path import token
from gq_horovod.path.config import Config
from mpi_ops import chunks, codec, lanes, sizes, wire

ROOT = Path(__file__).resolve().parents[2]
positive = st.floats(1e-3, 1e3)
methods = st.sampled_from(METHODS)
counts = st.integers(1, 1 << 28)
# Half of a float's digits: sums of thousands of terms round differently.
SLACK = 1 + 1e-9


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    ranks = draw(st.integers(2, 512))
    return Cluster(
        ranks=ranks,
        ranks_per_host=draw(st.integers(1, min(ranks, 8))),
        bandwidth=draw(st.floats(1e8, 1e11)),
        latency=draw(st.floats(0, 1e-3)),
    )


# -------------------------------------------------------------------------------- the paper's model


def test_papers_formula_by_hand() -> None:
    """8 ranks: 3 hops of 1 s latency, 10 bytes at 5 bytes/s, summed at 2 bytes/s."""
    assert model.paper_allreduce(8, 10, latency=1, beta=5, gamma=2) == 2 * 3 + 2 * 3 * 2 + 3 * 5


@given(
    ranks=st.integers(2, 4096),
    size=positive,
    latency=positive,
    beta=positive,
    gamma=positive,
    omega=st.floats(1, 100),
)
def test_papers_rule_follows_from_its_formula(
    ranks: int, size: float, latency: float, beta: float, gamma: float, omega: float
) -> None:
    """Compression pays iff ω <= 4 or β < 6γ/(ω-4); not compared where both sides are equal."""
    plain = model.paper_allreduce(ranks, size, latency, beta, gamma)
    compressed = model.paper_compressed_allreduce(ranks, size, latency, beta, gamma, omega)
    assume(abs(plain - compressed) > 1e-9 * plain)
    assert (omega <= 4 or beta < 6 * gamma / (omega - 4)) == (compressed < plain)


# -------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("count", [1, 33, 4096, 1_000_003, 9_999_999])
@pytest.mark.parametrize("ranks", [2, 4, 64])
@pytest.mark.parametrize("method", [STANDARD, EXPONENTIAL, STANDARD_MPI, EXPONENTIAL_MPI])
def test_bytes_are_those_of_the_codec(method: Method, ranks: int, count: int) -> None:
    """The payload that codec makes, and what padding to equal shares adds to each chunk."""
    assert method.config is not None
    plan = method.config.plan(ranks)
    item = codec.payload_dtype(plan).itemsize
    pieces = wire.parcel_bytes((count,), plan, method.config.transport)
    exact = codec.payload_size(count, plan) * item
    padding = sum(pieces) - exact
    # A chunk ends at a whole row of words, and where ranks reduce shares, of every share.
    shares = 1 if method is STANDARD else ranks
    unit = lanes.ROW if plan.in_flight else codec.payload_size(sizes.share_unit(plan), plan)
    assert 0 <= padding <= len(pieces) * shares * unit * item
    assert padding == 0 or method is not STANDARD or len(pieces) > 1
    norms = lanes.blocks(count, plan.block_for(count))
    assert wire.norm_count(count, plan) == norms
    whole = replace(method, config=replace(method.config, min_elements=0))
    proposals = 4 * ranks if method.config.transport == "mpi" else 0
    total = sum(pieces) + 4 * norms + proposals + token.BYTES
    sent = model.cost(whole, [count], Cluster(ranks, 1e9)).bytes
    assert sent == pytest.approx(2 * (ranks - 1) / ranks * total)


@given(count=counts, bits=st.integers(2, 15), ranks=st.integers(2, 512))
def test_more_bits_are_never_fewer_bytes(count: int, bits: int, ranks: int) -> None:
    assume(lanes.levels(bits, ranks) > 0)
    cluster = Cluster(ranks, 1e9)

    def sent(width: int) -> float:
        return model.cost(
            Method("", "", config=Config(levels="standard", bits=width)), [count], cluster
        ).bytes

    assert sent(bits) <= sent(bits + 1) * SLACK


def test_bytes_of_hosts_with_several_ranks() -> None:
    """Codes of a share of every bucket among the hosts; norms of all; floats inside."""
    cluster = Cluster(64, 1e9, ranks_per_host=8)
    sizes = [3 << 20, 1 << 20, 5000]
    for flat in (STANDARD, TWO_HOP, TWO_HOP_MPI):
        assert flat.config is not None
        method = replace(flat, hierarchical=True)
        plan = flat.config.plan(8)
        payload = sum(
            sum(wire.parcel_bytes((-(-sum(own) // 8),), plan, flat.config.transport))
            for own in model.in_buckets(sizes, flat.config, 8)
        )
        norms = 4 * sum(wire.norm_count(size, plan) for size in sizes)
        found = model.cost(method, sizes, cluster)
        own = found.bytes - 2 * 7 / 8 * payload
        assert norms * 2 * 63 / 64 < own < 1.1 * norms * 2 * 63 / 64 + 4000  # tokens, flags
        assert found.inner_bytes == pytest.approx(2 * 7 / 8 * 4 * sum(sizes))
        assert model.cost(flat, sizes, cluster).inner_bytes == 0


def test_where_ranks_of_a_host_can_reduce_first() -> None:
    method = replace(STANDARD, hierarchical=True)
    for ranks, on_host, possible in ((8, 4, True), (8, 1, False), (8, 8, False), (9, 4, False)):
        cluster = Cluster(ranks, 1e9, ranks_per_host=on_host)
        assert cluster.hierarchical == possible
        reason = method.why_not(cluster)
        assert (reason is None) == possible
        assert possible or "several hosts with as many ranks on each" in str(reason)
        names = [own.name for own in model.methods_for(cluster)]
        assert len(set(names)) == len(names)
        assert ("standard, flat" in names) == ("standard, hierarchical" in names) == possible
        assert ("standard" in names) != possible


def test_small_tensors_go_uncompressed() -> None:
    cluster = Cluster(4, 1e9)
    assert model.cost(STANDARD, [4095], cluster) == model.cost(NONE, [4095], cluster)
    assert model.cost(STANDARD, [4096], cluster).bytes < model.cost(NONE, [4096], cluster).bytes


# -------------------------------------------------------------------------------------- collectives


def messages(cluster: Cluster, size: float) -> float:
    """Seconds in which each rank sends an n-th of `size` bytes to every other rank, straight."""
    return cluster._seconds(cluster.to_each, size, cluster.message_efficiency)


def test_bandwidth_terms_of_collectives() -> None:
    """No latency, free sums: 2(n-1)/n, (n-1)/n and (n-1)/n times the bytes."""
    free = Kernels(sum=1e30)
    ideal = Cluster(4, 8e9, 0.0, 0.0, allreduce_efficiency=1.0, gather_efficiency=1.0, kernels=free)
    assert ideal.allreduce(1e9) == pytest.approx(1.5)
    assert ideal.alltoall(1e9) == pytest.approx(0.75)
    assert ideal.allgather(1e9) == pytest.approx(0.75)
    assert messages(replace(ideal, message_efficiency=1.0), 1e9) == pytest.approx(0.75)
    shared = replace(ideal, ranks=8, ranks_per_host=4, inner_bandwidth=1e30)
    assert shared.allreduce(1e9) == pytest.approx(2 * 1 / 2)  # halves cross, of each place
    uneven = replace(shared, ranks=9)
    assert uneven.allreduce(1e9) == pytest.approx(2 * 8 / 9)  # a ring: one rank crosses
    assert shared.alltoall(1e9) == pytest.approx(4 * 4 / 8)  # every rank of a host to all elsewhere
    alone = replace(shared, ranks=4)  # no link is used
    assert alone.allreduce(1e9) == pytest.approx(0)
    # What ranks of a host exchange travels at the same time: here it takes longer.
    slow_inside = replace(shared, inner_bandwidth=8e8)
    assert slow_inside.allgather(1e9) == pytest.approx(10 * 7 / 8)
    assert slow_inside.alltoall(1e9) == pytest.approx(10 * 3 / 8)


def test_latency_terms_of_collectives() -> None:
    slow = Cluster(64, 1e30, latency=1.0, message_overhead=0.0)
    assert slow.allreduce(8) == pytest.approx(12)
    assert slow.alltoall(8) == pytest.approx(1)
    assert slow.allgather(8) == pytest.approx(6)
    assert slow.allgather(64 * 4096) == pytest.approx(63)  # a ring
    assert messages(slow, 8) == pytest.approx(1)
    busy = replace(slow, latency=0.0, message_overhead=1.0)
    assert busy.alltoall(8) == messages(busy, 8) == pytest.approx(62)


@pytest.mark.parametrize(("ranks", "messages"), [(2, 1), (64, 14), (100, 18), (4096, 126)])
def test_rows_and_columns_by_hand(ranks: int, messages: int) -> None:
    there, back = Cluster(ranks, 1e9).by_rows_and_columns
    assert back == (2, messages, (ranks - 1) / ranks, 0)
    assert there[:2] == (2, messages)
    # Of all pieces two ways, but for those of a row and a column that need one.
    assert there.leaving == pytest.approx((2 * (ranks - 1) - messages) / ranks)
    assert there.inside == 0


@pytest.mark.parametrize("ranks", [100, 1024, 4096])
def test_where_rows_and_columns_are_faster(ranks: int) -> None:
    """There: while the bytes of a payload take less than the overhead that is saved."""
    cluster = Cluster(ranks, 1e10)
    saved = cluster.to_each.messages - cluster.by_rows_and_columns[0].messages + 1
    seconds = saved * cluster.message_overhead - cluster.latency
    there, back = cluster.by_rows_and_columns
    limit = seconds * cluster.bandwidth * 0.6 / 8 / (there.leaving - back.leaving)
    for size in (limit / 2, limit / 1.01):
        assert cluster._seconds(there, size, 0.6) < messages(cluster, size)
    assert cluster._seconds(there, 1.01 * limit, 0.6) > messages(cluster, 1.01 * limit)


@pytest.mark.parametrize("ranks", [32, 64, 1024])
def test_short_pieces_go_by_rows_and_columns(ranks: int) -> None:
    """At 2.5 Gbit/s and more that is faster."""
    cluster = Cluster(ranks, 2.5e9)
    short, long = ranks * chunks.FORWARDED_BYTES, ranks * (chunks.FORWARDED_BYTES + 1)
    assert cluster.hops(short) == cluster.by_rows_and_columns
    assert cluster.both_hops(short) < 2 * messages(cluster, short)
    assert cluster.hops(long) == (cluster.to_each, cluster.to_each)
    assert cluster.both_hops(long) == 2 * messages(cluster, long)
    fewer = replace(cluster, ranks=chunks.FORWARDING_RANKS - 1)
    assert fewer.hops(31) == (fewer.to_each, fewer.to_each)


@pytest.mark.parametrize(
    ("ranks", "columns"), [(1, 1), (2, 2), (6, 3), (12, 4), (37, 37), (64, 8), (96, 12)]
)
def test_rows_and_columns_of_any_number_of_ranks(ranks: int, columns: int) -> None:
    assert chunks.columns(ranks) == columns
    assert chunks.forwarded(ranks, 1) == (ranks in (64, 96))  # a prime number has one row


@pytest.mark.parametrize("bandwidth", [1e10, 2.5e10])
@pytest.mark.parametrize("ranks", [1024, 4096])
def test_messages_stay_fast_with_more_ranks(ranks: int, bandwidth: float) -> None:
    """DeepLight, at least 0.9 of the speed with 64 ranks: messages grow with the ranks."""
    sizes, compute = [607_959_381], 0.0151
    few, many = (
        model.step_time(TWO_HOP_MPI, sizes, Cluster(own, bandwidth), compute) for own in (64, ranks)
    )
    assert few / many > 0.9


@pytest.mark.parametrize("bandwidth", [1e10, 2.5e10])
@pytest.mark.parametrize("ranks", [64, 256, 1024, 4096])
def test_chunks_of_any_other_size_are_no_faster(
    ranks: int, bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepLight by Horovod's operations: the best power of two gains at most a twentieth."""

    def step() -> float:
        wire.parcel_bytes.cache_clear()
        return model.step_time(TWO_HOP, [607_959_381], Cluster(ranks, bandwidth), 0.0151)

    own, others = step(), []
    for power in range(21, 31):
        for module in (wire, model):
            monkeypatch.setattr(module, "chunk_elements", lambda ranks, size=1 << power: size)
        others.append(step())
    monkeypatch.undo()
    wire.parcel_bytes.cache_clear()
    assert own < 1.05 * min(others)


def test_efficiency_of_a_size() -> None:
    """Linear in the logarithm of the size between two sizes, constant beyond them."""
    measured = ((1e6, 0.8), (1e8, 0.4))
    for size, share in ((1, 0.8), (1e6, 0.8), (1e7, 0.6), (1e8, 0.4), (1e12, 0.4), (0, 0.8)):
        assert model.share_reached(measured, size) == pytest.approx(share)
        assert model.share_reached(0.6, size) == 0.6
    cluster = Cluster(4, 8e9, 0.0, 0.0, kernels=Kernels(sum=1e30))
    by_size = replace(cluster, allreduce_efficiency=measured, gather_efficiency=measured)
    by_size = replace(by_size, message_efficiency=measured)
    for of in (Cluster.allreduce, Cluster.alltoall, Cluster.allgather, messages):
        seconds = of(cluster, 1e8)  # with the default, 0.6
        assert of(by_size, 1e7) == pytest.approx(seconds / 10)
        assert of(by_size, 1e8) == pytest.approx(seconds * 0.6 / 0.4)


def test_fusion() -> None:
    assert model.fused([1, 2, 3, 9, 1], threshold=6) == [6, 9, 1]
    assert model.fused([1, 2], threshold=0) == [1, 2]
    assert model.fused([], threshold=6) == []


def test_pipeline_of_two_stages() -> None:
    assert model.pipelined(2, 3, 1) == 5
    assert model.pipelined(2, 3, 4) == 3.5
    assert model.pipelined(3, 2, 1 << 40) == pytest.approx(3)
    # What the longer stage does not hide, where that is more than one piece.
    assert model.pipelined(3, 2, 4, exposed=0.1) == 3.5
    assert model.pipelined(3, 2, 4, exposed=0.75) == 4.5
    assert model.pipelined(2, 3, 4, exposed=1) == 5


# -------------------------------------------------------------------------------------------- steps


@given(
    method=methods,
    sizes=st.lists(counts, min_size=1, max_size=4),
    cluster=clusters(),
    faster=st.floats(1, 100),
    compute=st.floats(0, 10),
    overlap=st.floats(0, 1),
)
def test_a_faster_network_never_slows_a_step(
    method: Method,
    sizes: list[int],
    cluster: Cluster,
    faster: float,
    compute: float,
    overlap: float,
) -> None:
    assume(method.why_not(cluster) is None)
    better = replace(cluster, bandwidth=cluster.bandwidth * faster)
    slow = model.step_time(method, sizes, cluster, compute, overlap)
    assert compute <= model.step_time(method, sizes, better, compute, overlap) <= slow * SLACK


@given(method=methods, count=counts, cluster=clusters(), overlaps=st.tuples(*[st.floats(0, 1)] * 2))
def test_more_overlap_never_slows_a_step(
    method: Method, count: int, cluster: Cluster, overlaps: tuple[float, float]
) -> None:
    assume(method.why_not(cluster) is None)
    less, more = sorted(overlaps)
    slow = model.step_time(method, [count], cluster, 0.1, less)
    assert model.step_time(method, [count], cluster, 0.1, more) <= slow * SLACK


def test_without_overlap_a_step_is_the_sum() -> None:
    cluster = Cluster(4, 1e9)
    for method in METHODS:
        alone = model.cost(method, [1 << 24], cluster).seconds
        assert model.step_time(method, [1 << 24], cluster, 1.0, 0.0) == pytest.approx(1 + alone)


def test_communication_hides_but_for_the_last_tensor() -> None:
    cluster = Cluster(4, 1e9)
    last = model.cost(NONE, [10_000], cluster).seconds
    step = model.step_time(NONE, [10_000, 1 << 20], cluster, compute=1e3, overlap=1.0)
    assert step == pytest.approx(1e3 + last)


@pytest.mark.parametrize(
    ("method", "way"), [(STANDARD, "allreduce"), (EXPONENTIAL, "gather"), (STANDARD_MPI, "message")]
)
def test_what_is_exposed_and_hidden_belongs_to_a_way(method: Method, way: str) -> None:
    def step(**changed: Any) -> float:
        cluster = replace(Cluster(4, 1e9), **changed)
        return model.step_time(method, [1 << 20] * 16, cluster, compute=0.05, overlap=1.0)

    for other in model.WAYS:
        assert (step(**{f"{other}_exposed": 1.0}) > step()) == (other == way)
        # Half of the computation hides nothing any more.
        longer = step(**{f"{other}_hidden": 0.5}) - step()
        assert longer == pytest.approx(0.025 if other == way else 0.0)


def test_break_even_separates_the_two() -> None:
    cluster = Cluster(4, 1e9)
    sizes = [1 << 24]
    found = model.break_even(FP16, NONE, sizes, cluster, 0.1)
    assert 1e6 < found < 1e11
    for rate, pays in ((found / 1.1, True), (found * 1.1, False)):
        there = replace(cluster, bandwidth=rate)
        times = [model.step_time(method, sizes, there, 0.1) for method in (FP16, NONE)]
        assert (times[0] < times[1]) == pays


def test_break_even_where_there_is_none() -> None:
    cluster = Cluster(4, 1e9)
    assert model.break_even(NONE, FP16, [1 << 24], replace(cluster, latency=1.0), 0.1) == 0.0
    instant = Kernels(cast=1e30)
    assert math.isinf(
        model.break_even(FP16, NONE, [1 << 24], replace(cluster, kernels=instant), 0.0)
    )


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"ranks": 1}, "Cluster: ranks must be an integer of at least 2, got 1"),
        ({"bandwidth": 0.0}, "Cluster: bandwidth must be a positive number of bits per second"),
        ({"bandwidth": math.nan}, "Cluster: bandwidth must be"),
        ({"latency": -1.0}, "Cluster: latency must be a number of seconds, 0 or more, got -1.0"),
        ({"allreduce_efficiency": 1.5}, "Cluster: allreduce_efficiency must be a share"),
        ({"gather_efficiency": ()}, "or pairs of bytes and such a share by growing bytes, got"),
        ({"gather_efficiency": ((1e6, 0.5), (1e6, 0.6))}, "by growing bytes"),
        ({"gather_efficiency": ((0, 0.5),)}, "by growing bytes"),
        ({"message_efficiency": ((1e6, 0.0),)}, "Cluster: message_efficiency must be a share"),
        ({"message_efficiency": ((1e6,),)}, "Cluster: message_efficiency must be a share"),
        ({"gather_exposed": -0.5}, "Cluster: gather_exposed must be a share, 0 to 1, got -0.5"),
        ({"message_hidden": 1.5}, "Cluster: message_hidden must be a share, 0 to 1, got 1.5"),
        ({"ranks_per_host": 8}, "ranks_per_host must be at most ranks"),
    ],
)
def test_clusters_that_cannot_be(wrong: dict[str, object], text: str) -> None:
    values = {"ranks": 4, "bandwidth": 1e9, **wrong}
    with pytest.raises(ValueError, match=text):
        Cluster(**values)  # type: ignore[arg-type]


def test_other_values_that_cannot_be() -> None:
    cluster = Cluster(64, 1e9)
    with pytest.raises(ValueError, match="Kernels: sum must be a positive number"):
        Kernels(sum=0)
    with pytest.raises(ValueError, match="compute must be seconds"):
        model.step_time(NONE, [1], cluster, -1)
    with pytest.raises(ValueError, match="overlap must be a share"):
        model.step_time(NONE, [1], cluster, 1, 2)
    with pytest.raises(ValueError, match="sizes must be 0 or more"):
        model.cost(NONE, [-1], cluster)
    four_bits = next(method for method in METHODS if method.name == "standard 4 bit")
    reason = four_bits.why_not(Cluster(64, 1e9))
    assert reason is not None
    assert "at least 8 for standard levels on 64 ranks" in reason


def test_arguments_are_the_settings_that_they_stand_for() -> None:
    for method in METHODS[2:]:
        written = method.argument.removeprefix("compression=").replace("GlobalQSGD", "Config")
        built = eval(written)
        assert (built() if built is Config else built) == method.config
