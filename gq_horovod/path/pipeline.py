"""A bucket's path: norm, quantize, reduce, dequantize, with many buckets in flight at once.

A *bucket* is what is reduced together: several tensors, or one. Each method is a generator that
reads from top to bottom and yields wherever it waits for the network. `Pipeline` advances the
generators of all buckets whenever it gets the chance, so that no backward hook ever waits for a
round trip.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mpi_ops import codec, lanes, stages
from mpi_ops.chunks import Chunk, chunks
from mpi_ops.chunks import chunk_elements as chunk_elements
from mpi_ops.codec import Payload
from mpi_ops.kernels.host import Buffer, Tensors
from mpi_ops.layout import Layout, Parcel, layout
from mpi_ops.stages import Stages, Steps

from ..log import Log, Rarely
from .config import Plan
from .feedback import Feedback, keep
from .memory import Handle as Handle
from .memory import Memory as Memory
from .memory import Waiting

if TYPE_CHECKING:
    from .nodes import Nodes

_log = Log(__name__)
_not_finite = Rarely()

Array = NDArray[Any]

# Reductions in a row whose operations are not complete, before nobody asks about the rest: a model
# has hundreds. Operations complete about in the order in which they began.
_PATIENCE = 3

# Who waits for one reduction asks about all others every so many times, some two milliseconds.
_ROUNDS_TO_EVERYTHING = 16

# What every rank adds to the norms where codes are to travel by other operations than Allreduce. A
# rank that has called hvd.join() adds a zero, which then is the maximum.
PRESENT = -1

# While nothing is ready: long enough to leave the core to other ranks, short against a round trip.
POLL_SECONDS = 50e-6


class Collectives(Protocol):
    """Asynchronous collectives on NumPy arrays, matched between ranks by name.

    Where tensors lie on a GPU, their memory says whether these get CuPy arrays.
    """

    def allreduce_max(self, array: NDArray[np.int32], name: str) -> Handle:
        """Element-wise maximum over ranks; may overwrite `array`."""

    def allreduce_sum(self, array: Array, name: str) -> Handle:
        """Element-wise sum over ranks of int32 or float32; may overwrite `array`."""

    def alltoall(self, array: Array, name: str) -> Handle:
        """Piece i of rank j becomes piece j of rank i; pieces are equal parts of `array`."""

    def allgather(self, array: Array, name: str) -> Handle:
        """The arrays of all ranks, one after the other."""


class Exchanges(Protocol):
    """Reductions by messages between ranks, told apart by number (`gq_horovod.path.mpi`)."""

    def proposals(self, rank: int, ranks: int) -> list[int]:
        """This rank's part of what all ranks take the maximum of, to get every rank's proposal.

        That is a positive number for each of so many ranks; one less is used for no other exchange
        in flight of the rank that proposes it. Zeros stand for others.
        """

    def start(
        self,
        number: int,
        x: Tensors,
        steps: Steps,
        norms: NDArray[np.int32],
        stages: Stages,
        deliver: Callable[[Parcel, Payload], None],
    ) -> Handle:
        """Reduce `x`; `stages` are those of this rank, `deliver` takes codes."""


@dataclass(frozen=True)
class Task:
    """Tensors to average over ranks, together: a bucket."""

    name: str  # of operations: the same on every rank, another for each bucket in flight
    # Of the tensors' dithers: the same on every rank, others for each tensor of the program.
    keys: tuple[str, ...]
    counts: tuple[int, ...]  # their elements
    x: Tensors  # must not change until the reduction is done
    # Called when the means are asked for, by when x is not needed any more: memory for them, with
    # as many elements each as x; may be x itself.
    new_output: Callable[[], Tensors]
    plan: Plan
    collectives: Collectives
    rank: int  # in the group that reduces
    seed: int
    steps: Steps  # how many times each tensor was reduced before
    # Complete when x has been written: an accelerator may be at it still. None: it has been.
    written: Handle | None = None
    # Whether all ranks reduce these tensors together; raises an error if not. None: they do.
    agreed: Handle | None = None
    exchanges: Exchanges | None = None  # where codes are to travel beside `collectives`
    method: Method | None = None  # another way than Global-QSGD's
    # What the method keeps of a tensor from step to step.
    state: dict[str, Any] = field(default_factory=dict)
    memory: Memory = field(default_factory=Memory)
    feedback: Feedback | None = None  # takes what this rank's codes leave out of x
    nodes: Nodes | None = None  # where ranks are, if that matters to `method`
    described: Stages | None = None  # what this rank computes, if not what follows from the rest
    whose: str = "this rank"  # the tensors are, for the log
    # Called with whether any rank has each of several tensors, as soon as that is known.
    seen: Callable[[NDArray[np.int32]], None] | None = None
    # Called as soon as a part of a mean is decoded: with the tensor's place, the chunk of it, and
    # the output.
    observe: Callable[[Task, int, Chunk, Tensors], None] | None = None

    @cached_property
    def stages(self) -> Stages:
        """What this rank computes."""
        if self.described is not None:
            return self.described
        limit = None if self.exchanges is not None else chunk_elements(self.plan.world_size)
        return self._stages(layout(self.counts, self.plan, limit))

    def _stages(self, own: Layout) -> Stages:
        computed = _stages(own, self.keys, self.seed, self.rank)
        if self.feedback is None:
            return computed
        return replace(computed, coded=partial(keep, self.feedback, computed, self.x))

    def there(self) -> list[int]:
        """Which tensors this rank has; nothing where nobody asks."""
        if self.seen is None or len(self.counts) == 1:
            return []
        return [int(own != 0) for own in self.x.pointers]

    def summed(self, plan: Plan) -> Stages:
        """What it computes where codes are summed by Allreduce, by norms that are there already."""
        own = layout(self.counts, plan, chunk_elements(plan.world_size), norms_for=self.plan)
        return self._stages(own)

    def operation(self, part: str) -> str:
        """The name of an operation, the same on every rank."""
        return f"{self.name}.{part}"

    # For methods that reduce tensors one by one.

    @property
    def key(self) -> str:
        """Of the dither of the only tensor."""
        (key,) = self.keys
        return key

    @property
    def step(self) -> int:
        """How many times the only tensor was reduced before."""
        return int(self.steps[0])

    @property
    def tensor(self) -> Buffer:
        """The only tensor."""
        return self.buffer(self.x)

    def buffer(self, tensors: Tensors) -> Buffer:
        """The only one of `tensors`."""
        own = tensors
        (pointer,), (count,) = own.pointers.tolist(), self.counts
        return Buffer(pointer, own.dtype, count, own.owner, own.memory, own.stream)

    def chunks(self, norms: NDArray[np.int32]) -> list[Chunk]:
        """The chunks in which the only tensor travels."""
        (count,) = self.counts
        return list(chunks(count, norms, self.plan, chunk_elements(self.plan.world_size)))


@lru_cache(maxsize=4096)  # what is worked out for a bucket serves all of its steps
def _stages(own: Layout, keys: tuple[str, ...], seed: int, rank: int) -> Stages:
    return Stages(own, keys, seed, rank)


# A reduction waits for the handles that it yields, and delivers what means are decoded from: a part
# of the bucket and what was reduced for it, when that part of x is not needed any more.
Deliver = Callable[[Any, Any], None]
Reduction = Generator[Handle, Any, None]


class Reduced(NamedTuple):
    """A reduced payload, and what it is decoded with."""

    stages: Stages
    norms: NDArray[np.int32]  # of all tensors
    payload: Payload


def dequantize(task: Task, parcel: Parcel, reduced: Reduced, out: Tensors) -> None:
    """Decode a parcel to its parts of `out`."""
    reduced.stages.dequantize(parcel, reduced.payload, reduced.norms, out)
    if task.observe is not None:
        norms = task.memory.values(reduced.norms)
        for place, piece in enumerate(parcel.pieces):
            task.observe(task, piece.tensor, stages.chunk_of(parcel, place, norms), out)


@dataclass(frozen=True)
class Method:
    """The way that a bucket goes, and how means are decoded from what it delivers."""

    reduce: Callable[[Task, Deliver], Reduction]
    decode: Callable[[Task, Any, Any, Tensors], None] = dequantize


def warn_unless_finite(
    norms: NDArray[np.int32], name: str, step: int, whose: str = "this rank"
) -> None:
    """Log if own norms of a tensor, as bit patterns, say that it has NaN or Inf.

    Now and then: where losses are scaled it may be ordinary, and where a model has diverged it is
    so for every tensor.
    """
    if not (_log.on(logging.WARNING) and norms.size and norms.max() >= codec.INFINITY):
        return
    if (count := _not_finite.count()) is not None:
        _log.say(
            logging.WARNING,
            "not-finite",
            f"tensor {name!r} has a norm that is NaN or Inf on {whose} in its reduction {step}, "
            f"and becomes NaN there on every rank; seen {count} times on this rank",
            tensor=name,
            step=step,
            count=count,
        )


def warn_unless_all_finite(
    norms: NDArray[np.int32], own: Stages, steps: Steps, whose: str = "this rank"
) -> None:
    """The same of the tensors of a bucket."""
    if not (_log.on(logging.WARNING) and norms.size and norms.max() >= codec.INFINITY):
        return
    ends = [*own.layout.norm_places[1:], own.layout.norm_count]
    places = zip(own.names, steps, own.layout.norm_places, ends, strict=True)
    for name, step, begin, end in places:
        warn_unless_finite(norms[begin:end], stages.user_name(name), int(step), whose)


class Shared(NamedTuple):
    """What all ranks know after the norms."""

    norms: NDArray[np.int32]  # of all blocks, as bit patterns; NaN and Inf of one rank reach all
    beside: NDArray[np.int32]  # the maximum of what went beside them


def global_norms(task: Task, *beside: int) -> Generator[Handle, Any, Shared]:
    """The norms of all ranks, and the maximum over ranks of what goes beside them."""
    memory, count = task.memory, task.stages.layout.norm_count
    there = task.there()
    tail = [*there, *beside]
    own = memory.take(stages.NORM, count + len(tail), np.int32)
    spare = memory.take("largest", 1, np.int32) if task.plan.one_norm else None
    task.stages.measure(task.x, own[:count], spare)
    largest = memory.largest(own[:count]) if _log.on(logging.WARNING) and count else []
    sent = yield from memory.send(stages.NORM, own, tail)
    if isinstance(sent, np.ndarray):
        warn_unless_all_finite(sent[:count], task.stages, task.steps, task.whose)
    both = yield task.collectives.allreduce_max(sent, task.operation(stages.NORM))
    flags, *found = yield from memory.read(both[count:], *largest)
    if any(one.max() >= codec.INFINITY for one in found):
        yield from _warn_of_unseen(task)
    seen, others = np.split(flags, [len(there)])
    if there and task.seen is not None:
        task.seen(seen)
    return Shared(memory.receive(stages.NORM, both[:count]), others)


def _warn_of_unseen(task: Task) -> Waiting:
    """Log which tensors have norms that are not finite, where the host has not seen them.

    They are measured again: the norms of all ranks are in their place by now.
    """
    own = task.memory.take(f"own {stages.NORM}", task.stages.layout.norm_count, np.int32)
    task.stages.measure(task.x, own)
    (norms,) = yield from task.memory.read(own)
    warn_unless_all_finite(norms, task.stages, task.steps, task.whose)


def quantize(
    task: Task, own: Stages, parcel: Parcel, norms: NDArray[np.int32], part: str
) -> Payload:
    """This rank's codes of a parcel."""
    out = task.memory.take(part, parcel.size, codec.payload_dtype(own.plan))
    return own.quantize(parcel, task.x, task.steps, norms, out)


