"""A gradient's path: norm, quantize, reduce, dequantize, with many tensors in flight at once.

Each method is a generator that reads from top to bottom and yields wherever it waits for the
network. `Pipeline` advances the generators of all tensors whenever it gets the chance, so that no
backward hook ever waits for a round trip.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mpi_ops import codec, lanes, stages
from mpi_ops.chunks import CHUNK_ELEMENTS as CHUNK_ELEMENTS
from mpi_ops.chunks import Chunk, chunks
from mpi_ops.codec import Payload
from mpi_ops.dither import Dithers
from mpi_ops.kernels.host import Buffer
from mpi_ops.stages import Stages

from ..log import Log, Rarely
from .config import Plan

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
_POLL_SECONDS = 50e-6


class Handle(Protocol):
    """A collective operation in flight."""

    def ready(self) -> bool:
        """Whether wait() would return at once."""

    def wait(self) -> Any:
        """The result, after blocking until it is there. Raises if the operation failed."""


class Collectives(Protocol):
    """Asynchronous collectives on NumPy arrays, matched between ranks by name."""

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

    def propose(self) -> int:
        """A number, not negative, that this rank uses for no other exchange in flight."""

    def start(
        self,
        number: int,
        x: Buffer,
        norms: NDArray[np.int32],
        stages: Stages,
        deliver: Deliver,
    ) -> Handle:
        """Reduce `x`; `stages` are those of this rank, `deliver` takes codes."""


@dataclass(frozen=True)
class Task:
    """One tensor to average over ranks."""

    name: str  # of operations: the same on every rank, another for each tensor in flight
    key: str  # of the dither: the same on every rank, another for each tensor of the program
    x: Buffer  # must not change until the reduction is done
    # Called when the mean is asked for, by when x is not needed any more: memory for the mean, with
    # as many elements as x; may be x itself.
    new_output: Callable[[], Buffer]
    plan: Plan
    collectives: Collectives
    rank: int  # in the group that reduces
    seed: int
    step: int  # how many times this tensor was reduced before
    # Complete when x has been written: an accelerator may be at it still. None: it has been.
    written: Handle | None = None
    exchanges: Exchanges | None = None  # where codes are to travel beside `collectives`
    method: Method | None = None  # another way than Global-QSGD's
    # What the method keeps of this tensor from step to step.
    memory: dict[str, Any] = field(default_factory=dict)
    # Called with the chunk and the output as soon as a part of the mean is decoded.
    observe: Callable[[Task, Chunk, Buffer], None] | None = None

    @property
    def dither(self) -> Dithers:
        """Randomness of the stages of chunks on this rank."""
        return stages.dithers(self.seed, self.key, self.step, self.rank)

    @property
    def stages(self) -> Stages:
        """What this rank computes."""
        return Stages(self.plan, self.rank, self.dither)

    def operation(self, part: str) -> str:
        """The name of an operation, the same on every rank."""
        return f"{self.name}.{part}"

    def chunks(self, norms: NDArray[np.int32]) -> list[Chunk]:
        """The chunks in which codes travel through `collectives`."""
        return list(chunks(self.x.size, norms, self.plan, CHUNK_ELEMENTS))


# A reduction waits for the handles that it yields, and delivers what the mean is decoded from: each
# chunk's reduced payload, when the chunk's part of x is not needed any more.
Deliver = Callable[[Chunk, Any], None]
Reduction = Generator[Handle, Any, None]


class Summed(NamedTuple):
    """A reduced payload of another plan than its task's."""

    plan: Plan
    payload: Payload


def dequantize(task: Task, chunk: Chunk, payload: Any, out: Buffer) -> None:
    """Decode a reduced payload of `chunk` to `out`, the chunk's part of the mean."""
    own = task.stages
    if isinstance(payload, Summed):
        own, payload = own._replace(plan=payload.plan), payload.payload
    own.dequantize(chunk, payload, out)


@dataclass(frozen=True)
class Method:
    """The way that a tensor goes, and how the mean is decoded from what it delivers."""

    reduce: Callable[[Task, Deliver], Reduction]
    decode: Callable[[Task, Chunk, Any, Buffer], None] = dequantize


def warn_unless_finite(norms: NDArray[np.int32], name: str, step: int) -> None:
    """Log if a rank's own norms of a tensor, as bit patterns, say that it has NaN or Inf.

    Now and then: where losses are scaled it may be ordinary, and where a model has diverged it is
    so for every tensor.
    """
    if not (_log.on(logging.WARNING) and norms.size and norms.max() >= codec.INFINITY):
        return
    if (count := _not_finite.count()) is not None:
        _log.say(
            logging.WARNING,
            "not-finite",
            f"tensor {name!r} has a norm that is NaN or Inf on this rank in its reduction {step}, "
            f"and becomes NaN there on every rank; seen {count} times on this rank",
            tensor=name,
            step=step,
            count=count,
        )


