"""Whether all ranks run the same configuration: checked before the first gradient moves.

Ranks that have called hvd.join() take no part: they contribute zeros to an Allreduce, and no other
operation of Horovod works meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpi_ops.agreement import require_same
from mpi_ops.kernels import host

from .. import __version__
from ..log import Log
from .config import Config, ConfigMismatchError
from .pipeline import PRESENT, Handle, poll_all

__all__ = ["LARGEST", "Same", "agree", "checksum", "describe", "elastic", "wait"]

_log = Log(__name__)

_POLL_SECONDS = 1e-3
# Before the first word about a wait; from then on after twice as long each time.
WARN_SECONDS = 30.0
LARGEST = 2**31 - 1  # of the numbers that ranks compare, as int32

# Ranks may be minutes apart at the first step (data loading, compilation); for ever is a bug.
TIMEOUT_SECONDS = 600.0


def elastic() -> bool:
    """Whether workers of this job may come and go, as Horovod's launcher says."""
    return os.environ.get("HOROVOD_ELASTIC", "0") not in ("", "0")


class Same:
    """Whether something is the same on all ranks, found out while they go on; a `Handle`.

    Several may wait for it. Ranks that have called hvd.join() agree with everything.
    """

    def __init__(
        self, something: object, allreduce_max: Callable[[NDArray[np.int32]], Handle], error: str
    ) -> None:
        """Begin.

        Arguments:
            something: with a text that says it all.
            allreduce_max: begins an operation.
            error: of the ConfigMismatchError that wait() raises where ranks differ.
        """
        own = checksum(something)
        self._error = error
        self._handle = allreduce_max(np.array([own, LARGEST - own], dtype=np.int32))
        self._lock = threading.Lock()
        self._result: NDArray[np.int32] | None = None

    def ready(self) -> bool:
        """Whether it is known."""
        with self._lock:  # a handle may be asked for nothing any more once it was waited for
            return self._result is not None or self._handle.ready()

    @property
    def holds(self) -> bool:
        """Whether it is known to be the same on all ranks."""
        with contextlib.suppress(ConfigMismatchError):
            if self.ready():
                self.wait()
                return True
        return False

    def wait(self) -> None:
        """Block until it is known. Raises ConfigMismatchError where ranks differ."""
        with self._lock:
            if self._result is None:
                self._result = self._handle.wait()
        if int(self._result.sum(dtype=np.int64)) != LARGEST:
            raise ConfigMismatchError(self._error)


def describe(config: Config) -> dict[str, Any]:
    """What has to be the same on every rank of any framework: the software, and the options."""
    software = {"gq-horovod version": __version__, "kernels": host.fingerprint()}
    return {**software, "compression": config.FUNCTION, **config.describe()}


def checksum(data: Any) -> int:
    """Of plain data, 31 bits.

    Ranks compare it beside LARGEST minus it: the maxima over ranks of both add up to LARGEST where
    it is the same on all that take part.
    """
    return zlib.crc32(json.dumps(data, sort_keys=True).encode()) & LARGEST


def agree(
    allreduce_max: Callable[[NDArray[np.int32], str], NDArray[np.int32]],
    description: dict[str, Any],
    numbers: Sequence[int],
    rank: int,
    ranks: int,
    function: str = "GlobalQSGD",
) -> tuple[list[int], bool]:
    """Compare a description between ranks, and take the largest of each of some numbers.

    Arguments:
        allreduce_max: the element-wise maximum over ranks of an int32 array, under a name; blocks.
        description: plain data; what could not even start has "error" in it.
        numbers: from 0 to 2**31 - 1, as many on every rank.
        rank, ranks: this rank, of how many, in the group that compares.
        function: what errors name.

    Returns the largest numbers, and whether every rank took part: those that have called hvd.join()
    do not. Raises ConfigMismatchError, with the same text on every rank, unless all descriptions
    are equal and none is an error.
    """
    text = json.dumps(description, sort_keys=True).encode()
    own = checksum(description)
    opening = [PRESENT, own, LARGEST - own, len(text), *numbers]
    found = allreduce_max(np.array(opening, dtype=np.int32), "gq.configuration").tolist()
    present, largest, complement, length, *agreed = found
    # Every rank sees the same two extremes. Where descriptions are equal, so are errors in them.
    if largest + complement != LARGEST or "error" in description:
        table = np.zeros((ranks, length), dtype=np.int32)
        table[rank, : len(text)] = list(text)
        rows = allreduce_max(table.reshape(-1), "gq.configuration.details").reshape(ranks, length)
        # JSON has no zeros; a row without anything else is that of a rank that has joined.
        texts = [row[row > 0].astype(np.uint8).tobytes() for row in rows]
        require_same([json.loads(row) if row else None for row in texts], function)
    return agreed, present == PRESENT


def wait(handle: Handle, function: str = "GlobalQSGD") -> NDArray[Any]:
    """What the ranks share; raises instead of waiting for ever."""
    begin = time.monotonic()
    warn = WARN_SECONDS
    while not handle.ready():
        waited = time.monotonic() - begin
        if waited > TIMEOUT_SECONDS:
            raise ConfigMismatchError(
                f"{function}: after {TIMEOUT_SECONDS:.0f} s not every rank has reported its "
                f"configuration; pass compression={function} on every rank, and see the first "
                "error of the ranks that stopped."
            )
        if waited > warn:
            _log.say(
                logging.WARNING,
                "waiting",
                f"{function}: has waited {waited:.0f} s for ranks that have not reported their "
                f"configuration or times yet; gives up after {TIMEOUT_SECONDS:.0f} s",
                function=function,
                seconds=waited,
                limit=TIMEOUT_SECONDS,
            )
            warn = 2 * waited
        poll_all()
        time.sleep(_POLL_SECONDS)
    return handle.wait()
