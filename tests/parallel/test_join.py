"""hvd.join(): ranks with fewer batches than others, with all levels and both transports.

A rank that has joined contributes zeros, and Average still divides by the number of all ranks, as
without compression. Of Horovod's operations only Allreduce works meanwhile.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import (
    TRANSPORT,
    check_mean,
    check_replicas,
    farthest,
    gradient,
    ranks_per_node,
    unfinished,
)
from horovod.common.exceptions import HorovodInternalError
from test_optimizer import SHAPES, check_gradient, local_gradient, make_optimizer, make_parameters

from gq_horovod.path import auto
from gq_horovod.path.pipeline import poll_all
from gq_horovod.research.torch_baselines import QSGD, IntSGD
from gq_horovod.torch import GlobalQSGD, allreduce, frontend

pytestmark = pytest.mark.usefixtures("several_ranks")

LEVELS = ["standard", "exponential", "two-hop", "auto"]
EVERY = pytest.mark.parametrize("levels", LEVELS)
QUANTIZING = pytest.mark.parametrize("levels", LEVELS[:-1])
MIN_ELEMENTS = 1000


def new(levels: Any, **options: Any) -> GlobalQSGD:
    """Not shared with other tests: what happens before the first agreement matters."""
    options = {"min_elements": MIN_ELEMENTS, "transport": TRANSPORT, **options}
    return GlobalQSGD(levels=levels, **options)


def last() -> int:
    return hvd.size() - 1


def train(
    compression: GlobalQSGD, batches: Sequence[Sequence[int]], after: Callable[[], None] = hvd.join
) -> dict[str, Any]:
    """Train; batches[epoch][rank] are a rank's. All gradients are judged as they come."""
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, compression)
    step = 0
    for epoch in batches:
        longest = max(epoch)
        for batch in range(epoch[hvd.rank()]):
            for name, parameter in parameters.items():
                own = local_gradient(parameters, name, hvd.rank(), step + batch)
                (parameter * own).sum().backward()
            optimizer.synchronize()
            for name in parameters:
                present = [batch < count for count in epoch]
                judge(parameters, name, step + batch, present, compression)
            with optimizer.skip_synchronize():
                optimizer.step()
            optimizer.zero_grad()
        after()
        step += longest
        # What a joined rank has missed it gets from the others, as every such program does it.
        hvd.broadcast_parameters(parameters, root_rank=epoch.index(longest))
    return parameters


def judge(
    parameters: Any, name: str, step: int, present: list[bool], compression: GlobalQSGD
) -> None:
    inputs = [
        local_gradient(parameters, name, rank, step) * (1.0 if present[rank] else 0.0)
        for rank in range(hvd.size())
    ]
    result = parameters[name].grad
    assert result is not None
    levels = compression.config.levels
    # "auto" has several ways. So have messages, and nodes: until all ranks have been there they are
    # not used.
    nodes = ranks_per_node(compression, hvd.size()) > 1
    if levels == "auto" or ((TRANSPORT == "mpi" or nodes) and not all(present)):
        config = replace(compression.config, levels="auto", bits=None)
        ways = auto.settings(config, hvd.size())
        exact = torch.stack([own.double() for own in inputs]).mean(dim=0)
        largest = max(float(own.abs().max()) for own in inputs)
        assert float((result.double() - exact).abs().max()) <= 1.01 * largest * farthest(ways)
    elif all(present) or levels == "standard" or result.numel() < MIN_ELEMENTS:
        check_gradient(result, inputs, compression)
    else:  # sums of standard levels of 16 bits, by the norms of the levels chosen
        block = compression.config.plan(hvd.size()).block_size
        check_mean(result, inputs, GlobalQSGD(levels="standard", bits=16, block_size=block))


def uneven(first: int, others: int) -> list[int]:
    """Batches of an epoch: the last rank has fewer."""
    return [*[others] * last(), first]


# ----------------------------------------------------------------------------------------- training


@EVERY
def test_a_rank_without_a_batch_in_the_first_epoch(levels: str) -> None:
    """It has compared its options with nobody when the others train, and comes back later."""
    train(new(levels), [uneven(0, 3), uneven(3, 3), uneven(0, 2), uneven(2, 2)])


@EVERY
def test_ranks_with_fewer_batches(levels: str) -> None:
    train(new(levels), [uneven(1, 3), uneven(4, 2), [3 - rank % 3 for rank in range(hvd.size())]])


@EVERY
def test_all_ranks_join_at_once(levels: str) -> None:
    train(new(levels), [uneven(2, 2), uneven(2, 2)])


@QUANTIZING
def test_codes_of_joined_ranks_were_cached(levels: str) -> None:
    """Horovod crashes a rank that has joined where others start an Alltoall that it remembers."""
    train(new(levels), [uneven(6, 6), uneven(1, 6)])


@QUANTIZING
def test_joining_with_gradients_on_their_way(levels: str, name: str) -> None:
    """Plain Horovod completes them. Nobody may start codes of them after that."""
    compression = new(levels)
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, compression)
    for step in range(3):
        for key, parameter in parameters.items():
            own = local_gradient(parameters, key, hvd.rank(), step)
            (parameter * own).sum().backward()
        hvd.barrier()  # or Horovod crashes: every rank must have begun what one has that joins
        if hvd.rank() % 2:
            time.sleep(0.02)  # the norms are there, and nobody has asked
        hvd.join()
        optimizer.synchronize()
        for key in SHAPES:
            judge(parameters, key, step, [True] * hvd.size(), compression)
        with optimizer.skip_synchronize():
            optimizer.step()
        optimizer.zero_grad()
    check_replicas(*parameters.values())


