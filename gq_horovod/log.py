"""What the package says while it runs: records of the loggers `gq_horovod.*` that name their rank.

Nothing is said unless it is asked for, by one of two ways:

1. The program configures logging itself: `logging.basicConfig(level=logging.INFO)`.
2. GQ_HOROVOD_LOG=info (or debug, warning) in the environment makes a handler of our own, which
   writes to stderr; GQ_HOROVOD_LOG_FORMAT=json makes it write JSON, one record a line. It leaves
   the root logger alone, and records do not go on to it: each would be seen twice.

Every record has the attributes `rank`, `size` (both None before the first gradient), `host`,
`event` and `fields`, and begins with the rank in words, whoever formats it. What is the same on all
ranks of a process set is said by the first of them.

It knows no framework.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

from mpi_ops.scheme import one_of

LEVEL_VARIABLE = "GQ_HOROVOD_LOG"
FORMAT_VARIABLE = "GQ_HOROVOD_LOG_FORMAT"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}
FORMATS = ("text", "json")

_PACKAGE = logging.getLogger("gq_horovod")
_PACKAGE.addHandler(logging.NullHandler())  # else Python prints warnings that nobody asked for


class _Identity(NamedTuple):
    """Who speaks; ranks of the world, also where a process set reduces."""

    rank: int | None = None
    size: int | None = None

    def __str__(self) -> str:
        who = "" if self.rank is None else f"rank {self.rank} of {self.size} "
        return f"[{who}on {_host()}]"


_identity = _Identity()


def identify(rank: int | None, size: int | None) -> None:
    """Tell which rank of how many this process is; again after every hvd.init()."""
    global _identity
    _identity = _Identity(rank, size)


@cache
def _host() -> str:
    return socket.gethostname()


class Log:
    """The logger of a module, for events with fields."""

    def __init__(self, name: str) -> None:
        self.logger = logging.getLogger(name)
        self.on = self.logger.isEnabledFor  # whether anybody asks for records of a level

    def say(self, level: int, event: str, text: str, **fields: Any) -> None:
        """Make a record.

        Arguments:
            level: of the logging module.
            event: a short name that does not change, to search for.
            text: for people.
            fields: for programs, plain data.
        """
        extra = {**_identity._asdict(), "host": _host(), "event": event, "fields": fields}
        self.logger.log(level, "%s %s", str(_identity), text, extra=extra, stacklevel=2)


class Json(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's time, level, rank, size, host, logger, event, fields and text."""
        when = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {"time": when.isoformat(timespec="milliseconds")}
        line["level"] = record.levelname.lower()
        line |= {key: getattr(record, key, None) for key in ("rank", "size", "host")}
        line["logger"] = record.name
        line |= {key: getattr(record, key, None) for key in ("event", "fields")}
        line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(environment: Mapping[str, str] = os.environ) -> None:
    """Make the handler that the environment asks for, in place of that of an earlier call.

    Raises ValueError for values of the variables that are none.
    """
    level = _chosen(environment, LEVEL_VARIABLE, tuple(LEVELS))
    form = _chosen(environment, FORMAT_VARIABLE, FORMATS) or "text"
    for handler in _PACKAGE.handlers[:]:
        if isinstance(handler, _Stderr):
            _PACKAGE.removeHandler(handler)
            _PACKAGE.setLevel(logging.NOTSET)
            _PACKAGE.propagate = True
    if level is None:
        return
    handler = _Stderr()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(Json() if form == "json" else text)
    _PACKAGE.addHandler(handler)
    _PACKAGE.setLevel(LEVELS[level])
    _PACKAGE.propagate = False


class _Stderr(logging.StreamHandler):
    """Ours, to be told from a handler that the user has put there."""


def _chosen(environment: Mapping[str, str], variable: str, choices: tuple[str, ...]) -> str | None:
    """The value of a variable, in small letters; None where it is not set, or empty."""
    value = environment.get(variable, "")
    if value and value.lower() not in choices:
        raise ValueError(
            f"gq_horovod: the environment variable {variable} must be {one_of(choices)}, got "
            f"{value!r}; unset it for the default."
        )
    return value.lower() or None


class Rarely:
    """Counts what may happen in every step, and picks the first, the 10th, the 100th ... time."""

    def __init__(self) -> None:
        self._count = 0
        self._next = 1

    def count(self) -> int | None:
        """Count one; how many there were if it is time to say so, else None."""
        self._count += 1
        if self._count < self._next:
            return None
        self._next *= 10
        return self._count


