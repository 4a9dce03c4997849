"""What this process knows of the reductions that its graphs run.

A graph holds a call of a kernel as text, which says whose it is. Whose instance that is may be
gone, or in another process, where a saved graph runs: then nobody asks for statistics.
"""

from __future__ import annotations

import sys
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from types import FrameType
from typing import Any, Protocol

import horovod.tensorflow as hvd
from horovod.tensorflow import mpi_ops as hvd_ops
from tensorflow.python.client import session
from tensorflow.python.eager import execute

from ..guards import watchdog
from ..guards.stats import TensorStats
from ..path.auto import SharedTrials, Way


class Owner(Protocol):
    """Whose reductions they are."""

    stats_interval: int

    @property
    def stats(self) -> dict[str, TensorStats]:
        """The newest figures of each tensor, by its name."""


_making = threading.Lock()  # of what exists once
_owners: weakref.WeakValueDictionary[str, Owner] = weakref.WeakValueDictionary()


def register(owner: Owner) -> str:
    """A key by which `owner_of` finds it, as long as it lives."""
    key = str(uuid.uuid4())
    _owners[key] = owner
    # Not more than that: instances may be collected at any moment, within a lock too.
    weakref.finalize(owner, _gone.append, key)
    return key


_gone: deque[str] = deque()  # keys of instances that are gone


def _forget() -> None:
    """Drop what has been found out for instances that are gone; the lock is held."""
    while _gone:
        key = _gone.popleft()
        for tried in [own for own in _trials if own[0] == key]:
            del _trials[tried]
        for decided in [own for own in _decided if own[0] == key]:
            del _decided[decided]


def owner_of(key: str) -> Owner | None:
    """Who was registered; None in another process."""
    return _owners.get(key)


def ranks_of(process_set: Any) -> tuple[int, ...]:
    """The ranks of a process set that Horovod knows now; its number may have been another's."""
    number = process_set.process_set_id
    if number == 0:
        return tuple(range(process_set.size()))
    return tuple(hvd_ops._basics._get_process_set_ids_and_ranks()[number])


# What levels="auto" has found out, by whose it is, the process set and its ranks; the last used
# last. In an elastic job a process set has other ranks from time to time.
_trials: dict[tuple[str, int, tuple[int, ...]], SharedTrials] = {}
# What has been decided in a run before, by whose it is and the ranks.
_decided: dict[tuple[str, tuple[int, ...]], str] = {}


def trials(
    owner: str, process_set_id: int, ranks: tuple[int, ...], begin: Callable[[], SharedTrials]
) -> SharedTrials:
    """Those of an instance in a process set; the first reduction begins them."""
    key = owner, process_set_id, ranks
    with _making:
        own = _trials.pop(key, None)
        if own is None:
            _forget()
            own = begin()
            if (owner, ranks) in _decided:
                own.decide(_decided[owner, ranks])
        _trials[key] = own
        return own


def decide(owner: str, ranks: tuple[int, ...], way: str) -> None:
    """Take over what these ranks have decided in a run before."""
    with _making:
        _decided[owner, ranks] = way
        for key, own in _trials.items():
            if key[::2] == (owner, ranks):
                own.decide(way)


def decisions(owner: str) -> dict[tuple[int, tuple[int, ...]], Way | None]:
    """What an instance has decided, by process set and its ranks, the last used last."""
    with _making:
        return {key[1:]: own.decision for key, own in _trials.items() if key[0] == owner}


class UnderWay:
    """Reductions under way with one time limit, for the thread that looks at them."""

    def __init__(self, timeout: float, function: str) -> None:
        self._moves = 0
        # By reduction: the operation that it waits for, and what is another number after each move.
        self._waiting: dict[str, tuple[str, int]] = {}
        # Those of the last look, with what executed TensorFlow when each was seen for the first
        # time. A step that fails ends without a word to us. Then that has returned.
        self._seen: dict[tuple[str, int], list[FrameType]] = {}
        self._lock = threading.Lock()
        watchdog.start(timeout, hvd.rank, function, self._look)

    def move(self, reduction: str, operation: str) -> None:
        """It goes on, and waits for an operation of Horovod's."""
        with self._lock:
            self._moves += 1
            self._waiting[reduction] = operation, self._moves

    def end(self, reduction: str) -> None:
        """It waits for nothing any more."""
        with self._lock:
            self._waiting.pop(reduction, None)

    def _look(self) -> watchdog.Waiting:
        executing = _executing()
        seen: dict[tuple[str, int], list[FrameType]] = {}
        waiting: dict[Hashable, str] = {}
        with self._lock:
            for reduction, (operation, moves) in list(self._waiting.items()):
                key = reduction, moves
                known = self._seen.get(key)
                still = [own for own in known if own in executing] if known else executing
                if still:
                    seen[key], waiting[key] = still, operation
                elif known is None:
                    seen[key] = []  # it may have begun since that look at the stacks
                else:
                    del self._waiting[reduction]
        self._seen = seen
        return waiting


_under_way: dict[float, UnderWay] = {}


def under_way(timeout: float, function: str) -> UnderWay:
    """What is under way with this time limit; the first one starts the thread."""
    with _making:
        if timeout not in _under_way:
            _under_way[timeout] = UnderWay(timeout, function)
        return _under_way[timeout]


def _executing() -> list[FrameType]:
    """What waits for TensorFlow on the stacks, in a graph or in an operation of Horovod's."""
    library: Any = hvd_ops.MPI_LIB
    places = (vars(execute), vars(session), library.horovod_allreduce.__globals__)
    found = []
    for top in sys._current_frames().values():
        frame: FrameType | None = top
        while frame is not None and not any(frame.f_globals is own for own in places):
            frame = frame.f_back
        if frame is not None:
            found.append(frame)
    return found
