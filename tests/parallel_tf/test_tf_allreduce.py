"""gq_horovod.tensorflow.allreduce: values, replicas, and what a tensor may look like."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import helpers
import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
import torch
from helpers import CONFIGURATIONS, law_of
from tf_helpers import (
    DTYPES,
    all_bytes,
    check_mean,
    check_replicas,
    compressor,
    gradients,
    to_torch,
)

import gq_horovod.tensorflow as plugin
from gq_horovod.path import pipeline
from gq_horovod.tensorflow import GlobalQSGD, allreduce

EVERY = pytest.mark.parametrize(("levels", "bits"), CONFIGURATIONS)
EACH = pytest.mark.parametrize(
    ("levels", "bits"), [("standard", 8), ("exponential", 8), ("two-hop", 8)]
)
MODES = pytest.mark.parametrize("mode", ["eager", "graph"])
# Graphs know nothing of widths.
EVERY_AND_GRAPHS = pytest.mark.parametrize(
    ("levels", "bits", "mode"),
    [
        *((*options, "eager") for options in CONFIGURATIONS),
        *((levels, 8, "graph") for levels in ("standard", "exponential", "two-hop")),
    ],
)


def run(mode: str, function: Any, *arguments: Any) -> Any:
    """Call a function eagerly, or as a graph."""
    return (tf.function(function) if mode == "graph" else function)(*arguments)


@EVERY_AND_GRAPHS
def test_the_mean_is_unbiased_with_the_variance_of_its_closed_form(
    levels: str, bits: int | None, mode: str, name: str
) -> None:
    """In a graph, tensors of all dtypes are in flight at once."""
    compression = compressor(levels, bits)
    inputs = [gradients(4097, tag=1, dtype=dtype) for dtype in DTYPES]
    own = [tf.identity(ranks[hvd.rank()]) for ranks in inputs]
    before = [x.numpy().copy() for x in own]

    def reduce(tensors: Any) -> Any:
        return [
            allreduce(x, f"{name}.{index}", compression=compression)
            for index, x in enumerate(tensors)
        ]

    results = run(mode, reduce, own)
    for x, copy, result, ranks in zip(own, before, results, inputs, strict=True):
        assert np.array_equal(x.numpy(), copy), "the input was modified"
        check_mean(result, ranks, compression)
    check_replicas(*results)


def shrink(self: Any, index: int, shapes: Any, shared: Any, x: Any) -> Any:
    return quantize(self, index, shapes, shared, x * 0.9)


def round_to_nearest(self: Any, index: int, shapes: Any, shared: Any, x: Any) -> Any:
    level = shared.view(np.float32)[0] / self.plan.level_count
    return quantize(self, index, shapes, shared, (np.round(x / level) * level).astype(x.dtype))


class RankZero(plugin.kernels.Kernels):
    @property
    def process_set(self) -> Any:
        return SimpleNamespace(size=super().process_set.size, rank=lambda: 0)


def round_alike_on_all_ranks(self: Any, index: int, shapes: Any, shared: Any, x: Any) -> Any:
    return quantize(RankZero(**vars(self)), index, shapes, shared, x)


quantize = plugin.kernels.Kernels.quantize


@pytest.mark.parametrize("mutant", [shrink, round_to_nearest, round_alike_on_all_ranks])
def test_faulty_rounding_fails_the_check(
    mutant: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check of the mean's law would see what the graph could do wrong."""
    if mutant is round_alike_on_all_ranks and hvd.size() == 1:
        pytest.skip("needs a second rank")
    compression = compressor("standard", 8, block_size=None)
    inputs = gradients(4097, tag=15)
    if mutant is round_to_nearest:  # which loses what is under half a level on every rank
        large = tf.one_hot(0, 4097, on_value=8.0)
        inputs = [x / 16 + large for x in inputs]
    if mutant is round_alike_on_all_ranks:
        inputs = inputs[:1] * hvd.size()  # so that the errors are alike, too
    own = inputs[hvd.rank()]
    check_mean(allreduce(own, name, compression=compression), inputs, compression)
    monkeypatch.setattr(plugin.kernels.Kernels, "quantize", mutant)
    result = allreduce(own, name, compression=compression)
    with pytest.raises(AssertionError, match=r"biased|sum of squares|mean"):
        check_mean(result, inputs, compression)


@EVERY
def test_any_number_of_elements(levels: str, bits: int | None, name: str) -> None:
    compression = compressor(levels, bits)
    results = []
    for count in (1, 31, 32, 33, 1000, 4097):
        inputs = gradients(count, tag=2)
        result = allreduce(inputs[hvd.rank()], f"{name}.{count}", compression=compression)
        check_mean(result, inputs, compression)
        results.append(result)
    check_replicas(*results)


