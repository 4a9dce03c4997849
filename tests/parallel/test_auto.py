"""levels="auto" under an unmodified DistributedOptimizer: trials, one decision, equal replicas."""

from __future__ import annotations

from functools import partial

import horovod.torch as hvd
import pytest
import torch
from helpers import TRANSPORT, check_mean, check_replicas, compressor, farthest, gradient
from test_optimizer import (
    MIN_ELEMENTS,
    SHAPES,
    backward,
    local_gradient,
    make_optimizer,
    make_parameters,
)

from gq_horovod import torch as plugin
from gq_horovod.path import auto
from gq_horovod.torch import frontend

LARGE = "matrix"  # not below MIN_ELEMENTS


class Clock:
    """Seconds that steps seem to take, by the way in which they are reduced."""

    def __init__(self, fastest: str) -> None:
        self.now = 0.0
        self.fastest = fastest

    def __call__(self) -> float:
        return self.now

    def pass_step(self, way: auto.Way) -> None:
        # On rank 0 the others are faster still, but not on the slowest rank, which counts.
        others = 0.1 if hvd.rank() == 0 else 1.0
        self.now += 0.5 if way.name == self.fastest else others


@pytest.mark.parametrize("fastest", ["none", "16 bits", "standard", "two-hop"])
def test_all_ranks_take_one_decision(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if hvd.size() == 1:
        pytest.skip("Horovod reduces nothing with one rank")
    clock = Clock(fastest)
    monkeypatch.setattr(frontend, "Trials", partial(auto.Trials, clock=clock))
    monkeypatch.setattr(auto, "STEPS", (2, 2))
    compression = plugin.GlobalQSGD(levels="auto", min_elements=MIN_ELEMENTS, transport=TRANSPORT)
    parameters = make_parameters()
    optimizer = make_optimizer(parameters, compression)
    names = list(SHAPES)
    turned = names[hvd.rank() % len(names) :] + names[: hvd.rank() % len(names)]
    seen = set()
    for step in range(60):
        optimizer.zero_grad()
        backward(parameters, step, turned)
        optimizer.synchronize()
        (trials,) = (group.trials for group in compression._groups.values())
        assert trials is not None
        way = trials.way(step, parameters[LARGE].numel())
        seen.add(way.name)
        clock.pass_step(way)
        check_replicas(*(own.grad for own in parameters.values() if own.grad is not None))
        with optimizer.skip_synchronize():
            optimizer.step()
    assert seen == {"none", "16 bits", "standard", "two-hop"}
    assert trials.decision is not None
    assert trials.decision.name == fastest
    assert list(compression.decisions.values()) == [trials.decision]

    inputs = [local_gradient(parameters, LARGE, rank, step) for rank in range(hvd.size())]
    result = parameters[LARGE].grad
    assert result is not None
    exact = torch.stack([x.double() for x in inputs]).mean(dim=0)
    if fastest == "none":
        unit = torch.finfo(torch.float32).eps
        bound = (hvd.size() + 1) * unit * max(float(x.abs().max()) for x in inputs)
        assert float((result.double() - exact).abs().max()) <= bound
    else:
        levels, bits = ("standard", 16) if fastest == "16 bits" else (fastest, None)
        assert not torch.equal(result.double(), exact)
        check_mean(result, inputs, compressor(levels, bits))


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        *((size, torch.float16) for size in (1e5, 1e-9, 1.0)),
        # These have all of the sizes.
        *((1e5, torch.bfloat16), (1e-9, torch.float32), (1.0, torch.float64)),
    ],
)
def test_trials_change_nothing_but_by_the_documented_error(
    size: float, dtype: torch.dtype, name: str
) -> None:
    """float16 makes Inf of what is above 65504, and zero of what is below 6e-8.

    Sums stay below 16384, because Gloo adds larger ones in float16 wrongly (docs/reliability.md).
    """
    largest = min(torch.finfo(dtype).max / 16, 1e30)
    compression = plugin.GlobalQSGD(levels="auto", min_elements=0, transport=TRANSPORT)
    ways = auto.settings(compression.config, hvd.size())
    for step in range(105):
        inputs = [
            (gradient(rank, 2000, tag=90 + step) * size).clamp(-largest, largest).to(dtype)
            for rank in range(hvd.size())
        ]
        result = plugin.allreduce(inputs[hvd.rank()], name, compression=compression)
        exact = torch.stack([own.double() for own in inputs]).mean(dim=0)
        assert bool(result.isfinite().all()), step
        norm = max(float(own.double().abs().max()) for own in inputs)
        rounding = torch.finfo(dtype).eps * norm + torch.finfo(dtype).smallest_normal
        assert (
            float((result.double() - exact).abs().max())
            <= 1.01 * norm * farthest(ways) + 4 * rounding
        )
    assert compression.decisions[0] is not None
    check_replicas(result)
