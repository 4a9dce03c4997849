"""Process sets that come and go: Horovod gives the number of one that was removed to the next."""

from __future__ import annotations

from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import TRANSPORT, check_mean, check_replicas, compressor, gradient

from gq_horovod.torch import GlobalQSGD, allreduce


@pytest.fixture(autouse=True)
def three_ranks() -> None:
    if hvd.size() < 3:
        pytest.skip("needs a third rank that is left out")


LEVELS = pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
TURNS = {
    "others": ([0, 1], [1, 2], [0, 1], [0, 2]),
    "the same": ([0, 1], [0, 1], [0, 1]),
    "larger and smaller": ([0, 1], [0, 1, 2], [0, 1]),
}


def reduce_among(ranks: list[int], compression: Any, name: str, process_set: Any) -> None:
    if hvd.rank() not in ranks:
        return
    inputs = [gradient(rank, 3000, tag=81) for rank in ranks]
    for _ in range(2):
        result = allreduce(
            gradient(hvd.rank(), 3000, tag=81),
            name,
            compression=compression,
            process_set=process_set,
        )
        check_mean(result, inputs, compression)
        check_replicas(result, process_set=process_set)


@LEVELS
@pytest.mark.parametrize("turns", TURNS)
def test_a_number_that_is_used_again(turns: str, levels: str, name: str) -> None:
    compression = GlobalQSGD(levels=levels, min_elements=0, transport=TRANSPORT)
    everybody = list(range(hvd.size()))
    for ranks in TURNS[turns]:
        if ranks == everybody:
            reduce_among(ranks, compression, name, hvd.global_process_set)
            continue
        process_set = hvd.add_process_set(ranks)
        reduce_among(ranks, compression, name, process_set)
        hvd.remove_process_set(process_set)


@LEVELS
def test_an_object_that_is_added_again(levels: str, name: str) -> None:
    process_set = hvd.ProcessSet([0, 2])
    compression = GlobalQSGD(levels=levels, min_elements=0, transport=TRANSPORT)
    for _ in range(3):
        hvd.add_process_set(process_set)
        reduce_among([0, 2], compression, name, process_set)
        hvd.remove_process_set(process_set)


def test_steps_go_on_where_a_set_comes_back(name: str) -> None:
    """No dither is used twice for the same ranks."""
    compression = GlobalQSGD(min_elements=0, transport=TRANSPORT)
    results = []
    for _ in range(2):
        process_set = hvd.add_process_set([0, 1])
        if process_set.included():
            own = gradient(hvd.rank(), 3000, tag=82)
            results.append(allreduce(own, name, compression=compression, process_set=process_set))
        hvd.remove_process_set(process_set)
    if results:
        assert not torch.equal(*results)
        assert compression.state_dict()["process_sets"]["0,1"]["steps"] == {name: 2}


def test_a_set_that_was_removed_is_an_error(name: str) -> None:
    """The same on every rank, before anything is sent."""
    process_set = hvd.add_process_set([0, 1])
    hvd.remove_process_set(process_set)
    with pytest.raises(ValueError, match=r"process_set must be one .* that was removed") as error:
        allreduce(torch.ones(5000), name, compression=compressor(), process_set=process_set)
    assert "[0, 1]" in str(error.value)


def test_two_optimizers_of_sets_that_follow_each_other(name: str) -> None:
    compression = GlobalQSGD(min_elements=0, transport=TRANSPORT)
    for ranks in ([0, 1], [1, 2]):
        process_set = hvd.add_process_set(ranks)
        if hvd.rank() in ranks:
            parameter = torch.nn.Parameter(torch.zeros(2000))
            sgd = torch.optim.SGD([parameter], lr=1.0)
            optimizer = hvd.DistributedOptimizer(
                sgd, [(name, parameter)], compression=compression, process_set=process_set
            )
            (parameter * gradient(hvd.rank(), 2000, tag=83)).sum().backward()
            optimizer.synchronize()
            inputs = [gradient(rank, 2000, tag=83) for rank in ranks]
            assert parameter.grad is not None
            check_mean(parameter.grad, inputs, compression)
        hvd.remove_process_set(process_set)


def test_a_copy_keeps_its_process_set(name: str) -> None:
    """Horovod knows the object; the copy is known by its ranks."""
    import copy

    process_set = hvd.add_process_set([0, 1])
    compression = GlobalQSGD(min_elements=0, process_set=process_set, transport=TRANSPORT)
    copied = copy.deepcopy(compression)
    reduce_among([0, 1], copied, name, process_set)
    with pytest.raises(ValueError, match="process_set must be that of the caller"):
        allreduce(torch.ones(5000), f"{name}.all", compression=copied)
    hvd.remove_process_set(process_set)
