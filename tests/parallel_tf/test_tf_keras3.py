"""Keras 3: the distributed optimizer and the callbacks of gq_horovod.tensorflow.keras."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import horovod.tensorflow.keras as hvd_keras
import keras
import numpy as np
import pytest
import tensorflow as tf
from tf_helpers import (
    BATCH,
    FEATURES,
    SAMPLES,
    SHAPES,
    all_bytes,
    check_all,
    check_replicas,
    compressor,
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

pytestmark = pytest.mark.skipif(
    os.environ.get("TF_USE_LEGACY_KERAS") == "1", reason="TensorFlow is told to take Keras 2"
)


def weights_of(model: Any) -> np.ndarray:
    return np.concatenate([weights.ravel() for weights in model.get_weights()])


def state_of(model: Any) -> list[np.ndarray]:
    return [variable.numpy() for variable in [*model.weights, *model.optimizer.variables]]


def steps_of(compression: GlobalQSGD) -> list[int]:
    """How many times each bucket was reduced."""
    return [int(counter.last()) + 1 for counter in compression._counters.values()]


def variables_of() -> list[Any]:
    """Variables of Keras that start as zeros."""
    return [keras.Variable(tf.zeros(shape), name=name) for name, shape in SHAPES.items()]


# ------------------------------------------------------------------------------------------- loops


def custom_loop(model: Any, optimizer: Any, tape_of: Callable[[Any], Any], epochs: int) -> None:
    @tf.function
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        # Horovod wants TensorFlow's variables, which Keras 3 keeps inside its own.
        variables = [variable.value for variable in model.trainable_variables]
        found = tape_of(tape).gradient(loss, variables)
        optimizer.apply(found, model.trainable_variables)

    optimizer.build(model.trainable_variables)
    x, y = problem(hvd.rank())
    for _ in range(epochs):
        for start in range(0, SAMPLES, BATCH):
            batch = slice(start, start + BATCH)
            step(tf.constant(x[batch]), tf.constant(y[batch]))


def fit(model: Any, optimizer: Any, epochs: int, **options: Any) -> list[float]:
    model.compile(optimizer=optimizer, loss="mse", **options)
    callbacks = [
        BroadcastGlobalVariablesCallback(0),
        MetricAverageCallback(),
        keras.callbacks.LearningRateScheduler(lambda epoch, lr: lr * (2 if epoch == 0 else 1)),
    ]
    x, y = problem(hvd.rank())
    history = model.fit(
        x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks
    )
    losses: list[float] = history.history["loss"]
    return losses


def test_a_custom_loop_with_a_tape() -> None:
    compression = GlobalQSGD(levels="exponential", min_elements=1024)
    model = model_of(seed=0)
    custom_loop(
        model,
        keras.optimizers.Adam(0.01),
        lambda tape: hvd.DistributedGradientTape(tape, compression=compression),
        epochs=2,
    )
    check_replicas(*model.get_weights())
    if hvd.size() > 1:
        assert steps_of(compression) == [2 * SAMPLES // BATCH]


def test_a_custom_loop_with_the_optimizer() -> None:
    compression = GlobalQSGD(min_elements=1024)
    model = model_of(seed=0)
    optimizer = DistributedOptimizer(keras.optimizers.Adam(0.01), compression=compression)
    custom_loop(model, optimizer, lambda tape: tape, epochs=2)
    check_replicas(*model.get_weights(), *[v.numpy() for v in optimizer.variables])
    if hvd.size() > 1:
        assert steps_of(compression) == [2 * SAMPLES // BATCH]


WAYS: dict[str, dict[str, Any]] = {
    "graph": {},
    "eagerly": {"run_eagerly": True},
    "several steps at once": {"steps_per_execution": 4},
}


@pytest.mark.parametrize("way", WAYS)
def test_fit_from_different_states(way: str) -> None:
    compression = GlobalQSGD(min_elements=1024)
    model = model_of(seed=hvd.rank())  # the callback makes weights and learning rates equal
    optimizer = keras.optimizers.Adam(0.01 / (1 + hvd.rank()))
    optimizer = DistributedOptimizer(optimizer, compression=compression)
    losses = fit(model, optimizer, epochs=3, **WAYS[way])
    assert losses[-1] < 0.5 * losses[0]
    assert int(optimizer.iterations) == 3 * SAMPLES // BATCH
    check_replicas(*state_of(model), np.array(losses))
    if hvd.size() > 1:
        assert steps_of(compression) == [3 * SAMPLES // BATCH]
        before = weights_of(model)
        model.train_on_batch(*(part[:BATCH] for part in problem(hvd.rank())))
        assert not np.array_equal(weights_of(model), before)
        check_replicas(*state_of(model))


def test_rules_go_by_the_paths_of_variables() -> None:
    compression = GlobalQSGD(min_elements=0, rules={"*/body/*": None})
    layers = [keras.layers.Dense(8, name="body"), keras.layers.Dense(1, name="head")]
    model = keras.Sequential(layers)
    optimizer = DistributedOptimizer(keras.optimizers.SGD(0.001), compression=compression)
    fit(model, optimizer, epochs=1)
    check_replicas(*model.get_weights())
    if hvd.size() > 1:
        assert len(compression._counters) == len(layers[1].variables)


def test_the_loss_of_a_training_is_that_without_compression() -> None:
    losses = []
    for compression in (hvd.Compression.none, GlobalQSGD(min_elements=1024)):
        model = model_of(seed=0)
        optimizer = DistributedOptimizer(keras.optimizers.SGD(0.002), compression=compression)
        losses.append(fit(model, optimizer, epochs=10)[-1])
        check_replicas(*state_of(model))
    assert losses[1] == pytest.approx(losses[0], rel=0.005)
    if hvd.size() > 1:
        assert losses[1] != losses[0]


# ----------------------------------------------------------------------------------------- options

OPTIONS: dict[str, Callable[[list[Any]], dict[str, Any]]] = {
    "default": lambda _: {},
    "sum": lambda _: {"op": hvd.Sum},
    "predivide": lambda _: {"gradient_predivide_factor": 2.0},
    "number of groups": lambda _: {"groups": 2},
    "groups": lambda variables: {"groups": [variables[:2]]},
}


@pytest.mark.parametrize(
    ("option", "way"),
    [("default", "eagerly"), *zip(OPTIONS, ["graph", "graph", "eagerly"] * 2, strict=False)],
)
def test_options(option: str, way: str) -> None:
    """With a learning rate of 1, variables that start as zeros become the reduced gradients."""
    compression = compressor("exponential" if "group" in option else "standard", min_elements=0)
    variables = variables_of()
    options = OPTIONS[option](variables)
    optimizer = DistributedOptimizer(keras.optimizers.SGD(1.0), compression=compression, **options)
    apply = optimizer.apply_gradients
    pairs = zip(own(30), variables, strict=True)
    if way == "graph":
        optimizer.build(variables)
        tf.function(lambda: apply(pairs))()
    else:
        apply(pairs)
    factor = hvd.size() if option == "sum" else 1.0
    check_all(
        [-variable.value for variable in variables], locals_of(30), compression, factor=factor
    )


@pytest.mark.parametrize("compression", ["none", "fp16"])
def test_compressions_of_horovod(compression: str) -> None:
    variables = variables_of()
    optimizer = DistributedOptimizer(
        keras.optimizers.SGD(1.0), compression=getattr(hvd.Compression, compression)
    )
    optimizer.apply(own(31), variables)
    for variable, ranks in zip(variables, locals_of(31), strict=True):
        mean = -np.mean(ranks, axis=0)
        tolerance = 2e-3 if compression == "fp16" else 1e-5
        np.testing.assert_allclose(variable.numpy(), mean, rtol=tolerance, atol=tolerance)
    check_replicas(*[variable.numpy() for variable in variables])


CLIPPING = {"clipnorm": 0.5, "global_clipnorm": 0.7, "clipvalue": 0.01}


@pytest.mark.parametrize("option", CLIPPING)
def test_the_reduced_gradients_are_clipped(option: str) -> None:
    results = []
    for reduced in (True, False):
        optimizer = keras.optimizers.SGD(1.0, **{option: CLIPPING[option]})
        variables = variables_of()
        given = [tf.constant(np.mean(ranks, axis=0)) for ranks in locals_of(32)]
        if reduced:
            optimizer, given = DistributedOptimizer(optimizer), own(32)
        optimizer.apply(given, variables)
        results.append(np.concatenate([variable.numpy().ravel() for variable in variables]))
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-6)


def test_variables_without_a_gradient_and_moving_averages() -> None:
    compression = compressor(min_elements=0)
    variables = variables_of()
    optimizer = DistributedOptimizer(
        keras.optimizers.SGD(1.0, use_ema=True, ema_momentum=0.5), compression=compression
    )
    for _ in range(2):
        given = own(33)
        given[1] = None
        with pytest.warns(UserWarning, match="Gradients do not exist"):
            optimizer.apply(given, variables)
    assert not np.any(variables[1].numpy())
    assert np.any(variables[0].numpy())
    last = variables[0].numpy()
    optimizer.finalize_variable_values(variables)
    assert not np.array_equal(variables[0].numpy(), last)
    check_replicas(*[variable.numpy() for variable in [*variables, *optimizer.variables]])


def test_values_that_keras_assigns_are_the_largest_of_all_ranks() -> None:
    """Those of float8: they are no gradients, though they come as such."""
    variables = variables_of()
    variables[1].overwrite_with_gradient = True
    given = own(34)
    DistributedOptimizer(keras.optimizers.SGD(1.0), op=hvd.Sum).apply(given, variables)
    np.testing.assert_array_equal(variables[1].numpy(), np.max(locals_of(34)[1], axis=0))
    np.testing.assert_allclose(
        variables[0].numpy(), -np.sum(locals_of(34)[0], axis=0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
def test_sparse_gradients_have_the_result_of_dense_ones(kind: str) -> None:
    """Rows that several ranks have are added, as they are in a dense gradient."""
    weights = []
    for dense in (False, True):
        optimizer = DistributedOptimizer(
            getattr(keras.optimizers, kind)(0.1), sparse_as_dense=dense
        )
        variable = keras.Variable(tf.ones((20, 3)), name="table")
        for step in range(3):
            rows = tf.constant([1, 3 + hvd.rank(), 5 + step], tf.int64)
            values = tf.reshape(tf.range(9, dtype=tf.float32), (3, 3)) + hvd.rank()
            given = tf.IndexedSlices(values, rows, tf.constant([20, 3], tf.int64))
            optimizer.apply([given], [variable])
        weights.append(variable.numpy())
    np.testing.assert_allclose(*weights, rtol=1e-5)
    check_replicas(*weights)


# ------------------------------------------------------------------------------------ accumulation


@pytest.mark.parametrize("way", ["eagerly", "graph"])
@pytest.mark.parametrize("option", [{}, {"clipnorm": 0.5}])
def test_the_mean_of_several_passes_is_reduced(option: dict[str, float], way: str) -> None:
    compression = GlobalQSGD(min_elements=0)
    variables = variables_of()
    optimizer = DistributedOptimizer(
        keras.optimizers.SGD(1.0, gradient_accumulation_steps=2, **option), compression=compression
    )
    optimizer.build(variables)

    def step(*given: Any) -> None:
        optimizer.apply(list(given))

    step = tf.function(step) if way == "graph" else step
    passes = 40, 41
    for index, tag in enumerate(passes):
        assert not np.any(variables[0].numpy()), index
        step(*own(tag))
    if option:
        norms = [np.linalg.norm(variable.numpy()) for variable in variables]
        np.testing.assert_allclose(norms, 0.5, rtol=1e-5)
        check_replicas(*[variable.numpy() for variable in variables])
    else:
        every = [
            [(a + b) / 2 for a, b in zip(*ranks, strict=True)]
            for ranks in zip(*map(locals_of, passes), strict=True)
        ]
        check_all([-variable.value for variable in variables], every, compression)
    if hvd.size() > 1:
        assert set(steps_of(compression)) == {1}


def test_fit_with_several_passes() -> None:
    """In a graph; the test before takes steps eagerly, too."""
    compression = GlobalQSGD(min_elements=1024)
    model = model_of(seed=hvd.rank())
    optimizer = DistributedOptimizer(
        keras.optimizers.Adam(0.01, gradient_accumulation_steps=4), compression=compression
    )
    fit(model, optimizer, epochs=1)
    check_replicas(*state_of(model))
    if hvd.size() > 1:
        assert steps_of(compression) == [SAMPLES // BATCH // 4]


def test_an_optimizer_that_never_clips_cannot_accumulate() -> None:
    class Odd(keras.optimizers.SGD):  # type: ignore[misc]
        def _backend_apply_gradients(self, grads: Any, trainable_variables: Any) -> None:
            self._backend_update_step(grads, trainable_variables, self.learning_rate)

    optimizer = DistributedOptimizer(Odd(1.0, gradient_accumulation_steps=2))
    variables = variables_of()
    optimizer.build(variables)
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps"):
        tf.function(lambda: optimizer.apply(own(42)))()


# ------------------------------------------------------------------------------------ loss scaling


@pytest.fixture(params=["float32", "mixed_float16"])
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


def around(optimizer: Any, compression: Any) -> Any:
    return keras.optimizers.LossScaleOptimizer(DistributedOptimizer(optimizer, **compression))


def inside(optimizer: Any, compression: Any) -> Any:
    return DistributedOptimizer(keras.optimizers.LossScaleOptimizer(optimizer), **compression)


def by_itself(optimizer: Any, compression: Any) -> Any:
    """Keras wraps it, under the policy mixed_float16."""
    return DistributedOptimizer(optimizer, **compression)


NESTINGS = [
    pytest.param(around, "float32", "graph", id="around"),
    pytest.param(around, "mixed_float16", "eagerly", id="around-mixed"),
    pytest.param(inside, "float32", "eagerly", id="inside"),
    pytest.param(inside, "mixed_float16", "graph", id="inside-mixed"),
    pytest.param(by_itself, "mixed_float16", "graph", id="by itself"),
    pytest.param(by_itself, "mixed_float16", "eagerly", id="by itself-eagerly"),
]


# Every gradient is compressed: Horovod's own sums would bring the bad value to all ranks, too.
@pytest.mark.parametrize(("nesting", "policy", "way"), NESTINGS, indirect=["policy"])
@pytest.mark.usefixtures("policy")
def test_a_bad_value_of_one_rank_skips_the_step_on_all(nesting: Any, way: str) -> None:
    """A bad value halves the scale, and leaves the weights alone, on every rank."""
    model = model_of(seed=0)
    optimizer = nesting(keras.optimizers.Adam(0.01), {"compression": compressor(min_elements=0)})
    model.compile(optimizer=optimizer, loss="mse", **WAYS[way])
    scaling = model.optimizer
    assert isinstance(scaling, keras.optimizers.LossScaleOptimizer)
    model.train_on_batch(*batch())
    while int(scaling.inner_optimizer.iterations) == 0:
        # The scale falls until float16 can hold the gradients.
        model.train_on_batch(*batch())
        assert float(scaling.dynamic_scale) > 1
    for bad in (np.nan, np.inf):
        scale, before = float(scaling.dynamic_scale), weights_of(model)
        model.train_on_batch(*batch(bad))
        assert float(scaling.dynamic_scale) == scale / 2
        np.testing.assert_array_equal(weights_of(model), before)
        model.train_on_batch(*batch())
        assert float(scaling.dynamic_scale) == scale / 2
        assert not np.array_equal(weights_of(model), before)
    check_replicas(*state_of(model))


@pytest.mark.parametrize("nesting", [around, inside])
def test_a_bad_value_in_an_earlier_pass_skips_the_pass_on_all_ranks(nesting: Any) -> None:
    """Every pass is reduced, once, since Keras looks at every pass."""
    compression = GlobalQSGD(min_elements=0)
    model = model_of(seed=0)
    optimizer = nesting(
        keras.optimizers.SGD(0.001, gradient_accumulation_steps=2), {"compression": compression}
    )
    model.compile(optimizer=optimizer, loss="mse")
    before = weights_of(model)
    for bad, moved in [(None, False), (np.inf, False), (None, True)]:
        model.train_on_batch(*batch(bad))
        assert np.array_equal(weights_of(model), before) is not moved
    assert float(optimizer.dynamic_scale) == optimizer.initial_scale / 2
    check_replicas(*state_of(model))
    if hvd.size() > 1:
        assert set(steps_of(compression)) == {3}


def test_a_plain_loss_scaling_stays_as_it_was() -> None:
    model = model_of(seed=0)
    DistributedOptimizer(keras.optimizers.SGD(0.001))  # which changes the class of scaling
    model.compile(
        optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.001)), loss="mse"
    )
    before = weights_of(model)
    model.train_on_batch(*batch(np.inf))
    bad = hvd.rank() == hvd.size() - 1
    assert np.array_equal(weights_of(model), before) is bad


# ---------------------------------------------------------------------------------------- one rank


@pytest.fixture(scope="module")
def alone() -> Iterator[Any]:
    """The process set of this rank."""
    sets = [hvd.add_process_set([rank]) for rank in range(hvd.size())] if hvd.size() > 1 else []
    yield sets[hvd.rank()] if sets else hvd.global_process_set
    for process_set in sets:
        hvd.remove_process_set(process_set)


def clipping(own: Any) -> Any:
    return own(keras.optimizers.Adam(0.01, global_clipnorm=1.0, gradient_accumulation_steps=2))


def scaling(own: Any) -> Any:
    return keras.optimizers.LossScaleOptimizer(own(keras.optimizers.SGD(0.001)))


@pytest.mark.parametrize("kind", [clipping, scaling])
def test_one_rank_computes_what_the_plain_optimizer_computes(kind: Any, alone: Any) -> None:
    def ours(optimizer: Any) -> Any:
        return DistributedOptimizer(optimizer, compression=GlobalQSGD(), process_set=alone)

    results = []
    for wrap in (ours, lambda optimizer: optimizer):
        model = model_of(seed=0)
        model.compile(optimizer=kind(wrap), loss="mse")
        x, y = problem(hvd.rank())
        model.fit(x, y, batch_size=BATCH, epochs=1, shuffle=False, verbose=0)
        results.append(state_of(model))
    for ours_is, plain_is in zip(*results, strict=True):
        np.testing.assert_array_equal(ours_is, plain_is)
    if hvd.size() > 1:
        assert len(np.unique(all_bytes(results[0][:1]), axis=0)) == hvd.size()


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("nesting", [around, inside, by_itself])
def test_an_optimizer_is_distributed_once(nesting: Any) -> None:
    optimizer = nesting(keras.optimizers.SGD(1.0), {})
    with pytest.raises(ValueError, match=r"DistributedOptimizer: optimizer .* once"):
        DistributedOptimizer(optimizer)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"op": hvd.Max}, "op must be"),
        ({"op": hvd.Sum, "gradient_predivide_factor": 2.0}, "gradient_predivide_factor must be"),
        ({"groups": 0}, "groups must be"),
        ({"num_groups": 2}, "use groups"),
        ({"backward_passes_per_step": 2}, "gradient_accumulation_steps"),
    ],
)
def test_arguments(options: dict[str, Any], text: str) -> None:
    optimizer = keras.optimizers.SGD(1.0)
    with pytest.raises(ValueError, match=f"DistributedOptimizer: .*{text}"):
        DistributedOptimizer(optimizer, **options)
    DistributedOptimizer(optimizer)  # nothing was done to it


@pytest.mark.parametrize("steps", [None, 2])
def test_a_gradient_for_each_variable(steps: int | None) -> None:
    """Keras leaves out what is too much, in silence."""
    optimizer = keras.optimizers.SGD(1.0, gradient_accumulation_steps=steps)
    with pytest.raises(ValueError, match=r"apply\(\) must .* got 3 for 4 variables"):
        DistributedOptimizer(optimizer).apply(own(60)[:3], variables_of())
    with pytest.raises(ValueError, match="already be built"):
        DistributedOptimizer(keras.optimizers.SGD(1.0)).apply(own(60))


def test_groups_of_variables_need_names_of_their_own() -> None:
    variables = [keras.Variable(tf.zeros(3), name="same") for _ in range(2)]
    optimizer = DistributedOptimizer(keras.optimizers.SGD(1.0), groups=[variables])
    with pytest.raises(ValueError, match=r"names must differ.*same"):
        optimizer.apply([tf.ones(3)] * 2, variables)


def test_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match=r"got 'jax'; set KERAS_BACKEND=tensorflow"):
        DistributedOptimizer(keras.optimizers.SGD(1.0))


def test_models_that_xla_compiles() -> None:
    """The callback says what TensorFlow says less clearly."""
    model = model_of(seed=0)
    optimizer = DistributedOptimizer(keras.optimizers.SGD(0.001))
    model.compile(optimizer=optimizer, loss="mse", jit_compile=True)
    with pytest.raises(ValueError, match="jit_compile=False"):
        model.fit(*batch(), verbose=0, callbacks=[BroadcastGlobalVariablesCallback(0)])
    with pytest.raises(tf.errors.InvalidArgumentError, match="unsupported operations"):
        model.fit(*batch(), verbose=0)


@pytest.mark.parametrize("way", ["horovod", "ours"])
def test_the_optimizer_of_horovod_warns(way: str) -> None:
    optimizer = keras.optimizers.SGD(1.0)
    if way == "horovod":
        with pytest.warns(RuntimeWarning, match="does not reduce") as caught:
            hvd_keras.DistributedOptimizer(optimizer)
        assert caught[0].filename == __file__
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            DistributedOptimizer(optimizer)


# ------------------------------------------------------------------------------------------ saving


@keras.saving.register_keras_serializable("tests")
class Registered(keras.optimizers.SGD):  # type: ignore[misc]
    """An optimizer of the user's, which files know by the name that it was registered with."""


