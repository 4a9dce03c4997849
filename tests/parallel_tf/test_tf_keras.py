"""Keras 2 (tf-keras): model.fit, callbacks, and the options of DistributedOptimizer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd_tf
import horovod.tensorflow.keras as hvd
import numpy as np
import pytest
import tensorflow as tf
from horovod.keras import PartialDistributedOptimizer  # horovod.tensorflow.keras has none
from seldom import rare
from tf_helpers import (
    BATCH,
    SAMPLES,
    SHAPES,
    all_bytes,
    check_all,
    check_mean,
    check_replicas,
    compressor,
    gradients,
    locals_of,
    model_of,
    own,
    problem,
)

from gq_horovod.tensorflow.keras import (
    BroadcastGlobalVariablesCallback,
    DistributedOptimizer,
    GlobalQSGD,
    MetricAverageCallback,
)

keras = tf.keras
pytestmark = pytest.mark.skipif(
    os.environ.get("TF_USE_LEGACY_KERAS") != "1", reason="needs Keras 2: TF_USE_LEGACY_KERAS=1"
)

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "legacy": lambda: keras.optimizers.legacy.Adam(0.01),
}
KINDS = pytest.mark.parametrize(
    ("optimizer", "levels"), [("adam", "standard"), ("legacy", "exponential")]
)


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


@KINDS
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


def test_the_names_of_this_package_are_horovods() -> None:
    """A program that uses them runs with Keras 2 and Keras 3; test_tf_keras3.py has the others."""
    assert BroadcastGlobalVariablesCallback is hvd.callbacks.BroadcastGlobalVariablesCallback
    compression = GlobalQSGD(min_elements=1024)
    model = model_of(seed=hvd.rank())
    optimizer = DistributedOptimizer(
        OPTIMIZERS["adam"](), compression=compression, backward_passes_per_step=2
    )
    model.compile(optimizer=optimizer, loss="mse")
    every = [BroadcastGlobalVariablesCallback(0), MetricAverageCallback()]
    x, y = problem(hvd.rank())
    losses = model.fit(x, y, batch_size=BATCH, verbose=0, callbacks=every).history["loss"]
    check_replicas(*model.get_weights(), np.array(losses))
    if hvd.size() > 1:
        assert [int(c.last()) + 1 for c in compression._counters.values()] == [4]


def test_a_value_that_has_a_name(name: str) -> None:
    """Horovod's function names a constant after it, and does not pass the name on."""
    compression, inputs = compressor(), gradients(5000)
    own = inputs[hvd.rank()].numpy()
    result = hvd.allreduce(own, name=name, compression=compression)
    check_mean(result, inputs, compression)
    check_replicas(result)
    with pytest.raises(ValueError, match="name must be a string"):
        hvd.allreduce(own, compression=compression)


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "sum": {"op": hvd.Sum},
    "predivide": {"gradient_predivide_factor": 2.0},
    "groups": {"groups": 2},
    "passes": {"backward_passes_per_step": 2},
    "average of passes": {"backward_passes_per_step": 2, "average_aggregated_gradients": True},
    "sum of groups of passes": {"groups": 2, "op": hvd.Sum, "backward_passes_per_step": 2},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", [keras.optimizers, keras.optimizers.legacy], ids=["new", "legacy"])
def test_options_of_the_optimizer(kind: Any, option: str) -> None:
    """With a learning rate of 1, variables that start as zeros become the reduced gradients."""
    options = OPTIONS[option]
    levels = "exponential" if "groups" in options else "standard"
    compression = compressor(levels, min_elements=0)
    optimizer = hvd.DistributedOptimizer(kind.SGD(1.0), compression=compression, **options)
    variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in SHAPES.items()]
    passes = options.get("backward_passes_per_step", 1)
    for index in range(passes):
        wanted = own(30 + index)

        def loss(wanted: Any = wanted) -> Any:
            parts = zip(variables, wanted, strict=True)
            return tf.add_n([tf.reduce_sum(variable * x) for variable, x in parts])

        optimizer.minimize(loss, variables)
    every = zip(*(locals_of(30 + index) for index in range(passes)), strict=True)
    inputs = [[tf.add_n(parts) for parts in zip(*ranks, strict=True)] for ranks in every]
    factor = hvd.size() if "sum" in option else 1.0
    factor /= passes if "average" in option else 1
    check_all([-variable for variable in variables], inputs, compression, factor=factor)


