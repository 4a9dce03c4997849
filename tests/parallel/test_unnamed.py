"""Operations of Horovod without a name, wherever a program may have them beside compressed ones.

Horovod names them after a counter that all operations of a process move. What ours do has to be
invisible to it, since ranks start them at different times: here one rank is slow between its hooks,
so that it finds its norms there and starts codes, which the others have not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import check_replicas, compressor
from horovod.common.basics import HorovodBasics
from horovod.torch import mpi_ops as hvd_ops

from gq_horovod.path.config import ConfigMismatchError
from gq_horovod.torch import allreduce, numbering

LEVELS = pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
PAUSE = 5e-3  # seconds; norms of small tensors take less


@pytest.fixture(autouse=True, scope="module")
def even() -> None:
    """Ranks that have had equally many operations of their own, as plain Horovod needs it too.

    Tests before these have reduced among some ranks, and have joined at different steps.
    """
    allreduce(torch.ones(1000), "test.even", compression=compressor())
    library = numbering.library()
    assert library is not None
    assert library._others is not None
    library._others = max(hvd.allgather_object(library._others, name="test.numbers"))


def ranks_apart() -> None:
    """What makes ranks start their codes at different times."""
    if hvd.rank() % 2:
        time.sleep(PAUSE)


def tower(name: str, compression: Any, width: int = 48, **options: Any) -> tuple[Any, Any]:
    """A small network whose hooks come slowly on some ranks, and its optimizer."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, width) for _ in range(4)]
    net = torch.nn.Sequential(*layers)
    for layer in layers:
        layer.weight.register_hook(lambda _: ranks_apart())
    named = [(f"{name}.{key}", value) for key, value in net.named_parameters()]
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    return net, hvd.DistributedOptimizer(sgd, named, compression=compression, **options)


def inputs(width: int = 48) -> torch.Tensor:
    return torch.randn(8, width, generator=torch.Generator().manual_seed(hvd.rank()))


def mean_rank() -> float:
    return (hvd.size() - 1) / 2


def own(*shape: int) -> torch.Tensor:
    return torch.full(shape, float(hvd.rank()))


# Each of Horovod's functions that takes a name and is given none, and what it should return.
UNNAMED: dict[str, Callable[[], bool]] = {
    "allreduce": lambda: bool((hvd.allreduce(own(3)) == mean_rank()).all()),
    "allreduce_": lambda: bool((hvd.allreduce_(own(3)) == mean_rank()).all()),
    "allreduce_async": lambda: bool(
        (hvd.synchronize(hvd.allreduce_async(own(3), op=hvd.Max)) == hvd.size() - 1).all()
    ),
    "grouped_allreduce": lambda: all(
        bool((found == mean_rank()).all()) for found in hvd.grouped_allreduce([own(3), own(2, 2)])
    ),
    "grouped_allreduce_": lambda: all(
        bool((found == mean_rank()).all()) for found in hvd.grouped_allreduce_([own(3), own(2, 2)])
    ),
    "allgather": lambda: hvd.allgather(own(1)).tolist() == list(range(hvd.size())),
    "grouped_allgather": lambda: all(
        found.tolist() == list(range(hvd.size())) for found in hvd.grouped_allgather([own(1)] * 2)
    ),
    "broadcast": lambda: hvd.broadcast(own(2), hvd.size() - 1).tolist() == [hvd.size() - 1] * 2,
    "broadcast_": lambda: hvd.broadcast_(own(2), 0).tolist() == [0, 0],
    "alltoall": lambda: hvd.alltoall(own(hvd.size())).tolist() == list(range(hvd.size())),
    "alltoall with splits": lambda: (
        hvd.alltoall(own(hvd.size()), torch.ones(hvd.size(), dtype=torch.int32))[0].tolist()
        == list(range(hvd.size()))
    ),
    "reducescatter": lambda: bool((hvd.reducescatter(own(hvd.size(), 2)) == mean_rank()).all()),
    "grouped_reducescatter": lambda: all(
        bool((found == mean_rank()).all())
        for found in hvd.grouped_reducescatter([own(hvd.size(), 2)] * 2)
    ),
    "sparse": lambda: (
        hvd.sparse_allreduce_async(own(2).to_sparse_coo(), None, hvd.Average)().to_dense().tolist()
        == [mean_rank()] * 2
    ),
    "broadcast_object": lambda: hvd.broadcast_object(hvd.rank(), 0) == 0,
    "allgather_object": lambda: hvd.allgather_object(hvd.rank()) == list(range(hvd.size())),
    "barrier": lambda: hvd.barrier() is None,
    # Horovod crashes where a rank joins before others have begun what it has begun.
    "join": lambda: hvd.barrier() is None and hvd.join() in range(hvd.size()),
}


def test_everything_that_horovod_can_start_is_counted(name: str) -> None:
    """A function of another version of Horovod, or one that is forgotten, would shift all names."""
    allreduce(torch.ones(1000), name, compression=compressor())
    library = numbering.library()
    assert library is not None
    functions = {key for key in vars(library.original) if key.startswith("horovod_torch_")}
    beginning = {key for key in functions if "_async_" in key}
    beginning |= {"horovod_torch_join", "horovod_torch_barrier"}
    others = {f"horovod_torch_{key}" for key in ("poll", "wait_and_clear", "reset")}
    assert functions == beginning | others
    for key in functions:
        replaced = getattr(library, key) is not getattr(library.original, key)
        assert replaced or key == "horovod_torch_poll", key