@EACH
@MODES
def test_a_large_tensor(
    levels: str, bits: int, mode: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "chunk_elements", lambda ranks: 20_000)  # so that it is one
    compression = compressor(levels, bits)
    inputs = gradients(100_003, tag=17)
    result = run(mode, lambda x: allreduce(x, name, compression=compression), inputs[hvd.rank()])
    check_mean(result, inputs, compression)
    check_replicas(result)


@pytest.mark.parametrize("levels", ["standard", "exponential"])
@pytest.mark.parametrize(
    "options", [{"norm": "l2"}, {"block_size": None}, {"block_size": 32}, {"bits": 8, "seed": -1}]
)
def test_the_other_options(levels: str, options: dict[str, Any], name: str) -> None:
    compression = compressor(levels, **options)
    inputs = gradients(1000, tag=3)
    result = allreduce(inputs[hvd.rank()], name, compression=compression)
    check_mean(result, inputs, compression)
    check_replicas(result)


@pytest.mark.parametrize("bits", [3, 5, 6, 10, 12, 16])
def test_lanes_of_any_width(bits: int, name: str) -> None:
    compression = compressor("standard", bits)
    if hvd.size() > 2 ** (bits - 1) - 1:
        pytest.skip(f"{bits} bits cannot hold the sum of {hvd.size()} ranks")
    inputs = gradients(1000, tag=4)
    result = allreduce(inputs[hvd.rank()], name, compression=compression)
    check_mean(result, inputs, compression)
    check_replicas(result)


@EACH
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_sum(levels: str, bits: int, dtype: Any, name: str) -> None:
    compression = compressor(levels, bits)
    inputs = gradients(1000, tag=5, dtype=dtype)
    result = allreduce(inputs[hvd.rank()], name, op=hvd.Sum, compression=compression)
    check_mean(result, inputs, compression, factor=hvd.size())
    check_replicas(result)


def test_the_presets_of_the_paper_and_the_class_itself(name: str) -> None:
    inputs = gradients(5000, tag=6)
    for index, choice in enumerate(
        (GlobalQSGD, GlobalQSGD.paper_standard, GlobalQSGD.paper_exponential)
    ):
        result = allreduce(inputs[hvd.rank()], f"{name}.{index}", compression=choice)
        check_mean(result, inputs, choice() if isinstance(choice, type) else choice)
        check_replicas(result)


@EACH
@MODES
def test_horovod_functions_take_it_as_compression(
    levels: str, bits: int, mode: str, name: str
) -> None:
    compression = compressor(levels, bits)
    inputs = gradients(1000, tag=7)
    others = gradients(500, tag=8)

    def reduce(own: Any, other: Any) -> Any:
        scaled = hvd.allreduce(
            own, name=name, compression=compression, prescale_factor=0.5, postscale_factor=4.0
        )
        pair = hvd.grouped_allreduce(
            [own, other], name=f"{name}.group", op=hvd.Sum, compression=compression
        )
        return [scaled, *pair]

    results = run(mode, reduce, inputs[hvd.rank()], others[hvd.rank()])
    check_mean(results[0], inputs, compression, factor=2.0)
    check_mean(results[1], inputs, compression, factor=hvd.size())
    check_mean(results[2], others, compression, factor=hvd.size())
    check_replicas(*results)


def test_a_group_of_large_and_small_tensors(name: str) -> None:
    """Horovod reduces a group as one, so it is compressed if one of its tensors is large."""
    inputs = gradients(5000, tag=18), gradients(9, tag=19)
    results = hvd.grouped_allreduce(
        [ranks[hvd.rank()] for ranks in inputs], name=name, compression=GlobalQSGD
    )
    for result, ranks in zip(results, inputs, strict=True):
        check_mean(result, ranks, GlobalQSGD())
    check_replicas(*results)


# ------------------------------------------------------------------------------------------- shapes


@EACH
@pytest.mark.parametrize("shape", [(), (40, 30), (5, 1, 8, 6)])
def test_shapes(levels: str, bits: int, shape: tuple[int, ...], name: str) -> None:
    compression = compressor(levels, bits)
    inputs = gradients(shape, tag=9)
    result = allreduce(inputs[hvd.rank()], name, compression=compression)
    assert result.shape == shape
    check_mean(result, inputs, compression)
    check_replicas(result)