@QUANTIZING
def test_joining_after_a_step_that_was_abandoned(levels: str, name: str) -> None:
    """A program has caught an error and forgotten all of it. The ranks were not equally far.

    Horovod crashes a rank in hvd.join() where others have begun what it has not.
    """
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, new(levels))
    for key, parameter in parameters.items():
        own = local_gradient(parameters, key, hvd.rank(), 0)
        (parameter * own).sum().backward()
    hvd.barrier()  # all norms are under way
    if hvd.rank() != last():
        time.sleep(0.05)
        poll_all()
    del optimizer, parameter, parameters
    gc.collect()
    if hvd.rank() == last():
        time.sleep(0.1)
    hvd.join()
    assert not unfinished()
    train(new(levels), [uneven(2, 2)])


@QUANTIZING
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_reaches_all_that_are_left(levels: str, value: float, name: str) -> None:
    compression = new(levels)
    own = gradient(hvd.rank(), 3000, tag=31)
    allreduce(own, name, compression=compression)
    if hvd.rank() != last():
        if hvd.rank() == 0:
            own[1500] = value
        result = allreduce(own, name, compression=compression)
        block = slice(1500 // 256 * 256, (1500 // 256 + 1) * 256)
        whole = compression.config.plan(hvd.size()).block_size is None
        assert bool(result[slice(None) if whole else block].isnan().all())
        assert whole or bool(result[: block.start].isfinite().all())
    hvd.join()


# -------------------------------------------------------------------------------- what is agreed on


@EVERY
def test_steps_are_the_same_on_all_ranks_after_it(levels: str, name: str) -> None:
    """So ranks' dithers repel each other, and trials of "auto" take place together, as before."""
    compression = new(levels)
    own = gradient(hvd.rank(), 2000, tag=32)
    for count in (3, 5):
        for _ in range(count if hvd.rank() != last() else count - 2):
            allreduce(own, name, compression=compression)
        hvd.join()
        allreduce(own, name, compression=compression)
        steps = [group["steps"] for group in compression.state_dict()["process_sets"].values()]
        everywhere = hvd.allgather_object(steps, name="test.steps")
        assert everywhere == [everywhere[0]] * hvd.size()
    assert steps[0][name] == 10


def test_trials_that_one_rank_has_missed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It takes the finalists and the decision from the others."""
    clock = iter(range(10**6))
    timed = partial(auto.Trials, clock=lambda: float(next(clock)))
    monkeypatch.setattr(frontend, "Trials", timed)
    monkeypatch.setattr(auto, "STEPS", (2, 2))
    own = gradient(hvd.rank(), 2000, tag=33)
    every = auto.WARM_UP_STEPS + 2 * 2 * len(auto.settings(new("auto").config, hvd.size()))
    for missed in (5, every + 3, 70):
        compression = new("auto")
        present = 70 if hvd.rank() != last() else 70 - missed
        for _ in range(present):
            allreduce(own, f"{name}.{missed}", compression=compression)
        hvd.join()
        result = allreduce(own, f"{name}.{missed}", compression=compression)
        check_replicas(result)
        (decision,) = compression.decisions.values()
        assert decision is not None
        decisions = hvd.allgather_object(str(decision), name="test.decisions")
        assert decisions == [decisions[0]] * hvd.size()


@QUANTIZING
def test_without_a_join_that_is_uneven_nothing_changes(levels: str, name: str) -> None:
    """Tensors that are reduced more often than others keep their own steps, and so their bytes."""
    own = gradient(hvd.rank(), 2000, tag=34)
    rows = []
    for joins in (True, False):
        compression = new(levels)
        results = []
        for _ in range(2):
            results += [allreduce(own, name, compression=compression) for _ in range(2)]
            results.append(allreduce(own, f"{name}.seldom", compression=compression))
            if joins:
                hvd.join()
        rows.append(torch.stack(results))
    assert torch.equal(*rows)


def test_replicas_are_compared_while_a_rank_has_joined(name: str) -> None:
    compression = new("standard", check_replicas=1)
    train(compression, [uneven(1, 3), uneven(0, 2), uneven(2, 2)])


def test_a_baseline_says_why_it_cannot(name: str) -> None:
    """Horovod's own error recommends an option of sparse gradients."""
    if hvd.rank() != last():
        with pytest.raises(HorovodInternalError, match=r"hvd.join\(\), and the compression in use"):
            allreduce(gradient(hvd.rank(), 5000), name, compression=QSGD(min_elements=0))
    hvd.join()


@pytest.mark.parametrize("steps", [0, 2], ids=["float32", "integers"])
def test_integers_of_all_ranks_but_one_are_an_error_that_names_it(steps: int, name: str) -> None:
    """Horovod adds zeros for that rank, which no other error would tell from another alpha."""
    compression, own = IntSGD(min_elements=0), gradient(hvd.rank(), 5000)
    for _ in range(steps):
        allreduce(own, name, compression=compression)
    if hvd.rank() != last():
        with pytest.raises(RuntimeError, match=rf"IntSGD: all .* got {last()}: .*hvd\.join\(\)"):
            allreduce(own, name, compression=compression)
    hvd.join()


def test_two_instances_and_a_process_set(name: str) -> None:
    """Every group agrees anew by itself."""
    every = [new("two-hop"), new("exponential")]
    own = gradient(hvd.rank(), 2000, tag=35)
    for count in (0, 2, 1):
        for _ in range(2 if hvd.rank() != last() else count):
            for place, compression in enumerate(every):
                allreduce(own, f"{name}.{place}", compression=compression)
        hvd.join()
        for place, compression in enumerate(every):
            check_replicas(allreduce(own, f"{name}.{place}", compression=compression))
