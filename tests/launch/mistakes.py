"""Ranks that do different things. Run by test_mistakes.py: python mistakes.py CASE [CASE ...]

Every rank prints what it sees: "CASE: no error", or "CASE: ErrorType: message".
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from rank import say

from gq_horovod.path import agreement
from gq_horovod.path.config import ConfigMismatchError
from gq_horovod.torch import GlobalQSGD, allreduce

# How long a rank that saw an error stays, so that the launcher does not end the others before they
# have printed theirs.
GRACE_SECONDS = 2.0
# In place of the ten minutes that a user waits for a rank that never uses compression.
AGREEMENT_SECONDS = 2.0
HANG_SECONDS = 60.0
WATCHDOG_SECONDS = 3.0


def is_last() -> bool:
    return bool(hvd.rank() == hvd.size() - 1)


def train(
    name: str,
    compression: Any,
    *,
    size: int = 5000,
    dtype: torch.dtype = torch.float32,
    steps: int = 1,
    between: Callable[[int], None] = lambda step: None,
) -> None:
    """A few steps, with `between` called between backward() and step()."""
    weight = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD([weight], lr=1.0),
        named_parameters=[(name, weight)],
        compression=compression,
    )
    for step in range(steps):
        optimizer.zero_grad()
        weight.sum().backward()
        between(step)
        optimizer.step()
    assert torch.equal(weight, torch.full_like(weight, -steps))


# ------------------------------------------------------------------- mistakes that can be survived


def different_sizes(name: str) -> None:
    train(name, GlobalQSGD(), size=6000 if is_last() else 5000)


def different_sizes_with_as_many_blocks(name: str) -> None:
    train(name, GlobalQSGD(), size=5001 if is_last() else 5000)


def different_shapes_of_as_many_elements(name: str) -> None:
    """Horovod without compression refuses them too."""
    shape = (50, 100) if is_last() else (100, 50)
    allreduce(torch.ones(shape), name)


def different_dtypes(name: str) -> None:
    train(name, GlobalQSGD(), dtype=torch.float64 if is_last() else torch.float32)


def too_small_on_one_rank(name: str) -> None:
    train(name, GlobalQSGD(), size=100 if is_last() else 5000)


def as_small_as_the_token_on_one_rank(name: str) -> None:
    train(name, GlobalQSGD(), size=4 if is_last() else 5000)


def different_sizes_among_others(name: str) -> None:
    """The optimizer waits for another tensor when the operation of this one fails."""
    weights = {f"{name}.{i}": torch.nn.Parameter(torch.zeros(5000)) for i in range(3)}
    weights[name] = torch.nn.Parameter(torch.zeros(6000 if is_last() else 5000))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(weights.values(), lr=1.0),
        named_parameters=weights.items(),
        compression=GlobalQSGD(),
    )
    for weight in weights.values():
        weight.sum().backward()
    time.sleep(0.5)  # so that all of them are under way
    optimizer.step()


def going_on_with_the_same_compression(name: str) -> None:
    compression = GlobalQSGD()
    with contextlib.suppress(ConfigMismatchError):
        train(name, compression, size=6000 if is_last() else 5000)
    train(f"{name}.other", compression)
    train(name, compression)


# ------------------------------------------------------------------------ mistakes that end the job


def one_rank_without_compression(name: str) -> None:
    agreement.TIMEOUT_SECONDS = AGREEMENT_SECONDS
    train(name, hvd.Compression.none if is_last() else GlobalQSGD)


def different_bits(name: str) -> None:
    train(name, GlobalQSGD(bits=4 if is_last() else 8))


def killed(name: str) -> None:
    def kill(step: int) -> None:
        if is_last() and step == 3:
            say("killed now")
            os.kill(os.getpid(), signal.SIGKILL)

    train(name, GlobalQSGD, steps=1000, between=kill)


def error_on_one_rank(name: str) -> None:
    def fail(step: int) -> None:
        if is_last() and step == 3:
            raise ZeroDivisionError("the user's own mistake")

    train(name, GlobalQSGD, steps=1000, between=fail)


def operations_of_the_program_that_do_not_match(name: str) -> None:
    """Nothing of ours waits then, but what is in flight does not go on either."""

    def wait(step: int) -> None:
        hvd.allreduce(torch.ones(1), name=f"{name}.{hvd.rank()}")

    train(name, GlobalQSGD(timeout=WATCHDOG_SECONDS), between=wait)


def shut_down_while_operations_begin(name: str) -> None:
    """Horovod's thread does not wait for Python's lock, which this rank keeps for itself."""
    train(name, GlobalQSGD())
    tensors = [torch.ones(10) for _ in range(50_000)]
    hvd.barrier()
    if is_last():
        time.sleep(0.3)  # a fifth of what the other needs for all of them
        return
    interval = sys.getswitchinterval()
    sys.setswitchinterval(HANG_SECONDS)
    try:
        for place, tensor in enumerate(tensors):
            hvd.allreduce_async_(tensor, name=f"{name}.{place}")
    finally:
        sys.setswitchinterval(interval)


def one_rank_ends_early(name: str) -> None:
    train(name, GlobalQSGD, steps=3 if is_last() else 1000)


def main(cases: list[str]) -> None:
    # A hang shows where, and ends.
    faulthandler.dump_traceback_later(HANG_SECONDS, exit=True)
    torch.set_num_threads(1)
    hvd.init()
    failed = False
    for case in cases:
        try:
            globals()[case](case)
            say(f"{case}: no error")
        except Exception as error:
            say(f"{case}: {type(error).__name__}: {error}")
            failed = True
        if case != cases[-1]:
            train(f"after {case}", GlobalQSGD())
            say(f"after {case}: no error")
    if failed:
        hvd.shutdown()  # as the interpreter does when it ends
        time.sleep(GRACE_SECONDS)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