def own_norms(task: Task) -> NDArray[np.int32]:
    """Norm of each block on this rank, as bit patterns."""
    norms = codec.norms(task.x, task.plan)
    warn_unless_finite(norms, stages.user_name(task.name), task.step)
    return norms


def global_norms(
    task: Task, *beside: int
) -> Generator[Handle, Any, tuple[NDArray[np.int32], NDArray[np.int32]]]:
    """Norm of each block over all ranks, as bit patterns; NaN and Inf of one rank reach all.

    And the maximum over ranks of what goes beside them.
    """
    own = own_norms(task)
    both = np.concatenate([own, np.array(beside, dtype=np.int32)]) if beside else own
    both = yield task.collectives.allreduce_max(both, task.operation(stages.NORM))
    return both[: own.size], both[own.size :]


def quantize(task: Task, chunk: Chunk, plan: Plan, out: Payload | None = None) -> Payload:
    """This rank's codes of a chunk, in `out` if it is given."""
    return task.stages._replace(plan=plan).quantize(chunk, chunk.of(task.x), out)


def standard(
    task: Task, deliver: Deliver, quantize: Callable[[Task, Chunk, Plan], Payload] = quantize
) -> Reduction:
    """Codes of evenly spaced levels, summed in lanes of int32 words by Allreduce itself."""
    norms, _ = yield from global_norms(task)
    yield from _sum(task, norms, task.plan, stages.codes, deliver, quantize)


def _sum(
    task: Task,
    norms: NDArray[np.int32],
    plan: Plan,
    part: Callable[[int], str],
    deliver: Deliver,
    quantize: Callable[[Task, Chunk, Plan], Payload] = quantize,
) -> Reduction:
    """Deliver the sums of all ranks' codes of each chunk; `part` names the operations."""
    sums = []
    for chunk in task.chunks(norms):
        payload = quantize(task, chunk, plan)
        name = task.operation(part(chunk.index))
        sums.append((chunk, task.collectives.allreduce_sum(payload, name)))
    for chunk, handle in sums:
        deliver(chunk, (yield handle))


def _sum_without_the_joined(task: Task, norms: NDArray[np.int32], deliver: Deliver) -> Reduction:
    """The way of a tensor while some rank has called hvd.join(), whatever its levels.

    Horovod lets such a rank take part in an Allreduce, with zeros, and in nothing else. So codes
    travel as standard levels of the widest lanes, which are finer than those of any other plan.
    """
    bits, ranks = max(lanes.STANDARD_BITS), task.plan.world_size
    count = lanes.levels(bits, ranks)
    if count == 0:
        raise RuntimeError(
            f"GlobalQSGD: a rank has called hvd.join(), and codes of {ranks} ranks cannot be "
            f"summed in {bits} bits meanwhile; give every rank as many batches."
        )
    plan = replace(task.plan, levels="standard", bits=bits, level_count=count, square=False)

    def deliver_summed(chunk: Chunk, payload: Payload) -> None:
        deliver(chunk, Summed(plan, payload))

    yield from _sum(task, norms, plan, stages.joined, deliver_summed)


def by_shares(task: Task, deliver: Deliver) -> Reduction:
    """Codes that Allreduce cannot add: each rank reduces one share of all ranks' with one rounding.

    Two hops: Alltoall of codes, Allgather of the reduced shares.
    """
    own = task.stages
    norms, (present,) = yield from global_norms(task, PRESENT)
    if present != PRESENT:
        yield from _sum_without_the_joined(task, norms, deliver)
        return
    received = []
    for chunk in task.chunks(norms):
        size = own.sent_size(chunk.stop - chunk.start)
        codes = own.quantize(chunk, chunk.of(task.x), np.empty(size, codec.payload_dtype(own.plan)))
        name = task.operation(stages.codes(chunk.index))
        received.append((chunk, task.collectives.alltoall(codes, name)))
    means = []
    for chunk, handle in received:
        pieces = yield handle
        share = own.reduce(chunk, pieces)
        name = task.operation(stages.mean(chunk.index))
        means.append((chunk, task.collectives.allgather(share, name)))
    for chunk, handle in means:
        deliver(chunk, (yield handle))


