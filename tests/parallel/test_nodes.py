"""hierarchical: gradients are added exactly inside nodes, and quantized between them.

Needs two nodes of two ranks; the tests choose which ranks are on which.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import helpers
import horovod.torch as hvd
import numpy as np
import pytest
import torch
from helpers import TRANSPORT, check_replicas, gradient
from rendezvous import restart
from seldom import in_pairs
from test_optimizer import backward, make_optimizer, make_parameters

from gq_horovod.path import agreement
from gq_horovod.research.simulation import SimulatedRanks
from gq_horovod.research.torch_baselines import QSGD, PowerSGD
from gq_horovod.torch import GlobalQSGD, allreduce, gpus, nodes
from mpi_ops.nodes import placement

SHAPES = {"matrix": (300, 100), "vector": (5003,), "small": (40,), "wide": (7, 3000)}
CONFIGS: dict[str, dict[str, Any]] = {
    "standard": {"levels": "standard"},
    "standard of 10 bits": {"levels": "standard", "bits": 10, "block_size": 96},
    "exponential": {"levels": "exponential"},
    "exponential of 4 bits": {"levels": "exponential", "bits": 4},
    "two-hop": {"levels": "two-hop"},
    "two-hop of 4 bits": {"levels": "two-hop", "bits": 4},
    # Shares of more than a block: the last one of a tensor has norms of nothing.
    "two-hop of 5 bits": {"levels": "two-hop", "bits": 5},
    "two-hop with short blocks": {"levels": "two-hop", "block_size": 64},
}
PLACES: dict[str, Callable[[], int]] = {
    "by slot": lambda: hvd.rank() // 2,
    "by node": lambda: hvd.rank() % 2,
    "crosswise": lambda: int(hvd.rank() in (1, 2)),
}
DTYPES = (torch.float32, torch.float64)


def new(**options: Any) -> GlobalQSGD:
    """Not shared with other tests: it has still to find out where ranks are.

    Standard levels, unless the options have others: what depends on the number of parties.
    """
    own = {"levels": "standard", "min_elements": 1000, "transport": TRANSPORT, **options}
    return GlobalQSGD(**own)


@pytest.fixture(params=PLACES)
def where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ranks of each node, which they find out about."""
    monkeypatch.setattr(nodes, "_node", PLACES[request.param])
    helpers.place(PLACES[request.param])
    return [list(own) for own in helpers.PLACEMENT[0].nodes]


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    if hvd.size() != 4:
        pytest.skip("needs two nodes of two ranks")
    yield
    helpers.place(nodes._node)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], str]]:
    """The text of the events of a name that this rank has logged."""
    package = logging.getLogger("gq_horovod")
    before = package.level, package.propagate
    package.setLevel(logging.INFO)
    package.propagate = True
    yield lambda event: "\n".join(
        own.getMessage() for own in caplog.records if getattr(own, "event", "") == event
    )
    package.setLevel(before[0])
    package.propagate = before[1]


