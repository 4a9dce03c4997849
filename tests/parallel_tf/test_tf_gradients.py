"""DistributedGradientTape and the graph: names, steps, order, and what a gradient may look like."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from tf_helpers import (
    DTYPES,
    SHAPES,
    check_all,
    check_mean,
    check_replicas,
    compressor,
    gradients,
    locals_of,
    own,
)

import gq_horovod.tensorflow as plugin
from gq_horovod.tensorflow import GlobalQSGD

# Long enough for a slow machine; only a failing test waits for it.
LIMIT_SECONDS = 60


class Model:
    """Variables, and a step whose gradients are whatever is asked for."""

    def __init__(self, **options: Any) -> None:
        self.variables = [tf.Variable(tf.zeros(shape), name=name) for name, shape in SHAPES.items()]
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


@pytest.mark.parametrize("levels", ["standard", "exponential"])
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_a_tape(levels: str, mode: str) -> None:
    compression = compressor(levels, min_elements=4096)
    model = Model(compression=compression)
    step = tf.function(model.gradients) if mode == "graph" else model.gradients
    for tag in range(3):
        check_all(step(own(tag)), locals_of(tag), compression)


OPTIONS: dict[str, Callable[[list[Any]], dict[str, Any]]] = {
    "sum": lambda _: {"op": hvd.Sum},
    "predivide": lambda _: {"gradient_predivide_factor": 3.0},
    "number of groups": lambda _: {"groups": 2},
    "list of groups": lambda variables: {"groups": [variables[1::-1], [variables[3]]]},
    "sum of groups": lambda _: {"groups": 2, "op": hvd.Sum},
}


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize(
    ("option", "levels"), list(zip(OPTIONS, ["exponential", "standard"] * 3, strict=False))
)
def test_options_of_the_tape(option: str, levels: str) -> None:
    # Every tensor is compressed in a group with a large one.
    compression = compressor(levels, min_elements=0)
    model = Model(compression=compression)
    model.options |= OPTIONS[option](model.variables)
    factor = hvd.size() if "sum" in option else 1.0
    results = tf.function(model.gradients)(own(5))
    check_all(results, locals_of(5), compression, factor=factor)


@pytest.mark.parametrize(
    ("bits", "options"), [(8, {}), (16, {"op": hvd.Sum}), (8, {"groups": 2})], ids=str
)
def test_gradients_on_the_levels_are_those_of_horovod(bits: int, options: dict[str, Any]) -> None:
    """Whole numbers up to the number of levels: the real quantizer has nothing to round."""
    compression = compressor("standard", bits, min_elements=0)
    levels = compression.config.plan(hvd.size()).level_count
    largest = levels - levels % hvd.size()
    wanted = []
    for x in own(13):
        # Multiples of the number of ranks, and the largest level in every block.
        whole = np.clip(np.round(4 * x.numpy()), -largest, largest) * hvd.size()
        whole = np.clip(whole, -largest, largest)
        whole.reshape(-1)[::32] = levels
        wanted.append(tf.constant(whole))
    ours, theirs = (
        np.concatenate([np.ravel(x) for x in tf.function(model.gradients)(wanted)])
        for model in (
            Model(compression=choice, **options) for choice in (compression, hvd.Compression.none)
        )
    )
    if hvd.size() in (1, 2, 4):
        np.testing.assert_array_equal(ours, theirs)
    else:  # norm / (levels * ranks) is rounded
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_variables_of_mixed_dtypes() -> None:
    compression = compressor(min_elements=1000)
    inputs = [gradients(n, tag=26, dtype=dtype) for dtype in DTYPES for n in (1500, 16)]
    variables = [tf.Variable(tf.zeros_like(ranks[0])) for ranks in inputs]

    @tf.function
    def step(wanted: Any) -> Any:
        with tf.GradientTape() as tape:
            parts = [
                tf.cast(tf.reduce_sum(variable * x), tf.float64)
                for variable, x in zip(variables, wanted, strict=True)
            ]
            loss = tf.add_n(parts)
        return hvd.DistributedGradientTape(tape, compression=compression).gradient(loss, variables)

    results = step([ranks[hvd.rank()] for ranks in inputs])
    check_replicas(*results)
    for result, ranks in zip(results, inputs, strict=True):
        assert result.dtype == ranks[0].dtype
        if hvd.size() > 1 and len(ranks[0]) == 1500:
            check_mean(result, ranks, compression)


def test_generic_names() -> None:
    compression = compressor(min_elements=4096)
    model = Model(compression=compression)
    step = tf.function(lambda wanted: model.gradients(wanted, generic=True))
    check_all(step(own(6)), locals_of(6), compression)


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
    check_all(step(own(9)), locals_of(9), compression)


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
        check_all(results[0], locals_of(tag), compression)
        check_all(results[1], locals_of(tag + 1), compression)


@pytest.mark.usefixtures("several_ranks")
def test_two_tapes_with_different_compressions() -> None:
    kinds = compressor("standard", min_elements=0), compressor("exponential", min_elements=0)
    models = [Model(compression=compression) for compression in kinds]
    step = tf.function(lambda *wanted: [m.gradients(w) for m, w in zip(models, wanted)])  # noqa: B905
    results = step(own(14), own(15))
    check_all(results[0], locals_of(14), kinds[0])
    check_all(results[1], locals_of(15), kinds[1])


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
    """One is held back until one of another bucket is done, in either order."""
    last = 2 - first
    compression = compressor(min_elements=4096, bucket_bytes=0)
    done = threading.Event()
    waited: list[bool] = []
    measure, dequantize = plugin.kernels.Kernels.measure, plugin.kernels.Kernels.dequantize

    def slow(self: Any, *arguments: Any) -> Any:
        if self.name == f"DistributedGradientTape.{last}":
            waited.append(done.wait(LIMIT_SECONDS))
        return measure(self, *arguments)

    def watched(self: Any, *arguments: Any) -> Any:
        result = dequantize(self, *arguments)
        if self.name == f"DistributedGradientTape.{first}":
            done.set()
        return result

    monkeypatch.setattr(plugin.kernels.Kernels, "measure", slow)
    monkeypatch.setattr(plugin.kernels.Kernels, "dequantize", watched)
    check_all(
        tf.function(Model(compression=compression).gradients)(own(11)), locals_of(11), compression
    )
    assert waited == [True]


# --------------------------------------------------------------------------- what a gradient may be


@pytest.mark.parametrize(("mode", "value"), [("eager", np.nan), ("graph", np.inf)])
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
def test_ranks_that_have_joined_bring_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """hvd.join(), for ranks with less data than others: Average still divides by all ranks.

    Not with exponential levels: Horovod has no Alltoall for ranks that have joined.
    """
    compression = compressor("standard", min_elements=0)
    step = tf.function(Model(compression=compression).gradients)
    last = hvd.size() - 1
    for tag in range(1 if hvd.rank() == last else 3):
        inputs = locals_of(40 + tag)
        results = step([ranks[hvd.rank()] for ranks in inputs])
        for result, ranks in zip(results, inputs, strict=True):
            if tag > 0:
                ranks[last] = tf.zeros_like(ranks[last])
            check_mean(result, ranks, compression)
    # In this process the other tests compare settings as if no rank had ever joined.
    monkeypatch.setattr(hvd.mpi_ops.MPI_LIB, "joined", False)
    hvd.join()


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

    # AutoGraph raises an error of its own, with the text.
    error = Exception if mode == "graph" else LookupError
    with pytest.raises(error, match="a compressed result must not be differentiated"):
        (tf.function(step) if mode == "graph" else step)()


# ------------------------------------------------------------------------------ groups and buckets


def operations(graph: Any) -> list[str]:
    """The kinds of the nodes of a graph, and of the functions that it calls."""
    definition = graph.as_graph_def()
    nodes = [
        *definition.node,
        *(node for own in definition.library.function for node in own.node_def),
    ]
    return [node.op for node in nodes]


# Options of the tape and of the compression, and how many reductions the gradients then take.
TOGETHER: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "each by itself": ({}, {"bucket_bytes": 0}, len(SHAPES)),
    "a bucket": ({}, {}, 1),
    # The last of SHAPES has 16 kB, the convolution and the bias 18, the matrix 24.
    "three buckets": ({}, {"first_bucket_bytes": 1, "bucket_bytes": 30_000}, 3),
    "two groups": ({"groups": 2}, {}, 2),
}


# Exponential levels take the way of two-hop ones.
@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("levels", ["standard", "two-hop"])
def test_gradients_that_are_reduced_together(levels: str) -> None:
    """With the results of each by itself, and operations that do not grow with the tensors."""
    results: dict[str, list[bytes]] = {}
    stages = 3 if levels == "standard" else 4
    for case, (tape, options, buckets) in TOGETHER.items():
        # Anew, so that all count their steps from 0.
        model = Model(compression=GlobalQSGD(levels=levels, min_elements=0, **options), **tape)
        step = tf.function(model.gradients)
        results[case] = [
            np.concatenate([np.ravel(x) for x in step(own(tag))]).tobytes() for tag in (31, 32)
        ]
        (function,) = step._list_all_concrete_functions()
        kinds = operations(function.graph)
        assert kinds.count("PyFuncStateless") == stages * buckets, case
        # Norms, standard codes, and without groups a token each.
        reductions = buckets * (2 if levels == "standard" else 1)
        tokens = 0 if tape else len(SHAPES)
        assert kinds.count("HorovodAllreduce") == reductions + tokens, case
        assert kinds.count("HorovodGroupedAllreduce") == tape.get("groups", 0), case
    (reference, *others) = results.values()
    assert all(own == reference for own in others), [k for k in results if results[k] != reference]


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("levels", ["standard", "exponential"])
def test_one_norm_for_a_bucket(levels: str) -> None:
    """Means lie on the levels of the largest element of all gradients of all ranks."""
    compression = GlobalQSGD(levels=levels, bits=8, block_size="bucket", min_elements=0)
    scales = [4.0 ** -(place % 3) for place in range(len(SHAPES))]
    inputs = [
        [scale * own for own in ranks] for scale, ranks in zip(scales, locals_of(33), strict=True)
    ]
    norm = max(float(tf.reduce_max(tf.abs(own))) for ranks in inputs for own in ranks)
    model = Model(compression=compression)
    results = tf.function(model.gradients)([ranks[hvd.rank()] for ranks in inputs])
    for result in results:
        places = np.ravel(result).astype(float) / norm
        if levels == "standard":
            places = places * hvd.size() * (127 // hvd.size())
        else:
            places = np.log2(np.abs(places[places != 0]))
        np.testing.assert_allclose(places, np.rint(places), atol=1e-3)
    check_replicas(*results)


@pytest.mark.usefixtures("several_ranks")
def test_small_gradients_are_in_no_bucket() -> None:
    """They go the way of Horovod, unlike those of a group."""
    compression = GlobalQSGD(min_elements=4096, levels="two-hop")
    step = tf.function(Model(compression=compression).gradients)
    check_all(step(own(33)), locals_of(33), compression)
    assert "DistributedGradientTape.1" not in compression._counters
    assert len(set(compression._counters.values())) == 1


@pytest.mark.usefixtures("several_ranks")
def test_a_bucket_of_other_members_uses_no_step_again() -> None:
    """Two functions share some of their variables, and are called in turns."""
    compression = GlobalQSGD(min_elements=0)
    variables = [tf.Variable(tf.zeros(shape)) for shape in (5000, 6000, 7000)]
    inputs = [gradients(shape, tag=34 + shape) for shape in (5000, 6000, 7000)]

    def train(count: int, **options: Any) -> list[int]:
        used = Model.__new__(Model)
        used.variables, used.options = variables[:count], {"compression": compression, **options}
        step = tf.function(used.gradients)
        results = step([ranks[hvd.rank()] for ranks in inputs[:count]])
        for result, ranks in zip(results, inputs, strict=False):
            check_mean(result, ranks, compression)
        names = [f"DistributedGradientTape.{place}" for place in range(count)]
        return [int(compression._counters[name].last()) for name in names]

    assert train(1) == [0]
    assert train(1) == [1]
    assert train(3) == [2, 2, 2]
    assert train(2) == [3, 3]
    # Each by itself, as with groups, gradients of one counter still have steps of their own.
    assert min(train(3, groups=3)) >= 4


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize(
    ("around", "levels"), [("while", "standard"), ("while", "two-hop"), ("cond", "two-hop")]
)
def test_buckets_in_a_loop_or_a_branch_of_the_users(around: str, levels: str) -> None:
    """They belong to the body of the loop, not to what is around it."""
    compression = compressor(levels, min_elements=0)
    model = Model(compression=compression)

    @tf.function
    def step(wanted: Any, times: Any) -> Any:
        results = [tf.zeros_like(x) for x in wanted]
        if around == "while":
            for number in tf.range(times):
                factor = tf.cast(number, tf.float32)
                # As in training, a step needs what the one before has left: TensorFlow would begin
                # it before that one is done, with operations of the same names.
                mine = zip(wanted, results, strict=True)
                results = model.gradients([factor * x + 0.0 * last for x, last in mine])
        elif times > 1:
            results = model.gradients(wanted)
        return results

    inputs = locals_of(35)
    for times in (2, 3):
        results = step(own(35), tf.constant(times))
        factor = float(times - 1) if around == "while" else 1.0
        check_all(results, [[factor * x for x in ranks] for ranks in inputs], compression)
    if around == "cond":
        assert all(not np.any(x) for x in step(own(35), tf.constant(1)))
    hvd.allreduce(tf.constant(0.0), name="after")


# Of rank 0 and of the others. The last one's buckets have other members too.
SHAPES_THAT_DIFFER = {
    "a member": ([(5000,), (70, 70), (6000,)], [(5000,), (4900,), (6000,)]),
    "the last one": ([(5000,), (6000,), (4900,)], [(5000,), (6000,), (70, 70)]),
    "the cut": ([(5000,), (6000,), (6000,)], [(5000,), (9500,), (6000,)]),
    "sizes and the cut": ([(6000,), (6000,), (6000,)], [(6000,), (5000,), (9500,)]),
}


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize(
    ("case", "levels"), list(zip(SHAPES_THAT_DIFFER, ["standard", "two-hop"] * 2, strict=True))
)
def test_ranks_whose_buckets_differ(case: str, levels: str) -> None:
    """One error on every rank, ours or Horovod's, and nothing that waits for ever."""
    shapes = SHAPES_THAT_DIFFER[case][hvd.rank() > 0]
    model = Model.__new__(Model)
    model.variables = [tf.Variable(tf.zeros(own)) for own in shapes]
    compression = GlobalQSGD(levels=levels, bucket_bytes=50_000, first_bucket_bytes=50_000)
    model.options = {"compression": compression}
    known = (
        r"the ranks disagree about tensor 'DistributedGradientTape.2' or one of the 2|Mismatched"
    )
    with pytest.raises(tf.errors.OpError, match=known):
        tf.function(model.gradients)([tf.ones_like(own) for own in model.variables])
    hvd.allreduce(tf.constant(0.0), name=f"after.{case}.{levels}")


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("groups", [0, 2])
def test_nothing_is_kept_of_a_trace(groups: int) -> None:
    """Where some gradients are too small, too."""
    compression = GlobalQSGD(min_elements=4096)
    tf.function(Model(compression=compression, groups=groups or None).gradients)(own(36))
    assert compression._calls == {}


