"""Whatever Horovod's functions take: `average=`, shapes, dtypes and groups, as without compression.

Inputs are multiples of the number of ranks with the largest magnitude everywhere, which the
quantizer does not round: what comes out is what Horovod's own compression gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from seldom import in_pairs
from tf_helpers import DTYPES, check_replicas, compressor

WAYS = ["standard", "exponential", "two-hop"]
LEVELS = pytest.mark.parametrize("levels", WAYS)
MODES = ["eager", "graph", "unknown shapes"]


def call(mode: str, function: Callable[..., Any], tensors: list[Any]) -> list[Any]:
    """The results of function(tensors), eagerly or as a graph."""
    if mode == "graph":
        function = tf.function(function)
    if mode == "unknown shapes":
        specs = [tf.TensorSpec(None, x.dtype) for x in tensors]
        function = tf.function(function, input_signature=[specs])
    return list(function(tensors))


def exact(shape: tuple[int, ...], dtype: Any) -> Any:
    """The largest magnitude in every place; the same on every rank, so means are as exact."""
    values = np.where(np.arange(int(np.prod(shape))) % 3, -4.0, 4.0).reshape(shape)
    return tf.cast(values, dtype)


def equal(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert type(one) is type(other)
        if isinstance(one, tf.IndexedSlices):
            np.testing.assert_array_equal(one.indices, other.indices)
            one, other = one.values, other.values
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        np.testing.assert_array_equal(tf.cast(one, tf.float64), tf.cast(other, tf.float64))


INPUTS: dict[str, Callable[[], Any]] = {
    "compressed": lambda: exact((5000,), tf.float32),
    "small": lambda: tf.ones(9) * hvd.rank(),
    "integers": lambda: tf.range(5000) * hvd.rank(),
    "slices": lambda: tf.IndexedSlices(
        tf.fill([2, 3000], float(hvd.rank())), tf.constant([1, hvd.rank()]), tf.constant([9, 3000])
    ),
}


# Only the first is compressed.
KINDS = [*(("compressed", own) for own in WAYS), *((kind, "two-hop") for kind in [*INPUTS][1:])]


@pytest.mark.parametrize(
    ("case", "average", "mode"), in_pairs(KINDS, [True, False, None], ["eager", "graph"]), ids=str
)
def test_average(case: tuple[str, str], average: bool | None, mode: str, name: str) -> None:
    """The argument that `op` has replaced, of one tensor and of a group."""
    kind, levels = case
    choices = compressor(levels, min_elements=4096), hvd.Compression.none
    for group in (False, True):
        function = hvd.grouped_allreduce if group else hvd.allreduce

        def reduce(choice: Any, group: bool = group, function: Any = function) -> Any:
            tensor = INPUTS[kind]()
            options = {"average": average, "compression": choice, "name": f"{name}.{group}"}
            return function([tensor, tensor], **options) if group else [function(tensor, **options)]

        results = [(tf.function(reduce) if mode == "graph" else reduce)(c) for c in choices]
        equal(*results)


@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_average_beside_op(mode: str, name: str) -> None:
    for choice in (compressor(), hvd.Compression.none):

        def reduce(choice: Any = choice) -> Any:
            options = {"average": True, "op": hvd.Sum, "compression": choice}
            return hvd.allreduce(tf.ones(5000), name=name, **options)

        with pytest.raises(ValueError, match="The op parameter supersedes average"):
            (tf.function(reduce) if mode == "graph" else reduce)()


SHAPES = [(), (0, 3), (1, 1, 1), (31,), (64, 65)]


@pytest.mark.parametrize(("dtype", "mode", "levels"), in_pairs(DTYPES, MODES, WAYS), ids=str)
def test_tensors_of_any_shape(levels: str, dtype: Any, mode: str, name: str) -> None:
    """With min_elements=0, and each beside a large one in a group."""
    compression = compressor(levels, min_elements=0)
    tensors = [exact(shape, dtype) for shape in (*SHAPES, (70, 70))]

    def reduce(tensors: list[Any]) -> list[Any]:
        results = []
        for index, x in enumerate(tensors):
            options = {"name": f"{name}.{index}", "compression": compression}
            results.append(hvd.allreduce(x, **options))
            options["name"] += ".group"
            results += hvd.grouped_allreduce([tensors[-1], x], **options)
        return results

    equal(call(mode, reduce, tensors), [y for x in tensors for y in (x, tensors[-1], x)])


@pytest.mark.parametrize(
    ("levels", "mode", "min_elements"), in_pairs(WAYS, ["eager", "graph"], [0, 4096])
)
def test_a_scalar_variable_beside_a_large_one(levels: str, min_elements: int, mode: str) -> None:
    """A temperature, say; in the group of a tape, which Horovod reduces as one."""
    compression = compressor(levels, min_elements=min_elements)
    table, scalar = tf.Variable(tf.zeros([128, 128])), tf.Variable(0.5)

    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = 4.0 * scalar + tf.reduce_sum(table * 4.0)
        tape = hvd.DistributedGradientTape(tape, compression=compression, groups=1)
        return tape.gradient(loss, [table, scalar])

    results = (tf.function(step) if mode == "graph" else step)()
    assert [result.shape for result in results] == [[128, 128], []]
    assert all(bool(tf.reduce_all(result == 4.0)) for result in results)
    check_replicas(*results)


@pytest.mark.parametrize("mode", ["eager", "graph"])
@LEVELS
def test_groups_of_dtypes_that_horovod_refuses(levels: str, mode: str, name: str) -> None:
    """Integers beside floats: an error of Horovod or TensorFlow, with any compression."""
    for choice in (compressor(levels), hvd.Compression.none):

        def reduce(choice: Any = choice) -> Any:
            tensors = [tf.ones(5000), tf.ones(5000, tf.int32)]
            return hvd.grouped_allreduce(tensors, name=name, compression=choice)

        with pytest.raises((TypeError, ValueError, tf.errors.InvalidArgumentError)):
            (tf.function(reduce) if mode == "graph" else reduce)()


@pytest.mark.parametrize(
    ("dtype", "levels", "mode"),
    in_pairs([tf.float16, tf.bfloat16, tf.float32], WAYS, ["eager", "graph"]),
    ids=str,
)
def test_a_sum_that_overflows_is_inf_without_a_warning(
    levels: str, dtype: Any, mode: str, name: str, recwarn: pytest.WarningsRecorder
) -> None:
    if hvd.size() == 1:
        pytest.skip("needs a second rank")
    compression = compressor(levels)
    x = tf.fill([1000], tf.constant(dtype.max, dtype))

    def reduce(tensors: Any) -> Any:
        options = {"name": name, "op": hvd.Sum, "compression": compression}
        return [hvd.allreduce(tensors[0], **options)]

    (result,) = call(mode, reduce, [x])
    assert bool(tf.reduce_all(tf.math.is_inf(tf.cast(result, tf.float32))))
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