class Census:
    """The tensors of the first step: one line for each at DEBUG, one for all of them at INFO.

    The step is over where a tensor comes by again, or where all of it have been seen. Some steps
    later a line at INFO says how long they took, if the same tensors have come by until then.
    """

    # Steps that are timed; before them connections and caches are made.
    WARM_UP, TIMED = 3, 10

    def __init__(
        self, log: Log, function: str, patterns: Sequence[str] = (), timed: bool = True
    ) -> None:
        """Begin.

        Arguments:
            function: what the text names.
            patterns: of names that rules are for.
            timed: whether steps are timed; not where the first ones differ from the others.
        """
        self._patterns = dict.fromkeys(patterns, False)  # and whether a name has matched
        self._first = ""  # the first name
        self._log = log
        self._function = function
        self._seen: set[str] = set()
        self._summed_up = False
        # When steps began, in seconds: when their first tensor came. None: no more.
        self._begins: list[float] | None = [] if timed else None
        self._leader: tuple[str, int] | None = None  # that tensor
        self._later = 0  # tensors seen since the first step
        self._timing = threading.Lock()
        self._compressed: list[int] = []  # elements
        self._left: dict[str, list[tuple[str, int]]] = {}  # names and elements, by reason
        # Bytes that a rank sends for all tensors, as they are and without compression; None where
        # that is not known of one of them.
        self._sent: float | None = 0.0
        self._plain: float | None = 0.0

    @property
    def wanted(self) -> bool:
        """Whether to call see(); all that a step costs where nobody asks."""
        if self._summed_up:
            timing = self._begins is not None and self._log.on(logging.INFO)
            return timing or self._log.on(logging.DEBUG)
        return self._log.on(logging.WARNING if self._patterns else logging.INFO)

    def see(
        self,
        name: str,
        elements: int | None,
        dtype: str,
        *,
        reason: str | None = None,
        wire_bytes: float | None = None,
        plain_bytes: float | None = None,
        expected: int | None = None,
        label: str | None = None,
        owner: object = None,
    ) -> None:
        """Note a tensor that is about to be reduced.

        Arguments:
            name, elements, dtype: of the tensor; None for a size that is not known yet.
            reason: why it is left to Horovod, in words; None: it is compressed.
            wire_bytes: that this rank sends for it, if that is known.
            plain_bytes: the same without compression.
            expected: tensors of the whole step, if that is known.
            label: what rules know it by, if that is another name.
            owner: an optimizer, of which several may have tensors of one name.
        """
        with self._timing:
            self._time((name, id(owner)))
        if name in self._seen:
            self._sum_up()
            return
        if self._summed_up and not self._log.on(logging.DEBUG):
            return
        self._seen.add(name)
        way = f"left to Horovod, because it has {reason}" if reason else "compressed"
        sent = "" if wire_bytes is None else f", {wire_bytes:.0f} bytes sent by a rank"
        count = "an unknown number of" if elements is None else elements
        self._log.say(
            logging.DEBUG,
            "tensor",
            f"{self._function}: tensor {name!r}, {count} elements of {dtype}: {way}{sent}",
            function=self._function,
            tensor=name,
            elements=elements,
            dtype=dtype,
            compressed=reason is None,
            reason=reason,
            wire_bytes=wire_bytes,
        )
        if self._summed_up:
            return
        label = name if label is None else label
        self._first = self._first or label
        for pattern in self._patterns:
            self._patterns[pattern] |= fnmatchcase(label, pattern)
        self._sent = _plus(self._sent, wire_bytes)
        self._plain = _plus(self._plain, plain_bytes)
        if reason is None:
            self._compressed.append(elements or 0)
        else:
            self._left.setdefault(reason, []).append((name, elements or 0))
        if expected is not None and len(self._seen) >= expected:
            self._sum_up()

    def _time(self, tensor: tuple[str, int]) -> None:
        """Count the steps by their first tensor, and say how long they took."""
        if self._begins is None:
            return
        if self._leader is None:
            self._leader = tensor
        if self._summed_up:
            self._later += 1
        if tensor == self._leader:
            self._begins.append(time.perf_counter())
        steps = len(self._begins) - 1
        if steps < self.WARM_UP + self.TIMED:
            # A program whose tensors always have new names has no steps that could be told apart.
            if self._later > 2 * (self.WARM_UP + self.TIMED) * len(self._seen):
                self._begins = None
            return
        taken = [after - before for before, after in itertools.pairwise(self._begins)]
        taken = sorted(taken[self.WARM_UP :])
        self._begins = None
        middle = statistics.median(taken)
        self._log.say(
            logging.INFO,
            "steps",
            f"{self._function}: a step takes {1e3 * middle:.3g} ms, the median of {self.TIMED} "
            f"after the first {self.WARM_UP} ({1e3 * taken[0]:.3g} to {1e3 * taken[-1]:.3g} ms)",
            function=self._function,
            seconds=middle,
            fastest=taken[0],
            slowest=taken[-1],
            steps=self.TIMED,
        )

    def _sum_up(self) -> None:
        if self._summed_up:
            return
        self._summed_up = True
        unused = [own for own, matched in self._patterns.items() if not matched]
        if unused:
            self._log.say(
                logging.WARNING,
                "rules",
                f"{self._function}: no tensor of the first step has a name that these patterns of "
                f"rules match: {unused}; the first name is {self._first!r}",
                function=self._function,
                patterns=unused,
                first=self._first,
            )
        left = [elements for members in self._left.values() for _, elements in members]
        compressed = sum(self._compressed)
        reasons = "; ".join(
            f"{len(members)} {'have' if len(members) > 1 else 'has'} {reason} "
            f"({sum(elements for _, elements in members)} elements, the first is {members[0][0]!r})"
            for reason, members in self._left.items()
        )
        bytes_sent = ""
        if self._sent is not None and self._plain is not None:
            bytes_sent = (
                f"; a rank sends {self._sent / 1e6:.3g} MB a step, and would send "
                f"{self._plain / 1e6:.3g} MB without compression"
            )
        self._log.say(
            logging.INFO,
            "tensors",
            f"{self._function}: the first step compressed {len(self._compressed)} tensors with "
            f"{compressed} elements, and left {len(left)} to Horovod"
            f"{f': {reasons}' if reasons else ''}{bytes_sent}",
            function=self._function,
            compressed=len(self._compressed),
            compressed_elements=compressed,
            left=len(left),
            left_elements=sum(left),
            wire_bytes=self._sent,
            plain_bytes=self._plain,
            reasons={reason: len(members) for reason, members in self._left.items()},
        )


def _plus(total: float | None, more: float | None) -> float | None:
    """The sum; None where one of both is not known."""
    return None if total is None or more is None else total + more
