"""Compiled device code on disk: what one process has compiled, others of its user take from there.

Compiling takes seconds, in each process of a job. Files are named by all that code depends on, and
appear whole or not at all, so any number of processes may use a folder at once. A folder that
cannot be used costs time, and is no error.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

# Where the files lie; empty: nowhere.
VARIABLE = "GQ_HOROVOD_KERNEL_CACHE"

_DIGEST_BYTES = 32
_log = logging.getLogger(__name__)


def folder() -> Path | None:
    """Where compiled code is kept; None: nowhere."""
    chosen = os.environ.get(VARIABLE)
    if chosen is not None:
        return Path(chosen) if chosen else None
    base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(base) / "gq-horovod" / "kernels"


def cached(parts: Sequence[str], compiled: Callable[[], bytes]) -> bytes:
    """The code that `parts`, in their order, stand for; `compiled` makes it where it is not kept.

    Raises what `compiled` raises.
    """
    try:
        own = folder()
    except RuntimeError as error:  # a user without a home
        _log.info("compiled kernels cannot be kept: %s; set %s", error, VARIABLE)
        own = None
    if own is None:
        return compiled()
    lengths = ",".join(str(len(part)) for part in parts)
    path = own / hashlib.sha256("\0".join([lengths, *parts]).encode()).hexdigest()
    code = _read(path)
    if code is None:
        code = compiled()
        _write(path, code)
    return code


def _read(path: Path) -> bytes | None:
    """The code in a file; None where there is none, or not all of it."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.info("compiled kernels cannot be read from %s: %s", path.parent, error)
        return None
    digest, code = found[:_DIGEST_BYTES], found[_DIGEST_BYTES:]
    return code if digest == hashlib.sha256(code).digest() else None


def _write(path: Path, code: bytes) -> None:
    temporary = None
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except OSError as error:
        _log.info(
            "compiled kernels cannot be kept in %s: %s; every process compiles them, unless %s "
            "names a folder that can be written",
            *(path.parent, error, VARIABLE),
        )
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
