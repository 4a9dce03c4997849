"""error_feedback=True in every rank: what is kept of a gradient, where, and for how long."""

from __future__ import annotations

import gc
import os
import time
from typing import Any

import horovod.torch as hvd
import pytest
import torch
from helpers import TRANSPORT, check_replicas, gradient, gradients
from test_state import through_a_file

from gq_horovod.path.config import ConfigMismatchError
from gq_horovod.research.simulation import SimulatedRanks
from gq_horovod.torch import GlobalQSGD, allreduce

COUNT = 5000
LEVELS = [("standard", 4), ("two-hop", 3)]
both_levels = pytest.mark.parametrize(("levels", "bits"), LEVELS)


def make(levels: str = "standard", bits: int = 4, **options: Any) -> GlobalQSGD:
    options = {"min_elements": 0, "transport": TRANSPORT, **options}
    return GlobalQSGD(levels=levels, bits=bits, error_feedback=True, **options)


def residuals(compression: GlobalQSGD) -> dict[str, torch.Tensor]:
    (group,) = compression.state_dict()["process_sets"].values()
    kept: dict[str, torch.Tensor] = group["residuals"]
    return kept


def sum_over_ranks(tensor: torch.Tensor, name: str) -> torch.Tensor:
    result: torch.Tensor = hvd.allreduce(
        tensor.double().contiguous(), name=f"test.{name}", op=hvd.Sum
    )
    return result


@both_levels
def test_the_bytes_of_the_simulation(levels: str, bits: int, name: str) -> None:
    compression = make(levels, bits, transport="horovod")
    simulated = SimulatedRanks(compression.config, hvd.size())
    for step in range(4):
        inputs = gradients(COUNT, tag=step)
        own = inputs[hvd.rank()].clone()
        result = allreduce(own, name, compression=compression)
        assert torch.equal(own, inputs[hvd.rank()])  # not modified
        expected = simulated.average(name, [x.numpy() for x in inputs])
        assert torch.equal(result, torch.from_numpy(expected))
        kept = simulated._left[name][hvd.rank()]
        assert torch.equal(residuals(compression)[name], torch.from_numpy(kept))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_sent_is_all_but_the_residuals(dtype: torch.dtype, name: str) -> None:
    """Of tensors that are not contiguous, too; with standard levels, whose mean is exact."""
    compression = make(bits=8)
    sent = given = torch.zeros((), dtype=torch.float64)
    for step in range(4):
        own = gradient(hvd.rank(), (50, 60), tag=step, dtype=dtype).T
        result = allreduce(own, name, compression=compression)
        check_replicas(result)
        assert result.dtype == dtype
        sent = sent + result.double()
        given = given + own.double()
    left = residuals(compression)[name]
    assert (left.dtype, left.shape) == (dtype, (60, 50))
    expected = sum_over_ranks(given - left.double(), name) / hvd.size()
    unit = max(torch.finfo(dtype).eps, 2.0**-23) * 4 * float(given.abs().max())
    torch.testing.assert_close(sent, expected, rtol=0, atol=8 * unit)


@both_levels
def test_an_optimizer(levels: str, bits: int) -> None:
    """Two passes a step, and a parameter that a step uses on some ranks alone."""
    compression = make(levels, bits)
    shapes = {"used": (40, 50), "sometimes": (2000,)}
    parameters = {key: torch.nn.Parameter(torch.zeros(shape)) for key, shape in shapes.items()}
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters.values(), lr=1.0),
        named_parameters=parameters.items(),
        compression=compression,
        backward_passes_per_step=2,
    )
    given = {key: torch.zeros(shape, dtype=torch.float64) for key, shape in shapes.items()}
    for step in range(3):
        for half in range(2):
            loss = torch.zeros(())
            for place, (key, parameter) in enumerate(parameters.items()):
                if key == "sometimes" and (hvd.rank() + step) % 2:
                    continue
                own = gradient(hvd.rank(), parameter.shape, tag=100 * place + 10 * step + half)
                given[key] += own
                loss = loss + (parameter * own).sum()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    check_replicas(*parameters.values())
    if hvd.size() == 1:  # Horovod reduces nothing then
        return
    kept = residuals(compression)
    for key, parameter in parameters.items():
        expected = sum_over_ranks(given[key] - kept[key].double(), key) / hvd.size()
        # Two-hop levels round the mean again, without bias.
        norm = 3 * float(gradient(0, shapes[key]).abs().max())
        off = 1e-4 if levels == "standard" else 3 * norm
        torch.testing.assert_close(-parameter.detach().double(), expected, rtol=0, atol=off)


