"""What this process knows of the reductions that its graphs run.

A graph holds a call of a kernel as text, which says whose it is. Whose instance that is may be
gone, or in another process, where a saved graph runs: then nobody asks for statistics.
"""

from __future__ import annotations

import sys
import threading
import uuid
import weakref
from collections.abc import Callable, Hashable, Sequence
from types import FrameType
from typing import Any, Protocol

import horovod.tensorflow as hvd
from horovod.tensorflow import mpi_ops as hvd_ops
from tensorflow.python.client import session
from tensorflow.python.eager import execute

from ..guards import watchdog
from ..guards.stats import TensorStats
from ..path import auto


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
    return key


def owner_of(key: str) -> Owner | None:
    """Who was registered; None in another process."""
    return _owners.get(key)


class Trials:
    """The trials of one instance in one process set, from the step in which they began."""

    def __init__(self, trials: auto.Trials, ways: Sequence[auto.Way], first: int) -> None:
        self._trials, self._ways, self._first = trials, ways, first

    @property
    def decision(self) -> auto.Way | None:
        """What they have ended with."""
        return self._trials.decision

    def place(self, step: int) -> int:
        """Which way a step has. Blocks where it is the first one after a trial."""
        return self._ways.index(self._trials.way(step - self._first, sys.maxsize))


_trials: dict[tuple[str, int, int], Trials] = {}


def trials(owner: str, process_set_id: int, ranks: int, begin: Callable[[], Trials]) -> Trials:
    """Those of an instance in a process set; the first reduction begins them."""
    key = owner, process_set_id, ranks
    with _making:
        if key not in _trials:
            _trials[key] = begin()
        return _trials[key]


def decisions(owner: str) -> dict[int, auto.Way | None]:
    """What they have ended with, by process set; None while they go on."""
    return {key[1]: own.decision for key, own in _trials.items() if key[0] == owner}


class UnderWay:
    """Reductions under way with one time limit, for the thread that looks at them."""

    def __init__(self, timeout: float, function: str) -> None:
        self._moves = 0
        # By reduction: the operation that it waits for, and what is another number after each move.
        self._waiting: dict[str, tuple[str, int]] = {}
        # Those of the last look, with what executed TensorFlow when each was seen for the first
        # time. A step that fails ends without a word to us. Then that has returned.
        self._seen: dict[tuple[str, int], list[FrameType]] = {}
        watchdog.start(timeout, hvd.rank, function, self._look)

    def move(self, reduction: str, operation: str) -> None:
        """It goes on, and waits for an operation of Horovod's."""
        self._moves += 1
        self._waiting[reduction] = operation, self._moves

    def end(self, reduction: str) -> None:
        """It waits for nothing any more."""
        self._waiting.pop(reduction, None)

    def _look(self) -> watchdog.Waiting:
        executing = _executing()
        seen: dict[tuple[str, int], list[FrameType]] = {}
        waiting: dict[Hashable, str] = {}
        for reduction, (operation, moves) in list(self._waiting.items()):
            key = reduction, moves
            still = [own for own in self._seen.get(key, executing) if own in executing]
            if still:
                seen[key], waiting[key] = still, operation
            elif self._waiting.get(reduction) == (operation, moves):
                self.end(reduction)
        self._seen = seen
        return waiting


_under_way: dict[float, UnderWay] = {}


def under_way(timeout: float, function: str) -> UnderWay:
    """What is under way with this time limit; the first one starts the thread."""
    found = _under_way.get(timeout)
    if found is None:
        with _making:
            if timeout not in _under_way:
                _under_way[timeout] = UnderWay(timeout, function)
            found = _under_way[timeout]
    return found


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
