"""levels="auto" in graphs and eagerly: trials, one decision, equal replicas."""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Any

import horovod.tensorflow as hvd
import horovod.tensorflow.keras as hvd_keras
import numpy as np
import pytest
import tensorflow as tf
from seldom import rare
from tf_helpers import (
    SHAPES,
    check_all,
    check_replicas,
    compressor,
    gradients,
    locals_of,
    model_of,
    own,
    problem,
)

from gq_horovod.path import auto
from gq_horovod.tensorflow import GlobalQSGD, allreduce, kernels

pytestmark = pytest.mark.usefixtures("several_ranks")

WAYS = ["none", "16 bits", "standard", "two-hop"]
STEPS = 3 + 2 * 4 * (2 + 2)  # until a decision is there, with trials of two steps for each way


class Clock:
    """Seconds that steps seem to take, by the way in which they are reduced."""

    def __init__(self, fastest: str) -> None:
        self.now = 0.0
        self.fastest = fastest

    def pass_step(self, way: str) -> None:
        # On rank 0 the others are faster still, but not on the slowest rank, which counts.
        others = 0.1 if hvd.rank() == 0 else 1.0
        self.now += 0.5 if way == self.fastest else others


class Trials(auto.SharedTrials):
    """Keeps what was chosen."""

    chosen: list[tuple[str, int, str]]  # name of the first tensor, step and way

    def choose(self, name: str, agreed: Any) -> int:
        place = super().choose(name, agreed)
        self.chosen.append((name, agreed[0], WAYS[place]))
        return place


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, str]]:
    """What was chosen for each step."""
    monkeypatch.setattr(auto, "STEPS", (2, 2))
    monkeypatch.setattr(Trials, "chosen", [], raising=False)
    monkeypatch.setattr(kernels, "SharedTrials", Trials)
    return Trials.chosen


def step_of(compression: GlobalQSGD, run_eagerly: bool = False, **options: Any) -> Any:
    variables = [tf.Variable(tf.zeros(shape)) for shape in SHAPES.values()]

    def step(wanted: list[Any]) -> Any:
        with tf.GradientTape() as tape:
            parts = zip(variables, wanted, strict=True)
            loss = tf.add_n([tf.reduce_sum(variable * x) for variable, x in parts])
        tape = hvd.DistributedGradientTape(tape, compression=compression, **options)
        return tape.gradient(loss, variables)

    return step if run_eagerly else tf.function(step)


def law_of(way: str) -> GlobalQSGD:
    if way == "none":  # the mean itself
        return compressor("standard", min_elements=1 << 30)
    return compressor("standard", 16) if way == "16 bits" else compressor(way)


TOGETHER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a bucket": ({}, {}),
    "buckets": ({"first_bucket_bytes": 1, "bucket_bytes": 30_000}, {}),
    "each by itself": ({"bucket_bytes": 0}, {}),
    "groups": ({}, {"groups": 2}),
    "a sum": ({}, {"op": hvd.Sum}),
    "predivided": ({}, {"gradient_predivide_factor": 2.0}),
    "eager": ({}, {"run_eagerly": True}),
    "stats and replicas": ({"stats": 1, "check_replicas": 2, "timeout": 60.0}, {}),
}


@pytest.mark.parametrize(
    ("fastest", "together"),
    [
        ("none", "buckets"),
        ("16 bits", "stats and replicas"),
        ("standard", "groups"),
        ("two-hop", "eager"),
        rare("16 bits", "buckets"),
        rare("standard", "a sum"),
        *(rare("two-hop", own) for own in TOGETHER if own != "eager"),
    ],
)
def test_all_ranks_take_one_decision(
    fastest: str, together: str, chosen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(fastest)
    monkeypatch.setattr(kernels, "SharedTrials", partial(Trials, clock=lambda: clock.now))
    options, tape = TOGETHER[together]
    compression = GlobalQSGD(levels="auto", min_elements=0, **options)
    step = step_of(compression, **tape)
    factor = hvd.size() if together == "a sum" else 1.0
    for number in range(STEPS + 3):
        results = step(own(500 + number))
        (way,) = {own for _, at, own in chosen if at == number}
        clock.pass_step(way)
        if number % 4 == 0 or number > STEPS:
            check_all(results, locals_of(500 + number), law_of(way), factor=factor)
            assert compression.decisions[0] is None or number >= STEPS
    assert {way for _, _, way in chosen} == set(WAYS)
    (decision,) = compression.decisions.values()
    assert decision is not None
    assert decision.name == fastest
    assert {way for _, at, way in chosen if at >= STEPS} == {fastest}
    if together == "stats and replicas":
        assert len(compression.stats) == len(SHAPES)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    # The next test has float16, all others float32.
    [("eager", tf.bfloat16), ("graph", tf.bfloat16), ("graph", tf.float64)],
    ids=str,
)
def test_one_tensor_of_every_dtype(mode: str, dtype: Any, name: str, chosen: Any) -> None:
    compression = GlobalQSGD(levels="auto", min_elements=0)

    def reduce(x: Any) -> Any:
        return allreduce(x, name, compression=compression)

    reduce = reduce if mode == "eager" else tf.function(reduce)
    for number in range(STEPS + 1):
        inputs = gradients(2000, tag=600 + number, dtype=dtype)
        result = reduce(inputs[hvd.rank()])
        assert result.dtype == dtype
        exact = np.mean([tf.cast(x, tf.float64) for x in inputs], axis=0)
        norm = max(float(tf.reduce_max(tf.abs(tf.cast(x, tf.float64)))) for x in inputs)
        assert np.abs(tf.cast(result, tf.float64) - exact).max() <= 0.05 * norm
    check_replicas(result)
    assert list(compression.decisions.values()) != [None]


