"""A training with operations without names in all places. Run by test_unnamed.py in every rank:

python unnamed.py none|fp16|standard|exponential|two-hop [horovod|mpi]
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from rank import digest, say

from gq_horovod.torch import GlobalQSGD

STEPS = 6


def compression(which: str, transport: str) -> Any:
    if which in ("none", "fp16"):
        return getattr(hvd.Compression, which)
    return GlobalQSGD(levels=which, min_elements=0, transport=transport, timeout=60)


def tower(name: str, chosen: Any) -> tuple[torch.nn.Module, Any]:
    """Its hooks come at other times on every rank."""
    torch.manual_seed(0)
    pause = random.Random(hvd.rank())
    net = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(3)])
    for layer in net:
        layer.weight.register_hook(lambda _: time.sleep(pause.random() * 0.01))
    named = [(f"{name}.{key}", value) for key, value in net.named_parameters()]
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    return net, hvd.DistributedOptimizer(sgd, named, compression=chosen)


def main(which: str, transport: str = "horovod") -> None:
    torch.set_num_threads(1)
    hvd.init()
    chosen = compression(which, transport)
    (left, one), (right, other) = tower("left", chosen), tower("right", chosen)
    hvd.allreduce(torch.ones(1))  # before anything is compressed
    for _ in range(STEPS):
        one.zero_grad()
        other.zero_grad()
        gathered = hvd.allgather(left(torch.randn(4, 64)))
        summed = hvd.grouped_allreduce([right(gathered), gathered])
        loss = sum(part.square().mean() for part in summed)
        loss.backward()
        hvd.allreduce(loss.detach())
        one.step()
        hvd.barrier()
        hvd.broadcast(torch.ones(2), 0)
        hvd.alltoall(torch.ones(hvd.size()))
        hvd.reducescatter(torch.ones(hvd.size(), 2))
        other.step()
    trained = [*left.parameters(), *right.parameters()]
    say("DONE", digest(parameter.detach().numpy() for parameter in trained))
    end_timeline()
    hvd.shutdown()


def end_timeline() -> None:
    """Wait until Horovod has written down every operation: at shutdown it drops what is queued."""
    hvd.allreduce(torch.ones(1), name="end")
    timeline = Path(os.environ["HOROVOD_TIMELINE"])
    while hvd.rank() == 0 and '"name": "allreduce.end"' not in timeline.read_text():
        time.sleep(0.05)
    hvd.allreduce(torch.ones(1), name="after")


if __name__ == "__main__":
    main(*sys.argv[1:])
