"""Elastic training of which one worker is killed. Run by test_elastic.py in every worker:

    python elastic.py [--levels two-hop] [--steps 40] [--timeout 60] [--ask FILE] [--last-word FILE]

FILE is one that the script that discovers hosts looks at. The worker that is killed makes that of
--last-word. The ones that are left make that of --ask, and wait until Horovod has told them of the
new host, so that the newcomer always joins at the same commit.

Workers print "START <host> <step> <world size> <first dither step> <digest of the state>" when they
begin to train and after each change, "STEP <host> <step> <world size> <levels> <loss>", "LEFT ..."
and "DONE <loss> <digest> <decision of auto>" at the end.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from faults import digest, say

from gq_horovod.config import DEFAULT_TIMEOUT
from gq_horovod.torch import GlobalQSGD

STEPS = 40
COMMIT_EVERY = 5
KILL_AT = 13  # between two commits
ASK_AT = 22
NEWCOMER_SECONDS = 120
TOLD_SECONDS = 60.0  # Horovod looks for hosts every second
RATE = 0.01
MOMENTUM = 0.5
DIMENSION = 5000

told = threading.Event()  # that the hosts have changed


class State(hvd.elastic.TorchState):  # type: ignore[misc]
    """Says when Horovod's driver has told this worker, which is rank 0, of other hosts."""

    def on_hosts_updated(self, timestamp: int, update_res: Any) -> None:
        super().on_hosts_updated(timestamp, update_res)
        told.set()


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(DIMENSION, 1, bias=False)


def sgd(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=RATE, momentum=MOMENTUM)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """The same on every worker, so that the mean gradient does not depend on their number."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, DIMENSION, generator=generator) / DIMENSION**0.5
    return inputs, torch.randn(64, 1, generator=generator)


def loss_of(net: torch.nn.Module) -> torch.Tensor:
    inputs, targets = batch()
    return (net(inputs) - targets).square().sum()


def undisturbed(steps: int = STEPS) -> float:
    """Loss after as many exact steps."""
    net = model()
    optimizer = sgd(net)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()
    return loss_of(net).item()


def trained(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """What all replicas must have the same of: parameters and momentum."""
    yield from net.parameters()
    for kept in optimizer.state.values():
        yield kept["momentum_buffer"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--levels", default="standard")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT)
    parser.add_argument("--ask", type=Path)
    parser.add_argument("--last-word", type=Path)
    options = parser.parse_args()
    faulthandler.dump_traceback_later(250, exit=True)
    torch.set_num_threads(1)
    host = os.environ["HOROVOD_HOSTNAME"]
    hvd.init()
    # From the next start on: who waits longer than that for a newcomer to start is aborted, and the
    # job with it. In this session it is also how long it may take to notice the lost worker.
    os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(NEWCOMER_SECONDS)
    net = model()
    bits = None if options.levels == "auto" else 8
    compression = GlobalQSGD(
        levels=options.levels, bits=bits, check_replicas=1, timeout=options.timeout
    )
    optimizer = hvd.DistributedOptimizer(
        sgd(net), named_parameters=net.named_parameters(), compression=compression
    )

    @hvd.elastic.run
    def train(state: Any) -> None:
        started = False
        while state.step < options.steps:
            optimizer.zero_grad()
            loss = loss_of(net)
            loss.backward()
            (group,) = compression._groups.values()
            if not started:
                started = True
                same = digest(trained(net, optimizer))
                say("START", host, state.step, hvd.size(), group.first_step, same)
            if state.step == KILL_AT and host == "127.0.0.1":
                say("KILLED", state.step)
                if options.last_word:
                    options.last_word.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.step()
            say("STEP", host, state.step, hvd.size(), group.plan.level_count, loss.item())
            if options.ask and state.step == ASK_AT:
                ask(options.ask)
            state.step += 1
            if state.step % COMMIT_EVERY == 0:
                state.commit()

    train(State(net, optimizer, step=0))
    # What the sessions before left: one group, nothing in flight, one watchdog.
    (group,) = compression._groups.values()
    watchdogs = [thread for thread in threading.enumerate() if "watchdog" in thread.name]
    left = (len(group.pipeline._in_flight), len(group.checks), len(watchdogs))
    say("LEFT", *left, len(hvd.mpi_ops._handle_map))
    (decision,) = compression.decisions.values() or [None]
    say("DONE", loss_of(net).item(), digest(trained(net, optimizer)), decision)


def ask(wanted: Path) -> None:
    """Let the discovery script list one host more, and wait until this worker knows of it."""
    if hvd.rank() == 0:
        told.clear()
        wanted.touch()
        if not told.wait(TOLD_SECONDS):
            raise RuntimeError(f"elastic: no news of other hosts in {TOLD_SECONDS:g} s")


if __name__ == "__main__":
    main()
