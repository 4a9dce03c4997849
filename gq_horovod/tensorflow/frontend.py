"""The class that Horovod's TensorFlow API takes as `compression=`, and allreduce."""

from __future__ import annotations

import json
import logging
import sys
import threading
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

from mpi_ops import wire

from .. import log
from ..frontend import ClassOrInstance, Compression
from ..guards.stats import TensorStats, points
from ..path import agreement
from ..path.auto import Way, any_plan, quantizing
from ..path.buckets import cut
from ..path.config import Config, Plan
from . import runtime
from .caller import Caller, find_caller
from .graph import Counter, Place, Reduction, Ways, around, aside, orders_effects, within
from .kernels import Kernels, parcel_count
from .ranks import LOSS, Waiting, largest, ranks_compare

_log = log.Log(__name__)

DTYPES = (tf.float32, tf.float64, tf.float16, tf.bfloat16)


class Group(NamedTuple):
    """What belongs to one process set."""

    plan: Plan  # for the number of ranks when it was made
    census: log.Census | None  # of its tensors, on the rank that logs them


class Context(NamedTuple):
    """What decompress() has to know about a tensor."""

    reduction: Reduction
    place: int  # of the tensor among those that are reduced together


class Call(NamedTuple):
    """A call of Horovod's for a list of tensors, which come to compress() one after the other."""

    listed: Any  # the list in which Horovod has them
    coming: list[int]  # the places of those that have still to come, in their order
    members: dict[int, Context]  # by place, of those that belong to a reduction already

    def place_of(self, tensor: Any, caller: Caller) -> int | None:
        """The place of a tensor that has still to come; None: the call is another one.

        A tensor that is twice in the list comes twice.
        """
        if self.listed is not caller.listed:
            return None
        places = (own for own in self.coming if caller.siblings[own] is tensor)
        return next(places, None)


# One for each process set: threads of one process must not begin two comparisons at a time.
_locks: dict[Any, threading.Lock] = {}


