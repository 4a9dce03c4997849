"""Elastic training with PyTorch of which one worker is killed; see elastic_job.py.

Run by test_elastic.py in every worker. Workers print "LEFT ..." at the end, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import elastic_job as story
import horovod.torch as hvd
import numpy as np
import torch
from rank import digest, say

from gq_horovod.path.config import DEFAULT_TIMEOUT
from gq_horovod.torch import GlobalQSGD


class State(story.Told, hvd.elastic.TorchState):  # type: ignore[misc]
    """Of what a commit keeps, and a newcomer is sent."""


def trained(net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[np.ndarray]:
    """What all replicas must have the same of: parameters and momentum."""
    for parameter in net.parameters():
        yield parameter.detach().numpy()
    for kept in optimizer.state.values():
        yield kept["momentum_buffer"].numpy()


def main() -> None:
    parser = story.parser()
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT)
    parser.add_argument("--by-nodes", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    story.begin(hvd)
    net = torch.nn.Linear(story.DIMENSION, 1, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.from_numpy(story.weights()))
    inputs, targets = map(torch.from_numpy, story.batch())
    bits = None if options.levels == "auto" else 8
    compression = GlobalQSGD(
        levels=options.levels,
        bits=bits,
        check_replicas=1,
        timeout=options.timeout,
        hierarchical=options.by_nodes or "auto",
    )
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(net.parameters(), lr=story.RATE, momentum=story.MOMENTUM),
        named_parameters=net.named_parameters(),
        compression=compression,
    )

    def loss_now() -> torch.Tensor:
        return (net(inputs) - targets).square().sum()

    @hvd.elastic.run
    def train(state: Any) -> None:
        started = False
        while state.step < options.steps:
            optimizer.zero_grad()
            loss = loss_now()
            loss.backward()
            (group,) = compression._groups.values()
            if not started:
                started = True
                same = digest(trained(net, optimizer))
                say("START", story.HOST, state.step, hvd.size(), group.first_step, same)
            story.kill_one(state.step, options)
            optimizer.step()
            say("STEP", story.HOST, state.step, hvd.size(), group.plan.level_count, loss.item())
            story.ask(state.step, options, hvd.rank())
            state.step += 1
            if state.step % story.COMMIT_EVERY == 0:
                state.commit()

    train(State(net, optimizer, step=0))
    # What the sessions before left: one group, nothing in flight, one watchdog.
    (group,) = compression._groups.values()
    watchdogs = [thread for thread in threading.enumerate() if "watchdog" in thread.name]
    pipeline = group.pipeline
    say(
        *("LEFT", len(pipeline._in_flight), len(pipeline._waiting), len(group.checks)),
        *(len(watchdogs), len(hvd.mpi_ops._handle_map)),
    )
    (decision,) = compression.decisions.values() or [None]
    say("DONE", loss_now().item(), digest(trained(net, optimizer)), decision)


if __name__ == "__main__":
    main()