def exchange(task: Task, deliver: Deliver) -> Reduction:
    """Codes of either kind, in messages between ranks (`mpi_ops.exchange`)."""
    assert task.exchanges is not None
    # Every rank's proposal comes back with the norms. A rank that has called hvd.join() takes part
    # in Horovod's operations with zeros, and in no exchange.
    proposals = [0] * task.plan.world_size
    proposals[task.rank] = task.exchanges.propose() + 1
    norms, numbers = yield from global_norms(task, *proposals)
    if not numbers.all():
        yield from _sum_without_the_joined(task, norms, deliver)
        return
    number = int(numbers[0]) - 1
    yield task.exchanges.start(number, task.x, norms, task.stages, deliver)


METHODS = {
    "standard": Method(standard),
    "exponential": Method(by_shares),
    "two-hop": Method(by_shares),
}


def method(task: Task) -> Method:
    """The way that a tensor goes."""
    if task.method is not None:
        return task.method
    return METHODS[task.plan.levels] if task.exchanges is None else Method(exchange)


class InFlight:
    """A reduction and the operation that it waits for."""

    def __init__(self, task: Task) -> None:
        self.name = task.name
        self.error: Exception | None = None  # what one of its operations or stages raised
        self.task = task
        self._delivered: deque[tuple[Chunk, Any]] = deque()
        self._output: Buffer | None = None
        self._method = method(task)
        self._reduction = self._reduce()
        self._handle: Handle | None = next(self._reduction, None)

    def _reduce(self) -> Reduction:
        if self.task.written is not None and not self.task.written.ready():
            yield self.task.written
        yield from self._method.reduce(self.task, self._deliver)

    def _deliver(self, chunk: Chunk, payload: Any) -> None:
        self._delivered.append((chunk, payload))

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

        Raises nothing: an error belongs to this tensor, and is met by whoever asks for it. Those
        who ask for another one would not know what to say about it.
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
        return True

    def decode(self) -> Buffer:
        """Decode what has been delivered so far, and return the mean, which then has that much.

        Not before the mean is asked for: a reduction that nobody asks for must not write to memory
        that its owner may use for something else by then.
        """
        if self._output is None:
            self._output = self.task.new_output()
        while self._delivered:  # another thread may add to it
            chunk, payload = self._delivered.popleft()
            self._method.decode(self.task, chunk, payload, chunk.of(self._output))
            if self.task.observe is not None:
                self.task.observe(self.task, chunk, self._output)
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
                abandoned = self._in_flight.get(task.name)
                if abandoned is None:
                    self.poll(_PATIENCE)
                    started = InFlight(task)
                    self._in_flight[task.name] = started
                    self._await(started)
                    return started
            self._settle(abandoned)  # nobody asked for its error either

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
        are not complete. Of the tensors that an accelerator has still to write, which it does in
        the order of their hooks, until one is not.
        """
        with self._lock:
            before, missed = self._advances, 0
            for reduction in list(self._unwritten.values()):
                if not self._advance(reduction) and patience is not None:
                    break
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
        if not reduction.advance():
            return False
        self._advances += 1
        self._unwritten.pop(reduction.name, None)
        self._waiting.pop(reduction.name, None)
        self._await(reduction)
        return True

    @property
    def busy(self) -> bool:
        """Whether anything is in flight."""
        return bool(self._in_flight)

    def give_up(self) -> None:
        """Forget what is in flight: after a failed operation none of it can be trusted."""
        with self._lock:
            self._in_flight.clear()
            self._unwritten.clear()
            self._waiting.clear()
            self._hold()

    def drain(self) -> None:
        """Block until nothing is under way, whether or not somebody asks for it later."""
        for reduction in list(self._in_flight.values()):
            self._advance_until_done(reduction)

    def finish(self, reduction: InFlight) -> Buffer:
        """The mean of a tensor. Blocks, and advances the others meanwhile.

        Raises what its operations or stages raised, and then gives up the others too.
        """
        try:
            self._settle(reduction, decode=True)
            if reduction.error is not None:
                raise reduction.error
            return reduction.decode()
        except Exception:
            self.give_up()
            raise

    def _settle(self, reduction: InFlight, decode: bool = False) -> None:
        """Advance everything until a reduction is done, decode it meanwhile, and forget it."""
        self._advance_until_done(reduction, decode)
        with self._lock:
            if self._in_flight.get(reduction.name) is reduction:
                del self._in_flight[reduction.name]

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
                    if self._in_flight.get(reduction.name) is not reduction:
                        raise RuntimeError(
                            f"{self._function}: the reduction of {reduction.name!r} was given up, "
                            "because an operation that was in flight with it failed; see the first "
                            "error."
                        )
                    moved = self.poll(_PATIENCE) or self._advance(reduction)
                if rounds % _ROUNDS_TO_EVERYTHING == 0:
                    moved = poll_all() or moved
                if not moved:
                    time.sleep(_POLL_SECONDS)
                if decode and reduction.delivered:
                    reduction.decode()
        finally:
            self.idle.pop(thread, None)