class GlobalQSGD(Compression):
    """Horovod compression by Global-QSGD: unbiased, and the same result on every rank bit for bit.

    Pass the class itself for the defaults, or an instance. Works with hvd.allreduce,
    grouped_allreduce, DistributedGradientTape and DistributedOptimizer, eagerly and in a
    tf.function, with op Average and Sum, `gradient_predivide_factor`, `backward_passes_per_step`,
    `groups`, `sparse_as_dense` and process sets.

    A NaN or Inf on any rank makes its block NaN on every rank; a block of zeros stays zeros.
    float16, bfloat16, float32 and float64 are compressed (float64 at the range of float32),
    anything else is left to Horovod, tf.IndexedSlices too. Tensors on a GPU are staged through host
    memory. transport must be "horovod".

    Raises ConfigMismatchError at the first use, on every rank, if the ranks are configured
    differently; in an elastic job at the first gradient (where block sizes or min_elements differ,
    Horovod raises its own error about operations that do not match). There graphs outlive the ranks
    that they were built for. Raises ValueError with exponential and two-hop levels where a rank has
    called hvd.join(). What is raised while a graph runs, is a tf.errors.InvalidArgumentError with
    the same text.
    """

    HVD = hvd
    LEVELS = Config.LEVELS
    FORMAT = "tensorflow 2"

    @cached_property
    def _groups(self) -> dict[Any, Group]:
        """What belongs to the process sets that have agreed on their settings."""
        return {}

    @cached_property
    def _key(self) -> str:
        """By which graphs name this instance."""
        return runtime.register(self)

    @property
    def decisions(self) -> dict[int, Way | None]:
        """With levels="auto": what was decided for each process set, by its id; None before."""
        return {number: own for (number, _), own in runtime.decisions(self._key).items()}

    @cached_property
    def _counters(self) -> dict[str, Counter]:
        """What counts how many times a tensor was reduced, by its name."""
        return {}

    @cached_property
    def _calls(self) -> dict[int, Call]:
        """The call for a list of tensors that is under way, by its thread."""
        return {}

    # -------------------------------------------------------------------------- Horovod's interface

    @tf.autograph.experimental.do_not_convert
    def _compress(self, tensor: Any) -> tuple[Any, Any]:
        """Start reducing `tensor` and return a token for Horovod to reduce in place of it."""
        if GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()):
            raise ValueError(
                "GlobalQSGD: jit_compile must be False where gradients are reduced, got True: XLA "
                "compiles neither Horovod's operations nor the kernels. Pass jit_compile=False to "
                "this tf.function or to model.compile; a function that it calls, such as the "
                "model's, may be compiled."
            )
        caller = find_caller(tensor, sys._getframe(1))
        # Horovod reduces a group as one: large tensors take the small ones along.
        places = range(len(caller.siblings))
        beside = caller.fused and any(self._chosen(caller, place) for place in places)
        eligible = self._chosen(caller, caller.place)
        eligible = eligible or (beside and self._goes_along(caller, caller.place))
        if not caller.process_set.included():
            # Horovod builds the graph on all ranks, and runs it on those of the process set.
            return tensor, None
        plan, census = self._group(caller.process_set)
        if census is not None and census.wanted:
            handed = tensor.dtype if eligible else _handed_dtype(tensor, beside)
            self._see(census, tensor, caller, eligible, handed, plan)
        if not eligible or tensor.dtype not in DTYPES:
            return _left_to_horovod(tensor, beside)
        if caller.listed is None:
            context = self._members(caller, plan, [caller.place])[caller.place]
        else:
            context = self._listed(tensor, caller, plan)
        return context.reduction.marks[context.place], context

    def _listed(self, tensor: Any, caller: Caller, plan: Plan) -> Context:
        """What reduces a tensor of a list, together with others of it."""
        thread = threading.get_ident()
        call = self._calls.get(thread)
        place = None if call is None else call.place_of(tensor, caller)
        if call is None or place is None:
            call = self._calls[thread] = self._begin(caller, plan)
            place = call.place_of(tensor, caller)
            assert place is not None
        if place not in call.members:
            places = [place]
            if caller.fused:  # all that have its dtype, as in Horovod's own groups
                kind = self._kind(caller, place)
                places = [own for own in call.coming if self._kind(caller, own) == kind]
            call.members.update(self._members(caller, plan, places))
        call.coming.remove(place)
        if not call.coming:
            del self._calls[thread]  # and with it what it keeps alive
        return call.members[place]

    def _begin(self, caller: Caller, plan: Plan) -> Call:
        """The call for a list, of whose tensors the first one has come.

        Gradients go in buckets where they can: those of a dtype that follow each other, from the
        last one on, since that is what a backward pass begins with. The first bucket tells the
        ranks whether all of them have the same buckets. The others send nothing before that.
        """
        siblings = caller.siblings
        coming = [
            place
            for place, own in enumerate(siblings)
            if not isinstance(own, tf.IndexedSlices)
            and own.dtype in DTYPES
            and (self._chosen(caller, place) or self._goes_along(caller, place))
        ]
        call = Call(caller.listed, coming, {})
        graph = None if caller.fused else around(caller.process_set)
        if graph is None:
            return call
        buckets = []
        for kind in {self._kind(caller, place) for place in coming}:
            known = [
                place
                for place in reversed(coming)
                if self._kind(caller, place) == kind and siblings[place].shape.is_fully_defined()
            ]
            dtype, _ = kind
            sizes = [siblings[place].shape.num_elements() * dtype.size for place in known]
            cuts = cut(sizes, self.config.first_bucket_bytes, self._limit(caller, known, plan))
            buckets += [[known[place] for place in own] for own in cuts]
        buckets.sort(reverse=True)  # by their last gradients, which no two of them share
        described = [
            [caller.names[own], siblings[own].shape.as_list(), siblings[own].dtype.name, index]
            for index, places in enumerate(buckets)
            for own in places
        ]
        firsts: dict[bool, Reduction] = {}  # those with trials know what others do not
        for places in buckets:
            trials = self._config(caller, places[0]).levels == "auto"
            members = self._members(*(caller, plan, places, graph, described, firsts.get(trials)))
            call.members.update(members)
            firsts.setdefault(trials, members[places[0]].reduction)
        return call

    def _limit(self, caller: Caller, places: Sequence[int], plan: Plan) -> int:
        """Bytes of a bucket of tensors of one kind.

        A graph of an elastic job may outlive the number of ranks, and newcomers build others.
        """
        if agreement.elastic():
            plan = replace(plan, world_size=1)
        return self.config.bucket_limit(
            self.plan_for(caller.labels[places[0]], plan) if places else plan
        )

    def _config(self, caller: Caller, place: int) -> Config:
        """The options for a tensor that is compressed."""
        own = self.config.of(caller.labels[place])
        assert own is not None
        return own

    def _kind(self, caller: Caller, place: int) -> tuple[Any, Config]:
        """What tensors have to share to be reduced together."""
        return caller.siblings[place].dtype, self._config(caller, place)

    def _chosen(self, caller: Caller, place: int) -> bool:
        """Whether a tensor is compressed whatever comes beside it."""
        return self._eligible(caller.labels[place], caller.siblings[place])

    def _goes_along(self, caller: Caller, place: int) -> bool:
        """Whether a tensor is compressed where another one of its group is."""
        return caller.fused and self.config.of(caller.labels[place]) is not None

    def _members(
        self, caller: Caller, plan: Plan, places: list[int], *bucket: Any
    ) -> dict[int, Context]:
        reduction = self._reduction(caller, plan, places, *bucket)
        return {own: Context(reduction, at) for at, own in enumerate(places)}

    def _reduction(
        self,
        caller: Caller,
        plan: Plan,
        places: list[int],
        graph: tf.Graph | None = None,
        beside: Sequence[Any] = (),
        first: Reduction | None = None,
    ) -> Reduction:
        """What reduces the siblings at these places together.

        Arguments:
            graph: to which it belongs, if not to the current one.
            beside: descriptions of all tensors of the step, if they are in buckets.
            first: what tells that they are the same on all ranks, if that is another one.
        """
        own, config = [caller.siblings[place] for place in places], self._config(caller, places[0])
        plan = self.plan_for(caller.labels[places[0]], plan)
        with within(graph), aside():
            tensors = list(map(tf.convert_to_tensor, own))
        counts = [own.shape.num_elements() for own in tensors]
        kernels = Kernels(
            names=tuple(caller.names[place] for place in places),
            dtype=tensors[0].dtype.name,
            scaling=caller.scaling,
            sums=caller.op == hvd.Sum,
            config=config,
            process_set_id=caller.process_set.process_set_id,
            parcel_count=parcel_count(counts, plan),
            step=agreement.checksum(beside),
            others=max(len(beside), len(places)) - 1,
            owner=self._key,
            key=str(uuid.uuid4()),
            observed=self.stats_interval > 0,
        )
        return Reduction(
            kernels,
            caller.ignore_name_scope,
            tensors,
            self._counters_of(kernels.names),
            self._compared(caller, own),
            Place(graph, caller.device, first),
            self._ways(kernels, counts, caller),
        )

    def _ways(self, kernels: Kernels, counts: Sequence[int | None], caller: Caller) -> Ways | None:
        """The ways of levels="auto" for the tensors of these kernels; None with other levels."""
        if kernels.config.levels != "auto":
            return None
        ranks = caller.process_set.size()
        return Ways(
            caller.op,
            caller.prescale,
            caller.postscale,
            [
                replace(kernels, config=own, parcel_count=parcel_count(counts, own.plan(ranks)))
                for own in quantizing(kernels.config).values()
            ],
        )

    @tf.autograph.experimental.do_not_convert
    def _decompress(self, tensor: Any, ctx: Any) -> Any:
        """The reduced gradient for the token that Horovod reduced."""
        if ctx is None:
            return tensor
        if not isinstance(ctx, Context):
            return tf.cast(tensor, ctx)
        return ctx.reduction.result(ctx.place, tensor)

    compress = ClassOrInstance(_compress)
    decompress = ClassOrInstance(_decompress)

    def _compared(self, caller: Caller, tensors: Sequence[Any]) -> Sequence[Any]:
        """The variables that are compared between ranks beside these tensors.

        All of a step's, once: beside the first one that is compressed.
        """
        step = caller.step
        if step is None or self.config.check_replicas is None:
            return ()
        if not orders_effects():
            raise ValueError(
                "GlobalQSGD: check_replicas must be None outside of tf.function, got "
                f"{self.config.check_replicas}: in the graph of a session nothing says when "
                "variables are read; leave it out."
            )
        known = zip(step.labels, step.gradients, strict=True)
        first = next(own for label, own in known if self._eligible(label, own))
        return step.variables if any(own is first for own in tensors) else ()

    def _eligible(self, label: str, tensor: Any) -> bool:
        """Whether to compress; a tensor whose size the graph does not know yet is compressed."""
        if isinstance(tensor, tf.IndexedSlices) or tensor.dtype not in DTYPES:
            return False
        count = tensor.shape.num_elements()
        return self.config.of(label) is not None if count is None else self.takes(label, count)

    # --------------------------------------------------------------------------------------- state

    def _state_dict(self) -> dict[str, Any]:
        """What a resumed run has to know to go on as this one would, bit for bit.

        That is how often each tensor was reduced, which the dither depends on, and what
        levels="auto" has decided; trials that have not ended begin again. It is the same on all
        ranks: one may save it, and all load it. Returns plain numbers, texts, lists and
        dictionaries. Raises RuntimeError within a graph, or where TensorFlow executes nothing
        eagerly.
        """
        _require_eager("state_dict")
        shared: dict[Counter, list[str]] = {}
        for name, counter in self._counters.items():
            shared.setdefault(counter, []).append(name)
        reduced = [
            {"tensors": names, "last": int(counter.last())} for counter, names in shared.items()
        ]
        decided = [
            {"ranks": list(ranks), "way": own.name}
            for (_, ranks), own in runtime.decisions(self._key).items()
            if own is not None
        ]
        return {**self.describe_state(), "reduced": reduced, "decided": decided}

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what state_dict() returned, before the first step or between two.

        Raises ValueError for the state of another method, of other options, or of another version,
        and RuntimeError as state_dict() does.
        """
        _require_eager("load_state_dict")
        self.require_own_state(state)
        last: dict[Counter, int] = {}
        for own in state["reduced"]:
            for counter in self._counters_of(own["tensors"]):
                last[counter] = max(own["last"], last.get(counter, -1))
        for own in state["decided"]:
            runtime.decide(self._key, tuple(own["ranks"]), own["way"])
        for counter, number in last.items():
            counter.set(tf.constant(number, tf.int64))

    def _trackable(self) -> tf.train.experimental.PythonState:
        """Its state for `tf.train.Checkpoint(..., compression=compression.trackable())`."""
        return _State(self)

    state_dict = ClassOrInstance(_state_dict)
    load_state_dict = ClassOrInstance(_load_state_dict)
    trackable = ClassOrInstance(_trackable)

    def _counters_of(self, names: Sequence[str]) -> list[Counter]:
        """What counts the reductions of these tensors.

        One counter for those that are first reduced together. A tensor keeps its own, so that no
        step of it is used again when it is reduced with others later.
        """
        known = [self._counters[name] for name in names if name in self._counters]
        common = known[0] if known else Counter()
        found = [self._counters.setdefault(name, common) for name in names]
        return list(dict.fromkeys(found))

    def _see(
        self,
        census: log.Census,
        tensor: Any,
        caller: Caller,
        eligible: bool,
        handed: tf.DType,
        plan: Plan,
    ) -> None:
        """Log a tensor that comes by for the first time."""
        label = caller.labels[caller.place]
        count, dtype = tensor.shape.num_elements(), tensor.dtype.name
        supported = tensor.dtype in DTYPES
        known = eligible and count is not None
        codes = self.wire_bytes(label, count, self.plan_for(label, plan)) if known else None

        def plain(dtype: tf.DType) -> float | None:
            """Bytes that a rank sends without compression."""
            return None if count is None else wire.sent_bytes(count * dtype.size, plan.world_size)

        census.see(
            caller.name,
            count,
            dtype,
            reason=None if eligible else self.reason(label, count or 0, dtype, supported),
            wire_bytes=codes if eligible else plain(handed),
            plain_bytes=plain(tensor.dtype),
            expected=None if caller.step is None else len(caller.step.gradients),
            label=label,
        )

    def _group(self, process_set: Any) -> Group:
        """The settings for a process set; on first use, checks that its ranks have the same.

        See `ranks_compare` for where they cannot.
        """
        self.require_process_set(process_set)
        key = (process_set.process_set_id, process_set.size(), tuple(process_set.ranks or ()))
        with _locks.setdefault(key, threading.Lock()):
            if key not in self._groups:
                log.identify(hvd.rank(), hvd.size())
                plan = any_plan(self.config, process_set.size())
                self.config.require_plans(process_set.size())
                if ranks_compare():
                    self._agree(process_set)
                self._groups[key] = Group(plan, self.begin_log(process_set, plan))
                if process_set.rank() == 0:
                    _say_where_gradients_go()
        return self._groups[key]

    def _agree(self, process_set: Any) -> None:
        """Raise ConfigMismatchError, on all ranks that take part, where settings differ."""

        def of_all(own: NDArray[np.int32], name: str) -> NDArray[np.int32]:
            return agreement.wait(Waiting(largest, own, name, process_set))

        description = agreement.describe(self.config)
        agreement.agree(of_all, description, (), process_set.rank(), process_set.size())


@cache
def _say_where_gradients_go() -> None:
    """Log, once, that gradients leave the GPUs that TensorFlow uses."""
    gpus = tf.config.get_visible_devices("GPU")
    if not gpus:
        return
    problem = (
        "kernels of TensorFlow's graphs run on the host, so gradients are copied there whole, and "
        "the means back; hide GPUs with tf.config.set_visible_devices([], 'GPU'), or use PyTorch, "
        "whose gradients are quantized on the GPU"
    )
    _log.say(
        logging.WARNING, "gpu", f"gradients lie on {len(gpus)} GPUs, but {problem}", problem=problem
    )


class _State(tf.train.experimental.PythonState):
    """A text in TensorFlow's checkpoints."""

    def __init__(self, compression: GlobalQSGD) -> None:
        self._compression = compression

    def serialize(self) -> str:
        return json.dumps(self._compression.state_dict())

    def deserialize(self, string_value: str | bytes) -> None:
        self._compression.load_state_dict(json.loads(string_value))


