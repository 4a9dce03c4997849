"""What this process knows of the reductions that its graphs run.

A graph holds a call of a kernel as text, which says whose it is. Whose instance that is may be
gone, or in another process, where a saved graph runs: then nobody asks for statistics.
"""

from __future__ import annotations

import sys
import threading
import uuid
import weakref
from collections.abc import Hashable
from types import FrameType
from typing import Any, Protocol

import horovod.tensorflow as hvd
from horovod.tensorflow import mpi_ops as hvd_ops
from tensorflow.python.client import session
from tensorflow.python.eager import execute

from ..guards import watchdog
from ..guards.stats import TensorStats


class Owner(Protocol):
    """Whose reductions they are."""

    stats_interval: int

    @property
    def stats(self) -> dict[str, TensorStats]:
        """The newest figures of each tensor, by its name."""


_owners: weakref.WeakValueDictionary[str, Owner] = weakref.WeakValueDictionary()


def register(owner: Owner) -> str:
    """A key by which `owner_of` finds it, as long as it lives."""
    key = str(uuid.uuid4())
    _owners[key] = owner
    return key


def owner_of(key: str) -> Owner | None:
    """Who was registered; None in another process."""
    return _owners.get(key)


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
_making = threading.Lock()


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
