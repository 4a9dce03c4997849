"""Keras 2 (tf-keras): model.fit, callbacks, and the options of DistributedOptimizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd_tf
import horovod.tensorflow.keras as hvd
import numpy as np
import pytest
import tensorflow as tf
from tf_helpers import all_bytes, check_replicas, compressor

from gq_horovod.tensorflow.keras import GlobalQSGD

keras = tf.keras
pytestmark = pytest.mark.skipif(
    os.environ.get("TF_USE_LEGACY_KERAS") != "1", reason="needs Keras 2: TF_USE_LEGACY_KERAS=1"
)

FEATURES, SAMPLES, BATCH = 32, 512, 64


def problem(rank: int) -> tuple[np.ndarray, np.ndarray]:
    """A rank's samples of a linear problem that a network learns quickly."""
    weights = np.random.default_rng(0).normal(size=(FEATURES, 1))
    x = np.random.default_rng(1 + rank).normal(size=(SAMPLES, FEATURES))
    return x.astype(np.float32), (x @ weights).astype(np.float32)


def model_of(seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.layers.Dense(128, activation="relu", input_shape=(FEATURES,)),
            keras.layers.Dense(1),
        ]
    )


OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "legacy": lambda: keras.optimizers.legacy.Adam(0.01),
}


def callbacks() -> list[Any]:
    """Those of Horovod, for the Keras that TensorFlow has: it looks for the package `keras`."""
    every = [
        hvd.callbacks.BroadcastGlobalVariablesCallback(0),
        hvd.callbacks.MetricAverageCallback(),
        hvd.callbacks.LearningRateWarmupCallback(initial_lr=0.01, warmup_epochs=2),
    ]
    for callback in every:
        callback.backend = keras.backend
    return every


@pytest.mark.parametrize("levels", ["standard", "exponential"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fit_with_the_callbacks(levels: str, optimizer: str) -> None:
    compression = compressor(levels, min_elements=1024)
    model = model_of(seed=hvd.rank())  # the callback makes them equal
    model.compile(
        optimizer=hvd.DistributedOptimizer(OPTIMIZERS[optimizer](), compression=compression),
        loss="mse",
    )
    history = model.fit(
        *problem(hvd.rank()),
        batch_size=BATCH,
        epochs=5,
        verbose=0,
        callbacks=callbacks(),
    ).history["loss"]
    assert history[-1] < 0.5 * history[0]
    check_replicas(*model.get_weights())
    steps = {name: int(counter.last()) for name, counter in compression._counters.items()}
    if hvd.size() > 1:  # the only large one of four
        assert max(steps.values()) >= 5 * SAMPLES // BATCH - 1


@pytest.mark.parametrize("average", [False, True])
def test_backward_passes_per_step(average: bool) -> None:
    compression = GlobalQSGD(min_elements=1024)
    model = model_of(seed=0)
    model.compile(
        optimizer=hvd.DistributedOptimizer(
            keras.optimizers.SGD(0.001),
            compression=compression,
            backward_passes_per_step=4,
            average_aggregated_gradients=average,
        ),
        loss="mse",
    )
    model.fit(*problem(hvd.rank()), batch_size=BATCH, epochs=1, verbose=0)
    check_replicas(*model.get_weights())
    if hvd.size() > 1:  # eight batches, but two reductions
        assert [int(c.last()) for c in compression._counters.values()] == [1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_nan_of_one_rank_skips_the_step_on_all(optimizer: str) -> None:
    """Dynamic loss scaling halves the scale, and leaves the weights alone, on every rank."""
    scaling = keras.mixed_precision.LossScaleOptimizer(
        hvd.DistributedOptimizer(OPTIMIZERS[optimizer](), compression=compressor(min_elements=1024))
    )
    model = model_of(seed=0)
    model.compile(optimizer=scaling, loss="mse")
    x, y = problem(hvd.rank())
    model.train_on_batch(x[:BATCH], y[:BATCH])
    scale, before = float(scaling.loss_scale), model.get_weights()
    if hvd.rank() == hvd.size() - 1:
        y[0] = np.nan
    model.train_on_batch(x[:BATCH], y[:BATCH])
    assert float(scaling.loss_scale) == scale / 2
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    _, y = problem(hvd.rank())
    model.train_on_batch(x[:BATCH], y[:BATCH])
    assert not np.array_equal(before[0], model.get_weights()[0])
    check_replicas(*model.get_weights())


@pytest.mark.parametrize("dense", [False, True])
def test_embeddings(dense: bool) -> None:
    """Sparse gradients are gathered by Horovod, unless it makes them dense."""
    compression = GlobalQSGD(min_elements=1024)
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Embedding(500, 8, input_length=4),
            keras.layers.Flatten(),
            keras.layers.Dense(1),
        ]
    )
    model.compile(
        optimizer=hvd.DistributedOptimizer(
            keras.optimizers.Adam(0.01), compression=compression, sparse_as_dense=dense
        ),
        loss="mse",
    )
    rows = np.random.default_rng(hvd.rank()).integers(0, 500, size=(256, 4))
    model.fit(rows, rows[:, :1] / 500.0, batch_size=64, epochs=1, verbose=0)
    check_replicas(*model.get_weights())
    if hvd.size() > 1:
        assert len(compression._counters) == (1 if dense else 0)


def test_layers_that_stay_local() -> None:
    """A partial tape reduces the other layers only."""
    compression = compressor(min_elements=0)
    model = model_of(seed=0)
    x, y = problem(hvd.rank())
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    tape = hvd_tf.PartialDistributedGradientTape(
        tape, compression=compression, local_layers=model.layers[0]
    )
    gradients = tape.gradient(loss, model.trainable_variables)
    check_replicas(*gradients[2:])
    if hvd.size() > 1:
        assert len(np.unique(all_bytes(gradients[:2]), axis=0)) == hvd.size()


def test_a_saved_model_continues(tmp_path: Path) -> None:
    compression = compressor(min_elements=1024)
    model = model_of(seed=0)
    model.compile(
        optimizer=hvd.DistributedOptimizer(keras.optimizers.Adam(0.01), compression=compression),
        loss="mse",
    )
    model.fit(*problem(hvd.rank()), batch_size=BATCH, epochs=1, verbose=0)
    model.save(tmp_path / "model.h5")
    again = hvd.load_model(str(tmp_path / "model.h5"), compression=compression)
    again.fit(*problem(hvd.rank()), batch_size=BATCH, epochs=1, verbose=0)
    check_replicas(*again.get_weights())
