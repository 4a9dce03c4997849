"""Elastic training of which one worker is killed. Run by test_elastic.py in every worker.

Workers print "STEP <step> <world size> <levels> <loss>", and "DONE <loss> <digest>" at the end.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from typing import Any

import horovod.torch as hvd
import torch
from faults import digest, say

from gq_horovod.torch import GlobalQSGD

STEPS = 40
COMMIT_EVERY = 5
KILL_AT = 13  # between two commits
RATE = 0.01
DIMENSION = 5000


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(DIMENSION, 1, bias=False)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """The same on every worker, so that the mean gradient does not depend on their number."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, DIMENSION, generator=generator) / DIMENSION**0.5
    return inputs, torch.randn(64, 1, generator=generator)


def loss_of(net: torch.nn.Module) -> torch.Tensor:
    inputs, targets = batch()
    return (net(inputs) - targets).square().sum()


def undisturbed() -> float:
    """Loss after as many exact steps."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    return loss_of(net).item()


def main() -> None:
    faulthandler.dump_traceback_later(150, exit=True)
    torch.set_num_threads(1)
    hvd.init()
    net = model()
    compression = GlobalQSGD(bits=8, check_replicas=1)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=RATE),
        named_parameters=net.named_parameters(),
        compression=compression,
    )

    @hvd.elastic.run
    def train(state: Any) -> None:
        while state.step < STEPS:
            optimizer.zero_grad()
            loss = loss_of(net)
            loss.backward()
            if state.step == KILL_AT and os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1":
                say("KILLED", state.step)
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            (group,) = compression._groups.values()
            say("STEP", state.step, hvd.size(), group.plan.level_count, loss.item())
            state.step += 1
            if state.step % COMMIT_EVERY == 0:
                state.commit()

    train(hvd.elastic.TorchState(net, optimizer, step=0))
    # What the sessions before left: one group, nothing in flight, one watchdog.
    (group,) = compression._groups.values()
    watchdogs = [thread for thread in threading.enumerate() if "watchdog" in thread.name]
    left = (len(group.pipeline._in_flight), len(group.checks), len(watchdogs))
    say("LEFT", *left, len(hvd.mpi_ops._handle_map))
    say("DONE", loss_of(net).item(), digest(iter(net.parameters())))


if __name__ == "__main__":
    main()
