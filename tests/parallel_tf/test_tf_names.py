"""Operations of the user's that have no name, beside compressed ones.

In a graph Horovod names them after their inputs, whose names TensorFlow counts: what compression
inserts must not be counted. Eagerly every operation of Horovod's has the name of its type, with any
compression, so that ranks have to call them in one order.
"""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from tf_helpers import check_mean, check_replicas, compressor, gradients

LEVELS = ["standard", "two-hop"]  # exponential ones take the way of two-hop ones
EACH = pytest.mark.parametrize("levels", LEVELS)


class Steps:
    """A function with unnamed operations before, between and behind compressed ones."""

    def __init__(self, compression: Any, gathers: bool = True) -> None:
        self.compression = compression
        self.gathers = gathers
        self.kernel = tf.Variable(tf.zeros([100, 60]))

    def __call__(self, x: Any) -> Any:
        """This rank's x, of 100 x 60, reduced in several ways, and means of what is unnamed."""
        before = hvd.allreduce(tf.reduce_mean(tf.identity(x)))
        with tf.GradientTape() as inner:
            inner.watch(x)
            gathered = hvd.allgather(tf.reshape(x, [100, 60]) * 2.0)
            loss = tf.reduce_sum(tf.square(gathered))
        ours = [hvd.allreduce(x, name="direct", compression=self.compression)]
        with tf.GradientTape() as tape:
            tape_loss = tf.reduce_sum(self.kernel * x)
        tape = hvd.DistributedGradientTape(tape, compression=self.compression)
        ours += tape.gradient(tape_loss, [self.kernel])
        between = hvd.allreduce(tf.identity(tf.reshape(tf.cast(loss, tf.float64) + 1.0, [1])))
        unnamed = hvd.grouped_allreduce([tf.reduce_max(x), tf.reduce_min(x)], op=hvd.Max)
        ours += hvd.grouped_allreduce([x, x[0]], name="group", compression=self.compression)
        # An allreduce and an allgather of Horovod's own.
        behind = inner.gradient(loss, x) if self.gathers else loss
        last = hvd.allreduce(tf.reshape(tf.identity(between), []))
        return ours, [before, between, *unnamed, behind, last]


def names(compression: Any) -> set[str]:
    """Of the operations that are not part of compressed ones."""
    graph = tf.function(Steps(compression)).get_concrete_function(tf.zeros([100, 60])).graph
    types = ("HorovodAllreduce", "HorovodAllgather", "HorovodGroupedAllreduce", "HorovodAlltoall")
    found = {op.name for op in graph.get_operations() if op.type in types}
    ours = ("gq.", "direct", "group")
    return {name for name in found if not name.rpartition("/")[2].startswith(ours)}


@pytest.mark.usefixtures("several_ranks")
@EACH
def test_unnamed_operations_keep_their_names(levels: str) -> None:
    plain = names(hvd.Compression.none)
    assert len(plain) >= 6
    assert names(compressor(levels)) == plain
    assert names(compressor(levels, check_replicas=1, stats=1)) == plain


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize(
    ("mode", "levels"),
    [
        *zip(["eager", "graph"], LEVELS, strict=True),
        *(("traced at different times", levels) for levels in LEVELS),
    ],
)
def test_unnamed_operations_between_compressed_ones(levels: str, mode: str) -> None:
    compression = compressor(levels)
    # TensorFlow computes that allgather when it optimizes the graph, since its input is a shape: a
    # rank that builds its graph alone waits for ever, with any compression.
    gathers = mode != "traced at different times"
    step, plain = (Steps(choice, gathers) for choice in (compression, hvd.Compression.none))
    if mode != "eager":
        step, plain = tf.function(step), tf.function(plain)
    for tag in range(3):
        if not gathers and hvd.rank() == tag % hvd.size():
            step = tf.function(Steps(compression, gathers))
        inputs = gradients((100, 60), tag=300 + tag)
        own = inputs[hvd.rank()]
        ours, unnamed = step(own)
        for result, found in zip(ours[:3], [inputs] * 3, strict=True):
            check_mean(result, found, compression)
        check_mean(ours[3], [x[0] for x in inputs], compression)
        check_replicas(*ours)
        for result, expected in zip(unnamed, plain(own)[1], strict=True):
            # Horovod's own sums of three ranks depend on what it fuses.
            np.testing.assert_allclose(result, expected, rtol=0 if hvd.size() < 3 else 1e-6)


@pytest.mark.usefixtures("several_ranks")
@EACH
def test_ranks_that_build_a_graph_in_different_order(levels: str, name: str) -> None:
    """Named operations match by name, with unnamed ones between them."""
    compression = compressor(levels)
    inputs = [gradients((100, 60), tag=310 + index) for index in range(4)]

    @tf.function
    def reduce(tensors: Any) -> Any:
        order = list(range(4))
        results: list[Any] = [None] * 4
        for index in np.roll(order, hvd.rank()):
            options = {"name": f"{name}.{index}", "compression": compression}
            results[index] = hvd.allreduce(tensors[index], **options)
        return results, hvd.allreduce(tf.reduce_max(tensors[0]), op=hvd.Max)

    for _ in range(3):
        results, largest = reduce([ranks[hvd.rank()] for ranks in inputs])
        for result, ranks in zip(results, inputs, strict=True):
            check_mean(result, ranks, compression)
        check_replicas(*results, largest)


@pytest.mark.usefixtures("several_ranks")
@EACH
def test_sync_batch_norm_beside_a_tape(levels: str) -> None:
    """Its statistics are grouped in unnamed operations, forwards and backwards."""
    compression = compressor(levels)
    results = []
    for choice in (compression, hvd.Compression.none):
        try:
            norm = hvd.SyncBatchNormalization(axis=-1)
            norm.build([None, 60])
        except (AttributeError, NotImplementedError, TypeError) as error:
            pytest.skip(f"Horovod's layer does not know this Keras: {error}")
        kernel = tf.Variable(tf.eye(100))

        @tf.function
        def step(x: Any, norm: Any = norm, kernel: Any = kernel, choice: Any = choice) -> Any:
            with tf.GradientTape() as tape:
                y = norm(kernel @ x, training=True)
                loss = tf.reduce_sum(y**3)
            tape = hvd.DistributedGradientTape(tape, compression=choice)
            return y, tape.gradient(loss, [kernel, norm.gamma])

        x = gradients((100, 60), tag=320)[hvd.rank()]
        for _ in range(2):
            y, reduced = step(x)
        check_replicas(*reduced)
        results.append(y)
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)