@EACH
def test_a_graph_that_does_not_know_the_shape(levels: str, bits: int, name: str) -> None:
    compression = compressor(levels, bits, min_elements=4096)

    @tf.function(input_signature=[tf.TensorSpec(None, tf.float32)])
    def reduce(x: Any) -> Any:
        return allreduce(x, name, compression=compression)

    for shape in ((100, 50), (7,)):
        inputs = gradients(shape, tag=20)
        result = reduce(inputs[hvd.rank()])
        check_mean(result, inputs, compression)
        check_replicas(result)
    assert reduce(tf.zeros([0, 3])).shape == (0, 3)


@MODES
def test_an_empty_tensor_stays_empty(mode: str, name: str) -> None:
    for dtype in DTYPES:
        result = run(
            mode,
            lambda x: allreduce(x, name, compression=compressor()),
            tf.zeros([0, 3], dtype),
        )
        assert result.shape == (0, 3)
        assert result.dtype == dtype


def test_a_variable(name: str) -> None:
    inputs = gradients((50, 100), tag=21)
    result = allreduce(tf.Variable(inputs[hvd.rank()]), name, compression=GlobalQSGD)
    check_mean(result, inputs, GlobalQSGD())


# ----------------------------------------------------------------------------------- special values


@EVERY
def test_where_all_ranks_hold_the_maximum_it_is_exact(
    levels: str, bits: int | None, name: str
) -> None:
    """No sum of codes overflows: every code of the tensor is the largest one of its sign."""
    for dtype in DTYPES:
        x = tf.cast(np.where(np.arange(1000) % 2, -3.0, 3.0), dtype)
        result = allreduce(x, f"{name}.{dtype.name}", compression=compressor(levels, bits))
        assert bool(tf.reduce_all(result == x))


@EVERY
def test_zeros_stay_zeros_and_disturb_nobody(levels: str, bits: int | None, name: str) -> None:
    compression = compressor(levels, bits)
    assert not np.any(allreduce(tf.zeros(1000), name, compression=compression))
    inputs = [x.numpy() for x in gradients(1024, tag=10)]
    for x in inputs:
        x[256:512] = 0
    if hvd.size() > 1:
        inputs[-1][:] = 0
    inputs = [tf.constant(x) for x in inputs]
    result = allreduce(inputs[hvd.rank()], f"{name}.part", compression=compression)
    assert not np.any(result[256:512])
    check_mean(result, inputs, compression)
    check_replicas(result)


@EVERY
def test_one_bad_element_on_one_rank_makes_its_block_nan_on_every_rank(
    levels: str, bits: int | None, name: str
) -> None:
    compression = compressor(levels, bits)
    bad_values = [(np.nan, tf.float16), (np.inf, tf.float32), (-np.inf, tf.float64)]
    for value, dtype in [*bad_values, (np.nan, tf.bfloat16)]:
        inputs = [x.numpy() for x in gradients(1000, tag=11, dtype=dtype)]
        block = helpers.plan_of(compression, hvd.size()).block_for(1000)
        bad = slice(0, 1000) if block >= 1000 else slice(256, 512)
        inputs[-1][300] = value
        inputs = [tf.constant(x) for x in inputs]
        result = allreduce(inputs[hvd.rank()], f"{name}.{dtype.name}", compression=compression)
        assert bool(to_torch(result[bad]).isnan().all())
        check_replicas(result)
        for fine in (slice(0, bad.start), slice(bad.stop, 1000)):
            if fine.start < fine.stop:
                check_mean(result[fine], [x[fine] for x in inputs], compression)


@EVERY_AND_GRAPHS
def test_the_largest_and_the_smallest_numbers(
    levels: str, bits: int | None, mode: str, name: str
) -> None:
    """Norms at both ends of float32: neither the scale nor its reciprocal leaves the range.

    The threads that run a graph flush denormal numbers, so its smallest norm is a larger one.
    """
    compression = compressor(levels, bits)
    for end in (np.finfo(np.float32).max, 2.0**-140 if mode == "eager" else 2.0**-100):
        x = np.full(512, end, np.float32)
        x[::3] = 0
        reduce = lambda x: allreduce(x, f"{name}.{mode}", compression=compression)  # noqa: E731
        result = run(mode, reduce, tf.constant(x)).numpy()
        np.testing.assert_array_equal(result, x)


