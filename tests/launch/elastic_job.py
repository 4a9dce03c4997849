"""What elastic.py and elastic_tf.py share: the problem, the story of the job, and what they print.

    python elastic.py [--levels two-hop] [--steps 40] [--ask FILE] [--last-word FILE] ...

FILE is one that the script that discovers hosts looks at. The worker that is killed makes that of
--last-word. The ones that are left make that of --ask, and wait until Horovod has told them of the
new host, so that the newcomer always joins at the same commit.

Workers print "START <host> <step> <world size> <first dither step> <digest of the state>" when they
begin to train and after each change, "STEP <host> <step> <world size> <levels> <loss>", and "DONE
<loss> <digest> <decision of auto>" at the end.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
from rank import say

STEPS = 40
COMMIT_EVERY = 5
KILL_AT = 13  # between two commits
ASK_AT = 22
NEWCOMER_SECONDS = 120
TOLD_SECONDS = 60.0  # Horovod looks for hosts every second
LIMIT_SECONDS = 250
RATE = 0.01
MOMENTUM = 0.5
DIMENSION = 5000
SAMPLES = 64

HOST = os.environ.get("HOROVOD_HOSTNAME", "")

_told = threading.Event()  # that the hosts have changed


class Told:
    """A base of Horovod's states: notes when the driver has told this worker, rank 0, of hosts."""

    def on_hosts_updated(self, timestamp: int, update_res: Any) -> None:
        super().on_hosts_updated(timestamp, update_res)  # type: ignore[misc]
        _told.set()


def weights() -> np.ndarray:
    """What the linear model begins with, (DIMENSION,) float32."""
    random = np.random.default_rng(0)
    return (random.uniform(-1, 1, DIMENSION) / DIMENSION**0.5).astype(np.float32)


def batch() -> tuple[np.ndarray, np.ndarray]:
    """The same on every worker, so that the mean gradient does not depend on their number.

    Inputs (SAMPLES, DIMENSION) and targets (SAMPLES, 1), float32. The loss is the sum of squares.
    """
    random = np.random.default_rng(1)
    inputs = random.standard_normal((SAMPLES, DIMENSION)) / DIMENSION**0.5
    return inputs.astype(np.float32), random.standard_normal((SAMPLES, 1)).astype(np.float32)


def undisturbed(steps: int = STEPS) -> float:
    """Loss after as many exact steps of gradient descent with momentum."""
    inputs, targets = (part.astype(np.float64) for part in batch())
    own, velocity = weights().astype(np.float64)[:, None], 0.0
    for _ in range(steps):
        velocity = MOMENTUM * velocity + 2 * inputs.T @ (inputs @ own - targets)
        own = own - RATE * velocity
    return float(np.square(inputs @ own - targets).sum())


def parser() -> argparse.ArgumentParser:
    """The options that both scripts have."""
    made = argparse.ArgumentParser()
    made.add_argument("--levels", default="standard")
    made.add_argument("--steps", type=int, default=STEPS)
    made.add_argument("--ask", type=Path)
    made.add_argument("--last-word", type=Path)
    return made


def begin(hvd: Any) -> None:
    """Start Horovod, and see to it that nothing lasts for ever."""
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    hvd.init()
    # From the next start on: who waits longer than that for a newcomer to start is aborted, and the
    # job with it. In this session it is also how long it may take to notice the lost worker.
    os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(NEWCOMER_SECONDS)


def kill_one(step: int, options: argparse.Namespace) -> None:
    """End the worker that has a host of its own, at the step for that."""
    if step == KILL_AT and HOST == "127.0.0.1":
        say("KILLED", step)
        if options.last_word:
            options.last_word.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def ask(step: int, options: argparse.Namespace, rank: int) -> None:
    """Let the discovery script list one host more, and wait until this worker knows of it."""
    if options.ask and step == ASK_AT and rank == 0:
        _told.clear()
        options.ask.touch()
        if not _told.wait(TOLD_SECONDS):
            raise RuntimeError(f"elastic: no news of other hosts in {TOLD_SECONDS:g} s")
