"""DistributedGradientTape and the graph: names, steps, order, and what a gradient may look like."""

from __future__ import annotations

import threading
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from tf_helpers import check_mean, check_replicas, compressor, gradients

import gq_horovod.tensorflow as plugin
from gq_horovod.tensorflow import GlobalQSGD

# Long enough for a slow machine; only a failing test waits for it.
LIMIT_SECONDS = 60

SHAPES = {"matrix": (100, 60), "bias": (10,), "convolution": (3, 3, 25, 20), "vector": (4096,)}


def locals_of(tag: int) -> list[list[Any]]:
    """For each variable of SHAPES, the gradients of all ranks."""
    return [gradients(shape, tag=100 * tag + i) for i, shape in enumerate(SHAPES.values())]


def check_all(results: Any, tag: int, compression: GlobalQSGD, *, factor: float = 1.0) -> None:
    """Assert that large gradients follow the law, and small ones are the mean."""
    for result, inputs in zip(results, locals_of(tag), strict=True):
        if hvd.size() == 1:  # Horovod reduces nothing then
            np.testing.assert_array_equal(result, inputs[0])
        elif inputs[0].shape.num_elements() < compression.config.min_elements:
            mean = np.mean(inputs, axis=0) * factor
            np.testing.assert_allclose(result, mean, rtol=1e-5, atol=1e-6)
        else:
            check_mean(result, inputs, compression, factor=factor)
    check_replicas(*results)


class Model:
    """Variables, and a step whose gradients are whatever is asked for."""

    def __init__(self, **options: Any) -> None:
        self.variables = [tf.Variable(tf.zeros(shape)) for shape in SHAPES.values()]
        self.options = options

    def gradients(self, wanted: list[Any], generic: bool = False) -> list[Any]:
        with tf.GradientTape() as tape:
            parts = [
                tf.reduce_sum(variable * gradient)
                for variable, gradient in zip(self.variables, wanted, strict=True)
            ]
            loss = tf.add_n(parts)
        tape = hvd.DistributedGradientTape(tape, **self.options)
        gradients: list[Any] = tape.gradient(loss, self.variables, use_generic_names=generic)
        return gradients


def own(tag: int) -> list[Any]:
    return [ranks[hvd.rank()] for ranks in locals_of(tag)]


