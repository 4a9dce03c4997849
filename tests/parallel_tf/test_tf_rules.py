"""Options by layer: each variable's gradient is reduced as if all had its options."""

from __future__ import annotations

from ast import literal_eval
from functools import cache
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from tf_helpers import gradients

from gq_horovod.tensorflow import GlobalQSGD

SHAPES = {
    "body/kernel": (100, 60),
    "body/bias": (100,),
    "embedding/kernel": (500, 8),
    "head/kernel": (64, 64),
    "head/bias": (64,),
    "small/kernel": (30, 30),
}
COMMON = {"min_elements": 64}
RULES: dict[str, Any] = {
    "body/bias": None,
    "embedding*": {"levels": "standard", "bits": 4},
    "head/*": {"bits": 4, "block_size": 64},
    "small/*": {"min_elements": 1000},
}
# Beside trials each rule has to name its levels.
BESIDE: dict[str, Any] = {"levels": "standard", "bits": 4, "block_size": 64}
FIXED = {"body/bias": None, "head/*": BESIDE}
# What RULES say of each variable; None: Horovod reduces its gradient.
OPTIONS: dict[str, dict[str, Any] | None] = {
    "body/kernel": {},
    "body/bias": None,
    "embedding/kernel": {"levels": "standard", "bits": 4},
    "head/kernel": {"bits": 4, "block_size": 64},
    "head/bias": {"bits": 4, "block_size": 64},
    "small/kernel": None,
}
MODES = pytest.mark.parametrize("mode", ["graph", "eager"])


def reduce(compression: Any, mode: str, steps: int = 2, **options: Any) -> list[dict[str, Any]]:
    """The reduced gradients of each step, by the names of the variables."""
    variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in SHAPES.items()]
    if options.pop("grouped", False):
        options["groups"] = [variables[:4], variables[4:]]

    def step(own: list[Any]) -> list[Any]:
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(v * x) for v, x in zip(variables, own, strict=True)])
        tape = hvd.DistributedGradientTape(tape, compression=compression, **options)
        return tape.gradient(loss, variables)  # type: ignore[no-any-return]

    run = tf.function(step) if mode == "graph" else step
    found = []
    for number in range(steps):
        own = [gradients(shape, tag=number)[hvd.rank()] for shape in SHAPES.values()]
        found.append(dict(zip(SHAPES, run(own), strict=True)))
    return found


@cache
def alone(options: str, steps: int) -> list[dict[str, Any]]:
    """What all variables have where all have these options; eagerly, which computes the same."""
    own = literal_eval(options)
    choice = hvd.Compression.none if own is None else GlobalQSGD(**{**COMMON, **own})
    return reduce(choice, "eager", steps)


@pytest.mark.parametrize(
    ("mode", "options"), [("eager", {}), ("graph", {}), ("graph", {"grouped": True})], ids=str
)
def test_each_variable_has_its_options(mode: str, options: dict[str, Any]) -> None:
    found = reduce(GlobalQSGD(rules=RULES, **COMMON), mode, **options)
    for name, own in OPTIONS.items():
        if options and name == "small/kernel":
            continue  # a group takes small tensors along
        if options and own is None:  # among tokens, which are float64
            exact = [np.mean(gradients(SHAPES[name], tag=tag), 0) for tag in range(len(found))]
            for step, mean in zip(found, exact, strict=True):
                assert step[name].dtype == tf.float32
                np.testing.assert_allclose(step[name], mean, rtol=1e-6, atol=1e-7)
            continue
        for step, mean in zip(found, alone(str(own), len(found)), strict=True):
            np.testing.assert_array_equal(step[name], mean[name], err_msg=name)


@MODES
def test_beside_trials(mode: str) -> None:
    found = reduce(GlobalQSGD(levels="auto", rules=FIXED, **COMMON), mode, 5)
    expected, plain = alone(str(BESIDE), 5), alone(str(None), 5)
    for step, quantized, exact in zip(found, expected, plain, strict=True):
        for name in ("head/kernel", "head/bias"):
            np.testing.assert_array_equal(step[name], quantized[name], err_msg=name)
        np.testing.assert_array_equal(step["body/bias"], exact["body/bias"])
