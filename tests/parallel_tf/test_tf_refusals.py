"""Mistakes that get one clear error, the same on every rank, after which Horovod still works."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from itertools import product
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf
from tf_helpers import check_mean, compressor, gradients

from gq_horovod.frontend import Compression
from gq_horovod.path import token
from gq_horovod.path.config import ConfigMismatchError
from gq_horovod.tensorflow import GlobalQSGD, allreduce
from mpi_ops import codec

LAST = pytest.mark.usefixtures("several_ranks")
MODES = pytest.mark.parametrize("mode", ["eager", "graph"])


def message_of(
    error: type[Exception], mode: str, function: Callable[..., Any], *arguments: Any, **options: Any
) -> str:
    """The text of the error that the call raises; the same on every rank."""

    def call() -> Any:
        return function(*arguments, **options)

    # AutoGraph raises an error of its own for those that it does not know, with their text.
    expected = Exception if mode == "graph" and error is ConfigMismatchError else error
    with pytest.raises(expected) as caught:
        (tf.function(call) if mode == "graph" else call)()
    # Where in user code it was, AutoGraph puts before it, and TensorFlow behind.
    found = re.search(
        r"(GlobalQSGD|hvd\.\w+)( with compression=GlobalQSGD)?: .*", str(caught.value)
    )
    assert found, str(caught.value)
    texts = hvd.allgather_object(found[0], name="test.texts")
    assert texts == [texts[0]] * hvd.size()
    return found[0]


def check_it_still_works(name: str) -> None:
    compression = compressor()
    inputs = gradients(1000, tag=50)
    result = allreduce(inputs[hvd.rank()], f"{name}.after", compression=compression)
    check_mean(result, inputs, compression)


def on_the_last_rank(value: Any, elsewhere: Any) -> Any:
    return value if hvd.rank() == hvd.size() - 1 else elsewhere


def refused(
    error: type[Exception], mode: str, function: Callable[..., Any], *arguments: Any, **options: Any
) -> str:
    """As `message_of`, but one rank alone makes the mistake before all of them do.

    Had it communicated, the others would not be able to go on.
    """
    if hvd.rank() == hvd.size() - 1:
        with pytest.raises(error):
            function(*arguments, **options)
    return message_of(error, mode, function, *arguments, **options)


DIFFERENCES = [
    ("bits", 4, 8),
    ("levels", "exponential", "standard"),
    ("seed", 1, 2),
    ("block_size", None, 256),
    ("min_elements", 1000, 1001),
    ("norm", "l2", "max"),
]


# Who compares them knows nothing of graphs.
@LAST
@pytest.mark.parametrize(
    ("key", "one", "others", "mode"),
    [*((*own, "eager") for own in DIFFERENCES), (*DIFFERENCES[0], "graph")],
)
def test_ranks_with_different_options(
    key: str, one: Any, others: Any, mode: str, name: str
) -> None:
    compression = GlobalQSGD(**{key: on_the_last_rank(one, others)})
    for _ in range(2):  # it is not forgotten either
        text = message_of(
            ConfigMismatchError, mode, allreduce, tf.ones(5000), name, compression=compression
        )
        assert text.startswith(f"GlobalQSGD: the ranks are configured differently: {key} is ")
        assert f"{one!r} on rank {hvd.size() - 1}. Pass the" in text
    check_it_still_works(name)


@LAST
def test_a_tape_finds_the_difference_while_its_graph_is_built(name: str) -> None:
    variable = tf.Variable(tf.zeros(5000))
    compression = GlobalQSGD(bits=on_the_last_rank(4, 8))

    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(variable)
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        return tape.gradient(loss, [variable])

    text = message_of(ConfigMismatchError, "graph", step)
    assert text.startswith("GlobalQSGD: the ranks are configured differently: bits is ")
    check_it_still_works(name)


@LAST
def test_ranks_that_reduce_different_tensors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eagerly, where the token goes first. For graphs see test_sizes_and_dtypes_that_differ."""
    make = token.make
    other = on_the_last_rank("another", "one")
    monkeypatch.setattr(token, "make", lambda name, *rest: make(f"{name}.{other}", *rest))
    with pytest.raises(ConfigMismatchError) as caught:
        allreduce(tf.ones(5000), name, compression=GlobalQSGD)
    assert f"GlobalQSGD: the ranks disagree about tensor {name!r}" in str(caught.value)
    assert all(hvd.allgather_object(True, name="test.all"))
    monkeypatch.undo()
    check_it_still_works(name)


