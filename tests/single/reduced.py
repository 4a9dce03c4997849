"""Buckets that ranks of one process reduce."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from reference import Array, buffer

from gq_horovod.path import nodes as reduced_by_nodes
from gq_horovod.path.config import Config
from gq_horovod.path.nodes import Nodes
from gq_horovod.path.pipeline import InFlight, Task
from gq_horovod.research.simulation import _Operation, combine
from mpi_ops import nodes
from mpi_ops.kernels.host import Tensors


def _tensors(own: list[Array], rank: int, absent: tuple[tuple[int, int], ...]) -> Tensors:
    pointers = [0 if (rank, place) in absent else buffer(x).pointer for place, x in enumerate(own)]
    return Tensors(np.array(pointers, dtype=np.uint64), buffer(own[0]).dtype, own)


def finish(started: Sequence[InFlight]) -> None:
    """Advance reductions until all are done, and decode them."""
    while not all(own.done for own in started):
        progress = [own.advance() for own in started]
        assert any(progress), "the ranks wait for each other"
    for own in started:
        assert own.error is None, own.error
        own.decode()


def reduce_together(
    config: Config,
    xs: list[list[Array]],
    names: list[str],
    absent: tuple[tuple[int, int], ...] = (),
    observe: Any = None,
) -> list[list[Array]]:
    """The means of each rank's tensors, as one bucket; `absent` are (rank, tensor)."""
    network, plan = Network(tuple(range(len(xs)))), config.plan(len(xs))
    outs = [[np.full_like(x, 77) for x in own] for own in xs]

    def tensors(own: list[Array], rank: int) -> Tensors:
        return _tensors(own, rank, absent)

    started = [
        InFlight(
            Task(
                name="bucket",
                keys=tuple(names),
                counts=tuple(x.size for x in own),
                x=tensors(own, rank),
                new_output=lambda rank=rank: tensors(outs[rank], rank),
                plan=plan,
                collectives=network.of(rank),
                rank=rank,
                seed=3,
                steps=np.arange(len(own), dtype=np.uint32),
                seen=observe,
            )
        )
        for rank, own in enumerate(xs)
    ]
    finish(started)
    return outs


class Network:
    """Operations of some ranks, matched by name whatever the order in which they come."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self._ranks = ranks
        self._waiting: dict[str, dict[int, tuple[str, Array, _Operation]]] = {}

    def of(self, rank: int) -> Any:
        """Those of a rank; `Collectives` of the pipeline."""
        view = type("View", (), {})()
        for name, kind in {
            "allreduce_max": "max",
            "allreduce_sum": "sum",
            "alltoall": "alltoall",
            "allgather": "allgather",
        }.items():
            setattr(view, name, partial(self._submit, rank, kind))
        return view

    def _submit(
        self, rank: int, kind: str, array: Array, name: str, pieces: Sequence[int] | None = None
    ) -> _Operation:
        """`pieces` are the sizes of those of an Alltoall, or of the arrays of an Allgather."""
        waiting = self._waiting.setdefault(name, {})
        assert rank not in waiting, (rank, name)
        own = _Operation()
        waiting[rank] = kind, array.copy(), own
        if len(waiting) == len(self._ranks):
            del self._waiting[name]
            kinds = {kind for kind, *_ in waiting.values()}
            arrays = [waiting[one][1] for one in self._ranks]
            sizes = [own.size for own in arrays]
            assert kinds == {kind}, (name, kinds)
            if kind == "allgather" and pieces is not None:
                assert sizes == list(pieces), (name, sizes)
            else:
                assert len(set(sizes)) == 1, (name, sizes)
            if kind == "alltoall" and pieces is not None:
                assert sum(pieces) == sizes[0], name
                cut = [np.split(own, np.cumsum(pieces)[:-1]) for own in arrays]
                results = [np.concatenate(own) for own in zip(*cut, strict=True)]
            else:
                results = combine(kind, arrays)
            for one, result in zip(self._ranks, results, strict=True):
                waiting[one][2].result = result
        return own


def placed(node_count: int, per_node: int) -> nodes.Placement:
    """Ranks placed by node: each next one on another."""
    ranks = range(node_count * per_node)
    return nodes.Placement(tuple(tuple(ranks[node::node_count]) for node in range(node_count)))


def reduce_by_nodes(
    config: Config,
    xs: list[list[Array]],
    placement: nodes.Placement,
    absent: tuple[tuple[int, int], ...] = (),
    joined: tuple[int, ...] = (),
    seen: Any = None,
    seed: int = 3,
) -> list[list[Array]]:
    """The means of each rank's tensors; those that have joined have none."""
    ranks = range(len(xs))
    everyone = Network(tuple(rank for rank in ranks if rank not in joined))
    inside = [Network(own) for own in placement.nodes]
    across = [Network(placement.across(place)) for place in range(placement.ranks_per_node)]
    plan = config.plan(len(placement.nodes))
    outs = [[np.full_like(x, 77) for x in own] for own in xs]

    def tensors(own: list[Array], rank: int) -> Tensors:
        return _tensors(own, rank, absent)

    started = []
    for rank in ranks:
        if rank in joined:
            continue
        place = placement.place(rank)
        node = placement.across(place).index(rank)
        within = placement.nodes.index(placement.inside(rank))
        collectives = everyone.of(rank)
        if joined:
            collectives.allreduce_max = with_a_zero(collectives.allreduce_max)
        task = Task(
            name="bucket",
            keys=tuple(f"tensor {place}" for place in range(len(xs[0]))),
            counts=tuple(x.size for x in xs[0]),
            x=tensors(xs[rank], rank),
            new_output=lambda rank=rank: tensors(outs[rank], rank),
            plan=plan,
            collectives=collectives,
            rank=node,
            seed=seed,
            steps=np.arange(len(xs[0]), dtype=np.uint32),
            method=reduced_by_nodes.METHOD,
            nodes=Nodes(
                *(rank, len(xs), placement.ranks_per_node, node, place),
                inside=lambda _, within=within, rank=rank: inside[within].of(rank),
                across=across[place].of(rank),
            ),
            seen=seen,
        )
        started.append((rank, InFlight(task)))
    finish([own for _, own in started])
    return [outs[rank] for rank, _ in started]


def with_a_zero(allreduce_max: Any) -> Any:
    """The maximum of what is there and of a rank's zeros, as Horovod has it after hvd.join()."""

    def start(array: Array, name: str) -> Any:
        operation = allreduce_max(array, name)
        result = operation.wait

        def wait() -> Any:
            return np.maximum(result(), 0)

        operation.wait = wait
        return operation

    return start
