"""The way of a group of tensors, or of a single one, through the graph of TensorFlow."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from horovod.tensorflow import mpi_ops as hvd_ops
from tensorflow.python.framework.func_graph import FuncGraph
from tensorflow.python.ops.control_flow_v2_func_graphs import CondBranchFuncGraph

from mpi_ops import codec, stages

from ..path import token
from ..path.agreement import elastic
from .kernels import KEY, PREVIOUS, TAIL, Kernels, shapes_of
from .ranks import LOSS


def aside() -> Any:
    """A name scope for operations that have no name of their own.

    Horovod names operations that the user gave no name after their inputs. Those keep the names
    that TensorFlow gives them without compression.
    """
    return tf.name_scope("gq")


def around(process_set: Any) -> tf.Graph | None:
    """The graph around the branch of a tf.cond that Horovod has put a gradient into.

    None where there is no such branch, or where what is in it may not run outside: the branch of a
    rank that reduces nothing.
    """
    graph = tf.compat.v1.get_default_graph()
    if not isinstance(graph, CondBranchFuncGraph):
        return None
    if elastic():  # how many ranks there are is seen at each step
        return graph.outer_graph if process_set.process_set_id == 0 else None
    return graph.outer_graph if process_set.size() > 1 else None


def orders_effects() -> bool:
    """Whether a variable is read before what is written later: in a tf.function it is."""
    graph = tf.compat.v1.get_default_graph()
    while isinstance(graph, CondBranchFuncGraph):
        graph = graph.outer_graph
    return isinstance(graph, FuncGraph)


@contextlib.contextmanager
def within(graph: tf.Graph | None, device: str = "") -> Iterator[None]:
    """Add operations to this graph; to the current one if there is none."""
    if graph is None:
        yield
        return
    where = tf.device(device) if device else contextlib.nullcontext()
    with graph.as_default(), tf.control_dependencies(None), where:
        yield


class Place(NamedTuple):
    """Where a reduction stands."""

    # The graph that it belongs to, from which others take its results; None: where it is made.
    graph: tf.Graph | None
    device: str  # of Horovod's operations; "": where TensorFlow wants
    # Nothing is sent before this one has found that the ranks agree.
    first: Reduction | None


class Ways(NamedTuple):
    """Those in which levels="auto" may reduce tensors: by Horovod itself, or with these kernels."""

    op: int
    prescale: float
    postscale: float
    quantizing: Sequence[Kernels]


class Reduction:
    """The way of tensors that are reduced together through the graph, as vectors."""

    def __init__(
        self,
        kernels: Kernels,
        ignore_name_scope: bool,
        tensors: Sequence[Any],
        counters: Sequence[Counter],
        variables: Sequence[Any],
        at: Place,
        ways: Ways | None = None,
    ) -> None:
        """Of the user's `tensors`.

        Arguments:
            counters: count their reductions.
            variables: to be compared between ranks, every `check_replicas` steps.
            at: where it stands.
            ways: from which each step takes one; None: there is one way.
        """
        self.kernels, self.ignore_name_scope, self.counters = kernels, ignore_name_scope, counters
        self._variables, self._first, self._ways = variables, at.first, ways
        # What is there when the ranks have found that they agree: with `ways` which of them it is.
        self._agreed: Any = None
        self._shared: Any = None  # by which that was found, with `ways`
        self._prefix = ""  # of its operations
        # How many of the steps that were counted were of this very reduction: several graphs may
        # share the counters of their tensors.
        self._runs = Counter() if variables or kernels.observed else None
        self.tensors = tensors
        self._results: Sequence[Any] | None = None
        with within(at.graph, at.device):
            with aside():
                self._xs = [tf.reshape(x, [-1]) for x in tensors]
                self._shapes = shapes_of(tensors)
            # The tokens. Eagerly every operation waits for all ranks, so that Horovod can reduce
            # the first token first and nothing else is sent where they disagree. In a graph that
            # would be a round trip for nothing: what travels behind the norms tells there.
            if tf.executing_eagerly():
                marks = tf.constant(kernels.marks(np.array(self._shapes)))
                kernels.waits(kernels.name)
            else:
                marks, self._results = self._begin()
            with aside():
                self.marks = tf.split(marks, len(tensors)) if len(tensors) > 1 else [marks]
        for mark in self.marks:
            mark.set_shape([token.NUMBERS])

    def result(self, place: int, reduced: Any) -> Any:
        """The result of a tensor, for its reduced token. That of the first one comes first."""
        if tf.executing_eagerly():
            self._reduce_now(place, reduced)
        assert self._results is not None
        own = self.tensors[place]
        # In a graph TensorFlow removes the token's operation, since only this edge comes from it:
        # what the ranks compare has travelled behind the norms.
        with aside(), tf.control_dependencies([reduced]):
            result = tf.reshape(self._results[place], tf.shape(own))
            result.set_shape(own.shape)
            return not_differentiable(own, result)

    def _reduce_now(self, place: int, reduced: Any) -> None:
        """Eagerly: after the token of the first tensor; those of others are compared too."""
        try:
            self.kernels.check(reduced.numpy(), place, self.marks[place].numpy())
            if self._results is None:
                _, self._results = self._begin()
        except BaseException:
            self.kernels.waits(None)
            raise

    def _begin(self) -> tuple[Any, Sequence[Any]]:
        """The tokens, one behind the other, and the results."""
        with aside():
            number = self._next_step()
            previous = number - 1
            if self._runs is not None and not tf.executing_eagerly():
                previous = self._runs.last()
        if self._ways is not None:
            return self._in_one_of(self._ways, number, previous)
        shared, marks = self._measure(number, previous)
        with aside(), tf.control_dependencies(self._set_step(shared[-TAIL])):
            shared = tf.identity(shared)
        return marks, self._reduce(shared)

    def _in_one_of(self, ways: Ways, number: Any, previous: Any) -> tuple[Any, Sequence[Any]]:
        """As `_begin`, in the way that the ranks have agreed on for this step.

        Of reductions that begin together, the first one asks for all of them.
        """
        (marks,) = self._call("marks", (), [self._shapes], tf.float64)
        if self._first is None:
            self._shared, self._agreed = self._agree(number, previous)
        else:
            self._shared, self._agreed = self._first._shared, self._first._agreed
        with aside():
            found = [self._compare_replicas(self._shared)] if self._variables else []
            with tf.control_dependencies(found):
                way = tf.identity(self._agreed)
            if self._first is None:
                number = tf.cast(self._shared[-TAIL], tf.int64)

        inside = copy.copy(self)
        inside._prefix, inside._ways, inside._first, inside._variables = "auto.", None, None, ()

        def by_horovod() -> list[Any]:
            with tf.control_dependencies(inside._call("depart", (), [number], tf.int64)):
                results = inside._plain(ways)
            with tf.control_dependencies(results):
                return [*results, *inside._call("arrive", (), [number], tf.int64)]

        def by_kernels(kernels: Kernels) -> list[Any]:
            own = copy.copy(inside)
            own.kernels = kernels
            shared, _ = own._measure(number, previous)
            return [*own._reduce(shared), tf.cast(shared[-TAIL], tf.int64)]

        branches: list[Callable[[], list[Any]]] = [by_horovod]
        branches += [functools.partial(by_kernels, kernels) for kernels in ways.quantizing]
        with aside():
            if tf.executing_eagerly():
                *results, step = branches[int(way)]()
            else:
                *results, step = tf.switch_case(way, branches)
            with tf.control_dependencies(self._set_step(tf.reshape(step, []))):
                return marks, list(map(tf.identity, results))

    def _agree(self, number: Any, previous: Any) -> tuple[Any, Any]:
        """What the ranks share, and the way of this step; as soon as the gradients are there."""
        with aside(), tf.control_dependencies(self._xs):
            steps = tf.stack([number, previous])
        (own,) = self._call("propose", (), [self._shapes, steps], tf.int32)
        # Under the name that norms have with other levels: ranks that differ in that are told.
        shared = self._allreduce(own, stages.NORM, hvd.Max)
        (way,) = self._call("choose", (), [self._shapes, shared], tf.int32)
        with aside():
            return shared, tf.reshape(way, [])

    def _plain(self, ways: Ways) -> list[Any]:
        """What Horovod makes of the tensors by itself."""
        results = []
        for place, x in enumerate(self._xs):
            wide = tf.cast(x, tf.float32) if x.dtype == tf.bfloat16 else x  # which it does not know
            result = hvd_ops._allreduce(
                wide,
                op=ways.op,
                prescale_factor=ways.prescale,
                postscale_factor=ways.postscale,
                **self._named(f"plain.{place}"),
            )
            results.append(tf.cast(result, x.dtype))
        return results

    def _measure(self, number: Any, previous: Any) -> tuple[Any, Any]:
        """What the ranks share before they quantize; and the tokens.

        They take the largest step of any rank, and go on from there: where one has joined or been
        lost, no dither of a step that was is used again.
        """
        with aside():
            inputs = [self._shapes, tf.stack([number, previous]), *self._xs]
        own, marks = self._call("measure", (), inputs, tf.int32, tf.float64)
        marks.set_shape([token.NUMBERS * len(self._xs)])
        if self._first is not None:
            with aside(), tf.control_dependencies([self._first._agreed]):
                own = tf.identity(own)
        return self._allreduce(own, stages.NORM, hvd.Max), marks

    def _next_step(self) -> Any:
        """The number of the reduction that begins here, as a tensor; the first is 0."""
        number = functools.reduce(tf.maximum, [own.last() for own in self.counters]) + 1
        with tf.control_dependencies(_set(self.counters, number)):
            return tf.identity(number)

    def _set_step(self, number: Any) -> list[Any]:
        """Make this the number of the last reduction; what does it, in a graph."""
        return _set([*self.counters, *([] if self._runs is None else [self._runs])], number)

    def _reduce(self, shared: Any) -> Sequence[Any]:
        """The results as vectors, from what all ranks know."""
        if self._variables:
            with aside(), tf.control_dependencies([self._compare_replicas(shared)]):
                shared = tf.identity(shared)
        standard = self.kernels.plan.in_flight
        payloads = self._standard(shared) if standard else self._by_shares(shared)
        inputs = [self._shapes, shared, *(self._xs if self.kernels.observed else ()), *payloads]
        dtypes = [self._xs[0].dtype] * len(self._xs)
        results: Sequence[Any] = self._call("dequantize", (), inputs, *dtypes)
        return results

    def _compare_replicas(self, shared: Any) -> Any:
        """Where it is the turn of this step: an error if variables differ between ranks."""
        names = [own.name for own in self._variables]
        if len(set(names)) < len(names):  # as those that nobody has given a name
            names = [f"{name} ({place})" for place, name in enumerate(names)]

        def compare() -> Any:
            values = [tf.convert_to_tensor(own) for own in self._variables]
            (own,) = self._call("digests", (), values, tf.int32)
            found = self._allreduce(own, f"replicas.{names[0]}", hvd.Max)
            inputs = [tf.constant(json.dumps(names)), step, found]
            return tf.reshape(self._call("compare", (), inputs, tf.int32)[0], [])

        every = self.kernels.config.check_replicas
        with aside():
            step, previous = shared[-TAIL], shared[PREVIOUS]
            turn = (previous < 0) | tf.not_equal(step // every, previous // every)
            return tf.cond(turn, compare, lambda: tf.identity(step))

    def _standard(self, shared: Any) -> list[Any]:
        """Codes of evenly spaced levels, summed in lanes of int32 words by Allreduce itself."""
        payloads = [self._quantize(index, shared) for index in range(self.kernels.parcel_count)]
        return [
            self._allreduce(payload, stages.codes(index), hvd.Sum)
            for index, payload in enumerate(payloads)
        ]

    def _by_shares(self, shared: Any) -> list[Any]:
        """Codes that Allreduce cannot add: each rank reduces one share of all ranks' codes."""
        means = []
        for index in range(self.kernels.parcel_count):
            codes = self._quantize(index, shared)
            pieces = hvd.alltoall(codes, **self._named(stages.codes(index)))
            inputs = [self._shapes, shared, pieces]
            (share,) = self._call("reduce", (index,), inputs, codes.dtype)
            means.append(hvd.allgather(share, **self._named(stages.mean(index))))
        return means

    def _quantize(self, index: int, shared: Any) -> Any:
        dtype = tf.as_dtype(codec.payload_dtype(self.kernels.plan))
        codes = self._call("quantize", (index,), [self._shapes, shared, *self._xs], dtype)[0]
        if self._agreed is None:
            self._agreed = codes
        return codes

    def _allreduce(self, array: Any, part: str, op: int) -> Any:
        return hvd_ops._allreduce(array, op=op, **self._named(part))

    def _named(self, part: str) -> dict[str, Any]:
        return {
            "name": f"{LOSS}.{self._name(part)}" if elastic() else self._name(part),
            "ignore_name_scope": self.ignore_name_scope,
            "process_set": self.kernels.process_set,
        }

    def _name(self, part: str) -> str:
        return self.kernels.operation(hvd_ops._normalize_name(self._prefix + part))

    def _call(self, stage: str, index: tuple[int, ...], inputs: list[Any], *dtypes: Any) -> Any:
        """Insert a call of a kernel; all of its results are vectors."""
        if tf.executing_eagerly():
            results = self.kernels.run(stage, index, *(np.array(x) for x in inputs))
            return [tf.convert_to_tensor(x) for x in (results if len(dtypes) > 1 else [results])]
        with aside():
            inputs = [tf.constant(self.kernels.encode(stage, *index)), *inputs]
        part = ".".join([stage, *map(str, index)])
        results = tf.raw_ops.PyFuncStateless(
            input=inputs, token=KEY, Tout=dtypes, name=self._name(part)
        )
        for result in results:
            result.set_shape([None])
        return results