@pytest.mark.parametrize("operation", UNNAMED)
def test_between_backward_and_step(operation: str, name: str) -> None:
    net, optimizer = tower(name, compressor("two-hop"))
    for _ in range(3):
        optimizer.zero_grad()
        net(inputs()).square().mean().backward()
        assert UNNAMED[operation]()
        optimizer.step()
    check_replicas(*net.parameters())


@LEVELS
def test_the_everyday_script(levels: str, name: str) -> None:
    net, optimizer = tower(name, compressor(levels))
    for _ in range(20):
        optimizer.zero_grad()
        loss = net(inputs()).square().mean()
        loss.backward()
        mean = hvd.allreduce(loss.detach())
        optimizer.step()
        assert mean.isfinite()
    check_replicas(*net.parameters())


@LEVELS
def test_two_towers_that_are_gathered(levels: str, name: str) -> None:
    """As in CLIP: the backward pass itself has operations without names between its hooks."""
    (left, one), (right, other) = (tower(f"{name}.{i}", compressor(levels)) for i in range(2))
    for _ in range(5):
        one.zero_grad()
        other.zero_grad()
        # Each gathers the other's, so some are in the midst of every backward pass.
        first = hvd.allgather(left(inputs()))
        second = hvd.allgather(right(first))
        summed = hvd.allreduce(second)
        total = hvd.grouped_allreduce([summed, first])
        loss = sum(part.square().mean() for part in total)
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        one.step()
        hvd.allreduce(loss.detach())
        other.step()
    check_replicas(*left.parameters(), *right.parameters())


@LEVELS
def test_hooks_in_another_order_on_every_rank(levels: str, name: str) -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(40, 40)) for _ in range(6)]
    named = [(f"{name}.{i}", parameter) for i, parameter in enumerate(parameters)]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    optimizer = hvd.DistributedOptimizer(optimizer, named, compression=compressor(levels))
    for _ in range(5):
        optimizer.zero_grad()
        for turn in range(len(parameters)):
            parameters[(turn + hvd.rank()) % len(parameters)].square().sum().backward()
            ranks_apart()
            if turn % 2:
                assert UNNAMED["allreduce"]()
        assert UNNAMED["allgather"]()
        optimizer.step()
    check_replicas(*parameters)


@pytest.mark.usefixtures("several_ranks")
def test_after_an_error_that_the_program_catches(name: str) -> None:
    """Ranks that differ about a tensor have by then started different operations."""
    for turn in range(3):
        count = 2000 + 100 * (hvd.rank() == hvd.size() - 1)
        with pytest.raises(ConfigMismatchError):
            allreduce(torch.ones(count), f"{name}.{turn}", compression=compressor("two-hop"))
        ranks_apart()
        assert UNNAMED["allreduce"]()
        assert UNNAMED["alltoall"]()


@pytest.mark.usefixtures("several_ranks")
def test_a_step_that_was_abandoned(name: str) -> None:
    net, optimizer = tower(name, compressor("two-hop"))
    net(inputs()).square().mean().backward()
    assert UNNAMED["allreduce"]()
    ranks_apart()
    optimizer._handles.clear()  # what load_state_dict and others do
    for parameter in optimizer._allreduce_delay:
        optimizer._allreduce_delay[parameter] = 1
    assert UNNAMED["allgather"]()
    for _ in range(2):
        optimizer.zero_grad()
        net(inputs()).square().mean().backward()
        assert UNNAMED["allreduce"]()
        optimizer.step()
    check_replicas(*net.parameters())


def test_names_are_those_that_plain_horovod_gives(name: str) -> None:
    """Also on ranks that have compressed nothing yet, or never do."""
    allreduce(torch.ones(1000), name, compression=compressor("two-hop"))
    library = numbering.library()
    assert library is not None
    first = _unnamed_number(library)
    for step in range(1, 4):
        # Horovod itself would count one operation here: what we start beside it is not seen.
        allreduce(torch.ones(1000), name, compression=compressor("two-hop"))
        assert _unnamed_number(library) == first + 2 * step


def _unnamed_number(library: numbering.Library) -> int:
    handle = hvd.allreduce_async(torch.ones(1))
    word, number = library.name(handle).split(".noname.")
    assert word == "allreduce"
    hvd.synchronize(handle)
    return int(number)


def test_it_can_be_undone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    allreduce(torch.ones(1000), name, compression=compressor())
    before = numbering.library()
    assert before is not None
    monkeypatch.setattr(numbering, "_wanted", True)
    watched = HorovodBasics._remove_process_set_impl
    monkeypatch.setattr(HorovodBasics, "_remove_process_set_impl", watched)  # and back again
    numbering.uninstall()
    try:
        assert hvd_ops.mpi_lib is before.original
        assert HorovodBasics._remove_process_set_impl is not watched
        numbering.install()  # as the next first gradient would
        assert hvd_ops.mpi_lib is before.original
        allreduce(torch.ones(1000), name, compression=compressor())
    finally:
        hvd_ops.mpi_lib = before