def exact(rank: int, name: str, step: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A gradient whose sum over a node float32 has exactly."""
    own = gradient(rank, SHAPES[name], tag=10 * step + list(SHAPES).index(name))
    return ((own * 64).round() / 64).to(dtype)


def train(compression: Any, steps: int, dtype: torch.dtype = torch.float32) -> list[Any]:
    """The reduced gradients of each step."""
    named = {
        name: torch.zeros(shape, dtype=dtype, requires_grad=True) for name, shape in SHAPES.items()
    }
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(named.values(), lr=0.0),
        named_parameters=named.items(),
        compression=compression,
    )
    found = []
    for step in range(steps):
        optimizer.zero_grad()
        for name in named:
            (named[name] * exact(hvd.rank(), name, step, dtype)).sum().backward()
        optimizer.synchronize()
        found.append({name: own.grad.clone() for name, own in named.items()})  # type: ignore[union-attr]
    return found


@pytest.mark.parametrize(
    ("config", "where", "dtype"),
    in_pairs(tuple(CONFIGS), tuple(PLACES), DTYPES),
    indirect=["where"],
    ids=str,
)
def test_an_optimizer_gets_what_a_flat_reduction_of_the_nodes_would_give(
    config: str, where: list[list[int]], dtype: torch.dtype
) -> None:
    compression = new(**CONFIGS[config])
    flat = SimulatedRanks(compression.config, len(where))
    found = train(compression, 2, dtype)
    for step, means in enumerate(found):
        check_replicas(*means.values())
        for name, mean in means.items():
            own = [exact(rank, name, step, dtype).numpy() for rank in range(4)]
            if mean.numel() < 1000:
                np.testing.assert_allclose(mean, np.mean(own, 0), rtol=1e-5)
                continue
            of_nodes = [np.mean([own[rank] for rank in ranks], 0, own[0].dtype) for ranks in where]
            expected = flat.average(name, of_nodes)
            if helpers.PLACEMENT[0].across(1) == (where[0][1], where[1][1]):
                np.testing.assert_array_equal(mean, expected, err_msg=f"{name}, step {step}")
            else:  # ranks of a place have their own order, and its numbers
                assert mean.dtype == dtype
                error = np.abs(mean.numpy() - np.mean(own, 0)).mean()
                assert 0 < error <= 2 * np.abs(expected - np.mean(own, 0)).mean()


@pytest.mark.usefixtures("where")
@pytest.mark.parametrize("op", [hvd.Average, hvd.Sum], ids=["average", "sum"])
def test_a_tensor_without_an_optimizer(op: int, name: str) -> None:
    own = [exact(rank, "matrix", 5) for rank in range(4)]
    kept = own[hvd.rank()].clone()
    result = allreduce(own[hvd.rank()], name, op=op, compression=new(bits=16))
    assert torch.equal(own[hvd.rank()], kept)
    check_replicas(result)
    expected = sum(own) / (4 if op == hvd.Average else 1)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-3)
    assert not torch.equal(result, expected)


@pytest.mark.parametrize("grouped", [False, True])
def test_nan_reaches_every_rank(where: list[list[int]], grouped: bool, name: str) -> None:
    own = [exact(hvd.rank(), which, 1) for which in ("matrix", "wide")]
    if hvd.rank() == where[1][0]:
        own[0][7, 9] = torch.nan
    compression = new()
    if grouped:
        first, second = hvd.grouped_allreduce(own, name=name, compression=compression)
    else:
        first, second = (
            allreduce(one, f"{name}.{place}", compression=compression)
            for place, one in enumerate(own)
        )
    check_replicas(first, second)
    assert first[7, 9].isnan()
    assert 1 <= int(first.isnan().sum()) <= 256
    assert second.isfinite().all()


def test_fewer_parties_leave_levels_for_fewer_bits(name: str) -> None:
    """Lanes of 3 bits hold the sum of two codes, and not that of four."""
    x = torch.full((2000,), float(hvd.rank()))
    result = allreduce(x, name, compression=new(bits=3))
    torch.testing.assert_close(result, torch.full((2000,), 1.5), rtol=0, atol=1.5)
    with pytest.raises(ValueError, match="bits must be at least 4"):
        allreduce(x, name, compression=new(bits=3, hierarchical=False))


@pytest.mark.parametrize(
    ("hierarchical", "bits", "expected"),
    [("auto", 3, "at least 4 .* on 4 ranks"), (True, 2, "at least 3 .* on 2 nodes")],
)
def test_too_few_bits_are_refused_before_anything_is_begun(
    hierarchical: Any, bits: int, expected: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without nodes each rank sees it by itself; with nodes, no set is added for them."""

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("something was begun")

    if hierarchical == "auto":
        monkeypatch.setattr(nodes, "pays", lambda resident: resident)
        monkeypatch.setattr(agreement, "agree", never)
    else:
        monkeypatch.setattr(nodes, "reached", never)
    compression = new(levels="standard", bits=bits, hierarchical=hierarchical)
    for _ in range(2):
        with pytest.raises(ValueError, match=expected):
            allreduce(torch.ones(5000), name, compression=compression)


def test_too_few_bits_for_all_ranks_while_one_is_away(
    said: Callable[[str], str], name: str
) -> None:
    """Until all ranks have been there, codes of all ranks are added."""
    x = torch.ones(2000)
    compression = new(bits=3)
    if hvd.rank() < 3:
        with pytest.raises(ValueError, match="bits must be at least 4"):
            allreduce(x, name, compression=compression)
    hvd.join()
    assert "4 ranks on 2 nodes" not in said("plan")
    result = allreduce(x, name, compression=compression)
    torch.testing.assert_close(result, x, rtol=0, atol=1)
    assert ("4 ranks on 2 nodes" in said("plan")) is (hvd.rank() == 0)


def test_what_was_refused_is_refused_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where ranks have reduced before: one of them was away."""
    monkeypatch.setattr(nodes.hvd_ops, "is_homogeneous", lambda: False)
    x, compression = torch.ones(2000), new(hierarchical=True)
    if hvd.rank() < 3:
        allreduce(x, name, compression=compression)
    hvd.join()
    for step in range(2):
        with pytest.raises(ValueError, match="different numbers of ranks"):
            allreduce(x, f"{name}.{step}", compression=compression)


def test_what_the_log_says(
    said: Callable[[str], str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compression = new(stats=1)
    allreduce(torch.ones(5000), name, compression=compression)
    first = hvd.rank() == 0
    assert ("4 ranks on 2 nodes" in said("plan")) is first
    assert ("stats has no figures" in said("stats")) is first
    assert compression.stats == {}
    monkeypatch.setattr(nodes.hvd_ops, "is_homogeneous", lambda: False)
    allreduce(torch.ones(5000), name, compression=new())
    assert ("nodes have different numbers of ranks" in said("nodes")) is first


def test_an_elastic_job(
    said: Callable[[str], str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process sets cost it what it is for, so they are for who asks."""
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    may, asked = new(levels="standard"), new(levels="standard", hierarchical=True)
    for compression, parties in ((may, 4), (asked, 2)):
        allreduce(torch.ones(5000), name, compression=compression)
        (group,) = compression._groups.values()
        assert group.plan.world_size == parties
    warned = hvd.rank() == 0 and TRANSPORT == "horovod"
    assert ("in an elastic job" in said("nodes")) is warned


@pytest.mark.parametrize("reason", ["uneven", "numbers", "sets", "streams of NCCL"])
def test_where_it_cannot_be(
    reason: str, said: Callable[[str], str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, it is an error on every rank; else tensors are reduced among all ranks."""
    if reason == "uneven":
        monkeypatch.setattr(nodes.hvd_ops, "is_homogeneous", lambda: hvd.rank() != 2)
        expected = "nodes have different numbers of ranks"
    elif reason == "numbers":
        monkeypatch.setattr(nodes, "_node", lambda: int(hvd.rank() == 3))
        expected = "nodes have 3, 1 ranks"
    elif TRANSPORT == "mpi":
        pytest.skip("messages need no process sets")
    elif reason == "streams of NCCL":
        monkeypatch.setattr(gpus, "resident", lambda device: True)
        if hvd.rank() == 1:
            monkeypatch.setenv("HOROVOD_NUM_NCCL_STREAMS", "2")
        expected = "unset HOROVOD_NUM_NCCL_STREAMS"
    else:
        monkeypatch.setattr(nodes, "_known", dict)
        monkeypatch.setattr(nodes, "_can_add", lambda: hvd.rank() != 1)
        expected = "set HOROVOD_DYNAMIC_PROCESS_SETS=1"
    x = exact(hvd.rank(), "matrix", 3)
    with pytest.raises(ValueError, match=expected):
        allreduce(x, name, compression=new(hierarchical=True))
    compression = new()
    result = allreduce(x, f"{name}.flat", compression=compression)
    check_replicas(result)
    flat = allreduce(x, f"{name}.flat", compression=new(hierarchical=False))
    assert torch.equal(result, flat)
    assert (expected in said("nodes")) is (hvd.rank() == 0)


@pytest.mark.parametrize("ranks", [[0, 1, 2], [0, 3], [0, 1]], ids=str)
def test_process_sets_that_have_other_nodes(ranks: list[int], name: str) -> None:
    """Uneven nodes, nodes of one rank, one node: reduced among all of their ranks."""
    known = nodes._known()
    number = next((number for number, own in known.items() if own == ranks), None)
    process_set = (
        hvd.add_process_set(ranks) if number is None else nodes._process_set(number, ranks)
    )
    if hvd.rank() in ranks:
        x = exact(hvd.rank(), "vector", 2)
        options: dict[str, Any] = {"process_set": process_set}
        result = allreduce(x, name, compression=new(), **options)
        check_replicas(result, process_set=process_set)
        flat = allreduce(x, name, compression=new(hierarchical=False), **options)
        assert torch.equal(result, flat)
        if len(ranks) == 3:
            with pytest.raises(ValueError, match="nodes have 2, 1 ranks"):
                allreduce(x, name, compression=new(hierarchical=True), **options)
    if number is None:
        hvd.remove_process_set(process_set)


def test_a_process_set_of_all_ranks_that_others_have_made(name: str) -> None:
    """What is there already is used; see `by_process_sets`."""
    before = nodes._known()
    compression = new()
    allreduce(exact(hvd.rank(), "vector", 2), name, compression=compression)
    allreduce(exact(hvd.rank(), "vector", 2), name, compression=new(levels="two-hop"))
    (group,) = compression._groups.values()
    assert group.nodes is not None
    assert group.plan.world_size == 2
    if TRANSPORT == "horovod":
        assert nodes._known().keys() >= before.keys()
        assert len(nodes._known()) <= len(before) + 4


@pytest.mark.skipif(TRANSPORT != "mpi", reason="Horovod tells process sets apart")
def test_messages_of_a_process_set_with_the_ranks_of_a_place() -> None:
    """It counts its exchanges by itself: the same numbers are under way in both."""
    from gq_horovod.path import mpi

    rank = hvd.rank()
    node, place = [rank // 2 * 2, rank // 2 * 2 + 1], [rank % 2, rank % 2 + 2]
    by_nodes = mpi.Messages([0, 1, 2, 3], place, node)
    flat = mpi.Messages(place)
    begun = {}
    for value, own in ((1.0, by_nodes), (2.0, flat))[:: 1 if rank < 2 else -1]:
        collectives = mpi.Inside(own._comm, 0)
        begun[value] = collectives.alltoall(np.full(2, value, np.float32), "x", [1, 1])
    for value, handle in begun.items():
        np.testing.assert_array_equal(handle.wait(), value)


def test_a_state_goes_on_bit_for_bit() -> None:
    first, second = new(), new()
    parameters = make_parameters()
    results = []
    for compression in (first, second):
        parameters = make_parameters()
        optimizer = make_optimizer(parameters, compression)
        for step in range(2 if compression is first else 1):
            backward(parameters, step + (compression is second))
            optimizer.synchronize()
            results.append({name: own.grad.clone() for name, own in parameters.items()})  # type: ignore[union-attr]
            if compression is first and step == 0:
                second.load_state_dict(copy.deepcopy(first.state_dict()))
            with optimizer.skip_synchronize():
                optimizer.step()
            optimizer.zero_grad()
    _, wanted, found = results
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name


def test_options_that_go_with_no_nodes(name: str) -> None:
    """Their presets reduce among all ranks; to ask for both is an error."""
    for options in ({"levels": "auto"}, {"block_size": "bucket"}):
        with pytest.raises(ValueError, match="hierarchical must be 'auto' or False with"):
            new(hierarchical=True, **options)
    compression = new(block_size="bucket")
    allreduce(torch.ones(5000), name, compression=compression)
    (group,) = compression._groups.values()
    assert group.nodes is None
    assert group.plan.world_size == 4
    for other in (3, 1, np.True_):
        with pytest.raises(ValueError, match="hierarchical must be True, False or 'auto'"):
            new(hierarchical=other)


@pytest.mark.parametrize("other", [PowerSGD(rank=2), QSGD()], ids=["PowerSGD", "QSGD"])
def test_other_methods_beside_it_go_among_all_ranks(other: Any) -> None:
    """Two optimizers whose gradients are on their way together; each is as it would be alone."""
    found = []
    for together in (True, False):
        kept = []
        for number, compression in enumerate((new(levels="two-hop"), copy.copy(other))):
            parameters = make_parameters()
            named = {f"{number}.{name}": own for name, own in parameters.items()}
            kept.append((named, make_optimizer(named, compression), compression))
        results: list[torch.Tensor] = []
        for step in range(2):
            for number, (named, optimizer, _) in enumerate(kept):
                backward(named, 10 * number + step)
                if not together:
                    optimizer.synchronize()
            for named, optimizer, _ in kept:
                if together:
                    optimizer.synchronize()
                check_replicas(*(own.grad for own in named.values() if own.grad is not None))
                results += [own.grad.clone() for own in named.values() if own.grad is not None]
                optimizer.zero_grad()
        found.append(results)
        groups = [next(iter(compression._groups.values())) for *_, compression in kept]
        assert [group.nodes is None for group in groups] == [False, True]
        assert groups[1].plan.world_size == 4
    # Sums of floats depend on what Horovod fuses: of PowerSGD's factors, and of small tensors.
    exact_from = 10**9 if isinstance(other, PowerSGD) else 4096
    for one, alone in zip(*found, strict=True):
        tolerance = 0.0 if one.numel() >= exact_from else 1e-4
        torch.testing.assert_close(one, alone, rtol=tolerance, atol=tolerance)


def test_replicas_are_compared() -> None:
    compression = new(check_replicas=1)
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, compression)
    for step in range(2):
        backward(parameters, step)
        optimizer.step()
        optimizer.zero_grad()
    check_replicas(*parameters.values())


def test_placements_are_of_this_job() -> None:
    assert placement([0, 0, 1, 1]) == helpers.PLACEMENT[0] or hvd.cross_size() == 2


# --------------------------------------------------------- process sets that go, and Horovod itself


def expected_of(compression: GlobalQSGD) -> Callable[[str, int], Any]:
    """What an instance makes of `exact` gradients, step by step: those of nodes, reduced flat."""
    flat = SimulatedRanks(compression.config, 2)

    def average(name: str, step: int) -> Any:
        own = [exact(rank, name, step).numpy() for rank in range(4)]
        places = helpers.PLACEMENT[0].nodes
        return flat.average(name, [np.mean([own[rank] for rank in ranks], 0) for ranks in places])

    return average


def remove(ranks: list[int]) -> None:
    """As a program would that has added the set itself."""
    (number,) = (number for number, own in nodes._known().items() if own == ranks)
    assert hvd.remove_process_set(nodes._process_set(number, ranks))


by_process_sets = pytest.mark.skipif(TRANSPORT == "mpi", reason="messages need no process sets")


@by_process_sets
@pytest.mark.parametrize("ranks", [[2, 3], [0, 2]], ids=["a node", "a place"])
def test_a_process_set_that_is_removed_is_added_again(ranks: list[int], name: str) -> None:
    """Though Horovod has given its number to another one."""
    compression = new(levels="standard")
    average = expected_of(compression)
    other = None
    for step in range(4):
        if step == 2:
            remove(ranks)
            other = hvd.add_process_set([0, 1, 2])
        result = allreduce(exact(hvd.rank(), "wide", step), "wide", compression=compression)
        np.testing.assert_array_equal(result, average("wide", step), err_msg=f"step {step}")
    hvd.remove_process_set(other)
    # What none of them needs may come and go.
    (group,) = compression._groups.values()
    allreduce(torch.ones(5000), name, compression=compression)
    assert compression._groups == {(): group}


@by_process_sets
@pytest.mark.parametrize("first", [True, False])
def test_a_process_set_of_the_program_with_the_ranks_of_a_node(first: bool, name: str) -> None:
    """One that was added before the first gradient is taken; after it Horovod refuses another."""
    for number, own in nodes._known().items():  # as at the begin of a program
        if number:
            hvd.remove_process_set(nodes._process_set(number, own))
    own_set = hvd.add_process_set([0, 1]) if first else None
    compression = new(levels="standard")
    x = exact(hvd.rank(), "wide", 0)
    allreduce(x, name, compression=compression)
    if own_set is None:
        with pytest.raises(ValueError, match="Attempted to add a duplicate process set"):
            hvd.add_process_set([0, 1])
        return
    (group,) = compression._groups.values()
    assert group.nodes is not None
    assert group.nodes.sets[own_set.process_set_id] == [0, 1]
    if own_set.included():  # it serves both
        mean = allreduce(x, f"{name}.own", compression=compression, process_set=own_set)
        check_replicas(mean, process_set=own_set)


@by_process_sets
def test_an_optimizer_whose_process_set_is_removed() -> None:
    compression = new(levels="standard")
    average = expected_of(compression)
    parameter = torch.nn.Parameter(torch.zeros(SHAPES["wide"]))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=0.0), [("wide", parameter)], compression
    )
    for step in range(4):
        if step == 2:
            remove([0, 1])
        optimizer.zero_grad()
        (parameter * exact(hvd.rank(), "wide", step)).sum().backward()
        optimizer.step()
        np.testing.assert_array_equal(parameter.grad, average("wide", step), f"step {step}")


@by_process_sets
def test_a_process_set_that_cannot_be_added_again(
    said: Callable[[str], str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error where nodes were asked for, as often as somebody tries; else without nodes."""
    x = exact(hvd.rank(), "wide", 0)
    asked, may = new(levels="standard", hierarchical=True), new(levels="standard")
    for compression in (asked, may):
        allreduce(x, name, compression=compression)
    remove([1, 3])
    monkeypatch.setattr(nodes, "_can_add", lambda: False)
    for _ in range(2):
        with pytest.raises(ValueError, match="set HOROVOD_DYNAMIC_PROCESS_SETS=1"):
            allreduce(x, name, compression=asked)
    result = allreduce(x, name, compression=may)
    check_replicas(result)
    assert ("set HOROVOD_DYNAMIC_PROCESS_SETS=1" in said("nodes")) is (hvd.rank() == 0)
    flat = SimulatedRanks(may.config, 4)
    for _ in range(2):
        expected = flat.average(name, [exact(rank, "wide", 0).numpy() for rank in range(4)])
    np.testing.assert_array_equal(result, expected)


@by_process_sets
def test_a_process_set_that_is_removed_amid_a_step(name: str) -> None:
    """Gradients that are on their way are an error on every rank; the next step is sound."""
    compression = new(levels="two-hop")
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, compression)
    backward(parameters, 0)
    remove([0, 2])
    with pytest.raises(RuntimeError, match=r"process set of ranks \[0, 2\], which was removed"):
        optimizer.synchronize()
    x = exact(hvd.rank(), "wide", 0)
    result = allreduce(x, name, compression=compression)
    check_replicas(result)
    mean = sum(exact(rank, "wide", 0) for rank in range(4)) / 4
    assert 0 < (result - mean).abs().max() < 0.1


@pytest.mark.skipif(
    os.environ.get("HOROVOD_CONTROLLER") != "gloo", reason="MPI can be started only once"
)
def test_horovod_begins_again_with_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    compression = new(levels="standard")
    average = expected_of(compression)
    for step, place in enumerate(("by slot", "crosswise", "by slot")):
        if step:
            restart(hvd)
        monkeypatch.setattr(nodes, "_node", PLACES[place])
        helpers.place(nodes._node)
        result = allreduce(exact(hvd.rank(), "wide", step), "wide", compression=compression)
        check_replicas(result)
        expected = average("wide", step)
        if place == "by slot":
            np.testing.assert_array_equal(result, expected)
        (group,) = compression._groups.values()
        assert group.nodes is not None
        placement = helpers.PLACEMENT[0]
        wanted = {*placement.nodes, placement.across(0), placement.across(1)}
        assert set(map(tuple, group.nodes.sets.values())) == wanted