@pytest.mark.parametrize("levels", ["standard", "exponential"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_tape(levels: str, mode: str) -> None:
    compression = compressor(levels, min_elements=4096)
    model = Model(compression=compression)
    step = tf.function(model.gradients) if mode == "graph" else model.gradients
    for tag in range(3):
        check_all(step(own(tag)), tag, compression)


OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {"op": hvd.Sum},
    "predivide": {"gradient_predivide_factor": 3.0},
    "groups": {"groups": 2},
}


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_tape(option: str) -> None:
    # Every tensor is compressed in a group with a large one.
    compression = compressor(min_elements=0)
    model = Model(compression=compression, **OPTIONS[option])
    factor = hvd.size() if option == "sum" else 1.0
    check_all(tf.function(model.gradients)(own(5)), 5, compression, factor=factor)


def test_generic_names() -> None:
    compression = compressor(min_elements=4096)
    model = Model(compression=compression)
    step = tf.function(lambda wanted: model.gradients(wanted, generic=True))
    check_all(step(own(6)), 6, compression)


@pytest.mark.usefixtures("several_ranks")
def test_a_process_set_of_a_tape(ends: hvd.ProcessSet) -> None:
    """Horovod builds its graph on every rank, and runs it on those of the process set."""
    compression = GlobalQSGD(min_elements=0)
    model = Model(compression=compression, process_set=ends)
    results = tf.function(model.gradients)(own(7))
    for result, inputs in zip(results, locals_of(7), strict=True):
        if ends.included():
            check_mean(result, [inputs[rank] for rank in ends.ranks], compression)
        else:
            np.testing.assert_array_equal(result, inputs[hvd.rank()])


# ---------------------------------------------------------------------------------- names and steps


@pytest.mark.usefixtures("several_ranks")
def test_tracing_again_continues_the_steps() -> None:
    """A function that is traced again, or another one, never uses a step for the second time."""
    compression = GlobalQSGD(min_elements=0)
    model = Model(compression=compression)
    for _ in range(2):
        step = tf.function(lambda wanted, mark: model.gradients(wanted))
        for mark in (tf.constant(1), tf.constant(1.0)):  # one trace for each dtype
            step(own(8), mark)
    steps = {name: int(counter.last()) for name, counter in compression._counters.items()}
    assert steps == {f"DistributedGradientTape.{index}": 3 for index in range(len(SHAPES))}


@pytest.mark.usefixtures("several_ranks")
def test_ranks_that_trace_at_different_times() -> None:
    """Retracing on one rank alone moves no data, and the others need not know."""
    compression = compressor(min_elements=4096)
    model = Model(compression=compression)
    step = tf.function(model.gradients)
    step(own(0))
    if hvd.rank() == 0:
        step = tf.function(model.gradients)
    check_all(step(own(9)), 9, compression)


@pytest.mark.usefixtures("several_ranks")
def test_two_tapes_in_one_function() -> None:
    """Their gradients have the same places in their lists, and are in flight together."""
    compression = compressor(min_elements=4096)
    first, second = Model(compression=compression), Model(compression=compression)

    @tf.function
    def step(one: Any, other: Any) -> Any:
        return first.gradients(one), second.gradients(other)

    for tag in (10, 20):
        results = step(own(tag), own(tag + 1))
        check_all(results[0], tag, compression)
        check_all(results[1], tag + 1, compression)


@pytest.mark.usefixtures("several_ranks")
def test_one_gradient_of_two_variables() -> None:
    compression = compressor()
    inputs = gradients(1000, tag=23)
    one, other = (tf.Variable(tf.zeros(1000)) for _ in range(2))

    @tf.function
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((one + other) * x)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        return tape.gradient(loss, [one, other])

    results = step(inputs[hvd.rank()])
    for result in results:
        check_mean(result, inputs, compression)
    check_replicas(*results)


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("first", [0, 2])
def test_no_gradient_waits_for_another(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is held back until another one is done, in either order."""
    last = 2 - first
    compression = compressor(min_elements=4096)
    done = threading.Event()
    waited: list[bool] = []
    measure, dequantize = plugin._Kernels.measure, plugin._Kernels.dequantize

    def slow(self: Any, *arguments: Any) -> Any:
        if self.name == f"DistributedGradientTape.{last}":
            waited.append(done.wait(LIMIT_SECONDS))
        return measure(self, *arguments)

    def watched(self: Any, *arguments: Any) -> Any:
        result = dequantize(self, *arguments)
        if self.name == f"DistributedGradientTape.{first}":
            done.set()
        return result

    monkeypatch.setattr(plugin._Kernels, "measure", slow)
    monkeypatch.setattr(plugin._Kernels, "dequantize", watched)
    check_all(tf.function(Model(compression=compression).gradients)(own(11)), 11, compression)
    assert waited == [True]


# --------------------------------------------------------------------------- what a gradient may be


@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bad_value_of_one_rank_reaches_all(mode: str, value: float) -> None:
    """Mixed-precision loss scaling looks at its own rank only."""
    model = Model(compression=compressor(min_elements=4096))
    step = tf.function(model.gradients) if mode == "graph" else model.gradients
    mine = own(12)
    if hvd.rank() == hvd.size() - 1:
        mine[3] = tf.tensor_scatter_nd_update(mine[3], [[77]], [value])
    finite = [bool(tf.reduce_all(tf.math.is_finite(x))) for x in step(mine)]
    assert finite == [True, True, True, False]


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_variables_without_a_gradient(mode: str) -> None:
    compression = compressor(min_elements=4096)
    inputs = gradients(5000, tag=24)
    used, unused = tf.Variable(tf.zeros(5000)), tf.Variable(tf.zeros(5000))

    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(used * x)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        return tape.gradient(loss, [unused, used])

    step = tf.function(step) if mode == "graph" else step
    nothing, result = step(inputs[hvd.rank()])
    assert nothing is None
    if hvd.size() > 1:
        check_mean(result, inputs, compression)


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("dense", [False, True])
def test_rows_of_an_embedding(dense: bool) -> None:
    """Sparse gradients go the way of Horovod, unless it makes them dense."""
    compression = compressor(min_elements=4096)
    table = tf.Variable(tf.zeros([64, 100]))
    inputs = gradients((8, 100), tag=25)
    rows = [tf.range(8) * 7 + rank for rank in range(hvd.size())]

    @tf.function
    def step(x: Any, rows: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.gather(table, rows) * x)
        tape = hvd.DistributedGradientTape(tape, compression=compression, sparse_as_dense=dense)
        return tape.gradient(loss, [table])[0]

    result = step(inputs[hvd.rank()], rows[hvd.rank()])
    scattered = [
        tf.scatter_nd(row[:, None], x, [64, 100]) for row, x in zip(rows, inputs, strict=True)
    ]
    if dense:
        check_mean(result, scattered, compression)
    else:
        assert isinstance(result, tf.IndexedSlices)
        mean = np.mean(scattered, axis=0)
        np.testing.assert_allclose(tf.convert_to_tensor(result), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_result_is_not_differentiable(mode: str, name: str) -> None:
    x = tf.Variable(tf.ones(1000))

    def step() -> Any:
        with tf.GradientTape() as tape:
            y = plugin.allreduce(x, name, compression=compressor())
            loss = tf.reduce_sum(y * y)
        return tape.gradient(loss, x)

    with pytest.raises(ValueError, match="a compressed result must not be differentiated"):
        (tf.function(step) if mode == "graph" else step)()
