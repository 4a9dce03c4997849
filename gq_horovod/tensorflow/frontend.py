"""The class that Horovod's TensorFlow API takes as `compression=`, and allreduce."""

from __future__ import annotations

import sys
import threading
from functools import cached_property
from typing import Any, NamedTuple

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from .. import log
from ..frontend import ClassOrInstance, Compression
from ..path import agreement
from ..path.config import Plan
from .caller import Caller, find_caller
from .graph import Counter, Reduction, aside
from .kernels import Kernels, parcel_count
from .ranks import LOSS, Waiting, elastic, largest, ranks_compare

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
    """A call of hvd.grouped_allreduce, whose tensors come one after the other."""

    group: Any  # the list in which Horovod has them
    reductions: dict[Any, tuple[Reduction, list[int]]]  # by dtype, with the places of the members
    arrived: set[int]

    def place_of(self, tensor: Any) -> int | None:
        """The next place of a tensor that has not come yet; None if there is none."""
        places = (place for place, own in enumerate(self.group) if own is tensor)
        return next((place for place in places if place not in self.arrived), None)


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

    @cached_property
    def _groups(self) -> dict[Any, Group]:
        """What belongs to the process sets that have agreed on their settings."""
        return {}

    @cached_property
    def _counters(self) -> dict[str, Counter]:
        """How many times each tensor was reduced, by its name."""
        return {}

    @cached_property
    def _calls(self) -> dict[int, Call]:
        """The call for several tensors that is under way, by its thread."""
        return {}

    # -------------------------------------------------------------------------- Horovod's interface

    @tf.autograph.experimental.do_not_convert
    def _compress(self, tensor: Any) -> tuple[Any, Any]:
        """Start reducing `tensor` and return a token for Horovod to reduce in place of it."""
        caller = find_caller(tensor, sys._getframe(1))
        eligible = any(self._eligible(member) for member in caller.siblings)
        if not caller.process_set.included():
            # Horovod builds the graph on all ranks, and runs it on those of the process set.
            return tensor, None
        plan, census = self._group(caller.process_set)
        if census is not None and census.wanted:
            self._see(census, tensor, caller, eligible, plan)
        if not eligible or tensor.dtype not in DTYPES:
            return _left_to_horovod(tensor)
        if caller.group is None:
            reduction, place = self._reduction(caller, plan, [caller.place]), 0
        else:
            reduction, place = self._in_group(tensor, caller, plan)
        return reduction.marks[place], Context(reduction, place)

    def _in_group(self, tensor: Any, caller: Caller, plan: Plan) -> tuple[Reduction, int]:
        """The reduction of a group's tensors of this one's dtype, and its place there."""
        thread = threading.get_ident()
        call = self._calls.get(thread)
        if call is None or call.group is not caller.group or call.place_of(tensor) is None:
            call = self._calls[thread] = Call(caller.group, {}, set())
        place = call.place_of(tensor)
        assert place is not None
        call.arrived.add(place)
        if tensor.dtype not in call.reductions:
            members = [
                place
                for place, own in enumerate(caller.siblings)
                if not isinstance(own, tf.IndexedSlices) and own.dtype == tensor.dtype
            ]
            call.reductions[tensor.dtype] = self._reduction(caller, plan, members), members
        reduction, members = call.reductions[tensor.dtype]
        if len(call.arrived) == len(caller.siblings):
            del self._calls[thread]  # and with it what it keeps alive
        return reduction, members.index(place)

    def _reduction(self, caller: Caller, plan: Plan, places: list[int]) -> Reduction:
        """What reduces the siblings at these places together."""
        with aside():
            tensors = [tf.convert_to_tensor(caller.siblings[place]) for place in places]
        kernels = Kernels(
            names=tuple(caller.names[place] for place in places),
            dtype=tensors[0].dtype.name,
            scaling=caller.scaling,
            sums=caller.op == hvd.Sum,
            config=self.config,
            process_set_id=caller.process_set.process_set_id,
            parcel_count=parcel_count([own.shape.num_elements() for own in tensors], plan),
        )
        counter = self._counter(kernels.name)
        return Reduction(kernels, caller.ignore_name_scope, tensors, counter)

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

    def _eligible(self, tensor: Any) -> bool:
        """Whether to compress; a tensor whose size the graph does not know yet is compressed."""
        if isinstance(tensor, tf.IndexedSlices):
            return False
        count = tensor.shape.num_elements()
        large = count is None or count >= max(self.config.min_elements, 1)
        return large and tensor.dtype in DTYPES

    # --------------------------------------------------------------------------------------- state

    def _counter(self, name: str) -> Counter:
        return self._counters.setdefault(name, Counter())

    def _see(
        self, census: log.Census, tensor: Any, caller: Caller, eligible: bool, plan: Plan
    ) -> None:
        """Log a tensor that comes by for the first time."""
        count, dtype = tensor.shape.num_elements(), tensor.dtype.name
        supported = tensor.dtype in DTYPES
        known = eligible and count is not None
        census.see(
            caller.name,
            count,
            dtype,
            reason=None if eligible else self.reason(count or 0, dtype, supported),
            wire_bytes=self.wire_bytes(count, plan) if known else None,
            expected=caller.expected,
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
                plan = self.config.plan(process_set.size())
                if ranks_compare():
                    self._agree(process_set)
                self._groups[key] = Group(plan, self.begin_log(process_set, plan))
        return self._groups[key]

    def _agree(self, process_set: Any) -> None:
        """Raise ConfigMismatchError, on all ranks that take part, where settings differ."""

        def of_all(own: NDArray[np.int32], name: str) -> NDArray[np.int32]:
            return agreement.wait(Waiting(largest, own, name, process_set))

        description = agreement.describe(self.config)
        agreement.agree(of_all, description, (), process_set.rank(), process_set.size())


def _left_to_horovod(tensor: Any) -> tuple[Any, Any]:
    """What Horovod reduces by itself: in TensorFlow it knows float16 but not bfloat16."""
    if tensor.dtype == tf.bfloat16:
        return tf.cast(tensor, tf.float32), tensor.dtype
    return tensor, None


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
    if elastic() and name is not None:
        name = f"{LOSS}.{name}"
    return hvd.allreduce(tensor, name=name, op=op, compression=compression, process_set=process_set)
