"""Instances that threads share, and copies of instances that have been used."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import cloudpickle
import horovod.tensorflow as hvd
import pytest
import tensorflow as tf
from tf_helpers import check_mean, check_replicas, gradients

from gq_horovod.tensorflow import GlobalQSGD, allreduce, frontend

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda instance: pickle.loads(pickle.dumps(instance)),  # noqa: S301
    "cloudpickle": lambda instance: pickle.loads(cloudpickle.dumps(instance)),  # noqa: S301
}


@pytest.mark.parametrize(
    ("way", "levels"), list(zip(COPIES, ["standard", "two-hop"] * 2, strict=True))
)
def test_a_copy_has_the_same_options(levels: str, way: str, name: str) -> None:
    original = GlobalQSGD(levels=levels, min_elements=0, seed=5)
    inputs = gradients(1000, tag=400)

    def reduce(compression: GlobalQSGD) -> Any:
        return tf.function(lambda x: allreduce(x, name, compression=compression))

    reduce(original)(inputs[hvd.rank()])
    again = COPIES[way](original)
    assert again.config == original.config
    for compression in (again, original):
        result = reduce(compression)(inputs[hvd.rank()])
        check_mean(result, inputs, compression)
        check_replicas(result)


@pytest.mark.parametrize(("shared", "levels"), [("instance", "standard"), ("class", "two-hop")])
def test_threads_that_begin_at_once(levels: str, shared: str, name: str) -> None:
    """Each builds and runs a graph of its own; the first use of an instance is one of all."""
    compression: Any = GlobalQSGD(levels=levels, min_elements=0)
    if shared == "class":
        compression = type("Fresh", (GlobalQSGD,), {})  # its default instance is not used yet
    barrier = threading.Barrier(3)
    results: dict[int, Any] = {}
    inputs = [gradients(5000, tag=410 + index) for index in range(3)]

    def run(index: int) -> None:
        reduce = tf.function(lambda x: allreduce(x, f"{name}.{index}", compression=compression))
        barrier.wait()
        results[index] = [reduce(inputs[index][hvd.rank()]) for _ in range(3)][-1]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    law = compression() if shared == "class" else compression
    for index in range(3):
        check_mean(results[index], inputs[index], law)
    check_replicas(*(results[index] for index in range(3)))


def test_gradients_that_leave_a_gpu_are_no_secret(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    frontend._say_where_gradients_go.cache_clear()
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [kind] * 2)
    for place in range(2):  # said once
        allreduce(tf.ones(5000), f"{name}.{place}", compression=GlobalQSGD(seed=place))
    frontend._say_where_gradients_go.cache_clear()
    said = [own.getMessage() for own in caplog.records if "gradients lie on 2 GPUs" in own.message]
    assert len(said) == (1 if hvd.rank() == 0 else 0)
