"""Gradients that are reduced together: buckets, and each of their reductions.

A bucket is settled once, from what all ranks know. In every step its tensors arrive one by one;
with the last one it is on its way. Where some do not come, it goes when the first of the others is
asked for: by then Horovod has handed over all that it has, on every rank. Those that did not come
are zeros, so that ranks do the same, of which one has a tensor and another has not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol

import horovod.torch as hvd
import numpy as np
import torch
from numpy.typing import NDArray

from mpi_ops import codec, stages
from mpi_ops.chunks import Chunk
from mpi_ops.dither import Stage, dither
from mpi_ops.kernels.host import Tensors

from ..guards.stats import Sample
from ..path import agreement, buckets, nodes, token
from ..path.config import Config, Plan
from ..path.memory import Memory, Resident, memory_for
from ..path.pipeline import Handle, InFlight, Method, Task
from . import gpus, numbering, tensors
from .collectives import Every, Written, written
from .group import Group

# Tensors that arrive until somebody asks how far earlier buckets are.
_NUDGE = 4

_HOST = torch.device("cpu")


class Maker(Protocol):
    """What depends on the method: a part of `TorchFrontend`."""

    RESULT_DTYPE: ClassVar[torch.dtype | None]
    config: Config

    def _method(self) -> Method | None: ...
    def _stage(self, tensor: torch.Tensor) -> torch.Tensor: ...
    def _sample(self, values: torch.Tensor, step: int) -> Sample | None: ...
    def _collect(self, key: str, sample: Sample, plan: Plan, step: int) -> None: ...
    def _hand(self, handed: torch.Tensor, own: Handed) -> None: ...


class Handed(NamedTuple):
    """What Horovod reduces something for: a token, or the tensor itself."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    compressed: bool


class Described(NamedTuple):
    """A tensor of a bucket, without its elements."""

    name: str  # the user's
    key: str  # by which its steps are counted
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def describe(name: str, key: str, like: torch.Tensor) -> Described:
    """A tensor of the shape, dtype and device of `like`."""
    return Described(name, key, like.shape, like.dtype, like.device)


