"""IntSGD in Horovod's optimizer: alpha follows the parameters, and is the same on every rank."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import check_replicas, gradients
from horovod.common.exceptions import HorovodInternalError

from gq_horovod.research.torch_baselines import IntSGD
from gq_horovod.torch import allreduce

# Horovod's optimizer of a single rank hands nothing over.
pytestmark = pytest.mark.usefixtures("several_ranks")

SHAPE = (60, 80)


class Training:
    """One parameter whose gradients are given."""

    def __init__(self, compression: IntSGD, name: str, **options: Any) -> None:
        self.compression, self.key = compression, f"{name}.weight"
        self.weight = torch.nn.Parameter(torch.zeros(SHAPE))
        optimizer = options.pop("kind", torch.optim.SGD)([self.weight], **options)
        self.optimizer = hvd.DistributedOptimizer(
            optimizer, named_parameters=[(self.key, self.weight)], compression=compression
        )

    def step(self, gradient: torch.Tensor) -> torch.Tensor:
        """One step; returns the mean that the optimizer got."""
        self.optimizer.zero_grad()
        (self.weight * gradient).sum().backward()
        self.optimizer.synchronize()
        assert self.weight.grad is not None
        mean = self.weight.grad.clone()
        with self.optimizer.skip_synchronize():
            self.optimizer.step()
        return mean

    @property
    def memory(self) -> dict[str, Any]:
        """What is remembered of the parameter on this rank."""
        (group,) = self.compression._groups.values()
        return group.memories[self.key]


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "plain": {"lr": 0.5},
    "momentum": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"kind": torch.optim.Adam, "lr": 0.01},
}


@pytest.mark.parametrize("key", OPTIMIZERS)
def test_alpha_follows_the_updates_of_the_parameter(key: str, name: str) -> None:
    """The true ones, whatever the optimizer makes of a mean; in the averages of the paper."""
    training = Training(IntSGD(bits=16, min_elements=0, beta=0.75), name, **OPTIMIZERS[key])
    before, r = training.weight.detach().clone(), None
    for turn in range(5):
        rate = training.optimizer.param_groups[0]["lr"] = OPTIMIZERS[key]["lr"] / (1 + turn)
        moved = float((training.weight.detach() - before).double().norm() ** 2)
        before = training.weight.detach().clone()
        if turn > 0:
            r = moved if r is None else 0.75 * r + 0.25 * moved
        own = gradients(SHAPE, tag=220 + turn)
        mean = training.step(own[hvd.rank()])
        memory = training.memory
        assert memory["rate"] == rate
        assert memory.get("r", 0.0) == pytest.approx(r or 0.0, rel=1e-5)
        every = hvd.allgather_object((memory.get("r"), memory["x"].tolist()), name="test.memory")
        assert every == [every[0]] * hvd.size()
        check_replicas(mean, training.weight.detach())
        exact = torch.stack(list(own)).double().mean(dim=0)
        if r is None:
            torch.testing.assert_close(mean.double(), exact, rtol=1e-6, atol=1e-6)
        else:  # sums of integers, and each within one of its own
            alpha = rate * (4800 / (2 * hvd.size() * r)) ** 0.5
            sums = alpha * hvd.size() * mean.double()
            torch.testing.assert_close(sums, sums.round(), rtol=0, atol=2e-3)
            assert bool(((mean - exact).abs() <= 1.001 / alpha).all())
            assert training.compression.clipped() == {training.key: 0.0}


class Scanned(list[torch.Tensor]):
    """Parameters of a group, which counts how often somebody goes through them."""

    times = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.times += 1
        return super().__iter__()


def test_the_learning_rate_of_a_parameter_wherever_its_group_is(name: str) -> None:
    training, own = Training(IntSGD(min_elements=0), name, lr=0.1), torch.ones(SHAPE)
    optimizer, found = training.optimizer, []
    for turn in range(4):
        (group, *_) = optimizer.param_groups
        if turn == 1:
            group["lr"] = 0.2
        elif turn == 2:
            state = optimizer.state_dict()
            state["param_groups"][0]["lr"] = 0.3
            optimizer.load_state_dict(state)  # makes new groups
        elif turn == 3:
            group["params"].clear()
            optimizer.add_param_group({"params": [training.weight], "lr": 0.4})
        training.step(own)
        found.append(training.memory["rate"])
    assert found == [0.1, 0.2, 0.3, 0.4]


def test_hooks_do_not_go_through_all_parameters(name: str) -> None:
    training = Training(IntSGD(min_elements=0), name, lr=0.1)
    (group,) = training.optimizer.param_groups
    training.step(torch.ones(SHAPE))
    scanned = group["params"] = Scanned(group["params"])
    for _ in range(2):
        training.weight.grad = None
        training.weight.sum().backward()
        training.optimizer.synchronize()
    assert scanned.times == 0


def test_a_checkpoint_is_tensors_numbers_and_texts(name: str) -> None:
    training = Training(IntSGD(min_elements=0), name, lr=0.1)
    for _ in range(2):
        training.step(torch.ones(SHAPE))
    file = io.BytesIO()
    torch.save(training.compression.state_dict(), file)
    file.seek(0)
    (loaded,) = torch.load(file, weights_only=True)["process_sets"].values()
    memory = loaded["memories"][training.key]
    assert torch.equal(memory.pop("x"), training.memory["x"])
    assert memory == {key: value for key, value in training.memory.items() if key != "x"}


def test_gradients_are_followed_where_asked_for(name: str) -> None:
    """As hvd.allreduce does, which knows no parameter: the same bytes."""
    for scale in ("gradient", "update"):
        training = Training(
            IntSGD(scale=scale, min_elements=0), f"{name}.{scale}", **OPTIMIZERS["momentum"]
        )
        other = IntSGD(scale=scale, min_elements=0)
        same = []
        for turn in range(3):
            own = gradients(SHAPE, tag=230 + turn)[hvd.rank()]
            mean = training.step(own)
            same.append(torch.equal(mean, allreduce(own, training.key, compression=other)))
        assert ("x" in training.memory) == (scale == "update")
        assert all(same) == (scale == "gradient")
        assert same[0]


def test_what_is_clipped_is_counted_over_process_sets(name: str) -> None:
    """A tensor of one name in two: on the rank that is in both, steps of both count."""
    compression, own = IntSGD(min_elements=0), torch.ones(5000)
    alone = hvd.add_process_set([0])
    try:
        for size in (1.0, 1.0, 1e6):
            allreduce(own * size, name, compression=compression)
        before = compression.clipped()
        if hvd.rank() == 0:
            for _ in range(hvd.size() + 1):
                allreduce(own, name, compression=compression, process_set=alone)
    finally:
        hvd.remove_process_set(alone)
    assert before == {name: 0.5}
    rounded = 2 * hvd.size() + hvd.size() * (hvd.rank() == 0)
    assert compression.clipped() == {name: hvd.size() / rounded}


def test_what_is_clipped_is_counted(name: str) -> None:
    """Gradients that grow a million times in one step are beyond all integers."""
    training = Training(IntSGD(min_elements=0), name, lr=0.1)
    signs = gradients(SHAPE, tag=240)[hvd.rank()].sign() + 0.5
    for size in (1.0, 1.0, 1e6):
        mean = training.step(signs * size)
    assert training.compression.clipped() == {training.key: 0.5}
    check_replicas(mean)
    assert bool((mean.abs() < 1e5).all())


@pytest.mark.parametrize("turns", [0, 1, 3], ids="after {} steps".format)
def test_replicas_that_differ_are_an_error_on_every_rank(turns: int, name: str) -> None:
    """From the start, or later; equal gradients move all of them alike, and alpha is the same."""
    training = Training(IntSGD(min_elements=0), name, lr=0.25)
    own = torch.ones(SHAPE)
    for _ in range(turns):
        training.step(own)
    with torch.no_grad():
        training.weight += 0.25 * (hvd.rank() == 0)
        if turns:
            training.memory["x"] += 0.25 * (hvd.rank() == 0)
    with pytest.raises(RuntimeError, match=r"IntSGD: the ranks must agree on alpha and on the par"):
        training.step(own)


def test_replicas_of_which_one_has_no_alpha(name: str) -> None:
    """Horovod itself refuses to add integers to float32, on every rank."""
    training = Training(IntSGD(min_elements=0), name, lr=0.0)
    own = gradients(SHAPE, tag=255)[hvd.rank()]
    training.step(own)
    with torch.no_grad():
        training.weight += 0.25 * (hvd.rank() == 0)
    training.optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(HorovodInternalError, match="Mismatched data types"):
        training.step(own)


def test_a_learning_rate_that_begins_at_zero(name: str) -> None:
    """Nothing moves at first, so there is no alpha, and gradients are not compressed."""
    training = Training(IntSGD(min_elements=0), name, lr=0.0)
    for turn, rate in enumerate((0.0, 0.0, 0.1, 0.1)):
        training.optimizer.param_groups[0]["lr"] = rate
        own = gradients(SHAPE, tag=260 + turn)
        mean = training.step(own[hvd.rank()])
        exact = torch.stack(list(own)).mean(dim=0)
        assert torch.allclose(mean, exact, atol=1e-6) == (turn < 3)
    check_replicas(training.weight.detach())