def _require_eager(function: str) -> None:
    if not tf.executing_eagerly():
        raise RuntimeError(
            f"GlobalQSGD.{function}: must be called where TensorFlow executes eagerly, got a call "
            "within a graph; call it outside of tf.function, with TensorFlow 2's behavior enabled."
        )


def _left_to_horovod(tensor: Any, beside_tokens: bool) -> tuple[Any, Any]:
    """What Horovod reduces by itself, and the dtype of the result; None: as it is."""
    handed = _handed_dtype(tensor, beside_tokens)
    if handed == tensor.dtype:
        return tensor, None
    return tf.cast(tensor, handed), tensor.dtype


def _handed_dtype(tensor: Any, beside_tokens: bool) -> tf.DType:
    """In which Horovod reduces a tensor by itself: in TensorFlow it knows float16 but not bfloat16.

    It takes no group of several dtypes, and tokens are float64, of which others lose nothing.
    """
    if beside_tokens and tensor.dtype in DTYPES:
        return tf.float64
    return tf.float32 if tensor.dtype == tf.bfloat16 else tensor.dtype


def allreduce(
    tensor: Any,
    name: str,
    *,
    op: int = hvd.Average,
    compression: type[GlobalQSGD] | GlobalQSGD = GlobalQSGD,
    process_set: Any = hvd.global_process_set,
) -> Any:
    """Average or sum a tensor over ranks with Global-QSGD, without an optimizer.

    Arguments:
        tensor: tf.Tensor or tf.Variable of any shape and dtype.
        name: identifies the operation, the same on every rank. Repeated calls may reuse it.
        op: hvd.Average or hvd.Sum.
        compression: GlobalQSGD or an instance of it.
        process_set: the ranks that take part.

    Returns a new tensor of the same shape and dtype, equal on every rank bit for bit. Eagerly, it
    blocks until it is there. Raises ValueError for a missing name or another op.
    """
    if agreement.elastic() and name is not None:
        name = f"{LOSS}.{name}"
    return hvd.allreduce(tensor, name=name, op=op, compression=compression, process_set=process_set)


def write_stats(stats: Mapping[str, TensorStats], step: int) -> None:
    """Write the newest figures of all tensors to the default writer of `tf.summary`.

    Arguments:
        stats: those of a compression, `compression.stats`.
        step: of training, the place on the horizontal axis.
    """
    for tag, value in points(stats):
        tf.summary.scalar(tag, value, step)
