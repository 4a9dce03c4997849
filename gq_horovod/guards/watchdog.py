"""Ends a rank that would wait for ever, with an error that says for what.

Horovod over MPI waits without a limit for a rank that is stopped or cut off, in threads that no
exception reaches, and its own stall check runs in those threads. So a thread of our own looks from
time to time at the operations under way, and ends the process where one has not moved for too long;
the launcher then ends the job.

It knows no framework.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import NoReturn

# Looks in a time limit. Between two looks at most twice their distance is counted: a job that was
# suspended whole finds hours gone by, in which nobody could have done anything.
_LOOKS = 20
_LONGEST_LOOK = 5.0

# What waits: a key that stays the same while it does, and what to call it.
Waiting = Mapping[Hashable, str]


class Watchdog:
    """Counts for how long operations have been waiting."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.pause = min(timeout / _LOOKS, _LONGEST_LOOK)  # seconds from one look to the next
        self._seconds: dict[Hashable, float] = {}

    def look(self, waiting: Waiting, elapsed: float) -> str | None:
        """The name of what has waited for too long, or None; `elapsed` seconds after last time."""
        counted = min(elapsed, 2 * self.pause)
        self._seconds = {
            key: self._seconds[key] + counted if key in self._seconds else 0.0 for key in waiting
        }
        late = [key for key, seconds in self._seconds.items() if seconds >= self._timeout]
        return waiting[late[0]] if late else None


def start(
    timeout: float, rank: Callable[[], int], function: str, waiting: Callable[[], Waiting | None]
) -> threading.Thread:
    """Watch what `waiting` returns, until that is None. Ends the process at the time limit."""

    def watch() -> None:
        watchdog = Watchdog(timeout)
        before = time.monotonic()
        while True:
            time.sleep(watchdog.pause)
            try:
                under_way = waiting()
            except RuntimeError:  # a dictionary that the main thread has changed meanwhile
                continue
            if under_way is None:
                return
            now = time.monotonic()
            late = watchdog.look(under_way, now - before)
            before = now
            if late is not None:
                _end(message(function, rank(), late, timeout))

    thread = threading.Thread(target=watch, name="gq-horovod watchdog", daemon=True)
    thread.start()
    return thread


def message(function: str, rank: int, name: str, timeout: float) -> str:
    """What is said before the end."""
    return (
        f"{function}: rank {rank} on {socket.gethostname()}: the operation {name!r} has not "
        f"moved for {timeout:g} s, so this rank ends. Another rank is stopped, cut off from the "
        "network, or busy with something else; see its output. Or this rank's GPU has not "
        "finished the gradient. Where ranks may wait longer for "
        f"each other, such as for a validation on one of them, pass a larger {function}(timeout=), "
        "or None."
    )


def _end(text: str) -> NoReturn:
    """No exception and no clean-up: all that could be cleaned up waits too."""
    print(text, file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.__stderr__ or 2)
    os._exit(1)
