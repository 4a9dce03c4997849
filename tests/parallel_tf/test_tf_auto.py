"""levels="auto" in graphs and eagerly: trials, one decision, equal replicas."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from tf_helpers import (
    DTYPES,
    SHAPES,
    check_all,
    check_replicas,
    compressor,
    gradients,
    locals_of,
    own,
)

from gq_horovod.path import auto
from gq_horovod.tensorflow import GlobalQSGD, allreduce, kernels

pytestmark = pytest.mark.usefixtures("several_ranks", "no_elastic_job")

WAYS = ["none", "16 bits", "standard", "two-hop"]


@pytest.fixture
def no_elastic_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOROVOD_ELASTIC", raising=False)


class Clock:
    """Seconds that steps seem to take, by the way in which they are reduced."""

    def __init__(self, fastest: str) -> None:
        self.now = 0.0
        self.fastest = fastest

    def pass_step(self, way: auto.Way) -> None:
        # On rank 0 the others are faster still, but not on the slowest rank, which counts.
        others = 0.1 if hvd.rank() == 0 else 1.0
        self.now += 0.5 if way.name == self.fastest else others


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[auto.Way]:
    """What was chosen for each step, in trials of two steps for each way."""
    chosen: dict[int, auto.Way] = {}

    class Trials(auto.Trials):
        def way(self, step: int, size: int) -> auto.Way:
            chosen[step] = super().way(step, size)
            return chosen[step]

    monkeypatch.setattr(auto, "STEPS", (2, 2))
    monkeypatch.setattr(kernels, "Trials", Trials)
    return chosen  # type: ignore[return-value]


def step_of(compression: GlobalQSGD, **options: Any) -> Any:
    variables = [tf.Variable(tf.zeros(shape)) for shape in SHAPES.values()]

    @tf.function
    def step(wanted: list[Any]) -> Any:
        with tf.GradientTape() as tape:
            parts = zip(variables, wanted, strict=True)
            loss = tf.add_n([tf.reduce_sum(variable * x) for variable, x in parts])
        tape = hvd.DistributedGradientTape(tape, compression=compression, **options)
        return tape.gradient(loss, variables)

    return step


TOGETHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a bucket": ({}, {}),
    "buckets": ({"first_bucket_bytes": 1, "bucket_bytes": 30_000}, {}),
    "each by itself": ({"bucket_bytes": 0}, {}),
    "groups": ({}, {"groups": 2}),
    "a sum": ({}, {"op": hvd.Sum}),
}


@pytest.mark.parametrize(
    ("fastest", "together"),
    [*((way, "buckets") for way in WAYS), *(("two-hop", own) for own in TOGETHER)],
)
def test_all_ranks_take_one_decision(
    fastest: str, together: str, ways: dict[int, auto.Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(fastest)
    monkeypatch.setattr(kernels, "Trials", partial(kernels.Trials, clock=lambda: clock.now))
    options, tape = TOGETHER[together]
    compression = GlobalQSGD(levels="auto", min_elements=0, **options)
    step = step_of(compression, **tape)
    factor = hvd.size() if together == "a sum" else 1.0
    for number in range(40):
        results = step(own(500 + number))
        clock.pass_step(ways[number])
        if number % 5 == 0 or number > 35:
            way = ways[number]
            law = compressor("standard", min_elements=1 << 30)  # of none: the mean itself
            if way.name != "none":
                assert way.plan is not None
                law = compressor(way.plan.levels, way.plan.bits)
            check_all(results, locals_of(500 + number), law, factor=factor)
    assert {way.name for way in ways.values()} == set(WAYS)
    (decision,) = compression.decisions.values()
    assert decision is not None
    assert decision.name == fastest
    assert all(ways[number] == decision for number in range(36, 40))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_one_tensor_of_every_dtype(mode: str, dtype: Any, name: str, ways: Any) -> None:
    compression = GlobalQSGD(levels="auto", min_elements=0)

    def reduce(x: Any) -> Any:
        return allreduce(x, name, compression=compression)

    reduce = reduce if mode == "eager" else tf.function(reduce)
    for number in range(36):
        inputs = gradients(2000, tag=600 + number, dtype=dtype)
        result = reduce(inputs[hvd.rank()])
        assert result.dtype == dtype
        exact = np.mean([tf.cast(x, tf.float64) for x in inputs], axis=0)
        norm = max(float(tf.reduce_max(tf.abs(tf.cast(x, tf.float64)))) for x in inputs)
        assert np.abs(tf.cast(result, tf.float64) - exact).max() <= 0.05 * norm
    check_replicas(result)
    assert list(compression.decisions.values()) != [None]


def test_after_join(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks may have reduced unequally often: refused on all of them, before anything is sent."""
    compression = GlobalQSGD(levels="auto", min_elements=0)
    reduce = tf.function(lambda x: allreduce(x, name, compression=compression))
    reduce(tf.ones(5000))
    monkeypatch.setattr(hvd.mpi_ops.MPI_LIB, "joined", True)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"levels must not be 'auto' where"):
        reduce(tf.ones(5000))
    hvd.allreduce(tf.constant(0.0), name=f"{name}.after")


def test_elastic_jobs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    with pytest.raises(ValueError, match="levels must not be 'auto' in an elastic job"):
        allreduce(tf.ones(5000), name, compression=GlobalQSGD(levels="auto"))


def test_slow_ranks_are_waited_for(name: str) -> None:
    """At the ends of trials all ranks compare times, while others' reductions are on their way."""
    step = step_of(GlobalQSGD(levels="auto", min_elements=0, bucket_bytes=0))
    for number in range(100):
        if number % 10 == hvd.rank():
            time.sleep(0.01)
        results = step(own(700))
    check_replicas(*results)