@pytest.mark.usefixtures("several_ranks")
def test_an_optimizer_that_is_gone_leaves_nothing() -> None:
    """As where a model loses a layer and gets another one, and with it another optimizer."""
    compression = make()
    layers = {key: torch.nn.Parameter(torch.zeros(COUNT)) for key in ("kept", "lost", "new")}
    known = []
    for names in (("kept", "lost"), ("kept", "new")):
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD([layers[key] for key in names], lr=1.0),
            named_parameters=[(key, layers[key]) for key in names],
            compression=compression,
        )
        for key in names:
            (layers[key] * gradient(hvd.rank(), COUNT)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        known.append(residuals(compression))
        assert len(known[-1]) == len(names)
        assert all(bool(left.any()) for left in known[-1].values())
        del optimizer
        gc.collect()
        assert residuals(compression) == {}
    # Those of another optimizer begin with zeros.
    assert torch.equal(known[0]["kept"], known[1]["kept#2"])


@pytest.mark.usefixtures("several_ranks")
def test_an_abandoned_step_leaves_nothing() -> None:
    compression = make()
    parameter = torch.nn.Parameter(torch.zeros(COUNT))
    parameter.grad = torch.zeros(COUNT)  # where it stays
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([parameter], lr=1.0),
        named_parameters=[("weight", parameter)],
        compression=compression,
    )
    for step in range(3):
        own = gradient(hvd.rank(), COUNT, tag=step)
        (parameter * own).sum().backward()
        if step == 1:
            optimizer.load_state_dict(optimizer.state_dict())  # Horovod forgets its handles
            hvd.barrier()  # Horovod itself refuses a name that is still being reduced
            time.sleep(0.1)
        else:
            optimizer.synchronize()
        if step < 2:
            parameter.grad.zero_()
    expected = allreduce(own, "test.fresh", compression=make())  # nothing of it is random
    assert torch.equal(parameter.grad, expected)


@pytest.mark.usefixtures("several_ranks")
def test_a_rank_that_has_joined(name: str) -> None:
    """It keeps its residuals, and the others go on with theirs."""
    compression, last = make(), hvd.rank() == hvd.size() - 1
    x = gradient(hvd.rank(), COUNT)
    allreduce(x, name, compression=compression)
    before = residuals(compression)[name].clone()
    if not last:
        allreduce(x, name, compression=compression)
    hvd.join()
    after = residuals(compression)[name]
    assert torch.equal(before, after) == last
    assert bool(after.isfinite().all())
    check_replicas(allreduce(x, name, compression=compression))


@pytest.mark.usefixtures("several_ranks")
def test_what_is_not_finite(name: str) -> None:
    compression = make()
    for step in range(3):
        own = gradient(hvd.rank(), COUNT, tag=step)
        if step == 1 and hvd.rank() == 0:
            own[7] = torch.nan
        result = allreduce(own, name, compression=compression)
        assert bool(residuals(compression)[name].any()) == (step != 1)
        assert bool(result.isfinite().all()) == (step != 1)
    other = allreduce(gradient(hvd.rank(), COUNT), f"{name}.zero", compression=compression)
    assert bool(other.isfinite().all())


@pytest.mark.usefixtures("several_ranks")
def test_one_rank_may_save_it_for_all(name: str) -> None:
    """The others begin with zeros, and all get the same results."""
    first = make()
    for step in range(2):
        allreduce(gradient(hvd.rank(), COUNT, tag=step), name, compression=first)
    state = through_a_file(first.state_dict())
    shared = hvd.broadcast_object(state, root_rank=0, name="test.state")
    second = make()
    second.load_state_dict(shared)
    before = residuals(first)[name]
    result = allreduce(gradient(hvd.rank(), COUNT, tag=2), name, compression=second)
    check_replicas(result)
    x = gradient(hvd.rank(), COUNT, tag=2) + (before if hvd.rank() == 0 else 0)
    sent = sum_over_ranks(x.double() - residuals(second)[name].double(), name) / hvd.size()
    torch.testing.assert_close(result.double(), sent, rtol=0, atol=1e-5)


def test_statistics_are_of_what_is_quantized(name: str) -> None:
    compression = make(stats=1)
    left = torch.zeros(COUNT)
    for step in range(2):
        own = gradient(hvd.rank(), COUNT, tag=step)
        allreduce(own, name, compression=compression)
        quantized, left = own + left, residuals(compression)[name]
        expected = float(left.square().sum() / quantized.square().sum())
        assert compression.stats[name].relative_error == pytest.approx(expected, rel=1e-4)


def test_another_shape_begins_with_zeros(name: str) -> None:
    compression = make()
    for count in (COUNT, COUNT + 1):
        allreduce(gradient(hvd.rank(), count), name, compression=compression)
        assert residuals(compression)[name].numel() == count


@pytest.mark.usefixtures("several_ranks")
def test_ranks_that_disagree(name: str) -> None:
    last = hvd.rank() == hvd.size() - 1
    compression = make() if last else GlobalQSGD(bits=4, levels="standard", min_elements=0)
    if last and TRANSPORT != "horovod":
        compression = make(transport="horovod")
    with pytest.raises(ConfigMismatchError, match="error_feedback is False on rank"):
        allreduce(torch.ones(COUNT), name, compression=compression)


@pytest.mark.skipif(
    os.environ.get("HOROVOD_CONTROLLER") != "gloo", reason="MPI can be started only once"
)
def test_horovod_again(name: str) -> None:
    """After hvd.init() all begin with zeros: ranks may be others, and steps were taken back."""
    from rendezvous import restart

    compression = make()
    x = gradient(hvd.rank(), COUNT)
    first = allreduce(x, name, compression=compression)
    assert not torch.equal(first, allreduce(x, name, compression=compression))
    restart(hvd)
    assert torch.equal(first, allreduce(x, name, compression=compression))