Quantize = Callable[[Task, Stages, Parcel, NDArray[np.int32], str], Payload]


def standard(task: Task, deliver: Deliver, quantize: Quantize = quantize) -> Reduction:
    """Codes of evenly spaced levels, summed in lanes of int32 words by Allreduce itself."""
    norms, _ = yield from global_norms(task)
    yield from _sum(task, norms, task.stages, stages.codes, deliver, quantize)


def _sum(
    task: Task,
    norms: NDArray[np.int32],
    own: Stages,
    part: Callable[[int], str],
    deliver: Deliver,
    quantize: Quantize = quantize,
) -> Reduction:
    """Deliver the sums of all ranks' codes of each parcel; `part` names the operations."""
    sums = []
    for parcel in own.layout.parcels:
        name = part(parcel.index)
        codes = quantize(task, own, parcel, norms, name)
        sent = yield from task.memory.send(name, codes)
        sums.append((parcel, name, task.collectives.allreduce_sum(sent, task.operation(name))))
    for parcel, name, handle in sums:
        deliver(parcel, Reduced(own, norms, task.memory.receive(name, (yield handle))))


def _sum_without_the_joined(task: Task, norms: NDArray[np.int32], deliver: Deliver) -> Reduction:
    """The way of a bucket while some rank has called hvd.join(), whatever its levels.

    Horovod lets such a rank take part in an Allreduce, with zeros, and in nothing else. So codes
    travel as standard levels of the widest lanes, which are finer than those of any other plan.
    """
    plan = plan_without_the_joined(task.plan, task.plan.world_size)
    yield from _sum(task, norms, task.summed(plan), stages.joined, deliver)


