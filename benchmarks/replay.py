"""Training whose computation only takes time: much of what a host sees of an accelerator.

Ranks that share a machine's cores cannot show how a reduction hides behind the computation, because
the computation takes the cores that the reduction needs. A Replay is a workload that records what
another's forward pass, every gradient and update take, and then waits for as long. Gradients come
out of autograd one after the other, as recorded, so Horovod's hooks run as in any training.

An accelerator has its work far ahead, and goes on while the host is in a hook: if that takes longer
than the next gradient, that one is there already when it returns. A host that computes by itself
does not. A Replay is either of them. But its gradients lie in host memory, its kernels run on the
host, and a hook runs when its gradient is computed, which PyTorch lets it do far earlier on a GPU.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from workloads import Batch, Workload

from gq_horovod.advisor.replayed import Layer

WARM_UP_STEPS = 2
RECORDED_STEPS = 5


class Replay:
    """A workload with the gradients of another's first step, which come when they came there.

    `times` is what record() returned, or a multiple of it: a tenth is an accelerator ten times as
    fast. Parameters never change, since the update only sleeps. `ahead` says whether computation
    goes on while the host is in a hook.
    """

    def __init__(self, workload: Workload, times: dict[str, float], ahead: bool) -> None:
        self.metric = workload.metric
        self._workload = workload
        self._delays = dict(times)
        self._forward, self._rest = self._delays.pop("forward"), self._delays.pop("rest")
        self._update = self._delays.pop("update")
        self._ahead = ahead
        torch.manual_seed(0)
        model = workload.build()
        workload.loss(model, workload.batch(0)).backward()
        self._gradients = {
            name: parameter.grad
            for name, parameter in model.named_parameters()
            if parameter.grad is not None
        }

    def build(self) -> nn.Module:
        """A new model, as the other workload's."""
        return self._workload.build()

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """One whose step() sleeps for as long as an update took."""
        return _Sleeper(parameters, self._update)

    def batch(self, step: int) -> Batch:
        """Nothing: all steps have the gradients of the first."""
        return torch.empty(0), torch.empty(0)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """A zero, behind which are the recorded gradients."""
        compute = _Accelerator().run if self._ahead else time.sleep
        compute(self._forward)
        parameters = dict(model.named_parameters())
        scalar = torch.zeros((), requires_grad=True)
        # What follows the last gradient comes first here, because backward goes the other way.
        scalar = Layer.apply(scalar, None, None, self._rest, compute)
        for name in reversed(self._delays):
            delay = self._delays[name]
            scalar = Layer.apply(scalar, parameters[name], self._gradients[name], delay, compute)
        return scalar


class _Accelerator:
    """Does one thing after the other, whatever the host does meanwhile."""

    def __init__(self) -> None:
        self._done = time.perf_counter()  # when all is that it was given

    def run(self, seconds: float) -> None:
        """Give it so many seconds of work, and wait until that is done."""
        self._done += seconds
        time.sleep(max(self._done - time.perf_counter(), 0.0))


class _Sleeper(torch.optim.Optimizer):
    # Horovod makes one of its own from the groups of parameters, which know the seconds.
    def __init__(self, parameters: Any, seconds: float = 0.0) -> None:
        super().__init__(parameters, {"seconds": seconds})

    def step(self, closure: Any = None) -> None:
        time.sleep(self.param_groups[0]["seconds"])


def record(workload: Workload, ranks: int) -> dict[str, float]:
    """Train a few steps in this process, with a rank's share of the batches.

    Returns seconds of "forward", of each gradient by its parameter's name, in the order in which
    they come, of the "rest" of backward, and of "update"; medians.
    """
    model = workload.build()
    optimizer = workload.optimizer(model.parameters())
    steps: list[dict[str, float]] = []
    ready: dict[str, float] = {}

    def note(name: str, gradient_of: Tensor) -> None:
        ready[name] = time.perf_counter()

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(functools.partial(note, name))
    for number in range(WARM_UP_STEPS + RECORDED_STEPS):
        ready.clear()
        optimizer.zero_grad()
        batch = workload.batch(number, (0, ranks))
        began = time.perf_counter()
        loss = workload.loss(model, batch)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        optimizer.step()
        update = time.perf_counter()
        own = {"forward": forward - began}
        last = forward
        for name, moment in ready.items():
            own[name], last = moment - last, moment
        steps.append(own | {"rest": backward - last, "update": update - backward})
    counted = steps[WARM_UP_STEPS:]
    return {name: statistics.median(step[name] for step in counted) for name in counted[0]}