@pytest.mark.usefixtures("several_ranks")
def test_operations_are_where_horovod_reduces() -> None:
    model = Model(compression=GlobalQSGD(min_elements=0), device_dense="/device:CPU:0")
    step = tf.function(model.gradients)
    step(own(37))
    (function,) = step._list_all_concrete_functions()
    devices = {
        node.device
        for node in function.graph.as_graph_def().node
        if node.op == "HorovodAllreduce" or node.op.startswith("PyFunc")
    }
    assert devices == {"/device:CPU:0"}


@pytest.mark.usefixtures("several_ranks")
@pytest.mark.parametrize("mode", ["eager", "graph"])
@pytest.mark.parametrize("levels", ["standard", "two-hop"])
def test_ranks_whose_groups_differ(levels: str, mode: str, name: str) -> None:
    """One error on every rank, also where only the second tensor of a group differs."""
    shape = (70, 70) if hvd.rank() == 0 else (4900,)
    xs = [tf.ones(5000), tf.ones(shape)]

    def reduce() -> Any:
        compression = GlobalQSGD(levels=levels)
        return hvd.grouped_allreduce(xs, name=name, compression=compression)

    reduce = reduce if mode == "eager" else tf.function(reduce)
    with pytest.raises(Exception, match=rf"the ranks disagree about tensor '{name}.[01]'"):
        [x.numpy() for x in reduce()]
    hvd.allreduce(tf.constant(0.0), name=f"{name}.after")


def test_a_tensor_twice_in_a_group(name: str) -> None:
    x = gradients(5000, tag=3)[hvd.rank()]
    one, other = hvd.grouped_allreduce([x, x], name=name, compression=compressor())
    check_replicas(one, other)
    if hvd.size() > 1:
        check_mean(one, gradients(5000, tag=3), compressor())
        assert not np.array_equal(one, other)


def test_buckets_of_an_elastic_job_are_those_of_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A survivor's graph was traced among as many ranks as there were; a newcomer's is not."""
    compression = GlobalQSGD()
    caller: Any = SimpleNamespace(labels=["w"])
    for ranks in (20, 24, 64):
        plan = compression.config.plan(ranks)
        monkeypatch.delenv("HOROVOD_ELASTIC", raising=False)  # a job of these tests has it
        assert compression._limit(caller, [0], plan) == ranks << 19
        monkeypatch.setenv("HOROVOD_ELASTIC", "1")
        assert compression._limit(caller, [0], plan) == 8 << 20
