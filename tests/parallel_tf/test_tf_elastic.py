"""What differs in elastic jobs; tests/launch/test_elastic.py has real ones."""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as hvd
import pytest
import tensorflow as tf
from tf_helpers import check_mean, check_replicas, gradients

from gq_horovod.path.config import ConfigMismatchError
from gq_horovod.tensorflow import GlobalQSGD, allreduce

pytestmark = pytest.mark.usefixtures("several_ranks")
MODES = pytest.mark.parametrize("mode", ["eager", "graph"])


@pytest.fixture(autouse=True)
def elastic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_ELASTIC", "1")


def reducer(mode: str, name: str, compression: GlobalQSGD) -> Any:
    def reduce(x: Any) -> Any:
        return allreduce(x, name, compression=compression)

    return tf.function(reduce) if mode == "graph" else reduce


@MODES
@pytest.mark.parametrize("levels", ["standard", "two-hop", "exponential"])
def test_a_rank_that_joins_takes_the_step_of_the_others(mode: str, levels: str, name: str) -> None:
    """Else it would round by another step's dither, or the others by one that they had already."""
    compression = GlobalQSGD(levels=levels, min_elements=0)
    reduce = reducer(mode, name, compression)
    inputs = gradients(5000, tag=60)
    steps = []
    for step in range(3):
        if step == 1 and hvd.rank() != hvd.size() - 1:  # the last one has just joined
            compression._counters[name].set(40)
        result = reduce(inputs[hvd.rank()])
        check_mean(result, inputs, compression)
        check_replicas(result)
        steps.append(int(compression._counters[name].last()))
    assert steps == [0, 41, 42]


DIFFERENCES = [
    {"seed": 1},
    {"levels": "standard", "bits": 16},
    {"levels": "two-hop", "bits": 4},
    {"levels": "standard"},
    {"norm": "l2"},
]


@MODES
@pytest.mark.parametrize("options", DIFFERENCES, ids=str)
def test_other_options_on_one_rank(mode: str, options: dict[str, Any], name: str) -> None:
    """Ranks do not compare them beforehand, so what travels with the norms has to tell."""
    own = options if hvd.rank() == hvd.size() - 1 else {}
    reduce = reducer(mode, name, GlobalQSGD(**{"min_elements": 0, **own}))
    error = tf.errors.InvalidArgumentError if mode == "graph" else ConfigMismatchError
    text = rf"configured differently, as they found with tensor '{name}'; this one has .*'seed'"
    with pytest.raises(error, match=text):
        reduce(tf.ones(5000))
    assert all(hvd.allgather_object(True, name="test.all"))


def test_horovod_takes_its_errors_for_a_loss(name: str) -> None:
    """By a word in the names of all operations on the way, also where the caller gives a name."""
    concrete = tf.function(lambda x: allreduce(x, name, compression=GlobalQSGD))
    graph = concrete.get_concrete_function(tf.TensorSpec([5000], tf.float32)).graph
    found = [op for op in graph.get_operations() if op.type.startswith("Horovod")]
    assert {op.type for op in found} >= {"HorovodAllreduce"}
    for op in found:
        assert op.type.endswith("Size") or "HorovodAllreduce" in op.name, op.name
