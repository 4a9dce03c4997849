"""Where a group's ranks are, and what they reach each other by where gradients go by nodes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
from horovod.common import process_sets
from horovod.torch import mpi_ops as hvd_ops

from mpi_ops.nodes import Placement, placement

from ..log import Log
from ..path.nodes import Nodes
from .collectives import Collectives

_log = Log(__name__)

_DYNAMIC = "HOROVOD_DYNAMIC_PROCESS_SETS"


def table(place: int, ranks: int) -> list[int]:
    """What ranks take the maximum of, to know where all are; `place` is this one's of so many.

    Whether one of them cannot add process sets, whether nodes differ, and the node of each rank.
    """
    nodes = [0] * ranks
    nodes[place] = _node() + 1
    return [int(not _can_add()), int(not hvd_ops.is_homogeneous()), *nodes]


def numbers(ranks: int) -> int:
    """How many that are."""
    return 2 + ranks


def where(agreed: Sequence[int]) -> Placement | str:
    """Where all ranks are, from the maxima; or why there are no two levels."""
    _, uneven, *found = agreed
    return "nodes have different numbers of ranks" if uneven else placement(found)


def pays(resident: bool) -> bool:
    """Whether "auto" takes it: where codes stay on GPUs, whose links inside a node are fast.

    In host memory the exact sums cost more passes over it than codes of all ranks cost network
    (docs/benchmarks.md).
    """
    return resident


def reached(
    found: Placement, rank: int, members: Sequence[int], agreed: Sequence[int], transport: str
) -> Nodes | str:
    """What a rank reaches the others by, or why it cannot; the same on every rank.

    Arguments:
        found: where the group's ranks are.
        rank: this one, in the group.
        members: ranks of Horovod that the group has.
        agreed: the maxima.
        transport: of the options.
    """
    if transport == "mpi":
        return _by_messages(found, rank, members)
    return _by_process_sets(found, rank, members, dynamic=not agreed[0])


def say(function: str, problem: str) -> None:
    """Log why gradients are not reduced by nodes; loud where that can be changed."""
    _log.say(
        logging.WARNING if _DYNAMIC in problem else logging.INFO,
        "nodes",
        f"{function}: gradients are reduced among all ranks, and not by nodes, because {problem}",
        function=function,
        problem=problem,
    )


def say_without_stats(function: str) -> None:
    """Log that nothing is measured, where somebody has asked for it."""
    _log.say(
        logging.WARNING,
        "stats",
        f"{function}: stats has no figures where gradients are reduced by nodes, because codes are "
        "those of means; pass hierarchical=False for them",
        function=function,
    )


def _node() -> int:
    """The number of this rank's node, where all have as many ranks."""
    number: int = hvd.cross_rank()
    return number


def _can_add() -> bool:
    """Whether Horovod adds process sets after hvd.init(), as it reads it."""
    try:
        return int(os.environ.get(_DYNAMIC, "0")) > 0
    except ValueError:
        return False


def _by_process_sets(
    found: Placement, rank: int, members: Sequence[int], dynamic: bool
) -> Nodes | str:
    """The process sets of this rank's node, and of its place.

    They are added where they are missing, which all ranks of Horovod have to do.
    """
    wanted = [*found.nodes, *map(found.across, range(found.ranks_per_node))]
    lists = [sorted(members[one] for one in own) for own in wanted]
    known = {tuple(own): number for number, own in _known().items()}
    missing = [own for own in lists if tuple(own) not in known]
    if missing and len(members) < hvd.size():
        return (
            f"a process set of ranks {missing[0]} is missing, which all ranks would have to add: "
            "add one for the ranks of each node, and one for those of each place in their nodes"
        )
    if missing and not dynamic:
        return f"Horovod cannot add process sets: set {_DYNAMIC}=1 on every rank before hvd.init()"
    for own in missing:
        hvd.add_process_set(own)
    known = {tuple(own): number for number, own in _known().items()}
    inside, across = (
        Collectives(_process_set(known[tuple(own)], own))
        for ranks in (found.inside(rank), found.across(found.place(rank)))
        for own in [sorted(members[one] for one in ranks)]
    )
    return _nodes(found, rank, lambda _: inside, across)


def _by_messages(found: Placement, rank: int, members: Sequence[int]) -> Nodes:
    """The communicators of this rank's node, and of its place. Collective over the group."""
    from ..path import mpi

    across = [members[one] for one in found.across(found.place(rank))]
    node = [members[one] for one in found.inside(rank)]
    messages = mpi.Messages(list(members), across, node)
    return _nodes(found, rank, messages.inside, None, messages)


def _nodes(
    found: Placement,
    rank: int,
    inside: Callable[[int], Any],
    across: Collectives | None,
    exchanges: Any = None,
) -> Nodes:
    place = found.place(rank)
    return Nodes(
        rank=rank,
        ranks=len(found.nodes) * found.ranks_per_node,
        ranks_per_node=found.ranks_per_node,
        node=found.across(place).index(rank),
        place=place,
        inside=inside,
        across=across,
        exchanges=exchanges,
    )


def _known() -> dict[int, list[int]]:
    """The ranks of all process sets, by their ids."""
    known: dict[int, list[int]] = process_sets._basics._get_process_set_ids_and_ranks()
    return known


def _process_set(number: int, ranks: list[int]) -> Any:
    """One that Horovod has already."""
    own = hvd.ProcessSet(ranks)
    own.process_set_id = number
    return own