def plan_without_the_joined(plan: Plan, ranks: int) -> Plan:
    """Settings with which any Allreduce of `ranks` ranks adds codes."""
    bits = max(lanes.STANDARD_BITS)
    count = lanes.levels(bits, ranks)
    if count == 0:
        raise RuntimeError(
            f"GlobalQSGD: a rank has called hvd.join(), and codes of {ranks} ranks cannot be "
            f"summed in {bits} bits meanwhile; give every rank as many batches."
        )
    return replace(
        plan, world_size=ranks, levels="standard", bits=bits, level_count=count, square=False
    )


def by_shares(task: Task, deliver: Deliver) -> Reduction:
    """Codes that Allreduce cannot add: each rank reduces one share of all ranks' with one rounding.

    Two hops: Alltoall of codes, Allgather of the reduced shares.
    """
    own, memory = task.stages, task.memory
    norms, (present,) = yield from global_norms(task, PRESENT)
    if present != PRESENT:
        yield from _sum_without_the_joined(task, norms, deliver)
        return
    received = []
    for parcel in own.layout.parcels:
        name = stages.codes(parcel.index)
        sent = yield from memory.send(name, quantize(task, own, parcel, norms, name))
        received.append((parcel, name, task.collectives.alltoall(sent, task.operation(name))))
    means = []
    for parcel, name, handle in received:
        pieces = memory.receive(name, (yield handle))
        # The share's mean takes the place of this rank's codes, which have been sent.
        out = memory.take(name, parcel.reduced_size, codec.payload_dtype(own.plan))
        name = stages.mean(parcel.index)
        with memory.entered():
            share = own.reduce(parcel, pieces, task.steps, norms, out)
        sent = yield from memory.send(name, share)
        means.append((parcel, name, task.collectives.allgather(sent, task.operation(name))))
    for parcel, name, handle in means:
        deliver(parcel, Reduced(own, norms, memory.receive(name, (yield handle))))