# The second has as many blocks as the first, the third as many payload words.
SIZES = [(5000, 5001), (5120, 5000), (1021, 1022), (5000, 9000), (4096, 0)]


@LAST
@pytest.mark.parametrize(
    ("mode", "levels"),
    [
        *product(["eager", "graph", "unknown shapes"], ["standard", "two-hop"]),
        # Which take the way of two-hop ones.
        ("eager", "exponential"),
    ],
)
def test_sizes_and_dtypes_that_differ(
    levels: str, mode: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One mismatch error on every rank, ours or Horovod's own, before there are codes."""
    monkeypatch.delattr(codec, "quantize_parcel")
    compression = GlobalQSGD(levels=levels, min_elements=0)
    pairs = [(tf.zeros(one), tf.zeros(other)) for one, other in SIZES]
    pairs += [(tf.zeros(5000), tf.zeros(5000, dtype)) for dtype in (tf.float64, tf.float16)]
    pairs += [(tf.zeros([100, 50]), tf.zeros([50, 100])), (tf.zeros(5000), tf.zeros([5000, 1]))]
    for index, (one, other) in enumerate(pairs):
        if mode == "graph" and other.shape[0] == 0:
            continue  # left to Horovod; see the next test
        x = on_the_last_rank(one, other)

        def reduce(x: Any, index: int = index) -> Any:
            return allreduce(x, f"{name}.{index}", compression=compression)

        if mode == "graph":
            reduce = tf.function(reduce)
        if mode == "unknown shapes":
            reduce = tf.function(reduce, input_signature=[tf.TensorSpec(None, x.dtype)])
        with pytest.raises((ConfigMismatchError, tf.errors.OpError)) as caught:
            reduce(x)
        text, known = str(caught.value), f"the ranks disagree about tensor '{name}.{index}'"
        if mode == "eager" and 0 not in (one.shape[0], other.shape[0]):
            assert isinstance(caught.value, ConfigMismatchError)
        assert known in text or "Mismatched" in text, text
        if mode == "graph" and known in text:
            # Not an UnknownError, which Horovod's elastic.run may take for the end of the training.
            assert isinstance(caught.value, tf.errors.InvalidArgumentError)
        if one.shape[0] // 256 == other.shape[0] // 256 and compression.config.block_size == 256:
            assert known in text
    monkeypatch.undo()
    check_it_still_works(name)


@LAST
@pytest.mark.parametrize("levels", ["standard", "exponential", "two-hop"])
def test_a_rank_that_leaves_the_tensor_to_horovod(levels: str, name: str) -> None:
    """Horovod gets a token from one rank and a tensor from another, and says so on both.

    Not in a graph, which sends no token: there both wait (tests/launch/test_tensorflow_guards.py).
    """
    compression = GlobalQSGD(levels=levels)
    with pytest.raises(tf.errors.FailedPreconditionError, match="Mismatched"):
        allreduce(tf.ones(on_the_last_rank(5000, 100)), name, compression=compression)
    check_it_still_works(name)


@MODES
@pytest.mark.parametrize("op", ["Min", "Max", "Product", "Adasum"])
def test_functions_with_another_op(op: str, mode: str, name: str) -> None:
    text = refused(
        ValueError,
        mode,
        hvd.allreduce,
        tf.ones(5000),
        name=name,
        op=getattr(hvd, op),
        compression=GlobalQSGD,
    )
    assert text == (
        f"GlobalQSGD: op must be hvd.Average or hvd.Sum, got hvd.{op} for tensor {name!r}; "
        "use Horovod's own compression for it."
    )
    check_it_still_works(name)


@LAST
def test_tapes_with_another_op(name: str) -> None:
    variable = tf.Variable(tf.zeros(5000))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(variable)
    tape = hvd.DistributedGradientTape(tape, op=hvd.Max, compression=GlobalQSGD)
    text = message_of(ValueError, "eager", tape.gradient, loss, [variable])
    assert text.startswith("GlobalQSGD: op must be hvd.Average or hvd.Sum, got hvd.Max")
    check_it_still_works(name)


@MODES
def test_functions_without_a_name(mode: str, name: str) -> None:
    for function, argument in (
        (hvd.allreduce, tf.ones(5000)),
        (hvd.grouped_allreduce, [tf.ones(5000)]),
    ):
        text = refused(ValueError, mode, function, argument, compression=GlobalQSGD)
        assert text == (
            "hvd.allreduce with compression=GlobalQSGD: name must be a string that is the same on "
            "every rank, got None; pass name=."
        )
    check_it_still_works(name)


@MODES
def test_another_collective(mode: str, name: str) -> None:
    text = refused(
        ValueError, mode, hvd.reducescatter, tf.ones(4096), name=name, compression=GlobalQSGD
    )
    assert text == (
        "GlobalQSGD: the caller must be an allreduce, got hvd.reducescatter; use Horovod's own "
        "compression for it."
    )
    check_it_still_works(name)


def test_compress_called_by_hand(name: str) -> None:
    text = refused(RuntimeError, "eager", GlobalQSGD.compress, tf.ones(5000))
    assert text.startswith("GlobalQSGD: compress() must be called by Horovod's Distributed")
    check_it_still_works(name)


@LAST
@MODES
def test_bits_that_cannot_hold_the_sum(mode: str, name: str) -> None:
    text = refused(
        ValueError,
        mode,
        allreduce,
        tf.ones(5000),
        name,
        compression=GlobalQSGD(levels="standard", bits=2),
    )
    assert text.startswith("GlobalQSGD: bits must be at least ")
    check_it_still_works(name)


@pytest.mark.parametrize("where", ["tape", "function"])
def test_what_xla_compiles(where: str, name: str) -> None:
    """The reduction is refused; what it calls and what it is called by may be compiled."""
    variable = tf.Variable(tf.ones(5000))

    def reduce() -> Any:
        if where == "function":
            return allreduce(tf.ones(5000), name, compression=GlobalQSGD)
        with tf.GradientTape() as tape:
            loss = tf.function(lambda: tf.reduce_sum(variable**2), jit_compile=True)()
        tape = hvd.DistributedGradientTape(tape, compression=GlobalQSGD)
        return tape.gradient(loss, [variable])[0]

    with pytest.raises(Exception, match="jit_compile must be False where gradients are reduced"):
        tf.function(reduce, jit_compile=True)()
    expected = 1.0 if where == "function" else 2.0
    np.testing.assert_allclose(tf.function(reduce)(), expected, rtol=1e-2)


@pytest.mark.parametrize("given", [True, 0])
def test_hierarchical(given: Any) -> None:
    """Only PyTorch's reduces by nodes; "auto" and False mean no nodes here."""
    text = refused(ValueError, "eager", GlobalQSGD, hierarchical=given)
    assert "hierarchical must be " in text
    assert "'auto'" in text
    assert f"got {given!r}; leave it out" in text
    for own in ("auto", False):
        compression = GlobalQSGD(hierarchical=own, min_elements=0)
        mean = hvd.allreduce(tf.ones(2000), name=f"hierarchical.{own}", compression=compression)
        np.testing.assert_allclose(mean, 1, rtol=1e-6)


def test_error_feedback() -> None:
    text = refused(ValueError, "eager", GlobalQSGD, error_feedback=True)
    assert text == (
        "GlobalQSGD: error_feedback must be False with horovod.tensorflow, got True; leave it out."
    )


def test_transport_mpi() -> None:
    text = refused(ValueError, "eager", GlobalQSGD, transport="mpi")
    assert text == (
        "GlobalQSGD: transport must be 'horovod' with horovod.tensorflow, got 'mpi'; leave it out."
    )


def test_the_signature_shows_the_options() -> None:
    assert inspect.signature(GlobalQSGD) == inspect.signature(Compression)


def test_a_process_set_that_is_none() -> None:
    text = refused(TypeError, "eager", GlobalQSGD, process_set=[0, 1])
    assert re.search(r"process_set must be .*ProcessSet or None, got \[0, 1\] of type list", text)


def test_another_process_set_than_the_callers(ends: hvd.ProcessSet, name: str) -> None:
    compression = GlobalQSGD(process_set=ends)
    text = refused(ValueError, "eager", allreduce, tf.ones(5000), name, compression=compression)
    assert "pass the same process_set to both, or only to Horovod" in text
    check_it_still_works(name)