@pytest.mark.parametrize("kind", [keras.optimizers.AdamW, Registered])
def test_configs_and_classes(kind: Any) -> None:
    given = kind(0.01, weight_decay=0.1)
    config, serialized = given.get_config(), keras.optimizers.serialize(given)
    optimizer = DistributedOptimizer(given, op=hvd.Sum)
    assert isinstance(optimizer, kind)
    assert optimizer.get_config() == config
    assert keras.optimizers.serialize(optimizer) == serialized
    assert type(keras.optimizers.deserialize(serialized)) is kind
    again = type(optimizer).from_config(config)  # which reduces, too
    assert again.get_config() == config
    with pytest.raises(ValueError, match="once"):
        DistributedOptimizer(again)
    variables = variables_of()
    again.apply(own(50), variables)
    check_replicas(*[variable.numpy() for variable in variables])


@pytest.mark.parametrize("nesting", [around, by_itself])
def test_a_saved_model_continues(nesting: Any, tmp_path: Path) -> None:
    model = model_of(seed=0)
    compression = {"compression": compressor(min_elements=1024)}
    optimizer = nesting(keras.optimizers.Adam(0.01), compression)
    path = tmp_path / "model.keras"
    x, y = problem(hvd.rank())
    model.compile(optimizer=optimizer, loss="mse")
    checkpoint = keras.callbacks.ModelCheckpoint(str(path))
    model.fit(x, y, batch_size=BATCH, verbose=0, callbacks=[checkpoint])
    again = keras.models.load_model(path)
    plain = keras.optimizers.Adam if nesting is by_itself else keras.optimizers.LossScaleOptimizer
    assert type(again.optimizer) is plain
    for saved, loaded in zip(state_of(model), state_of(again), strict=True):
        np.testing.assert_array_equal(saved, loaded)
    again.compile(optimizer=DistributedOptimizer(again.optimizer, **compression), loss="mse")
    again.fit(x, y, batch_size=BATCH, verbose=0)
    assert int(again.optimizer.iterations) == 2 * SAMPLES // BATCH
    check_replicas(*state_of(again))


def test_metrics_are_averaged() -> None:
    model = model_of(seed=0)
    model.compile(optimizer=DistributedOptimizer(keras.optimizers.SGD(0.0)), loss="mse")
    x, y = problem(hvd.rank())
    alone = model.evaluate(x, y, verbose=0)
    callback = MetricAverageCallback()
    history = model.fit(x, y, verbose=0, validation_data=(x, y), callbacks=[callback]).history
    mean = hvd.allgather(tf.constant([alone], tf.float64)).numpy().mean()
    assert history["val_loss"] == pytest.approx([mean])
    assert history["loss"] == pytest.approx([mean], rel=1e-4)


def test_ranks_keep_their_own_dropout() -> None:
    keras.utils.set_random_seed(hvd.rank())
    layers = [keras.layers.Dense(8), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((FEATURES,)), *layers])
    fit(model, DistributedOptimizer(keras.optimizers.SGD(0.001)), epochs=1)
    check_replicas(*state_of(model))
    seeds = [variable.numpy() for variable in model.non_trainable_variables]
    assert len(seeds) == 1
    if hvd.size() > 1:
        assert len(np.unique(all_bytes(seeds), axis=0)) == hvd.size()