def test_predividing_keeps_float16_in_range(chosen: Any) -> None:
    """As Horovod does without compression: the factor is divided by before the sum."""
    compression = GlobalQSGD(levels="auto", min_elements=0)
    variable = tf.Variable(tf.zeros([3000], tf.float16))

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable * tf.constant(40_000.0, tf.float16))
        tape = hvd.DistributedGradientTape(
            tape, compression=compression, gradient_predivide_factor=float(hvd.size())
        )
        return tape.gradient(loss, [variable])

    for _ in range(STEPS + 1):
        (result,) = step()
        assert np.isfinite(result).all()
        np.testing.assert_allclose(result, 40_000.0, rtol=0.05)
    assert {way for _, _, way in chosen} == set(WAYS)


def test_special_values_reach_all_ranks(name: str, chosen: Any) -> None:
    compression = GlobalQSGD(levels="auto", min_elements=0)
    reduce = tf.function(lambda x: allreduce(x, name, compression=compression))
    values = np.ones(2000, dtype=np.float32)
    values[7] = np.nan if hvd.rank() == hvd.size() - 1 else 1.0
    for _ in range(STEPS + 1):
        result = reduce(tf.constant(values))
        assert np.isnan(result[7])
        assert not np.isnan(result[1000:]).any()
        assert not reduce(tf.zeros(2000)).numpy().any()