# -------------------------------------------------------------------------- what is left to Horovod


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64], ids=lambda dtype: dtype.name)
def test_integers_are_summed_exactly(dtype: Any, name: str) -> None:
    x = tf.range(10, dtype=dtype) + hvd.rank()
    result = allreduce(x, name, op=hvd.Sum, compression=compressor())
    ranks = hvd.size()
    assert result.dtype == dtype
    assert np.array_equal(result, np.arange(10) * ranks + ranks * (ranks - 1) // 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_small_tensors_are_exact(dtype: Any, name: str) -> None:
    """Multiples of the number of ranks, so that their mean is an integer."""
    x = tf.cast(hvd.size() * (np.arange(99) % 9 + hvd.rank()), dtype)
    result = allreduce(x, name, compression=GlobalQSGD)
    expected = hvd.size() * (np.arange(99) % 9) + hvd.size() * (hvd.size() - 1) // 2
    assert result.dtype == dtype
    assert np.array_equal(tf.cast(result, tf.int64), expected)


def test_small_tensors_stay_differentiable(name: str) -> None:
    x, weights = tf.Variable(tf.ones(9)), tf.range(9.0)
    with tf.GradientTape() as tape:
        y = hvd.allreduce(x, name=name, compression=GlobalQSGD)
        loss = tf.reduce_sum(y * weights)
    np.testing.assert_allclose(tape.gradient(loss, x), weights)


def test_slices_are_gathered_by_horovod() -> None:
    values = tf.fill([2, 3000], float(hvd.rank()))
    slices = tf.IndexedSlices(values, tf.constant([hvd.rank(), 7]), tf.constant([10, 3000]))
    result = hvd.allreduce(slices, op=hvd.Sum, compression=GlobalQSGD)
    assert isinstance(result, tf.IndexedSlices)
    expected = [row for rank in range(hvd.size()) for row in (rank, 7)]
    assert result.indices.numpy().tolist() == expected


# ------------------------------------------------------------------------------------- process sets


@EACH
@MODES
def test_a_process_set_reduces_among_its_ranks(
    levels: str, bits: int, mode: str, ends: hvd.ProcessSet, name: str
) -> None:
    compression = GlobalQSGD(levels=levels, bits=bits, min_elements=0)
    inputs = [gradients(1000, tag=12)[rank] for rank in ends.ranks]
    if ends.included():

        def reduce(x: Any) -> Any:
            return allreduce(x, name, compression=compression, process_set=ends)

        result = run(mode, reduce, inputs[ends.rank()])
        check_mean(result, inputs, compression)
        check_replicas(result, process_set=ends)
    everyone = gradients(1000, tag=13)
    result = allreduce(everyone[hvd.rank()], f"{name}.all", compression=compression)
    check_mean(result, everyone, compression)


# --------------------------------------------------------------------------------------- randomness


@EVERY_AND_GRAPHS
def test_repetitions_round_afresh(levels: str, bits: int | None, mode: str, name: str) -> None:
    """Their errors are independent, with the law's variance: no step is used twice."""
    compression = compressor(levels, bits)
    inputs = gradients(500, tag=14)
    law = law_of([to_torch(x) for x in inputs], compression)

    def reduce(x: Any) -> Any:
        return allreduce(x, name, compression=compression)

    reduce = tf.function(reduce) if mode == "graph" else reduce
    results = [to_torch(reduce(inputs[hvd.rank()])) for _ in range(8)]
    errors = torch.stack([result.double() for result in results]) - law.mean
    helpers.check_errors(errors, law)
    helpers.check_averages(errors, law)


def test_a_constant_in_a_graph_is_reduced_in_every_run(name: str) -> None:
    """TensorFlow computes what depends on nothing once, when it optimizes the graph."""
    compression = compressor("standard", 4)
    own = gradients(1000, tag=22)[hvd.rank()].numpy()
    reduce = tf.function(lambda: allreduce(tf.constant(own), name, compression=compression))
    first, second = reduce(), reduce()
    assert not np.array_equal(first, second)


@EVERY
def test_ranks_do_not_share_their_errors(levels: str, bits: int | None, name: str) -> None:
    """With the same values on every rank, a shared dither would leave n times the variance."""
    compression = compressor(levels, bits)
    inputs = [gradients(4097, tag=15)[0]] * hvd.size()
    result = allreduce(inputs[0], name, compression=compression)
    check_mean(result, inputs, compression)


@EACH
def test_a_seed_reproduces_the_bytes_and_another_one_does_not(
    levels: str, bits: int, name: str
) -> None:
    own = gradients(1000, tag=16)[hvd.rank()]

    def twice(seed: int, mode: str) -> list[np.ndarray]:
        fresh = GlobalQSGD(levels=levels, bits=bits, min_elements=0, seed=seed)
        reduce = lambda x: allreduce(x, name, compression=fresh)  # noqa: E731
        reduce = tf.function(reduce) if mode == "graph" else reduce
        return [reduce(own).numpy() for _ in range(2)]

    first, again, other = twice(1, "eager"), twice(1, "graph"), twice(2, "eager")
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])
    assert len(np.unique(all_bytes(first), axis=0)) == 1