def exchange(task: Task, deliver: Deliver) -> Reduction:
    """Codes of either kind, in messages between ranks (`mpi_ops.exchange`)."""
    assert task.exchanges is not None
    # Every rank's proposal comes back with the norms. A rank that has called hvd.join() takes part
    # in Horovod's operations with zeros, and in no exchange.
    proposals = task.exchanges.proposals(task.rank, task.plan.world_size)
    norms, numbers = yield from global_norms(task, *proposals)
    if not numbers.all():
        yield from _sum_without_the_joined(task, norms, deliver)
        return
    yield from by_messages(task, task.exchanges, int(numbers[0]) - 1, norms, deliver)


def by_messages(
    task: Task, exchanges: Exchanges, number: int, norms: NDArray[np.int32], deliver: Deliver
) -> Reduction:
    """The exchange of that number, by norms that are there already."""
    own, near = task.stages, codec.near(norms, task.x)

    def deliver_reduced(parcel: Parcel, payload: Payload) -> None:
        deliver(parcel, Reduced(own, near, payload))

    yield exchanges.start(number, task.x, task.steps, norms, own, deliver_reduced)


METHODS = {
    "standard": Method(standard),
    "exponential": Method(by_shares),
    "two-hop": Method(by_shares),
}


def method(task: Task) -> Method:
    """The way that a bucket goes."""
    if task.method is not None:
        return task.method
    return METHODS[task.plan.levels] if task.exchanges is None else Method(exchange)