@pytest.mark.parametrize("elastic", ["0", "1"], ids=["plain", "elastic"])
def test_ranks_that_have_seen_different_things(
    elastic: str, name: str, chosen: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that was away takes over what the others have tried and decided."""
    monkeypatch.setenv("HOROVOD_ELASTIC", elastic)
    compression = GlobalQSGD(levels="auto", min_elements=0)
    fresh = GlobalQSGD(levels="auto", min_elements=0)
    allreduce(tf.ones(3000), f"{name}.first", compression=fresh)  # compares the settings
    reduce = tf.function(lambda x: allreduce(x, name, compression=compression))
    for _ in range(5):
        reduce(tf.ones(3000))
    if hvd.rank() == 0:  # as a worker that has just begun
        reduce = tf.function(lambda x: allreduce(x, name, compression=fresh))
        compression = fresh
    for number in range(STEPS):
        result = reduce(tf.ones(3000) * (number + 1.0))
        np.testing.assert_allclose(result, number + 1.0, rtol=0.05)
        check_replicas(result)
    hvd.allreduce(tf.constant(0.0), name=f"{name}.together")
    decision = compression.decisions[0]
    assert decision is not None
    places = hvd.allgather(tf.constant([WAYS.index(decision.name)]), name=f"{name}.places")
    assert len(set(places.numpy())) == 1


def test_a_decision_is_loaded(name: str, chosen: list[Any]) -> None:
    """On one rank, and a subset of all ranks: those that take part take it over."""
    compression = GlobalQSGD(levels="auto", min_elements=0)
    reduce = tf.function(lambda x: allreduce(x, name, compression=compression))
    for _ in range(STEPS + 1):
        reduce(tf.ones(3000))
    state = json.loads(json.dumps(compression.state_dict()))
    (decision,) = compression.decisions.values()
    assert decision is not None
    assert [own["way"] for own in state["decided"]] == [decision.name]

    other = GlobalQSGD(levels="auto", min_elements=0)
    if hvd.rank() == 0:
        other.load_state_dict(state)
    again = tf.function(lambda x: allreduce(x, f"{name}.again", compression=other))
    chosen.clear()
    for _ in range(3):
        again(tf.ones(3000))
    assert {way for _, _, way in chosen} == {decision.name}
    assert other.decisions == {0: decision}


def test_two_instances_at_a_time(name: str, chosen: list[Any]) -> None:
    """In one graph: each has trials of its own."""
    first, second = (GlobalQSGD(levels="auto", min_elements=0, seed=seed) for seed in (1, 2))
    names = [f"{name}.{own}" for own in "ab"]

    @tf.function
    def step(x: Any) -> Any:
        pairs = zip(names, (first, second), strict=True)
        return [allreduce(x, key, compression=which) for key, which in pairs]

    for number in range(STEPS + 2):
        results = step(own(700 + number)[-1])
    check_replicas(*results)
    assert all(each.decisions[0] is not None for each in (first, second))
    assert {key for key, _, _ in chosen} == set(names)


def test_functions_that_share_names(chosen: list[Any]) -> None:
    """As of a GAN: both tapes of a step have the same name, in functions that one calls."""
    compression = GlobalQSGD(levels="auto", min_elements=0)

    def half(variable: Any) -> Any:
        @tf.function
        def gradient(x: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(variable * x)
            tape = hvd.DistributedGradientTape(tape, compression=compression)
            return tape.gradient(loss, [variable])[0]

        return gradient

    first, second = (half(tf.Variable(tf.zeros([20_000]))) for _ in range(2))
    step = tf.function(lambda x: (first(x), second(3 * x)))
    for number in range(STEPS // 2):  # each step is two of the name
        x = tf.fill([20_000], hvd.rank() + number + 1.0)
        mean = number + (hvd.size() + 1) / 2
        for factor, result in zip((1, 3), step(x), strict=True):
            np.testing.assert_allclose(result, np.full(20_000, factor * mean), rtol=0.2)
    check_replicas(*step(x))


def test_ranks_that_disagree_about_a_tensor(name: str) -> None:
    compression = GlobalQSGD(levels="auto", min_elements=0)
    reduce = tf.function(lambda x: allreduce(x, name, compression=compression))
    x = tf.ones(4000 + 32 * hvd.rank())
    with pytest.raises(tf.errors.InvalidArgumentError, match="disagree about tensor"):
        reduce(x)
    hvd.allreduce(tf.constant(0.0), name=f"{name}.after")


@pytest.mark.parametrize("together", ["buckets", "groups"])
def test_replicas_are_compared(together: str, name: str, chosen: Any) -> None:
    options, tape = TOGETHER[together]
    compression = GlobalQSGD(levels="auto", min_elements=0, check_replicas=1, **options)
    variables = [tf.Variable(tf.ones([5000]), name=f"weights{own}") for own in range(3)]

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as recorded:
            loss = tf.add_n([tf.reduce_sum(own * own) for own in variables])
        distributed = hvd.DistributedGradientTape(recorded, compression=compression, **tape)
        return distributed.gradient(loss, variables)

    for _ in range(2):  # without compression
        step()
    variables[1].assign_add(tf.fill([5000], float(hvd.rank())))
    error = r"GlobalQSGD\(check_replicas\): .*weights1"
    with pytest.raises(tf.errors.InvalidArgumentError, match=error):
        step()
    hvd.allreduce(tf.constant(0.0), name=f"{name}.after")


def test_other_levels_on_one_rank(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an elastic job nothing is compared before the first step: no rank waits for ever."""
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")
    levels = "auto" if hvd.rank() == 0 else "standard"
    compression = GlobalQSGD(levels=levels, min_elements=0, timeout=30.0)
    reduce = tf.function(lambda x: allreduce(x, name, compression=compression))
    with pytest.raises(tf.errors.OpError, match=r"Mismatched|configured differently"):
        reduce(tf.ones(5000))
    hvd.allreduce(tf.constant(0.0), name=f"{name}.after")


def test_process_sets(chosen: list[Any], name: str) -> None:
    compression = GlobalQSGD(levels="auto", min_elements=0)
    subset = hvd.add_process_set([0, 1]) if hvd.size() > 2 else hvd.global_process_set
    try:
        if subset.included():
            reduce = tf.function(
                lambda x: allreduce(x, name, compression=compression, process_set=subset)
            )
            for _ in range(STEPS + 1):
                result = reduce(tf.ones(3000))
            check_replicas(result, process_set=subset)
            assert compression.decisions[subset.process_set_id] is not None
    finally:
        if hvd.size() > 2:
            hvd.remove_process_set(subset)


def test_keras_fit(chosen: list[Any]) -> None:
    model = model_of(seed=3)
    optimizer = hvd_keras.DistributedOptimizer(
        tf.keras.optimizers.SGD(0.01), compression=GlobalQSGD(levels="auto", min_elements=0)
    )
    model.compile(loss="mse", optimizer=optimizer)
    x, y = problem(hvd.rank())
    model.fit(x, y, batch_size=64, epochs=6, verbose=0, shuffle=False)
    check_replicas(*model.get_weights())
    assert {way for _, _, way in chosen} >= set(WAYS)


def test_slow_ranks_are_waited_for(name: str, chosen: Any) -> None:
    step = step_of(GlobalQSGD(levels="auto", min_elements=0, bucket_bytes=0))
    for number in range(STEPS + 5):
        if number % 10 == hvd.rank():
            time.sleep(0.01)
        results = step(own(700))
    check_replicas(*results)
