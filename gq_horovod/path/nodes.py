"""hierarchical: exact sums inside a node, codes between nodes (`mpi_ops.nodes`).

A bucket is reduced as a whole by one generator, like any other (`pipeline`). Inside, several of its
rounds are under way at a time, and each reduces this rank's share by the ordinary way of its levels
among the ranks of the same place in their nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mpi_ops import codec, nodes, stages
from mpi_ops.chunks import chunk_elements
from mpi_ops.kernels.interface import Tensors
from mpi_ops.layout import Parcel
from mpi_ops.nodes import Round

from . import pipeline
from .memory import Memory
from .pipeline import (
    PRESENT,
    Array,
    Collectives,
    Deliver,
    Exchanges,
    Handle,
    Method,
    Reduced,
    Reduction,
    Task,
)

__all__ = ["METHOD", "Nodes"]


class Inside(Protocol):
    """Part of `Collectives`, for arrays whose pieces have some sizes, the same on every rank."""

    def alltoall(self, array: Array, name: str, sizes: Sequence[int]) -> Handle: ...
    def allgather(self, array: Array, name: str, sizes: Sequence[int]) -> Handle: ...


@dataclass(frozen=True)
class Nodes:
    """Where this rank is, and what it reaches the others by."""

    rank: int  # of all
    ranks: int  # of all nodes
    ranks_per_node: int
    node: int  # of this rank, among those of its place
    place: int  # in the node
    # Among the ranks of the node, of float32 arrays, for an exchange of some number.
    inside: Callable[[int], Inside]
    across: Collectives | None  # among those of this place; None where codes go as messages
    exchanges: Exchanges | None = None  # those
    # The process sets of all nodes and places, by their numbers, where gradients go by such.
    sets: Mapping[int, Sequence[int]] = field(default_factory=dict)


class _Gathered(NamedTuple):
    """The means of a round, packed."""

    flat: Array


def _by_nodes(task: Task, deliver: Deliver) -> Reduction:
    own = task.nodes
    assert own is not None
    # Inside a node nobody gets on without a rank that has called hvd.join(). So what tells of it
    # comes first, in an Allreduce of all ranks.
    there = task.there()
    numbers = [PRESENT] if own.exchanges is None else own.exchanges.proposals(own.rank, own.ranks)
    opening = np.array([*there, *numbers], dtype=np.int32)
    found = yield task.collectives.allreduce_max(opening, task.operation(stages.THERE))
    seen, agreed = np.split(found, [len(there)])
    if there and task.seen is not None:
        task.seen(seen)
    if not agreed.all():
        yield from pipeline.standard(_flat(task, own), deliver)
        return
    limit = chunk_elements(task.plan.world_size)
    rounds = nodes.rounds(task.counts, task.plan, own.ranks_per_node, limit)
    several = range(min(len(rounds), nodes.ROUNDS_IN_FLIGHT))
    number = int(agreed[0]) - 1
    yield from _together(
        [
            _in_turn(task, own, rounds[slot :: len(several)], slot, number, deliver)
            for slot in several
        ]
    )


def _flat(task: Task, own: Nodes) -> Task:
    """The same task for all ranks, as long as one of them has called hvd.join()."""
    plan = pipeline.plan_without_the_joined(task.plan, own.ranks)
    return replace(task, nodes=None, method=None, exchanges=None, plan=plan, rank=own.rank)


def _in_turn(
    task: Task, own: Nodes, rounds: Iterable[Round], slot: int, number: int, deliver: Deliver
) -> Reduction:
    """Several rounds, one after the other, in the same memory."""
    memory = task.memory.part(f"slot {slot}")
    number = number * nodes.ROUNDS_IN_FLIGHT + slot
    inside = own.inside(number)
    for one in rounds:
        flat = memory.take("flat", one.size, np.float32)
        codec.pack(task.x, one.packed(task.x), 1 / own.ranks_per_node, flat)
        name = task.operation(stages.inside(one.index))
        sent = yield from memory.send("flat", flat)
        pieces = memory.receive("pieces", (yield inside.alltoall(sent, name, one.sizes)))
        share = memory.take("share", one.sizes[own.place], np.float32)
        with memory.entered():
            codec.add(pieces.reshape(own.ranks_per_node, -1), share)
        yield from _reduce_share(task, own, one, share, memory, number)
        name = stages.whole(one.index)
        sent = yield from memory.send("share", share)
        # Not of the slot: it stays until the means are asked for.
        gathered = yield inside.allgather(sent, task.operation(name), one.sizes)
        whole = memory.receive(name, gathered)
        deliver(one, _Gathered(whole))


def _reduce_share(
    task: Task, own: Nodes, one: Round, share: Array, memory: Memory, number: int
) -> Reduction:
    """Replace a share of one node's means by that of all nodes' means."""
    parts = one.shares[own.place]
    limit = None if own.exchanges is not None else chunk_elements(task.plan.world_size)
    settings = (task.keys, task.counts, task.plan, limit, task.seed, own.node)
    described = nodes.stages_of(one, own.place, *settings)
    kernels = codec.kernels_for(share)
    stream = task.x.stream if kernels.memory == task.x.memory else None
    pointers = one.parts(own.place, kernels.address(share))
    x = Tensors(pointers, "float32", share, kernels.memory, stream)
    # Where a tensor has one norm, it is that of the parts at all places, so all ranks take the
    # maximum. They do where there is no Horovod operation among those of a place, too.
    whole = task.plan.block_size is None
    collectives: Any = own.across
    if whole or own.across is None:
        collectives = _Among(task.collectives, own.across, memory, one.norms(own.place, task.plan))
    inner = Task(
        name=f"{task.name}.{one.index}",
        keys=described.names,
        counts=described.layout.counts,
        x=x,
        new_output=lambda: x,
        plan=task.plan,
        collectives=collectives,
        rank=own.node,
        seed=task.seed,
        steps=task.steps[[part.tensor for part in parts]],
        memory=memory,
        described=described,
        whose="this rank's node",
    )

    way = pipeline.METHODS[task.plan.levels]

    def decode(parcel: Parcel, reduced: Reduced) -> None:
        way.decode(inner, parcel, reduced, x)

    if own.exchanges is not None:
        norms, _ = yield from pipeline.global_norms(inner)
        if parts:
            yield from pipeline.by_messages(inner, own.exchanges, number, norms, decode)
    elif parts:
        yield from way.reduce(inner, decode)
    elif whole:
        yield from pipeline.global_norms(inner, *([] if task.plan.in_flight else [PRESENT]))


class _Among:
    """Operations among the ranks of a place, but for norms, which go among those of all ranks."""

    def __init__(
        self,
        everyone: Collectives,
        across: Collectives | None,
        memory: Memory,
        norms: tuple[int, int, int],
    ) -> None:
        """Make them; `norms` are as of `Round.norms`."""
        self._everyone, self._across, self._memory = everyone, across, memory
        self._begin, self._count, self._all = norms

    def allreduce_max(self, array: NDArray[np.int32], name: str) -> Handle:
        """Of norms, and of what goes beside them."""
        count, own = self._count, slice(self._begin, self._begin + self._count)
        kernels = codec.kernels_for(array)
        with self._memory.entered():
            every = kernels.empty(self._all + array.size - count, np.int32)
            every[: self._all].fill(0)
            kernels.copy(array[:count], every[own])
            kernels.copy(array[count:], every[self._all :])
        handle = self._everyone.allreduce_max(every, name)
        return _Own(handle, array, own, self._all, self._memory)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._across, name)


class _Own(NamedTuple):
    """A place's part of the norms of all; a `Handle`."""

    handle: Handle
    array: NDArray[np.int32]  # which it replaces
    own: slice
    all: int  # norms; others follow
    memory: Memory

    def ready(self) -> bool:
        return self.handle.ready()

    def wait(self) -> NDArray[np.int32]:
        found, count = self.handle.wait(), self.own.stop - self.own.start
        kernels = codec.kernels_for(self.array)
        with self.memory.entered():
            kernels.copy(found[self.own], self.array[:count])
            kernels.copy(found[self.all :], self.array[count:])
        return self.array


class _Any(NamedTuple):
    """Several things in flight; complete when one of them is."""

    handles: list[Handle]

    def ready(self) -> bool:
        return any(handle.ready() for handle in self.handles)

    def wait(self) -> None:
        assert self.ready(), "whoever waits asks first"


def _together(reductions: Sequence[Reduction]) -> Reduction:
    """Several reductions at one time."""
    waiting = {own: handle for own in reductions if (handle := next(own, None)) is not None}
    while waiting:
        yield _Any(list(waiting.values()))
        for own, handle in list(waiting.items()):
            while handle.ready():
                try:
                    handle = waiting[own] = own.send(handle.wait())
                except StopIteration:
                    del waiting[own]
                    break


def _unpack(task: Task, part: Any, reduced: Any, out: Tensors) -> None:
    if isinstance(reduced, _Gathered):
        codec.unpack(reduced.flat, part.packed(out), out)
    else:  # as among all ranks
        pipeline.dequantize(task, part, reduced, out)


METHOD = Method(_by_nodes, _unpack)