class InFlight:
    """A reduction and the operation that it waits for."""

    def __init__(self, task: Task) -> None:
        self.name = task.name
        self.error: BaseException | None = None  # what one of its operations or stages raised
        self.task = task
        self._delivered: deque[tuple[Any, Any]] = deque()
        self._output: Tensors | None = None
        self._method = method(task)
        self._reduction = self._reduce()
        self._handle: Handle | None = next(self._reduction, None)

    def _reduce(self) -> Reduction:
        if self.task.written is not None and not self.task.written.ready():
            yield self.task.written
        if self.task.agreed is not None:  # before anything is sent that others may not expect
            yield self.task.agreed
        yield from self._method.reduce(self.task, self._deliver)

    def _deliver(self, part: Any, reduced: Any) -> None:
        self._delivered.append((part, reduced))

    @property
    def done(self) -> bool:
        """Whether every operation is complete, or one has failed."""
        return self._handle is None

    @property
    def begun(self) -> bool:
        """Whether its tensor has been written, which every reduction waits for first."""
        return self._handle is None or self._handle is not self.task.written

    @property
    def delivered(self) -> bool:
        """Whether there is something to decode."""
        return bool(self._delivered)

    def advance(self) -> bool:
        """Go on to the next operation if this one is complete. Whether there was progress.

        Raises no error: it belongs to this tensor, and is met by whoever asks for it. Those who ask
        for another one would not know what to say about it. (An interrupt is the program's.)
        """
        if self._handle is None:
            return False
        try:
            if not self._handle.ready():
                return False
            self._handle = self._reduction.send(self._handle.wait())
        except StopIteration:
            self._handle = None
        except Exception as error:
            self._handle = None
            self.error = error
        except BaseException as error:
            self._handle = None
            self.error = error
            raise
        return True

    @property
    def stopped(self) -> bool:
        """Whether it ended here by what no other rank knows of: those wait for its operations."""
        own = self.error
        return isinstance(own, MemoryError) or not (own is None or isinstance(own, Exception))

    def decode(self) -> Tensors:
        """Decode what has been delivered so far, and return the means, which then have that much.

        Not before a mean is asked for: a reduction that nobody asks for must not write to memory
        that its owner may use for something else by then.
        """
        if self._output is None:
            self._output = self.task.new_output()
        while self._delivered:  # another thread may add to it
            part, reduced = self._delivered.popleft()
            self._method.decode(self.task, part, reduced, self._output)
        return self._output


_pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()  # all of this process
# Those that wait for operations. Nobody may refer to them any more, after an error that a program
# has caught; but other ranks, where the garbage was not collected yet, go on with the same tensors.
_unfinished: set[Pipeline] = set()
_making = threading.Lock()


def pipelines() -> list[Pipeline]:
    """Those of this process in which something is in flight."""
    with _making:
        return [pipeline for pipeline in _pipelines if pipeline.busy]


def poll_all() -> bool:
    """Advance what is in flight in this process; for whoever waits. Whether there was progress.

    Another rank may wait for something else first, such as for another optimizer's gradients, whose
    operations it needs from here.
    """
    moved = False
    for pipeline in pipelines():
        moved = pipeline.poll() or moved
    return moved


