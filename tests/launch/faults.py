"""Training in which something happens to the last rank. Run by test_faults.py in every rank:

    python faults.py FAULT STAGE [--transport mpi] [--levels exponential] [--steps 12]

Ranks print lines that the tests read: "FAULT <time>" when it happens, "ERROR <time> <message>" for
an exception, and "DONE <digest of the parameters>" at the end.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import horovod.torch as hvd
import torch
from rank import digest, say

import gq_horovod.torch as gq
from gq_horovod.path import pipeline
from gq_horovod.torch.collectives import Collectives
from mpi_ops import codec

FAULT_STEP = 4
HANG_SECONDS = 150.0
STOPPED_SECONDS = 3


# ------------------------------------------------------------------------------------------- faults


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stops the whole process, Horovod's threads too, and lets a child continue it."""
    pid = os.getpid()
    subprocess.Popen(["sh", "-c", f"sleep {STOPPED_SECONDS}; kill -CONT {pid}"])
    os.kill(pid, signal.SIGSTOP)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail() -> None:
    raise ZeroDivisionError("the user's own mistake")


def leave() -> None:
    raise SystemExit(0)


@contextmanager
def no_memory() -> Iterator[None]:
    """The address space ends where it is: the next allocation of some size fails."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


FAULTS: dict[str, Callable[[], None]] = {
    "kill": kill,
    "stop": stop,
    "freeze": freeze,
    "fail": fail,
    "leave": leave,
    "none": lambda: None,
}


class Fault:
    """Strikes once, on the last rank, in the step FAULT_STEP."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.step = 0
        self._struck = False

    @property
    def due(self) -> bool:
        return self.step == FAULT_STEP and hvd.rank() == hvd.size() - 1 and not self._struck

    def strike(self) -> None:
        if self.due:
            self._struck = True
            say("FAULT", time.time())
            FAULTS[self._name]()

    def after(self, owner: Any, name: str) -> None:
        """Strike whenever `owner.name` has been called."""
        original = getattr(owner, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            self.strike()
            return result

        setattr(owner, name, wrapped)

    def out_of_memory(self) -> None:
        """Let the allocations of the stage after the norms fail, as far as they are large."""
        advance = pipeline.InFlight.advance

        def wrapped(reduction: pipeline.InFlight) -> bool:
            if not self.due:
                return advance(reduction)
            with no_memory():
                progress = advance(reduction)
            if isinstance(reduction.error, MemoryError):
                self._struck = True
                say("FAULT", time.time())
            return progress

        pipeline.InFlight.advance = wrapped  # type: ignore[method-assign]


def install(fault: Fault, stage: str) -> None:
    """Let a fault strike in a stage of the reduction."""
    if stage == "norm":
        fault.after(Collectives, "allreduce_max")
    elif stage == "codes":
        fault.after(Collectives, "allreduce_sum")
        fault.after(Collectives, "alltoall")
        if hvd.mpi_enabled():
            from gq_horovod.path import mpi

            fault.after(mpi.Messages, "start")
    elif stage == "decompress":
        fault.after(codec, "dequantize_parcel")
    elif stage == "memory":
        fault.out_of_memory()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("fault", choices=[*FAULTS, "memory"])
    parser.add_argument("stage", choices=["norm", "codes", "decompress", "memory", "user"])
    parser.add_argument("--transport", default="horovod")
    parser.add_argument("--levels", default="standard")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--size", type=int, default=100_000)
    parser.add_argument("--pause", type=float, default=0.0, help="of the last rank in each step")
    parser.add_argument("--hang", type=float, default=HANG_SECONDS)
    options, rest = parser.parse_known_args()
    faulthandler.dump_traceback_later(options.hang, exit=True)
    torch.set_num_threads(1)
    hvd.init()
    fault = Fault(options.fault)
    install(fault, options.stage)
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(options.size)) for _ in range(4)]
    extra = {key: float(value) for key, value in (word.split("=") for word in rest)}
    compression = gq.GlobalQSGD(transport=options.transport, levels=options.levels, **extra)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(weights, lr=0.1),
        named_parameters=[(f"weight.{i}", weight) for i, weight in enumerate(weights)],
        compression=compression,
    )
    targets = torch.randn(4, options.size, generator=torch.Generator().manual_seed(hvd.rank()))
    try:
        for step in range(options.steps):
            fault.step = step
            optimizer.zero_grad()
            loss = sum(
                (weight - target).square().sum()
                for weight, target in zip(weights, targets, strict=True)
            )
            loss.backward()
            if options.stage == "user":
                fault.strike()
            if hvd.rank() == hvd.size() - 1:
                time.sleep(options.pause)
            optimizer.step()
            say("STEP", step, time.time())
    except Exception as error:
        say("ERROR", time.time(), f"{type(error).__name__}: {error}")
        raise
    say("DONE", digest(weight.detach().numpy() for weight in weights))


if __name__ == "__main__":
    main()