def test_backward_passes_per_step() -> None:
    """Of fit(); what is averaged is in test_options_of_the_optimizer."""
    compression = GlobalQSGD(min_elements=1024)
    model = model_of(seed=0)
    model.compile(
        optimizer=hvd.DistributedOptimizer(
            keras.optimizers.SGD(0.001),
            compression=compression,
            backward_passes_per_step=4,
            average_aggregated_gradients=True,
        ),
        loss="mse",
    )
    model.fit(*problem(hvd.rank()), batch_size=BATCH, epochs=1, verbose=0)
    check_replicas(*model.get_weights())
    if hvd.size() > 1:  # eight batches, but two reductions
        assert [int(c.last()) for c in compression._counters.values()] == [1]


# ------------------------------------------------------------------------------------ loss scaling


@pytest.fixture
def policy(request: pytest.FixtureRequest) -> Iterator[str]:
    """What layers compute in; the variables are float32."""
    keras.mixed_precision.set_global_policy(request.param)
    yield request.param
    keras.mixed_precision.set_global_policy("float32")


def batch(bad: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A batch of this rank, in which the last rank has one bad label."""
    x, y = (part[:BATCH] for part in problem(hvd.rank()))
    if bad is not None and hvd.rank() == hvd.size() - 1:
        y[0] = bad
    return x, y


def weights_of(model: Any) -> np.ndarray:
    return np.concatenate([weights.ravel() for weights in model.get_weights()])


def check_skipped_steps(model: Any, scaling: Any, step: Callable[..., Any]) -> None:
    """A bad value halves the scale, and leaves the weights alone, on every rank."""
    while True:  # the scale falls until float16 can hold the gradients
        before = weights_of(model)
        step(*batch())
        if not np.array_equal(before, weights_of(model)):
            break
        assert float(scaling.loss_scale) > 1
    for bad in (np.nan, np.inf):
        scale, before = float(scaling.loss_scale), weights_of(model)
        step(*batch(bad))
        assert float(scaling.loss_scale) == scale / 2
        np.testing.assert_array_equal(weights_of(model), before)
        step(*batch())
        assert float(scaling.loss_scale) == scale / 2
        assert not np.array_equal(weights_of(model), before)
    check_replicas(weights_of(model))


# Every gradient is compressed: Horovod's own sums would bring the bad value to all ranks, too.
@pytest.mark.parametrize(
    ("optimizer", "levels", "policy"),
    [("adam", "standard", "float32"), ("legacy", "exponential", "mixed_float16")],
    indirect=["policy"],
)
@pytest.mark.usefixtures("policy")
def test_a_bad_value_of_one_rank_skips_the_step_on_all(optimizer: str, levels: str) -> None:
    compression = compressor(levels, min_elements=0)
    scaling = keras.mixed_precision.LossScaleOptimizer(
        hvd.DistributedOptimizer(OPTIMIZERS[optimizer](), compression=compression)
    )
    model = model_of(seed=0)
    model.compile(optimizer=scaling, loss="mse")
    check_skipped_steps(model, scaling, model.train_on_batch)


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
@pytest.mark.usefixtures("policy")
def test_an_optimizer_that_keras_wraps_for_mixed_precision() -> None:
    """Into what the test before has around a legacy one."""
    compression = compressor("standard", min_elements=0)
    model = model_of(seed=0)
    model.compile(
        optimizer=hvd.DistributedOptimizer(OPTIMIZERS["adam"](), compression=compression),
        loss="mse",
    )
    assert isinstance(model.optimizer, keras.mixed_precision.LossScaleOptimizer)
    check_skipped_steps(model, model.optimizer, model.train_on_batch)


@pytest.mark.parametrize("policy", ["mixed_float16"], indirect=True)
@pytest.mark.usefixtures("policy")
def test_loss_scaling_around_a_tape() -> None:
    compression = compressor("exponential", min_elements=0)
    scaling = keras.mixed_precision.LossScaleOptimizer(keras.optimizers.Adam(0.01))
    model = model_of(seed=0)
    variables = model.trainable_variables
    scaling.build(variables)

    @tf.function
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((tf.cast(model(x, training=True), tf.float32) - y) ** 2)
            loss = scaling.get_scaled_loss(loss)
        tape = hvd_tf.DistributedGradientTape(tape, compression=compression)
        gradients = scaling.get_unscaled_gradients(tape.gradient(loss, variables))
        scaling.apply_gradients(zip(gradients, variables, strict=True))

    check_skipped_steps(model, scaling, step)


COMPRESSIONS = {"none": lambda: hvd.Compression.none, "ours": lambda: GlobalQSGD(min_elements=1024)}


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_horovod_does_not_wrap_loss_scaling(optimizer: str, compression: str) -> None:
    """It has to be the other way around: Horovod's class cannot be made from its config."""
    scaling = keras.mixed_precision.LossScaleOptimizer(OPTIMIZERS[optimizer]())
    with pytest.raises(TypeError, match=r"__init__\(\) takes 1 positional argument"):
        hvd.DistributedOptimizer(scaling, compression=COMPRESSIONS[compression]())


@pytest.mark.parametrize("compression", [rare("none"), "ours"])
def test_loss_scaling_looks_at_every_backward_pass(compression: str) -> None:
    """Horovod reduces the sum of several, and Keras sees the ones before the last on one rank.

    So a bad value in an earlier pass moves the scale of its own rank twice, with any compression.
    """
    scaling = keras.mixed_precision.LossScaleOptimizer(
        hvd.DistributedOptimizer(
            keras.optimizers.SGD(0.001),
            compression=COMPRESSIONS[compression](),
            backward_passes_per_step=2,
        ),
        initial_scale=1024.0,
    )
    model = model_of(seed=0)
    model.compile(optimizer=scaling, loss="mse")
    before = weights_of(model)
    model.train_on_batch(*batch(np.nan))
    model.train_on_batch(*batch())
    np.testing.assert_array_equal(weights_of(model), before)
    own = hvd.rank() == hvd.size() - 1
    assert float(scaling.loss_scale) == (256.0 if own else 512.0)


# ------------------------------------------------------------------------------------------ models


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


@pytest.mark.parametrize(
    ("way", "levels"),
    [("tape", "standard"), ("adam", "exponential"), rare("legacy", "standard")],
)
def test_layers_that_stay_local(way: str, levels: str) -> None:
    """Only the others are reduced; the local ones of each rank go their own way."""
    compression = GlobalQSGD(levels=levels, min_elements=1024)
    model = model_of(seed=0, hidden=2)  # the kernels are 32 x 128 and 128 x 128
    local = model.layers[0]
    x, y = problem(hvd.rank())
    if way == "tape":
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        tape = hvd_tf.PartialDistributedGradientTape(
            tape, compression=compression, local_layers=local
        )
        parts = tape.gradient(loss, model.trainable_variables)
    else:
        model.compile(
            optimizer=PartialDistributedOptimizer(
                OPTIMIZERS[way](), compression=compression, local_layers=local
            ),
            loss="mse",
        )
        model.fit(x, y, batch_size=BATCH, epochs=1, verbose=0)
        parts = model.get_weights()
    check_replicas(*parts[2:])
    if hvd.size() > 1:
        assert len(np.unique(all_bytes(parts[:2]), axis=0)) == hvd.size()
        steps = 1 if way == "tape" else SAMPLES // BATCH
        assert [int(counter.last()) + 1 for counter in compression._counters.values()] == [steps]


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


@pytest.mark.parametrize(("levels", "passes"), [("standard", 1), ("two-hop", 2)])
def test_two_optimizers_in_one_function(levels: str, passes: int) -> None:
    """Of parts of a model that learn by losses of their own, through one compression."""
    compression = GlobalQSGD(levels=levels, min_elements=1000, check_replicas=1)
    parts = [model_of(seed=1), model_of(seed=2, hidden=2)]
    optimizers = [
        hvd.DistributedOptimizer(
            keras.optimizers.Adam(0.01), compression=compression, backward_passes_per_step=passes
        )
        for _ in parts
    ]
    for part, optimizer in zip(parts, optimizers, strict=True):
        optimizer.build(part.trainable_variables)
    x, y = map(tf.constant, problem(hvd.rank()))

    def loss_of(part: Any) -> Any:
        return lambda: tf.reduce_mean((part(x) - y) ** 2)

    @tf.function
    def step() -> Any:
        losses = [loss_of(part) for part in parts]
        for part, optimizer, loss in zip(parts, optimizers, losses, strict=True):
            # Horovod reduces in minimize(), not in apply_gradients(), with any compression.
            optimizer.minimize(loss, part.trainable_variables)
        return [loss() for loss in losses]

    first, *_, last = [step() for _ in range(16)]
    for before, after in zip(first, last, strict=True):
        assert after < 0.5 * before
    for part in parts:
        check_replicas(*part.get_weights())
