"""Whether all ranks run the same configuration: checked once, before the first gradient moves."""

from __future__ import annotations

import logging
import time
from typing import Any

from numpy.typing import NDArray

from mpi_ops.agreement import decode, encode, require_same
from mpi_ops.kernels import host

from . import __version__
from .config import Config, ConfigMismatchError
from .log import Log
from .pipeline import Handle

__all__ = ["decode", "describe", "encode", "require_same", "wait"]

_log = Log(__name__)

_POLL_SECONDS = 1e-3
# Before the first word about a wait; from then on after twice as long each time.
WARN_SECONDS = 30.0
# Ranks may be minutes apart at the first step (data loading, compilation); for ever is a bug.
TIMEOUT_SECONDS = 600.0


def describe(config: Config) -> dict[str, Any]:
    """What has to be the same on every rank of any framework: the software, and the options."""
    software = {"gq-horovod version": __version__, "kernels": host.fingerprint()}
    return {**software, "compression": config.FUNCTION, **config.describe()}


def wait(handle: Handle, function: str = "GlobalQSGD") -> NDArray[Any]:
    """The gathered descriptions; raises instead of waiting for ever."""
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
        time.sleep(_POLL_SECONDS)
    return handle.wait()
