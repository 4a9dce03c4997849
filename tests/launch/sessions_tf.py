"""A training in TensorFlow 1's way: a graph, a session, an optimizer of tf.compat.v1.

sessions_tf.py MODE LEVELS ...             MODE is "graph", "eager disabled" or "v1 behavior"

Prints what it says about each of the levels behind a line "levels <levels>".
"""

from __future__ import annotations

import sys
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from rank import digest, say

from gq_horovod.tensorflow import GlobalQSGD

v1 = tf.compat.v1


def losses(session: Any, steps: Any, count: int) -> list[float]:
    return [float(session.run(steps)[-1]) for _ in range(count)]


def build(compression: Any, **options: Any) -> tuple[Any, ...]:
    """A training step: the operation, the variables, and the loss."""
    rng = np.random.default_rng(hvd.rank())
    x = rng.standard_normal((64, 70)).astype(np.float32)
    y = np.tile(x.sum(axis=1, keepdims=True), 70)
    kernel = v1.get_variable("kernel", [70, 70], initializer=v1.zeros_initializer())
    scale = v1.get_variable("scale", [], initializer=v1.ones_initializer())
    loss = tf.reduce_mean((scale * (x @ kernel) - y) ** 2)
    optimizer = v1.train.GradientDescentOptimizer(0.1)
    optimizer = hvd.DistributedOptimizer(optimizer, compression=compression, **options)
    return optimizer.minimize(loss), [kernel, scale], loss


def main(mode: str, *choices: str) -> None:
    if mode == "eager disabled":
        v1.disable_eager_execution()
    if mode == "v1 behavior":
        v1.disable_v2_behavior()
    hvd.init()
    for levels in choices:
        say("levels", levels)
        sessions(levels)


def sessions(levels: str) -> None:
    compression = GlobalQSGD(levels=levels)
    for options in ({}, {"groups": 1}, {"backward_passes_per_step": 2}):
        with tf.Graph().as_default():
            train, variables, loss = build(compression, **options)
            x = v1.placeholder(tf.float32, None)
            mean = hvd.allreduce(x, name="mean", compression=compression)
            start = v1.global_variables_initializer(), v1.local_variables_initializer()
            for _ in range(2):  # the second session begins anew
                with v1.Session() as session:
                    session.run(start)
                    session.run(hvd.broadcast_global_variables(0))
                    found = losses(session, (train, loss), 20)
                    assert found[-1] < 0.9 * found[0], found
                    say(options, digest(session.run(variables)))
                    given = np.full([80, 70], 1.0 + hvd.rank(), np.float32)
                    reduced = session.run([mean, mean], {x: given})[0]
                    expected = (1 + hvd.size()) / 2
                    np.testing.assert_allclose(reduced, np.full_like(given, expected), rtol=0.2)
                    say("mean", digest([reduced]))
                    assert session.run(mean, {x: np.float32(0.0)}) == 0.0


if __name__ == "__main__":
    main(*sys.argv[1:])
