"""Training with TensorFlow to which something happens. Run by test_tensorflow_guards.py:

    guarded_tf.py freeze MODE                  the last rank stops; MODE is "graph" or "eager"
    guarded_tf.py left                         in a graph, one rank compresses what the others leave
                                               to Horovod
    guarded_tf.py caught MODE                  a step fails on all ranks, and the program goes on
                                               without another reduction for some time
    guarded_tf.py train DIRECTORY FROM WHAT... from a checkpoint, "" for none, to the last step,
                                               once for each WHAT: "kill" to end at once behind a
                                               checkpoint, "forget" to restore all but the
                                               compression, or "go"

Ranks print "FAULT <time>" before it happens, and "DONE <digest of the variables>" at the end of
each training.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from rank import digest, say

from gq_horovod.path.config import ConfigMismatchError
from gq_horovod.tensorflow import GlobalQSGD, allreduce

TIMEOUT_SECONDS = 3.0
STEPS = 6
SAVED_AT = 3
SHAPES = [(100, 60), (5000,), (10,)]


class Training(tf.Module):
    """Variables that follow gradients that differ from step to step and from rank to rank."""

    def __init__(self, compression: GlobalQSGD) -> None:
        super().__init__()
        self.weights = [
            tf.Variable(tf.zeros(shape), name=f"w{i}") for i, shape in enumerate(SHAPES)
        ]
        self.step_number = tf.Variable(0)
        self.compression = compression

    @tf.function
    def step(self) -> None:
        factors = [
            tf.random.stateless_normal(shape, [self.step_number, 100 * hvd.rank() + place])
            for place, shape in enumerate(SHAPES)
        ]
        with tf.GradientTape() as tape:
            parts = zip(self.weights, factors, strict=True)
            loss = tf.add_n([tf.reduce_sum(own * factor + own**2) for own, factor in parts])
        tape = hvd.DistributedGradientTape(tape, compression=self.compression)
        gradients = tape.gradient(loss, self.weights)
        for own, gradient in zip(self.weights, gradients, strict=True):
            own.assign_sub(0.1 * gradient)
        self.step_number.assign_add(1)


def eager(number: int, compression: GlobalQSGD) -> None:
    x = tf.random.stateless_normal([5000], [number, hvd.rank()])
    allreduce(x, "x", compression=compression)


def differing(mode: str, compression: GlobalQSGD) -> None:
    """An operation of Horovod's fails in the midst of a reduction: no kernel is called any more."""
    x = tf.ones([9500] if hvd.rank() == 0 else [5000])

    def reduce() -> Any:
        return allreduce(x, "differing", compression=compression)

    (reduce if mode == "eager" else tf.function(reduce))()


def left() -> None:
    """The last rank alone has a tensor that is large enough to be compressed."""
    x = tf.ones([5000] if hvd.rank() == hvd.size() - 1 else [100])
    compression = GlobalQSGD(timeout=TIMEOUT_SECONDS)
    tf.function(lambda: allreduce(x, "left", compression=compression))()


def busy(seconds: float) -> None:
    """Compute with TensorFlow, in many short calls."""

    @tf.function
    def work(x: Any) -> Any:
        for _ in range(4):
            x = 1e-3 * x @ x
        return x

    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        work(tf.ones([300, 300]))


def guarded(event: str, mode: str) -> None:
    """Steps of which the fourth is disturbed."""
    training = Training(GlobalQSGD(timeout=TIMEOUT_SECONDS, min_elements=0))
    for number in range(STEPS):
        if number == 3 and event == "freeze" and hvd.rank() == hvd.size() - 1:
            say("FAULT", time.time())
            os.kill(os.getpid(), signal.SIGSTOP)
        if number == 3 and event == "caught":
            try:
                differing(mode, training.compression)
            except (tf.errors.OpError, ConfigMismatchError) as error:
                say("CAUGHT", "ismatched" in str(error) or "disagree" in str(error))
            busy(2 * TIMEOUT_SECONDS)  # longer than a reduction may stand still
        if mode == "eager":
            eager(number, training.compression)
        else:
            training.step()
    say("DONE", digest([own.numpy() for own in training.weights]))


def train(directory: str, began: str, what: str) -> None:
    """All steps, or those that a checkpoint has left."""
    training = Training(GlobalQSGD(min_elements=0, bits=4))
    kept = {"compression": training.compression.trackable()} if what != "forget" else {}
    checkpoint = tf.train.Checkpoint(training=training, **kept)
    if began:
        checkpoint.restore(began).expect_partial()
    for number in range(int(training.step_number), STEPS):
        if number == SAVED_AT and not began:
            path = checkpoint.write(os.path.join(directory, str(hvd.rank())))
            if what == "kill":
                hvd.allreduce(tf.constant(0.0), name="written")
                say("KILLED", path)
                os.kill(os.getpid(), signal.SIGKILL)
        training.step()
    weights = [own.numpy() for own in training.weights]
    assert all(np.isfinite(own).all() for own in weights)
    say("DONE", digest(weights))


if __name__ == "__main__":
    tf.config.threading.set_intra_op_parallelism_threads(1)
    hvd.init()
    if sys.argv[1] == "left":
        left()
    elif sys.argv[1] == "train":
        for what in sys.argv[4:]:
            train(*sys.argv[2:4], what)
    else:
        guarded(*sys.argv[1:])
