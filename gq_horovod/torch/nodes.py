"""Where a group's ranks are, and what they reach each other by where gradients go by nodes."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import horovod.torch as hvd
import numpy as np
from horovod.common import process_sets
from horovod.torch import mpi_ops as hvd_ops

from mpi_ops.nodes import Placement, placement

from ..log import Log
from ..path.nodes import Nodes
from ..path.pipeline import poll_all
from . import gpus, numbering
from .collectives import Collectives

_log = Log(__name__)

_DYNAMIC = "HOROVOD_DYNAMIC_PROCESS_SETS"
_STREAMS = "HOROVOD_NUM_NCCL_STREAMS"

# How long a rank that shuts Horovod down waits for ranks of other nodes to do so as well.
_LEAVE_SECONDS = 10.0
_POLL_SECONDS = 1e-3

# Who has reduced by nodes through Horovod, by the ranks; and the session in which.
_reduced: dict[tuple[int, ...], tuple[object, Collectives]] = {}


def table(place: int, ranks: int) -> list[int]:
    """What ranks take the maximum of, to know where all are; `place` is this one's of so many.

    Whether one of them cannot add process sets, whether nodes differ, whether NCCL has several
    streams, and the node of each rank.
    """
    nodes = [0] * ranks
    nodes[place] = _node() + 1
    several = gpus.number_of(_STREAMS) > 1
    return [int(not _can_add()), int(not hvd_ops.is_homogeneous()), int(several), *nodes]


def numbers(ranks: int) -> int:
    """How many that are."""
    return 3 + ranks


def where(agreed: Sequence[int]) -> Placement | str:
    """Where all ranks are, from the maxima; or why there are no two levels."""
    _, uneven, _, *found = agreed
    return "nodes have different numbers of ranks" if uneven else placement(found)


def pays(resident: bool) -> bool:
    """Whether "auto" takes it: where codes stay on GPUs, whose links inside a node are fast.

    In host memory the exact sums cost more passes over it than codes of all ranks cost network
    (docs/benchmarks.md).
    """
    return resident


def reached(
    found: Placement,
    rank: int,
    members: Sequence[int],
    agreed: Sequence[int],
    transport: str,
    resident: bool,
) -> Nodes | str:
    """What a rank reaches the others by, or why it cannot; the same on every rank.

    Arguments:
        found: where the group's ranks are.
        rank: this one, in the group.
        members: ranks of Horovod that the group has.
        agreed: the maxima.
        transport: of the options.
        resident: whether codes stay on GPUs.
    """
    if transport == "mpi":
        return _by_messages(found, rank, members)
    if resident and agreed[2]:
        # It takes the next stream, with a communicator of its own, after every operation on GPUs in
        # any process set (GPUOpContext::FinalizeGPUQueue); and ranks differ in their numbers.
        return (
            "Horovod takes NCCL's streams in turn, and ranks of different process sets would not "
            f"take the same one: unset {_STREAMS} on all ranks"
        )
    return _by_process_sets(found, rank, members, dynamic=not agreed[0])


def lost(own: Nodes) -> Sequence[int] | None:
    """The ranks of a process set that was removed, of those that gradients go by; None: none was.

    All ranks see the same, whatever nodes they are on.
    """
    known = _known() if own.sets else {}
    gone = (ranks for number, ranks in own.sets.items() if known.get(number) != ranks)
    return next(gone, None)


def stay(collectives: Collectives, members: Sequence[int]) -> None:
    """Have this rank wait for the others before it shuts Horovod down; see `leave`."""
    _reduced[tuple(members)] = numbering.session(), collectives
    if (library := numbering.library()) is not None:
        library.before_shutdown = leave
    atexit.unregister(leave)
    atexit.register(leave)  # after Horovod's own, and so before it


def leave() -> None:
    """Wait until all ranks shut Horovod down, as long as they may need it.

    What a node does last it does by itself: when it is done, other nodes may still have to begin
    that, and when one rank shuts Horovod down their operations fail.
    """
    own = list(_reduced.values())
    _reduced.clear()
    if getattr(sys, "last_value", None) is not None:  # an error ends the program, and others wait
        return
    begin = time.monotonic()
    with contextlib.suppress(Exception):  # Horovod has ended, or an operation has failed
        ends = [
            collectives.allreduce_max(np.zeros(1, np.int32), "gq.nodes.end")
            for session, collectives in own
            if session is numbering.session() and collectives.process_set.rank() is not None
        ]
        while not all(end.ready() for end in ends) and time.monotonic() < begin + _LEAVE_SECONDS:
            poll_all()
            time.sleep(_POLL_SECONDS)


def say(function: str, problem: str) -> None:
    """Log why gradients are not reduced by nodes; loud where that can be changed."""
    _log.say(
        logging.WARNING if _DYNAMIC in problem or _STREAMS in problem else logging.INFO,
        "nodes",
        f"{function}: gradients are reduced among all ranks, and not by nodes, because {problem}",
        function=function,
        problem=problem,
    )


def say_that_none_may_be_lost(function: str) -> None:
    """Log what an elastic job loses by process sets.

    Horovod 0.28.1 catches no error when it removes these from a job that is broken.
    """
    _log.say(
        logging.WARNING,
        "nodes",
        f"{function}: hierarchical=True in an elastic job adds process sets, and Horovod then ends "
        "all workers when one is lost; leave hierarchical out if others are to go on",
        function=function,
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
    sets = {known[tuple(own)]: own for own in lists}
    return _nodes(found, rank, lambda _: inside, across, sets=sets)


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
    sets: Mapping[int, Sequence[int]] | None = None,
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
        sets=sets or {},
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
