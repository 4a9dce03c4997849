"""check_replicas, stats, and the state of a checkpoint."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from seldom import in_pairs
from tf_helpers import gradients, own, to_torch

from gq_horovod.guards.stats import Sample, TensorStats
from gq_horovod.tensorflow import GlobalQSGD, allreduce, write_stats
from mpi_ops import stages
from mpi_ops.chunks import chunks
from mpi_ops.dither import Stage, dither

pytestmark = pytest.mark.usefixtures("several_ranks")


class Training:
    """Three variables, one of them too small to be compressed."""

    def __init__(self, compression: GlobalQSGD, names: tuple[str, ...], **options: Any) -> None:
        shapes = (5000,), (10,), (100, 60)
        self.variables = [
            tf.Variable(tf.zeros(shape), name=name)
            for shape, name in zip(shapes, names, strict=True)
        ]
        self.options = {"compression": compression, **options}

    @tf.function
    def step(self) -> list[Any]:
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(own * float(hvd.rank() + 1)) for own in self.variables])
        tape = hvd.DistributedGradientTape(tape, **self.options)
        found: list[Any] = tape.gradient(loss, self.variables)
        for own_, gradient in zip(self.variables, found, strict=True):
            own_.assign_sub(gradient)
        return found


# ----------------------------------------------------------------------------------------- replicas


def changed_on_the_last_rank(variable: tf.Variable) -> None:
    if hvd.rank() == hvd.size() - 1:
        variable.assign(variable + tf.ones_like(variable))


@pytest.mark.parametrize(
    ("place", "options", "levels"),
    [
        (place, options, levels)
        for options, place, levels in in_pairs(
            [{}, {"groups": 2}, {"bucket_bytes": 0}], [0, 1], ["standard", "two-hop"]
        )
    ],
    ids=str,
)
def test_a_replica_that_differs_is_named(place: int, options: dict[str, Any], levels: str) -> None:
    """On all ranks, at the next step whose turn it is, whatever is compressed."""
    ours = {key: own for key, own in options.items() if key == "bucket_bytes"}
    tape = {key: own for key, own in options.items() if key == "groups"}
    compression = GlobalQSGD(levels=levels, check_replicas=2, **ours)
    training = Training(compression, ("first", "second", "third"), **tape)
    for _ in range(3):
        training.step()
    changed_on_the_last_rank(training.variables[place])
    training.step()  # not its turn
    with pytest.raises(tf.errors.InvalidArgumentError) as caught:
        training.step()
    text = str(caught.value)
    name = ("first", "second", "third")[place]
    last = hvd.size() - 1
    assert "GlobalQSGD(check_replicas): before step 4 the parameters differ between ranks" in text
    assert f"'{name}:0' is " in text
    assert f" on rank {last}" in text
    for other in {"first", "second", "third"} - {name}:
        assert f"'{other}:0' is " not in text
    hvd.allreduce(tf.constant(0.0), name="after")


def test_variables_without_names() -> None:
    training = Training(GlobalQSGD(check_replicas=1), ("v", "v", "v"))
    changed_on_the_last_rank(training.variables[2])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"'v:0 \(2\)' is "):
        training.step()
    hvd.allreduce(tf.constant(0.0), name="after")


def test_replicas_are_compared_once_in_a_step() -> None:
    for options in ({}, {"groups": 2}, {"groups": 3}):
        training = Training(
            GlobalQSGD(check_replicas=1, min_elements=0), ("a", "b", "c"), **options
        )
        graph = training.step.get_concrete_function().graph.as_graph_def()
        nodes = [node for function in graph.library.function for node in function.node_def]
        nodes += list(graph.node)
        assert sum("compare" in node.name and node.op.startswith("PyFunc") for node in nodes) == 1


@pytest.mark.parametrize("place", [0, 1])
def test_two_tapes_that_take_turns(place: int) -> None:
    """Their gradients have the same names, and so one count of steps; each is looked at."""
    compression = GlobalQSGD(check_replicas=2, stats=2)
    both = [Training(compression, ("a", "b", "c")), Training(compression, ("d", "e", "f"))]

    def round_of_all() -> None:
        for training in both:
            training.step()

    round_of_all()
    sampled = compression.stats["DistributedGradientTape.0"]
    for _ in range(2):
        round_of_all()
    assert compression.stats["DistributedGradientTape.0"].step > sampled.step
    changed_on_the_last_rank(both[place].variables[0])
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"'[ad]:0' is "):
        round_of_all()
    hvd.allreduce(tf.constant(0.0), name="after")


def test_tensors_are_no_replicas() -> None:
    """What is differentiated to, such as a batch, may differ between ranks."""
    variable = tf.Variable(tf.ones(5000))
    compression = GlobalQSGD(check_replicas=1)

    @tf.function
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(x * variable)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        return tape.gradient(loss, [x, variable])

    for _ in range(2):
        step(tf.ones(5000) * float(hvd.rank()))


def test_sessions_compare_nothing() -> None:
    """There nothing orders what reads variables and what writes them."""
    with tf.Graph().as_default():
        variable = tf.compat.v1.get_variable("v", initializer=np.ones(5000, np.float32))
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable)
        tape = hvd.DistributedGradientTape(tape, compression=GlobalQSGD(check_replicas=1))
        with pytest.raises(Exception, match="check_replicas must be None outside"):
            tape.gradient(loss, [variable])


def test_a_process_set_compares_its_own(ends: hvd.ProcessSet) -> None:
    compression = GlobalQSGD(check_replicas=1)
    training = Training(compression, ("a", "b", "c"), process_set=ends)
    if not ends.included():
        training.variables[0].assign(tf.ones(5000))
    training.step()
    changed_on_the_last_rank(training.variables[0])
    if ends.included():
        with pytest.raises(tf.errors.InvalidArgumentError, match=rf" on rank {hvd.size() - 1}"):
            training.step()
    hvd.allreduce(tf.constant(0.0), name="after")


# -------------------------------------------------------------------------------------------- stats


def expected_stats(x: Any, result: Any, name: str, step: int, compression: GlobalQSGD) -> Any:
    """What the gradient and the mean say, in one chunk."""
    from mpi_ops import codec
    from mpi_ops.kernels.host import Buffer

    plan = compression.config.plan(hvd.size())
    local = to_torch(x).float().flatten().numpy()
    norms = hvd.allreduce(
        tf.constant(codec.norms(Buffer.of(local), plan)), op=hvd.Max, name=f"{name}.norms"
    ).numpy()
    sample = Sample(local)
    (chunk,) = chunks(local.size, norms, plan, local.size)
    words = dither(
        compression.config.seed,
        f"{stages.tensor_name(name)}.0",
        step,
        hvd.rank(),
        Stage.QUANTIZE,
        plan.strata,
    )
    sample.add(plan, chunk, words, to_torch(result).float().flatten().numpy())
    return sample.stats(plan, step, "horovod")


@pytest.mark.parametrize(
    ("levels", "dtype", "mode"),
    in_pairs(["standard", "exponential", "two-hop"], [tf.float32, tf.bfloat16], ["eager", "graph"]),
    ids=str,
)
def test_statistics_of_a_tensor(mode: str, dtype: Any, levels: str, name: str) -> None:
    """Those of the codes that were sent, on the steps that are sampled."""
    compression = GlobalQSGD(levels=levels, min_elements=0, stats=2)

    def reduce(x: Any) -> Any:
        return allreduce(x, name, compression=compression)

    reduce = reduce if mode == "eager" else tf.function(reduce)
    found = None
    for step in range(4):
        x = gradients(5000, tag=400 + step, dtype=dtype)[hvd.rank()]
        result = reduce(x)
        if step % 2 == 0:
            found = compression.stats[name]
            expected = expected_stats(x, result, name, step, compression)
            assert isinstance(found, TensorStats)
            assert found == expected
            assert 0 < found.relative_error < 0.1
        else:
            assert compression.stats[name] is found


def test_statistics_of_a_bucket() -> None:
    """Of each tensor in it, and on one rank alone."""
    options = {"stats": 1} if hvd.rank() == 0 else {}
    compression = GlobalQSGD(min_elements=100, **options)
    training = Training(compression, ("a", "b", "c"))
    training.step()
    names = [f"DistributedGradientTape.{place}" for place in (2, 0)]
    assert list(compression.stats) == (names if hvd.rank() == 0 else [])


def test_statistics_for_tensorboard(tmp_path: Any, name: str) -> None:
    compression = GlobalQSGD(min_elements=0, stats=1)
    allreduce(gradients(5000)[hvd.rank()], name, compression=compression)
    writer = tf.summary.create_file_writer(str(tmp_path / str(hvd.rank())))
    with writer.as_default():
        write_stats(compression.stats, 7)
    writer.flush()
    (path,) = (tmp_path / str(hvd.rank())).iterdir()
    found = {
        value.tag: (event.step, float(tf.make_ndarray(value.tensor)))
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    }
    step, error = found[f"gq/relative_error/{name}"]
    assert step == 7
    assert error == pytest.approx(compression.stats[name].relative_error, rel=1e-6)


# -------------------------------------------------------------------------------------------- state


def reducer(compression: GlobalQSGD, **options: Any) -> Callable[[int], bytes]:
    """A traced step: from a tag, the bytes of the means of some gradients."""
    model = [tf.Variable(tf.zeros(x.shape)) for x in own(0)]

    @tf.function
    def step(wanted: Any) -> Any:
        with tf.GradientTape() as tape:
            parts = [tf.reduce_sum(v * x) for v, x in zip(model, wanted, strict=True)]
            loss = tf.add_n(parts)
        tape = hvd.DistributedGradientTape(tape, compression=compression, **options)
        return tape.gradient(loss, model)

    return lambda tag: b"".join(np.array(x).tobytes() for x in step(own(tag)))


@pytest.mark.parametrize(("way", "levels"), [("dictionary", "standard"), ("checkpoint", "two-hop")])
def test_a_loaded_state_goes_on(way: str, levels: str, tmp_path: Any) -> None:
    """With the same dither."""
    first, second = (GlobalQSGD(levels=levels, bits=4, min_elements=0) for _ in range(2))
    train = reducer(first)
    for tag in (1, 2):
        train(tag)
    reducer(first, groups=2)(3)
    if way == "dictionary":
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    else:
        saved = tf.train.Checkpoint(compression=first.trackable())
        path = saved.write(str(tmp_path / f"state {hvd.rank()}"))
        tf.train.Checkpoint(compression=second.trackable()).read(path).assert_consumed()
    fresh = GlobalQSGD(levels=levels, bits=4, min_elements=0)
    expected = train(4)
    assert reducer(second)(4) == expected
    assert reducer(fresh)(4) != expected


def test_a_state_is_loaded_into_graphs_that_are_there() -> None:
    compression = GlobalQSGD(bits=4, min_elements=0)
    model = Training(compression, ("a", "b", "c"))
    model.step()
    state = copy.deepcopy(compression.state_dict())
    before = [x.numpy() for x in model.step()]
    after = [x.numpy() for x in model.step()]
    compression.load_state_dict(state)
    again = [x.numpy() for x in model.step()]
    assert all(np.array_equal(one, other) for one, other in zip(before, again, strict=True))
    assert not all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_states_that_do_not_belong_here() -> None:
    state = GlobalQSGD(bits=4).state_dict()
    with pytest.raises(
        ValueError, match=r"GlobalQSGD.load_state_dict: bits must be None .* got .*4"
    ):
        GlobalQSGD().load_state_dict(state)
    with pytest.raises(ValueError, match="format must be 'tensorflow 2'"):
        GlobalQSGD(bits=4).load_state_dict({**state, "format": 3})
    with pytest.raises(Exception, match="must be called where TensorFlow executes eagerly"):
        tf.function(lambda: GlobalQSGD().state_dict())()
