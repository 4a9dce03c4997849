"""Keras 3: as far as Horovod 0.28.1 carries it, which is a tape (docs/tensorflow.md)."""

from __future__ import annotations

import os
from typing import Any

import horovod.tensorflow as hvd
import keras
import numpy as np
import pytest
import tensorflow as tf
from tf_helpers import check_replicas, compressor

pytestmark = pytest.mark.skipif(
    os.environ.get("TF_USE_LEGACY_KERAS") == "1", reason="TensorFlow is told to take Keras 2"
)


@pytest.mark.parametrize("levels", ["standard", "exponential"])
def test_a_custom_loop(levels: str) -> None:
    compression = compressor(levels, min_elements=1024)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((32,)), keras.layers.Dense(128, activation="relu"), keras.layers.Dense(1)]
    )
    optimizer = keras.optimizers.Adam(0.01)
    optimizer.build(model.trainable_variables)
    random = np.random.default_rng(hvd.rank())
    x = tf.constant(random.normal(size=(512, 32)), tf.float32)
    y = tf.reduce_sum(x, axis=1, keepdims=True)

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        # Horovod wants TensorFlow's variables, which Keras 3 keeps inside its own.
        variables = [variable.value for variable in model.trainable_variables]
        optimizer.apply(tape.gradient(loss, variables), model.trainable_variables)
        return loss

    losses = [float(step()) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    check_replicas(*model.get_weights())
    if hvd.size() > 1:
        assert [int(counter.last()) for counter in compression._counters.values()] == [29]