class Member(NamedTuple):
    """One tensor of a bucket."""

    bucket: Bucket
    place: int
    described: Described

    def fits(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is such a one as the bucket was made for."""
        own = self.described
        return (
            tensor.dtype is own.dtype
            and tensor.shape == own.shape
            and tensor.device == own.device
            and tensor.layout is torch.strided
            and not tensor.requires_grad
        )


class Context(NamedTuple):
    """What decompress() has to know about a tensor that is compressed."""

    run: Run
    place: int
    strides: tuple[int, ...] | None  # of the result; None: contiguous


class Bucket:
    """Tensors of one dtype and device that are reduced together."""

    def __init__(
        self,
        maker: Maker,
        group: Group,
        plan: Plan,
        members: Sequence[Described],
        op: int,
        scaling: float = 1.0,
        in_place: bool = False,
        name: str | None = None,
        grouped: bool = False,
    ) -> None:
        """Make one.

        Arguments:
            maker, group, plan: whose, and how it is reduced.
            members: its tensors.
            op, scaling, in_place: the caller's.
            name: of its operations; None for one that tells other members from these.
            grouped: whether Horovod reduces their tokens in one operation with other tensors.
        """
        self.maker, self.group, self.plan = maker, group, plan
        self.members, self._op, self._scaling = list(members), op, scaling
        self.in_place, self._grouped = in_place, grouped
        self.factor = scaling * (group.ranks if op == hvd.Sum else 1)
        names = [stages.tensor_name(own.name) for own in members]
        shapes = [(tuple(own.shape), str(own.dtype)) for own in members]
        self.name = name or buckets.name_of(names, shapes)
        self.keys = tuple(stages.tensor_name(own.key) for own in members)
        self.counts = tuple(own.shape.numel() for own in members)
        together = self.name if len(members) > 1 else ""
        self.marks = [
            token.make(own.name, own.shape, tensors.DTYPES[own.dtype], together) for own in members
        ]
        # Horovod refuses a group whose tensors lie on several devices, and some of this one may go
        # without us. Other tokens stay in host memory: on a GPU, Horovod's operations wait for each
        # other in the order of the hooks, and codes would wait for tokens of later gradients.
        if members[0].device.type == "cuda":
            gpus.say_once(members[0].device.index)
        there = members[0].device if grouped and gpus.horovod_takes_them() else _HOST
        with torch.inference_mode(False):  # they outlive a region of that mode
            marks = torch.tensor(self.marks, dtype=torch.float64, device=_HOST)
            self._marks = gpus.placed(marks, there)
        numbering.note_operation(gpus.reduces_there(there))
        self.run: Run | None = None  # the last one
        self.agreed: agreement.Same | None = None  # until it is known that all ranks have it
        self.absent: list[int] = []  # members that no rank had in the last run
        self._memory: Memory | None = None
        self._renew()

    def _renew(self) -> None:
        """Memory that nothing else uses: an operation that was given up may still write to it."""
        self._memory = None
        with torch.inference_mode(False):
            self._tokens = torch.empty_like(self._marks)
            self.tokens = list(self._tokens)
        for own, handed in zip(self.members, self.tokens, strict=True):
            self.maker._hand(handed, Handed(own.name, own.shape, own.dtype, True))

    def of(self, places: Sequence[int]) -> Bucket:
        """A bucket of some of these members."""
        members = [self.members[place] for place in places]
        like = (self._op, self._scaling, self.in_place)
        return Bucket(self.maker, self.group, self.plan, members, *like, grouped=self._grouped)

    def arrive(
        self, owner: Owner, place: int, tensor: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, Context]:
        """Take a tensor; its token, and what decompress() has to know."""
        run = self.open(owner)
        return self.tokens[place], run.arrive(place, tensor, step)

    def memory_for(self, x: Tensors) -> Memory:
        """What norms and codes of its tensors lie in."""
        if self._memory is None:
            # Messages between ranks are made in host memory.
            on_host = bool(
                self.group.exchanges or (self.group.nodes and self.group.nodes.exchanges)
            )
            self._memory = Memory() if on_host else memory_for(x, self.group.resident)
            stays = isinstance(self._memory, Resident)
            numbering.note_operation(stays)
            if stays and not (self.plan.in_flight and self.group.nodes is None):
                gpus.say_what_waits(self.members[0].device, self.maker.config.FUNCTION)
        return self._memory

    def places(self) -> list[Member]:
        """Its members, as those who look them up need them."""
        return [Member(self, place, own) for place, own in enumerate(self.members)]

    def drop(self) -> None:
        """Forget what is open."""
        self.run = None
        self._renew()

    def drop_residuals(self) -> None:
        """Begin with zeros, after a step that was abandoned: who knows what it has quantized.

        Its gradients may have changed meanwhile. What is still under way writes to the old ones.
        """
        for own in self.members:
            self.group.residuals.pop(own.key, None)

    def open(self, owner: Owner) -> Run:
        """The reduction that tensors arrive for now."""
        last = self.run
        if last is not None and last.open:
            return last
        if last is not None:  # nobody has asked for all of it
            self._renew()
            self.drop_residuals()
        self._tokens.copy_(self._marks)
        self.run = Run(self, owner)
        return self.run


class Owner(Protocol):
    """Who has several buckets."""

    def flush(self) -> None:
        """Start what is open."""


class Run:
    """One reduction of a bucket. It is open until it has begun."""

    def __init__(self, bucket: Bucket, owner: Owner) -> None:
        count = len(bucket.members)
        self.bucket, self.owner = bucket, owner
        self.values: list[torch.Tensor | None] = [None] * count
        self.steps = np.zeros(count, dtype=np.uint32)
        self.arrived = self.taken = 0
        self.open = True
        self.step: Any = None  # whose tensors these are; see Settled.arrive
        self.last: dict[int, Any] = {}  # of each thread, the parameter whose gradient came last
        self._reduction: InFlight | None = None
        self._written: list[Written] = []
        self._copied_on: dict[int, Any] = {}  # streams of a GPU that have copied our values
        self._ours = [False] * count  # whether the result may lie where the values do
        self._results: list[torch.Tensor | None] = []
        self._samples: dict[int, Sample] = {}
        self._finished = False

    @property
    def over(self) -> bool:
        """Whether all results were taken, so that its memory is free."""
        return self._finished and self.taken == self.arrived

    @property
    def under_way(self) -> bool:
        """Whether operations of it may be incomplete."""
        return self._reduction is not None and self.bucket.group.pipeline.has(self._reduction)

    def settle(self) -> None:
        """Block until it is done, if it is under way still; nobody asks for the rest of it."""
        if self._reduction is not None and self.under_way:
            self.bucket.group.pipeline.settle(self._reduction)

    def arrive(self, place: int, tensor: torch.Tensor, step: int) -> Context:
        """Take a tensor, which must not change until its result is taken."""
        bucket = self.bucket
        values = bucket.maker._stage(tensor.detach() if tensor.requires_grad else tensor)
        self.values[place] = values
        self.steps[place] = step & 0xFFFFFFFF
        # The optimizer's gradient is reduced where it lies, as by Horovod itself.
        copied = values.data_ptr() != tensor.data_ptr()
        self._ours[place] = bucket.in_place or copied
        if (handle := written(values)) is not None:
            self._written.append(handle)
            if copied:
                self._copied(place, values)
        if not bucket.plan.nearest:
            self._sample(place, step)
        self.arrived += 1
        if self.arrived == len(self.values):
            self.start()
        elif self.arrived % _NUDGE == 0:
            bucket.group.pipeline.nudge()
        return Context(self, place, tensors.dense_strides(tensor))

    def _copied(self, place: int, values: torch.Tensor) -> None:
        """Values are a copy of ours, in memory of the stream that is the current one."""
        if values.is_cuda:
            _for_kernels(values)
            self._copied_on[place] = torch.cuda.current_stream(values.device)

    def _sample(self, place: int, step: int) -> None:
        """Collect statistics of a tensor, if that is wanted in this step."""
        bucket, values = self.bucket, self.values[place]
        assert values is not None
        sample = None if bucket.group.nodes else bucket.maker._sample(values, step)
        if sample is not None:
            self._samples[place] = sample

    def _add_residuals(self) -> Residuals:
        """Add what earlier steps have left out to what has arrived. Not before all ranks begin."""
        bucket, kept = self.bucket, self.bucket.group.residuals
        if bucket.group.pipeline.has_abandoned(bucket.name):
            bucket.drop_residuals()
        residuals: list[torch.Tensor | None] = [None] * len(self.values)
        present = next(own for own in self.values if own is not None)
        if present.is_cuda:  # this stream may be none of those that gradients were written on
            stream = torch.cuda.current_stream(present.device)
            for handle in self._written:
                handle.precede(stream)
            gpus.follow_kernels(present.device)  # which have written the residuals
        for place, own in enumerate(self.values):
            if own is None:
                continue
            key = bucket.members[place].key
            residual = kept.get(key)
            if residual is None or (residual.shape, residual.dtype) != (own.shape, own.dtype):
                with torch.inference_mode(False):  # it outlives a region of that mode
                    kept[key] = _for_kernels(torch.zeros_like(own))
            else:
                if residual.device != own.device:  # of a checkpoint
                    with torch.inference_mode(False):
                        residual = kept[key] = _for_kernels(residual.to(own.device))
                if self._ours[place]:
                    own.add_(residual)
                else:
                    own = own + residual
                    self.values[place], self._ours[place] = own, True
                    self._copied(place, own)
            residuals[place] = kept[key]
            self._sample(place, int(self.steps[place]))
        if (added := written(present)) is not None:
            self._written = [added]
        return Residuals(self.values, residuals)

    def start(self) -> None:
        """Begin, with zeros for what has not arrived."""
        bucket, group = self.bucket, self.bucket.group
        feedback = self._add_residuals() if bucket.plan.nearest else None
        x = _tensors(self.values)
        # Shares of what this rank has not are rounded with other random numbers in every step, too.
        missing = [place for place, own in enumerate(self.values) if own is None]
        self.steps[missing] = self.steps.max()
        if bucket.agreed is not None and bucket.agreed.holds:
            bucket.agreed = None
        task = Task(
            name=bucket.name,
            keys=bucket.keys,
            counts=bucket.counts,
            x=x,
            new_output=self._new_output,
            plan=bucket.plan,
            collectives=group.collectives,
            rank=group.rank,
            seed=bucket.maker.config.seed,
            steps=self.steps,
            written=Every(self._written) if self._written else None,
            agreed=bucket.agreed,
            exchanges=group.exchanges,
            method=bucket.maker._method() or (None if group.nodes is None else nodes.METHOD),
            nodes=group.nodes,
            state=group.memories.setdefault(bucket.members[0].key, {}),
            memory=bucket.memory_for(x),
            feedback=feedback,
            seen=self._see,
            observe=self._observe if self._samples else None,
        )
        self._reduction = group.pipeline.submit(task)
        self.open = False

    def _new_output(self) -> Tensors:
        wanted, results = self.bucket.maker.RESULT_DTYPE, []
        for values, ours in zip(self.values, self._ours, strict=True):
            own = values
            if values is not None and (not ours or values.dtype != (wanted or values.dtype)):
                own = tensors.new_output(values, wanted or values.dtype)
            results.append(own)
        self._results = results  # all of them, or none where memory is short
        return _tensors(results)

    def _see(self, seen: NDArray[np.int32]) -> None:
        self.bucket.absent = np.flatnonzero(seen == 0).tolist()

    def _observe(self, task: Task, place: int, chunk: Chunk, _: Tensors) -> None:
        """Add a chunk to the statistics of a step."""
        sample, result = self._samples.get(place), self._results[place]
        if sample is None or result is None:
            return
        if result.is_cuda:
            gpus.follow_kernels(result.device)
        plan = task.plan
        name = f"{task.keys[place]}.{chunk.index}"
        step = int(self.steps[place])
        random = dither(task.seed, name, step, task.rank, Stage.QUANTIZE, plan.strata)
        part = result.detach().flatten()[chunk.start : chunk.stop]
        sample.add(plan, chunk, random, part.to("cpu", torch.float32).numpy())

    def take(self, place: int) -> torch.Tensor:
        """A member's mean. Blocks until it is there."""
        assert self._reduction is not None
        if not self._finished:
            try:
                self.bucket.group.pipeline.finish(self._reduction)
            except Exception:
                # Kernels may still be at memory that whoever catches this gives back.
                for own in {own.device for own in self.values if own is not None and own.is_cuda}:
                    gpus.follow_kernels(own)
                raise
            self._finished = True
        self.taken += 1
        result = self._results[place]
        assert result is not None
        if result.is_cuda:
            gpus.follow_kernels(result.device)
            stream = torch.cuda.current_stream(result.device)
            if self._copied_on.get(place, stream) != stream:
                result.record_stream(stream)
        sample = self._samples.get(place)
        if sample is not None:
            bucket = self.bucket
            key = bucket.members[place].key
            bucket.maker._collect(key, sample, bucket.plan, int(self.steps[place]))
        if self.over:  # none of them may keep the others, and with them gradients, alive
            self._reduction = None
            if self.bucket.run is self:
                self.bucket.run = None
        return result


def _tensors(own: Sequence[torch.Tensor | None]) -> Tensors:
    """The memory of a bucket's tensors, for kernels."""
    pointers = np.array([0 if x is None else x.data_ptr() for x in own], dtype=np.uint64)
    first = next(x for x in own if x is not None)
    memory, stream = tensors.memory_of(first)
    owner = first if len(own) == 1 else list(own)
    return Tensors(pointers, tensors.DTYPES[first.dtype], owner, memory, stream)


def _for_kernels(own: torch.Tensor) -> torch.Tensor:
    """The same tensor, whose memory is not given out again while our kernels are at it.

    They work on a stream of their own, and whoever drops the tensor may be ahead of them.
    """
    if own.is_cuda:
        own.record_stream(gpus.kernel_stream(own.device))
    return own


class Residuals:
    """What the codes of a run leave out of its tensors; `Feedback` of `path.feedback`."""

    def __init__(
        self, values: Sequence[torch.Tensor | None], residuals: Sequence[torch.Tensor | None]
    ) -> None:
        self._values, self._left = list(values), residuals
        self._spoilt: dict[int, torch.Tensor] = {}  # whether a tensor on a GPU has norms like that
        self.residuals = _tensors(residuals)

    def subtract(self, tensor: int, start: int, stop: int, norms: Any) -> None:
        values, left = self._values[tensor], self._left[tensor]
        assert values is not None
        assert left is not None
        part = left.view(-1)[start:stop]
        with gpus.on_kernel_stream(left.device):
            torch.sub(values.view(-1)[start:stop], part, out=part)
            if not isinstance(norms, np.ndarray):
                if tensor not in self._spoilt:
                    self._spoilt[tensor] = gpus.as_tensor(norms).max() >= codec.INFINITY
                part.masked_fill_(self._spoilt[tensor], 0)
            elif norms.max() >= codec.INFINITY:
                part.zero_()


class _Alone:
    """Who has a bucket of one tensor, which begins with it."""

    def flush(self) -> None:
        """Nothing is open."""


ALONE = _Alone()


class Together:
    """Buckets whose tensors come in one call, one after the other: `hvd.grouped_allreduce`."""

    def __init__(self, tensors: Any, members: dict[int, Member]) -> None:
        self.tensors = tensors  # of the call
        self._members = members  # those that are compressed, by their places in the call
        self._arrived: set[int] = set()

    @property
    def complete(self) -> bool:
        """Whether all have come."""
        return len(self._arrived) == len(self.tensors)

    def place_of(self, tensors: Any, tensor: torch.Tensor, place: int) -> int | None:
        """The place of a tensor that comes now, which Horovod has at `place`, in this call.

        None: it belongs to another call. (A tensor may be in a call twice.)
        """
        if self.tensors is not tensors:
            return None
        alike = [place]
        if tensors[place] is tensor:
            alike = [number for number, own in enumerate(tensors) if own is tensor]
        return next((number for number in alike if number not in self._arrived), None)

    def arrive(
        self, place: int, tensor: torch.Tensor, count: Callable[[str], int]
    ) -> tuple[torch.Tensor, Context] | None:
        """Take the tensor at a place; None if it is not compressed. `count` counts by its key.

        Returns its token, and what decompress() has to know.
        """
        self._arrived.add(place)
        own = self._members.get(place)
        if own is None or not own.fits(tensor):
            return None
        return own.bucket.arrive(self, own.place, tensor, count(own.described.key))

    def flush(self) -> None:
        """Start what is open."""
        _start_open(self._members)


Cut = Callable[[], Iterable[tuple[Bucket, Sequence[Any]]]]


def _names(optimizer: Any) -> list[str]:
    """Of an optimizer's parameters; Horovod may have been given those of a whole model."""
    names = optimizer._parameter_names
    parameters = (own for part in optimizer.param_groups for own in part["params"])
    return [names[own] for own in parameters if own in names]


class Settled:
    """The buckets of an optimizer among the ranks of a group."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.joins = group.joins  # ranks that were away do not know who has been absent
        self._lock = threading.RLock()
        # By the way that they go, by the parameter. (Ways are kept, so that ids stay theirs.)
        self._members: dict[int, tuple[Any, dict[Any, Member]]] = {}
        self.known: dict[Any, Member] = {}  # those that go the last way that somebody asked for
        self._keys: dict[str, str] = {}

    def members(self, way: Any, optimizer: Any, cut: Cut) -> dict[Any, Member]:
        """Those that go some way, by their parameters; `cut` gives their buckets, once."""
        with self._lock:
            known = self._members.get(id(way))
            if known is None:
                own = {
                    parameter: member
                    for bucket, parameters in cut()
                    for parameter, member in zip(parameters, bucket.places(), strict=True)
                }
                self._compare(own, min(_names(optimizer)), str(way))
                known = self._members[id(way)] = way, own
            self.known = known[1]
            return known[1]

    def key(self, name: str, optimizer: Any) -> str:
        """What a tensor is remembered by."""
        key = self._keys.get(name)
        if key is None:
            key = self._keys[name] = self.group.key(name, optimizer)
        return key

    def _compare(self, members: dict[Any, Member], name: str, way: str) -> None:
        """Have the ranks find out whether all of them have these buckets, while they go on.

        `name` is one that they have, whatever their members are, as `way` is.
        """
        own = list(_buckets(members))
        same = agreement.Same(
            [
                [bucket.name, *([x.name, list(x.shape), str(x.dtype)] for x in bucket.members)]
                for bucket in own
            ],
            partial(self._largest, name=f"gq.members.{name}.{way}"),
            f"{self.group.function}: the ranks disagree about the tensors of an optimizer, one of "
            f"which is {name!r}. Every rank has to give it parameters of the same names, shapes "
            "and dtypes in the same order, and require gradients of the same ones.",
        )
        for bucket in own:  # one of a single tensor, too: that may be in a larger one elsewhere
            bucket.agreed = same

    def _largest(self, array: NDArray[np.int32], name: str) -> Handle:
        return self.group.collectives.allreduce_max(array, name)

    def arrive(
        self,
        members: dict[Any, Member],
        optimizer: Any,
        parameter: Any,
        tensor: torch.Tensor,
        step: int,
    ) -> tuple[torch.Tensor, Context]:
        """Take the gradient of a parameter; its token, and what decompress() has to know.

        `members` are those of its way.
        """
        while True:
            with self._lock:
                bucket = members[parameter].bucket
                last = bucket.run
                if last is None or last.open or not last.under_way:
                    return self._arrive(members, optimizer, parameter, tensor, step)
            last.settle()  # as on all ranks: what it tells of absent tensors is the same there

    def _arrive(
        self,
        members: dict[Any, Member],
        optimizer: Any,
        parameter: Any,
        tensor: torch.Tensor,
        step: int,
    ) -> tuple[torch.Tensor, Context]:
        own = members[parameter]
        # Where a bucket has one norm, results depend on what is in it, which a state does not know.
        absent = own.bucket.absent and not own.bucket.plan.one_norm
        if absent and (own.bucket.run is None or not own.bucket.run.open):
            if own.bucket.run is not None:  # of a step that was abandoned
                own.bucket.drop_residuals()
            self._split(members, own.bucket)
            own = members[parameter]
        bucket, handles = own.bucket, optimizer._handles
        run = bucket.open(self)
        # Horovod keeps a handle of everything that it has handed over in a step. Where it has
        # forgotten what came before, that step was abandoned before the bucket was whole.
        thread = threading.get_ident()
        before = None if optimizer._groups is not None else run.last.get(thread)
        if run.arrived and (
            run.step is not handles
            or run.values[own.place] is not None
            or (before is not None and before not in handles)
        ):
            bucket.drop()
            run = bucket.open(self)
        run.step, run.last[thread] = handles, parameter
        return bucket.arrive(self, own.place, tensor, step)

    def _split(self, members: dict[Any, Member], bucket: Bucket) -> None:
        """Those that no rank had in the last step go by themselves from now on, if they come."""
        parameters = {own.place: key for key, own in members.items() if own.bucket is bucket}
        left = sorted(set(parameters).difference(bucket.absent))
        for places in (left, *([place] for place in bucket.absent)):
            part = bucket.of(places)
            members.update(zip((parameters[place] for place in places), part.places(), strict=True))

    def flush(self) -> None:
        """Start what is open: whatever else comes belongs to the next step."""
        with self._lock:
            for _, members in list(self._members.values()):
                _start_open(members)


def _start_open(members: dict[Any, Member]) -> None:
    """Start the buckets of the members for which something has arrived."""
    for bucket in _buckets(members):
        if bucket.run is not None and bucket.run.open:
            bucket.run.start()


def _buckets(members: dict[Any, Member]) -> dict[Bucket, None]:
    """Those of the members, in their order."""
    return dict.fromkeys(own.bucket for own in members.values())
