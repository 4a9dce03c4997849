"""GlobalQSGD(check_replicas=k): ranks whose parameters drift apart are told, all in one step."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import TRANSPORT, unfinished

from gq_horovod.guards.replicas import ReplicaMismatchError
from gq_horovod.torch import GlobalQSGD, allreduce

EVERY = 3


def parameters() -> list[tuple[str, torch.nn.Parameter]]:
    """Compressed, too small for that, of another dtype, and of other strides."""
    torch.manual_seed(0)
    return [
        ("large", torch.nn.Parameter(torch.randn(100, 100))),
        ("small", torch.nn.Parameter(torch.randn(3))),
        ("half", torch.nn.Parameter(torch.randn(5000).bfloat16())),
        ("transposed", torch.nn.Parameter(torch.randn(80, 90).t())),
        ("scalar", torch.nn.Parameter(torch.tensor(2.0))),
    ]


def train(
    name: str,
    *,
    steps: int = 8,
    disturb: Callable[[int, dict[str, torch.nn.Parameter]], None] = lambda step, own: None,
    **options: Any,
) -> int:
    """Number of steps that were done."""
    named = [(f"{name}.{each}", parameter) for each, parameter in parameters()]
    compression = GlobalQSGD(check_replicas=EVERY, transport=TRANSPORT, **options)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter for _, parameter in named], lr=0.1),
        named_parameters=named,
        compression=compression,
    )
    own = {full.rsplit(".", 1)[1]: parameter for full, parameter in named}
    order = list(own.values())
    for step in range(steps):
        disturb(step, own)
        optimizer.zero_grad()
        # Ranks run their hooks in different orders.
        turned = order[hvd.rank() % 5 :] + order[: hvd.rank() % 5]
        for parameter in turned:
            (parameter.float().square().sum() * (1 + hvd.rank())).backward()
        optimizer.step()
    return steps


@pytest.mark.parametrize("levels", ["standard", "two-hop"])
def test_replicas_that_stay_equal(levels: str, name: str) -> None:
    assert train(name, levels=levels) == 8


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("which", ["large", "small", "transposed"])
def test_one_rank_drifts(which: str, name: str) -> None:
    """Every rank raises in the next step that is checked, and names the tensor and the ranks."""
    last = hvd.size() - 1

    def disturb(step: int, own: dict[str, torch.nn.Parameter]) -> None:
        reached.append(step)
        if step == EVERY + 1 and hvd.rank() == last:
            with torch.no_grad():
                own[which].add_(1.0)

    reached: list[int] = []
    with pytest.raises(ReplicaMismatchError) as raised:
        train(name, disturb=disturb)
    text = str(raised.value)
    assert reached[-1] == 2 * EVERY
    assert f"before step {2 * EVERY} the parameters differ" in text
    assert re.search(rf"'{re.escape(name)}\.{which}' is \w{{16}} on ranks? .*rank {last}", text), (
        text
    )
    for other in {"large", "small", "half", "transposed", "scalar"} - {which}:
        assert f".{other}'" not in text
    # Some ranks may go on with the rest of the step, and others forget it.
    assert not unfinished()


@pytest.mark.usefixtures("several_ranks")
def test_a_forgotten_broadcast_is_told_before_the_first_update(name: str) -> None:
    def disturb(step: int, own: dict[str, torch.nn.Parameter]) -> None:
        with torch.no_grad():
            own["large"].add_(hvd.rank())

    with pytest.raises(ReplicaMismatchError, match="before step 0 "):
        train(name, disturb=disturb)


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("order", ["added first", "added later"])
def test_parameters_of_a_group_that_was_added(order: str, name: str) -> None:
    """Horovod reduces no gradients of theirs, so ranks drift apart, and are told which."""
    torch.manual_seed(0)
    first, second = (torch.nn.Parameter(torch.randn(70, 70)) for _ in range(2))
    compression = GlobalQSGD(check_replicas=1, transport=TRANSPORT)
    sgd = torch.optim.SGD([first], lr=0.1)
    optimizer = hvd.DistributedOptimizer(sgd, [(name, first)], compression=compression)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            ((first.square() + second.square()).sum() * (1 + hvd.rank())).backward()
            optimizer.step()

    train(1 if order == "added later" else 0)
    optimizer.add_param_group({"params": [second]})
    with pytest.raises(ReplicaMismatchError) as raised:
        train(3)
    text = str(raised.value)
    assert "param_groups[1]['params'][0]" in text
    assert f"'{name}' is" not in text


def test_without_the_option_nothing_is_compared(name: str) -> None:
    parameter = torch.nn.Parameter(torch.full((5000,), float(hvd.rank())))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=0.1),
        named_parameters=[(name, parameter)],
        compression=GlobalQSGD(transport=TRANSPORT),
    )
    parameter.sum().backward()
    optimizer.step()


def test_the_watchdog_sees_operations_of_every_kind(name: str) -> None:
    compression = GlobalQSGD(min_elements=0)
    allreduce(torch.ones(100), name, compression=compression)
    x = torch.ones(2 * hvd.size())
    handles = [
        hvd.alltoall_async(x, name=f"{name}.alltoall"),
        hvd.allgather_async(x, name=f"{name}.allgather"),
        hvd.allreduce_async(x, name=f"{name}.allreduce"),
        hvd.grouped_allreduce_async([x, x.clone()], name=f"{name}.grouped"),
    ]
    assert compression._waiting() == {}  # none of them is the instance's own
    for handle in handles:
        hvd.synchronize(handle)
    assert compression._watchdog.is_alive()