class Pipeline:
    """The reductions in flight, of one group of ranks. Threads may share it.

    No thread holds the lock while it waits for other ranks: they may wait for another thread.
    """

    def __init__(self, function: str = "GlobalQSGD") -> None:
        self._function = function  # what errors name
        self._lock = threading.RLock()
        self._in_flight: dict[str, InFlight] = {}  # those not asked for yet
        self._unwritten: dict[str, InFlight] = {}  # not begun, in the order of their hooks
        self._waiting: dict[str, InFlight] = {}  # not done, by when they last advanced
        self._advances = 0
        self.closed: str | None = None  # why it takes nothing more
        self._stopped: BaseException | None = None  # what stopped a reduction on this rank alone
        # By thread that waits: for which tensor, and what changes with every progress.
        self.idle: dict[int, tuple[str, int]] = {}
        with _making:
            _pipelines.add(self)

    def submit(self, task: Task) -> InFlight:
        """Start reducing a tensor and advance others. Waits for nothing.

        (But for one case: a reduction of the same name that was started and never asked for,
        because the step failed in between. It is finished first, as it is on every other rank.)
        """
        while True:
            with self._lock:
                if self.closed is not None:
                    raise RuntimeError(
                        f"{self._function}: {task.name!r} cannot be reduced, because {self.closed}."
                    )
                if self._stopped is not None:
                    raise self._halted(task.name)
                abandoned = self._in_flight.get(task.name)
                if abandoned is None:
                    self.poll(_PATIENCE)
                    started = InFlight(task)
                    self._in_flight[task.name] = started
                    self._await(started)
                    return started
            self.settle(abandoned)  # nobody asked for its error either

    def _halted(self, name: str) -> RuntimeError:
        """The error of what comes after a reduction that was stopped on this rank alone."""
        error = RuntimeError(
            f"{self._function}: {name!r} cannot be reduced, because a reduction was stopped on "
            f"this rank by {type(self._stopped).__name__}: {self._stopped}. Other ranks wait for "
            "it, so end this process, or start Horovod anew on all ranks."
        )
        error.__cause__ = self._stopped
        return error

    def has_abandoned(self, name: str) -> bool:
        """Whether a reduction of that name was started and never asked for."""
        return name in self._in_flight

    def _await(self, reduction: InFlight) -> None:
        """Keep a reduction where it is found when what it waits for may be complete."""
        if not reduction.begun:
            self._unwritten[reduction.name] = reduction
        elif not reduction.done:
            self._waiting[reduction.name] = reduction
        self._hold()

    def _hold(self) -> None:
        """Live while anything is not done."""
        if self._unwritten or self._waiting:
            _unfinished.add(self)
        else:
            _unfinished.discard(self)

    def poll(self, patience: int | None = None) -> bool:
        """Advance the reductions whose operations are complete. Whether any was.

        About in the order in which those operations began; with `patience`, until so many in a row
        are not complete. Of the tensors that an accelerator has still to write, which each does in
        the order of their hooks, until one of it is not.
        """
        with self._lock:
            before, missed = self._advances, 0
            busy: list[Any] = []  # streams of the devices that have still to write a tensor
            for reduction in list(self._unwritten.values()):
                stream = reduction.task.x.stream
                if not (stream in busy or self._advance(reduction)) and patience is not None:
                    busy.append(stream)
            for reduction in list(self._waiting.values()):
                if self._advance(reduction):
                    missed = 0
                else:
                    missed += 1
                    if missed == patience:
                        break
            return self._advances > before

    def _advance(self, reduction: InFlight) -> bool:
        """Advance one, and wait for its next operation behind those that began before it."""
        try:
            if not reduction.advance():
                return False
        finally:
            if reduction.stopped:
                self._stopped = reduction.error
        self._advances += 1
        self._unwritten.pop(reduction.name, None)
        self._waiting.pop(reduction.name, None)
        self._await(reduction)
        return True

    @property
    def busy(self) -> bool:
        """Whether anything is in flight."""
        return bool(self._in_flight)

    def has(self, reduction: InFlight) -> bool:
        """Whether a reduction is in flight: neither asked for, nor given up."""
        return self._in_flight.get(reduction.name) is reduction

    def give_up(self) -> None:
        """Forget what is in flight: after a failed operation none of it can be trusted."""
        with self._lock:
            self._in_flight.clear()
            self._unwritten.clear()
            self._waiting.clear()
            self._hold()

    def close(self, reason: str) -> None:
        """Give up what is in flight, and take nothing more; errors name the reason."""
        with self._lock:
            self.closed = reason
            self.give_up()

    def drain(self) -> None:
        """Block until nothing is under way, whether or not somebody asks for it later."""
        for reduction in list(self._in_flight.values()):
            self._advance_until_done(reduction)

    def finish(self, reduction: InFlight) -> Tensors:
        """The means of a bucket. Blocks, and advances the others meanwhile.

        Raises what its operations or stages raised, and then gives up the others too.
        """
        try:
            self.settle(reduction, decode=True)
            if isinstance(reduction.error, Exception):
                raise reduction.error
            if reduction.error is not None:
                raise self._halted(reduction.name)
            return reduction.decode()
        except Exception:
            self.give_up()
            raise

    def settle(self, reduction: InFlight, decode: bool = False) -> None:
        """Advance everything until a reduction is done, decode it meanwhile, and forget it."""
        self._advance_until_done(reduction, decode)
        with self._lock:
            if self.has(reduction):
                del self._in_flight[reduction.name]

    def nudge(self) -> None:
        """Advance what began first, if it can; for whoever comes by often."""
        if self._waiting or self._unwritten:
            self.poll(1)

    def _advance_until_done(self, reduction: InFlight, decode: bool = False) -> None:
        """Advance everything until a reduction is done.

        Now and then everything at once, also of other pipelines: another rank may wait for one that
        is far behind here.
        """
        rounds, thread = 0, threading.get_ident()
        try:
            while not reduction.done:
                self.idle[thread] = (reduction.name, self._advances)
                rounds += 1
                with self._lock:
                    if not self.has(reduction):
                        reason = self.closed or (
                            "an operation that was in flight with it failed; see the first error"
                        )
                        raise RuntimeError(
                            f"{self._function}: the reduction of {reduction.name!r} was given up, "
                            f"because {reason}."
                        )
                    moved = self.poll(_PATIENCE) or self._advance(reduction)
                if rounds % _ROUNDS_TO_EVERYTHING == 0:
                    moved = poll_all() or moved
                if not moved:
                    time.sleep(POLL_SECONDS)
                if decode and reduction.delivered:
                    reduction.decode()
        finally:
            self.idle.pop(thread, None)