def _set(counters: Sequence[Counter], number: Any) -> list[Any]:
    return [done for own in counters for done in own.set(number)]


class Counter:
    """How many times tensors were reduced: those that are reduced together share one.

    A table of one number in TensorFlow's memory. TensorFlow orders the uses of one resource, and of
    nothing else. Graphs make the table themselves where there is none of its name, which a variable
    does not: they can be saved, and run in another process or in a session.
    """

    def __init__(self) -> None:
        self._shared_name = f"gq.step.{uuid.uuid4()}"

    def set(self, number: Any) -> list[Any]:
        """Make this the number of the last reduction; what does it, in a graph."""
        with tf.device("/CPU:0"):
            done = tf.raw_ops.LookupTableInsertV2(
                table_handle=self._table(),
                keys=tf.constant(0, tf.int64),
                values=tf.cast(number, tf.int64),
            )
        return [] if done is None else [done]

    def last(self) -> Any:
        """The number of the last reduction, as a tensor; -1 where there was none."""
        with tf.device("/CPU:0"):
            return tf.raw_ops.LookupTableFindV2(
                table_handle=self._table(),
                keys=tf.constant(0, tf.int64),
                default_value=tf.constant(-1, tf.int64),
            )

    def _table(self) -> Any:
        if tf.executing_eagerly():
            return self._make()
        # In the function around the branch of a tf.cond that Horovod puts a gradient into: branches
        # without a resource among their inputs would run one after the other.
        graph = tf.compat.v1.get_default_graph()
        while isinstance(graph, CondBranchFuncGraph):
            graph = graph.outer_graph
        made = graph.get_collection_ref(self)  # one for a graph, or TensorFlow would see several
        if not made:
            with graph.as_default(), tf.control_dependencies(None):
                made.append(self._make())
        return made[0]

    def _make(self) -> Any:
        with tf.device("/CPU:0"):
            return tf.raw_ops.MutableHashTableV2(
                key_dtype=tf.int64,
                value_dtype=tf.int64,
                shared_name=self._shared_name,
                name="gq.step",
            )


def not_differentiable(x: Any, result: Any) -> Any:
    """The result; an error if somebody differentiates it to `x`, not a gradient of None."""
    _, result = tf.raw_ops.IdentityN(input=[x, result])
    return tf.raw_ops.PreventGradient(
        input=result,
        message="GlobalQSGD: a compressed result must not be differentiated, because the quantized "
        "mean is not differentiable; pass tf.stop_gradient(tensor), or no compression.",
    )
